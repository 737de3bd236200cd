"""Opening Dagster's instance when its database accepts connections and never answers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.support.query_counter import by_way_of, target
from tests.support.tcp_proxy import tcp_proxy

from dagster_taskiq.cli.explain import explain
from dagster_taskiq.dagster_compat.instance import open_instance
from dagster_taskiq.errors import DriverMissing
from dagster_taskiq.runs import cancel_run, clean_up_run

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres, pytest.mark.timeout(60)]


RUN_ID = "00000000-0000-0000-0000-000000000000"
OPENERS: tuple[Callable[[], object], ...] = (open_instance, lambda: cancel_run(RUN_ID), lambda: clean_up_run(RUN_ID))


def test_it_fails_in_one_line_and_does_not_hang(postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_taskiq.dagster_compat.instance._CONNECT_S", "2")  # the least that libpq takes
    monkeypatch.delenv("PGCONNECT_TIMEOUT", raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with tcp_proxy(*target(postgres)) as proxy:
        proxy.swallow()
        url = by_way_of(postgres, proxy)
        (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"storage": {"postgres": {"postgres_url": url}}}))
        with pytest.raises(Exception, match="too many retries") as failed:
            open_instance()
    said = explain(failed.value)
    assert said is not None
    assert said.startswith("Dagster's database does not answer")
    assert "PGCONNECT_TIMEOUT" not in os.environ, "users' code has what it had"


@pytest.mark.parametrize("opens", OPENERS, ids=["open_instance", "cancel_run", "clean_up_run"])
def test_without_the_driver_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: Callable[[], object]
) -> None:
    """All of them open it by `open_instance`, so they have the bound above, too."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    url = "postgresql+psycopg://ada:s3cret@127.0.0.1:5432/dagster"
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"storage": {"postgres": {"postgres_url": url}}}))
    with pytest.raises(DriverMissing, match=r"install dagster-taskiq\[postgres\]") as failed:
        opens()
    assert "s3cret" not in str(failed.value)
