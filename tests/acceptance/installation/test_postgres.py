"""Both of Dagster's ways of naming a PostgreSQL database work with what the extra `postgres` installs."""

import re
import urllib.parse
from typing import Any

import pytest
import yaml
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.acceptance.installation.conftest import ROOT

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres]

PAGE = (ROOT / "docs" / "installation.md").read_text()
PASSWORD = "DB_PASSWORD"


def shown() -> dict[str, dict[str, Any]]:
    """What the page has under `storage: postgres:`, by the form of it."""
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
    forms = [block["storage"]["postgres"] for block in blocks if "postgres" in block["storage"]]
    return {next(iter(form)): form for form in forms}


def here(form: dict[str, Any], url: urllib.parse.SplitResult) -> dict[str, Any]:
    """The same with the address of another database."""
    if "postgres_url" in form:
        return {"postgres_url": url._replace(scheme=form["postgres_url"].partition("://")[0]).geturl()}
    at = {"hostname": url.hostname, "port": url.port or 5432, "username": url.username, "db_name": url.path.strip("/")}
    return {"postgres_db": {key: at.get(key, value) for key, value in form["postgres_db"].items()}}


@pytest.mark.parametrize("form", ["postgres_db", "postgres_url"])
def test_a_worker_runs_what_the_launcher_has_sent(
    endpoint: str, postgres: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = urllib.parse.urlsplit(postgres)
    password = {PASSWORD: url.password or "any: it trusts us"}
    monkeypatch.setenv(PASSWORD, password[PASSWORD])
    storage = {"storage": {"postgres": here(shown()[form], url)}}
    with open_platform(endpoint, extra=storage) as platform, platform.worker("-n", "w", env=password):
        run = platform.launch("quick_job")
        assert platform.finished(run) is DagsterRunStatus.SUCCESS
