"""Each filter finds its runs, and no others: in a real SQLite storage, through the options of the command line."""

import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from dagster import AssetKey, DagsterInstance, DagsterRunStatus
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq.cli.run_filters import run_filters
from dagster_taskiq.errors import QueryError
from dagster_taskiq.run_query import RunQuery, find_runs

STATUS = DagsterRunStatus
PARTITION = "dagster/partition"
RANGE = "dagster/asset_partition_range_"
RUNS: Mapping[str, Mapping[str, object]] = {
    "queued": {"job_name": "load", "status": STATUS.QUEUED, "tags": {"team": "a", "tier": "1"}},
    "starting": {"job_name": "load", "status": STATUS.STARTING, "tags": {"team": "b"}},
    "created": {"job_name": "report", "status": STATUS.NOT_STARTED},
    "started": {"job_name": "report", "status": STATUS.STARTED, "tags": {"team": "a"}, "location": "etl"},
    "canceling": {"job_name": "report", "status": STATUS.CANCELING, "tags": {"dagster/schedule_name": "nightly"}},
    "over": {"job_name": "load", "status": STATUS.SUCCESS, "tags": {"team": "a"}},
    "sensed": {"status": STATUS.STARTED, "tags": {"dagster/sensor_name": "nightly"}},
    "day 1": {"status": STATUS.QUEUED, "tags": {PARTITION: "2026-11-01", "dagster/backfill": "kzux"}},
    "day 2": {"status": STATUS.QUEUED, "tags": {PARTITION: "2026-11-02", "dagster/backfill": "kzux"}},
    "p2": {"status": STATUS.STARTED, "tags": {PARTITION: "p2"}},
    "p10": {"status": STATUS.STARTED, "tags": {PARTITION: "p10"}},
    "two dimensions": {
        "status": STATUS.QUEUED,
        "tags": {PARTITION: "de|2026-11-02", f"{PARTITION}/country": "de", f"{PARTITION}/date": "2026-11-02"},
    },
    "days": {"status": STATUS.STARTED, "tags": {f"{RANGE}start": "2026-10-28", f"{RANGE}end": "2026-11-01"}},
    "assets": {"status": STATUS.QUEUED, "asset_selection": frozenset({AssetKey(["raw", "orders"])})},
}
ON_DAY_1 = {"day 1", "days"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DagsterInstance, Mapping[str, str]]]:
    home: Path = tmp_path_factory.mktemp("home")
    with DagsterInstance.local_temp(str(home)) as instance:
        names = {}
        for name, what in RUNS.items():
            options = dict(what)
            repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(str(options.pop("location", "jobs"))), "r")
            origin = RemoteJobOrigin(repository, "job")
            options.setdefault("job_name", "job")
            names[create_run_for_test(instance, remote_job_origin=origin, **options).run_id] = name  # type: ignore[arg-type]
        (database,) = home.glob("**/runs.db")
        with sqlite3.connect(database) as connection:  # as if it had been created long ago
            connection.execute(
                "UPDATE runs SET create_timestamp = datetime(create_timestamp, '-3 hours') WHERE run_id = ?",
                [next(run_id for run_id, name in names.items() if name == "started")],
            )
        yield instance, names


