"""Which errors the command line puts into one line, and which it leaves their traceback."""

import pytest
import yaml
from dagster import DagsterInvariantViolationError
from sqlalchemy.exc import OperationalError

from dagster_taskiq.cli.explain import explain
from dagster_taskiq.errors import QueueMissing, QueueUnreachable


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (QueueMissing("q: no such queue;\n  create it"), "q: no such queue; create it"),
        (ExceptionGroup("helpers", [QueueMissing("a"), QueueUnreachable("b"), QueueMissing("a")]), "a; b"),
        (yaml.YAMLError("line 2"), "not readable as YAML: line 2"),
        (DagsterInvariantViolationError("not so"), "not so"),
        (PermissionError(13, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'"),
        (
            OperationalError("SELECT secret", {"password": "s3cret"}, Exception("connection refused")),
            "Dagster's database does not answer, see storage in $DAGSTER_HOME/dagster.yaml: connection refused",
        ),
        (ZeroDivisionError(), None),
        (ExceptionGroup("helpers", [QueueMissing("a"), ZeroDivisionError()]), None),
    ],
)
def test_an_error_is_explained_in_one_line_or_not_at_all(error: Exception, said: str | None) -> None:
    assert explain(error) == said


def test_the_cause_is_told_and_an_endless_text_is_cut() -> None:
    outer = OSError("cannot start")
    outer.__cause__ = ValueError("x" * 10_000)
    told = explain(outer)
    assert told is not None
    assert told.startswith("cannot start: xxx")
    assert len(told) == 600
