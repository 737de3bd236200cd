"""The options by which `run cancel` and `run list` say which runs are meant. Dagster is imported when they are read."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from dagster_taskiq._text import clean_text

if TYPE_CHECKING:
    from dagster_taskiq.run_query import RunQuery

Command = TypeVar("Command", bound=Callable[..., Any])

STATUSES: Final[Mapping[str, tuple[str, ...]]] = {
    "waiting": ("QUEUED",),
    "starting": ("NOT_STARTED", "STARTING"),
    "running": ("STARTED",),
    "canceling": ("CANCELING",),
    "success": ("SUCCESS",),
    "failure": ("FAILURE",),
    "canceled": ("CANCELED",),
    **{name.lower(): (name,) for name in ("QUEUED", "NOT_STARTED", "STARTED", "MANAGED")},
}
"""What `--status` takes: our words, and Dagster's, as Dagster's. "starting" is both of Dagster's before the start."""
_LONGEST_S: Final = 10 * 366 * 86_400.0
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class Refused(click.ClickException):
    """It is not clear which runs are meant. One line, exit code 2; nothing was done."""

    exit_code = 2


def duration(value: str) -> float:
    """A time like `90s`, `15m`, `2h`, `3d` or `1h30m`, as the type of an option: in seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value)
    if not parts or "".join(number + unit for number, unit in parts) != value:
        raise click.BadParameter(f"{clean_text(value)!r} is no duration; give a number and a unit: 90s, 15m, 2h, 3d")
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if seconds > _LONGEST_S:
        raise click.BadParameter(f"{clean_text(value)[:40]!r} is longer than ten years")
    return seconds


def text(value: str) -> str:
    """A text with something in it, as the type of an option: `--job "$JOB"` without a JOB must not mean any job."""
    if not value.strip():
        raise click.BadParameter("it is empty; give a value, or leave the option out")
    return value


def _statuses(value: str) -> tuple[str, ...]:
    if value.lower() not in STATUSES:
        known = ", ".join(list(STATUSES)[:7])
        raise click.BadParameter(f"there is no status {clean_text(value)!r}; there are {known}, and Dagster's own")
    return STATUSES[value.lower()]


def _tag(value: str) -> tuple[str, str | None]:
    key, is_pair, wanted = value.partition("=")
    if not key:
        raise click.BadParameter(f"{clean_text(value)!r} has no key; give KEY=VALUE, or KEY for any value")
    return key, wanted if is_pair else None


def _range(value: str) -> tuple[str, str]:
    first, dots, last = value.partition("..")
    if not dots or not (first or last):
        raise click.BadParameter(f"{clean_text(value)!r} is no range; give FIRST..LAST, both included")
    return first, last


_OPTIONS: Final = (
    click.option("--job", type=text, metavar="JOB", help="Runs of this job."),
    click.option(
        "--tag",
        "tags",
        type=_tag,
        multiple=True,
        metavar="KEY=VALUE",
        help="Runs with this tag; KEY alone: with any value. Several keys: with all of them. One key several times:"
        " with one of these values.",
    ),
    click.option(
        "--status",
        "statuses",
        type=_statuses,
        multiple=True,
        metavar="STATUS",
        help="waiting (in Dagster's queue), starting, running, canceling; or Dagster's name. Several: one of them.",
    ),
    click.option("--schedule", type=text, metavar="NAME", help="Runs that this schedule has launched."),
    click.option("--sensor", type=text, metavar="NAME", help="Runs that this sensor has launched."),
    click.option("--backfill", type=text, metavar="ID", help="Runs of this backfill."),
    click.option(
        "--partition",
        type=text,
        metavar="KEY",
        help="Runs of this partition, and runs of a range with it. Of one dimension: DIMENSION=KEY.",
    ),
    click.option(
        "--partition-range",
        type=_range,
        metavar="FIRST..LAST",
        help="Runs of these partitions, both included, or of a range that overlaps. The order is that of the text, with"
        " numbers by their value (p2 before p10), which is the calendar's for dates. One side may be left out.",
    ),
    click.option("--code-location", "location", type=text, metavar="NAME", help="Runs of this code location."),
    click.option(
        "--older-than", "older_than_s", type=duration, metavar="TIME", help="Created that long ago: 90s, 15m, 2h, 3d."
    ),
    click.option(
        "--where",
        metavar="EXPR",
        help="Runs of which this is true: \"job.startswith('load') and age > hours(2)\". It may use run_id, job, status"
        " (Dagster's name, 'STARTED'), tags['key'] (empty without that tag), partition, age (seconds since it was"
        " created), location, assets (a list), schedule, sensor, backfill; and, or, not, in, == and the like,"
        " + - * /, .startswith(), .endswith(), .lower(), .upper(), minutes(), hours(), days(), number(), len().",
    ),
)


def run_filters(command: Command) -> Command:
    """The options of a `RunQuery`, passed as `query`. One that cannot be is `Refused`, exit code 2."""

    @functools.wraps(command)
    def with_query(*args: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in _NAMES}
        return command(*args, query=_query(given), **options)

    for option in reversed(_OPTIONS):
        option(with_query)
    return cast("Command", with_query)


_NAMES: Final = (
    "job", "tags", "statuses", "schedule", "sensor", "backfill", "partition", "partition_range", "location",
    "older_than_s", "where",
)  # fmt: skip


def _query(given: dict[str, Any]) -> "RunQuery":
    from dagster import DagsterRunStatus

    from dagster_taskiq.errors import QueryError
    from dagster_taskiq.run_query import RunQuery

    names = dict.fromkeys(name for names in given.pop("statuses") for name in names)
    try:
        return RunQuery(**given, statuses=tuple(map(DagsterRunStatus, names)))
    except QueryError as error:
        raise Refused(str(error)) from error