def query_of(*arguments: str) -> RunQuery:
    """What these options mean."""
    found: list[RunQuery] = []

    @click.command()
    @run_filters
    def command(query: RunQuery) -> None:
        found.append(query)

    result = CliRunner().invoke(command, list(arguments))
    if result.exit_code:
        raise click.ClickException(result.stderr)
    return found[0]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--job", "load"], {"queued", "starting", "over"}),
        (["--job", "loa"], set()),
        (["--tag", "team=a"], {"queued", "started", "over"}),
        (["--tag", "team"], {"queued", "starting", "started", "over"}),
        (["--tag", "team=a", "--tag", "team=b", "--job", "load"], {"queued", "starting", "over"}),
        (["--tag", "team=a", "--tag", "tier=1"], {"queued"}),
        (["--status", "starting"], {"starting", "created"}),
        (["--status", "CANCELING", "--status", "success"], {"canceling", "over"}),
        (["--status", "waiting", "--tag", "team"], {"queued"}),
        (["--schedule", "nightly"], {"canceling"}),
        (["--sensor", "nightly"], {"sensed"}),
        (["--backfill", "kzux"], {"day 1", "day 2"}),
        (["--partition", "2026-11-01"], ON_DAY_1),
        (["--partition", "2026-10-30"], {"days"}),
        (["--partition", "date=2026-11-02"], {"two dimensions"}),
        (["--partition", "de|2026-11-02"], {"two dimensions"}),
        (["--partition-range", "2026-11-01..2026-11-30"], {"day 1", "day 2", "days"}),
        (["--partition-range", "2026-11-02..2026-11-30"], {"day 2"}),
        (["--partition-range", "p2..p10"], {"p2", "p10"}),
        (["--partition-range", "p3..p10"], {"p10"}),
        (["--partition-range", "date=2026-11-01..2026-11-05"], {"two dimensions"}),
        (["--partition-range", "date=2026-11-03..date=2026-11-05"], set()),
        (["--partition-range", "..2026-10-28"], {"days"}),
        (["--code-location", "etl"], {"started"}),
        (["--older-than", "2h30m"], {"started"}),
        (["--older-than", "4h"], set()),
        (["--where", "'raw/orders' in assets"], {"assets"}),
        (["--where", "age > hours(2) and location == 'etl'", "--tag", "team=a"], {"started"}),
        (["--where", "sensor == 'nightly' or backfill == 'kzux' and partition > '2026-11-01'"], {"sensed", "day 2"}),
        ([], set(RUNS)),
    ],
)
def test_a_filter_finds_its_runs(
    world: tuple[DagsterInstance, Mapping[str, str]], arguments: list[str], found: set[str]
) -> None:
    instance, names = world
    query = query_of(*arguments)
    assert {names[record.dagster_run.run_id] for record in find_runs(instance, query)} == found
    newest = [names[record.dagster_run.run_id] for record in find_runs(instance, query, newest_first=True, limit=2)]
    assert newest == [name for name in reversed(list(RUNS)) if name in found][:2]


def test_the_run_that_an_expression_cannot_be_asked_of_is_named(
    world: tuple[DagsterInstance, Mapping[str, str]],
) -> None:
    instance, names = world
    with pytest.raises(QueryError, match=r"could not convert string to float: 'a'; of run (\S+)$") as raised:
        list(find_runs(instance, query_of("--where", "number(tags['team']) > 1")))
    assert names[str(raised.value).split()[-1]] == "queued"


def test_more_runs_than_a_page(
    world: tuple[DagsterInstance, Mapping[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    instance, names = world
    monkeypatch.setattr("dagster_taskiq.run_query.PAGE", 3)
    found = [names[record.dagster_run.run_id] for record in find_runs(instance, query_of("--where", "job != 'load'"))]
    assert found == [name for name, what in RUNS.items() if what.get("job_name") != "load"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--schedule", "a", "--sensor", "b"], "launched by one schedule, sensor or backfill; give one of them"),
        (["--partition", "a", "--partition-range", "a..b"], "exclude each other"),
        (["--partition-range", "p10..p2"], "the range of partitions p10..p2 is empty: its end is before its beginning"),
        (["--partition-range", "date=2026-11-02..2026-11-01"], "is empty"),
        (["--partition-range", "p1-p2"], "is no range; give FIRST..LAST"),
        (["--older-than", "2"], "'2' is no duration; give a number and a unit: 90s, 15m, 2h, 3d"),
        (["--older-than", "2h x"], "is no duration"),
        (["--older-than", "9" * 400 + "d"], "is longer than ten years"),
        (["--status", "sleeping"], "there is no status 'sleeping'; there are waiting, starting, running, canceling"),
        (["--tag", "=a"], "has no key; give KEY=VALUE"),
        (["--job", ""], "it is empty; give a value, or leave the option out"),
        (["--where", "jbo == 1"], "--where, character 1 ('jbo == 1'): there is no jbo"),
    ],
)
def test_what_can_mean_no_run_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(click.ClickException) as raised:
        query_of(*arguments)
    assert said in " ".join(raised.value.message.split())
