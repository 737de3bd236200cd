"""Which exceptions a person can fix, and what the command line prints for them: one line each.

Errors only; `run explain`, the life of a run, is in `run_explain`.
"""

from dagster_taskiq._text import one_line
from dagster_taskiq.errors import DagsterTaskiqError

_LONGEST = 600
_NO_HOME = "DAGSTER_HOME is not set"


def explain(error: BaseException) -> str | None:
    """One line that says what is wrong and what to do; None for an unexpected error."""
    if isinstance(error, BaseExceptionGroup):
        parts = [explain(part) for part in error.exceptions]
        known = [part for part in parts if part is not None]
        return "; ".join(dict.fromkeys(known)) if len(known) == len(parts) else None
    if isinstance(error, DagsterTaskiqError):
        return _one_line(str(error))
    return _explain_others(error)


def _explain_others(error: BaseException) -> str | None:
    """Errors of Dagster and its libraries, which are imported here: ours are said at once."""
    import yaml
    from dagster import DagsterError, DagsterInvalidConfigError
    from sqlalchemy.exc import SQLAlchemyError

    from dagster_taskiq.dagster_compat.storage import outages, with_causes

    if isinstance(error, DagsterInvalidConfigError):
        # Dagster's list of what it expected is its whole schema, hundreds of keys.
        return _one_line("; ".join(problem.message.split(' Expected: "{')[0] for problem in error.errors))
    if _NO_HOME in str(error):
        return (
            "DAGSTER_HOME is not set: set it to the absolute path of the folder with dagster.yaml,"
            " the same that the Dagster webserver and daemon use"
        )
    if isinstance(error, yaml.YAMLError):
        return _one_line(f"not readable as YAML: {error}")
    if isinstance(error, (SQLAlchemyError, *outages())) and not isinstance(error, OSError):  # a `TimeoutError` is any
        return _one_line(
            "Dagster's database does not answer, see storage in $DAGSTER_HOME/dagster.yaml: " + with_causes(error)
        )
    if isinstance(error, DagsterError | OSError | ImportError):
        return _one_line(with_causes(error))
    return None


def _one_line(text: str) -> str:
    return one_line(text, _LONGEST)
