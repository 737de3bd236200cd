"""Opening Dagster's instance when its database accepts connections and never answers."""

import os
from pathlib import Path

import pytest
import yaml
from tests.support.query_counter import by_way_of, target
from tests.support.tcp_proxy import tcp_proxy

from dagster_taskiq.cli.explain import explain
from dagster_taskiq.dagster_compat.instance import open_instance

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres, pytest.mark.timeout(60)]


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
