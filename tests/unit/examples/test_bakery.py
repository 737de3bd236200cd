"""The bakery keeps its books, and its automation launches what it says."""

import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from dagster_taskiq.examples.bakery.assets import DAYS, receipts, report, sales, takings
from dagster_taskiq.examples.bakery.automation import every_minute, inbox
from dagster_taskiq.examples.bakery.definitions import defs
from dagster_taskiq.examples.bakery.files import Files
from dagster_taskiq.examples.bakery.tills import PAGES, RECEIPTS_PER_PAGE, SHOPS

DAY = "2025-01-07"
AT_ONCE = {"ops": {step: {"config": {"seconds": 0}} for step in ("receipts", "sales")}}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        yield instance


def enter(instance: dg.DagsterInstance) -> None:
    done = dg.materialize(
        [receipts, sales, report],
        partition_key=DAY,
        instance=instance,
        resources={"files": Files()},
        run_config=AT_ONCE,
    )
    assert done.success


def test_a_day_goes_from_the_tills_to_its_report(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    enter(instance)
    enter(instance)  # replaces the day
    rows = takings(tmp_path / "bakery" / "books" / f"{DAY}.sqlite")
    assert [shop for shop, _, _ in rows] == sorted(SHOPS)
    assert sum(number for _, number, _ in rows) == PAGES * RECEIPTS_PER_PAGE
    assert "| Market | 500 |" in (tmp_path / "bakery" / "reports" / f"{DAY}.md").read_text()
    assert [path.name for path in (tmp_path / "bakery" / "receipts").iterdir()] == [f"{DAY}.csv"]


def tick(instance: dg.DagsterInstance) -> tuple[list[tuple[str | None, str | None]], str | None]:
    with dg.build_sensor_context(instance=instance, definitions=defs, resources={"files": Files()}) as context:
        told = inbox.evaluate_tick(context)
    return [(request.run_key, request.partition_key) for request in told.run_requests or []], told.skip_message


def test_the_sensor_has_a_day_entered_again_for_each_file(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    requests, said = tick(instance)
    assert requests == []
    assert f"> {tmp_path}/bakery/inbox/{DAY}.csv" in str(said), "what one has to do, ready to be pasted"
    file = tmp_path / "bakery" / "inbox" / f"{DAY}.csv"
    file.write_text("Market,pretzel,10,1100\n")
    ((key, day),), said = tick(instance)
    assert (day, said) == (DAY, None)
    assert tick(instance)[0] == [(key, day)], "the same key: Dagster launches it once"
    enter(instance)
    assert ("Market", 501) in [row[:2] for row in takings(tmp_path / "bakery" / "books" / f"{DAY}.sqlite")]


def test_the_schedule_launches_the_audit(instance: dg.DagsterInstance) -> None:
    assert every_minute.job_name == "audit"
    with dg.build_schedule_context(instance=instance) as context:
        assert len(every_minute.evaluate_tick(context).run_requests or []) == 1


def test_all_of_it_can_be_served() -> None:
    dg.Definitions.validate_loadable(defs)
    assert len(DAYS.get_partition_keys()) == 31
    assert {job.name for job in defs.resolve_all_job_defs()} >= {"day", "books", "audit", "bake"}


def test_it_is_a_project_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has it: under its own name, not ours."""
    folder = Path(__file__).parents[3] / "examples" / "bakery"
    monkeypatch.syspath_prepend(folder)
    named = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["dagster"]["module_name"]
    before = set(sys.modules)
    own = importlib.import_module(named)
    try:
        assert own.__file__ == str(folder / "bakery" / "definitions.py")
        dg.Definitions.validate_loadable(own.defs)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("bakery"):
                del sys.modules[name]
