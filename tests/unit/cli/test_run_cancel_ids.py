"""`run cancel` with many ids: when everything has to stop, nobody waits for one query for each of them."""

from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test
from sqlalchemy import event
from sqlalchemy.engine import Engine

from dagster_taskiq.cli.run_cancel_do import Cancel, Options

DRY_RUN = Options(
    everything=False,
    reason=None,
    requested_by=None,
    stop_source=False,
    dry_run=True,
    yes=False,
    wait=False,
    timeout_s=None,
    until_s=None,
    per_second=None,
    as_json=False,
)


def test_whole_ids_are_found_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def ask(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        ids = [create_run_for_test(instance, status=DagsterRunStatus.STARTING).run_id for _ in range(30)]
        event.listen(Engine, "before_cursor_execute", ask)
        try:
            code = Cancel(instance, DRY_RUN).ids([*ids, ids[0], "00000000-not-there"])
        finally:
            event.remove(Engine, "before_cursor_execute", ask)
    said = capsys.readouterr()
    assert (code, said.err.splitlines()) == (1, [said.err.strip()])
    assert "00000000-not-there: there is no run" in said.err
    assert "30 are starting" in said.out
    about_runs = [statement for statement in asked if "FROM runs" in statement]
    assert 0 < len(about_runs) < 10, about_runs
