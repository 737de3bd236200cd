"""Both of Dagster's ways of naming a PostgreSQL database work with what the extra `postgres` installs."""

import urllib.parse
from typing import Any

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres]


def storage(url: str, form: str) -> dict[str, Any]:
    """The section of `dagster.yaml`; the driver is named nowhere."""
    parts = urllib.parse.urlsplit(url)
    if form == "postgres_url":
        return {"postgres_url": parts._replace(scheme="postgresql").geturl()}
    user, password = parts.username or "", parts.password or ""
    at = {"hostname": parts.hostname, "port": parts.port or 5432, "db_name": parts.path.strip("/")}
    return {"postgres_db": {"username": user, "password": password, **at}}


@pytest.mark.parametrize("form", ["postgres_db", "postgres_url"])
def test_a_worker_runs_what_the_launcher_has_sent(endpoint: str, postgres: str, form: str) -> None:
    with (
        open_platform(endpoint, extra={"storage": {"postgres": storage(postgres, form)}}) as platform,
        platform.worker("-n", "w"),
    ):
        run = platform.launch("quick_job")
        assert platform.finished(run) is DagsterRunStatus.SUCCESS
