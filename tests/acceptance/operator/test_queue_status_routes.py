"""`queue status` by route: which ones it shows, and what it says of those that nobody serves."""

import json

import pytest
from dagster import DagsterRunStatus
from dagster._core.test_utils import create_run_for_test
from tests.acceptance.conftest import open_platform
from tests.support.moto import sqs_client
from tests.support.platform import Platform

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import ROUTE_TAG

pytestmark = pytest.mark.acceptance


def routes_of(platform: Platform, *arguments: str) -> list[str]:
    listed = json.loads(platform.command("queue", "status", "--json", *arguments).stdout)
    return [one["route"] for one in listed if one["role"] == "work"]


def test_all_routes_in_use_are_shown_and_what_waits_for_nobody_is_said(endpoint: str) -> None:
    with open_platform(
        endpoint, source={"routes": [{"route": "ruled", "job": "x"}], "visibility_timeout_seconds": 1_200}
    ) as platform:
        assert routes_of(platform) == ["default", "ruled"]
        refused = platform.command("queue", "status")
        assert refused.returncode == 1
        assert "route 'ruled' does not exist; routes that exist: default; create it with" in refused.stderr
        for route in ("ruled", "listed", "served"):
            assert platform.command("queue", "create", "--route", route).returncode == 0
        name = queue_name(platform.queue_url)
        facts = {"slots": [1, 4], "routes": ["served", "default"], "queue": name}
        Heartbeats(platform.instance, 6, 4).beat("w", facts)
        for _ in range(2):
            create_run_for_test(platform.instance, status=DagsterRunStatus.STARTING, tags={ROUTE_TAG: "ruled"})
        url = sqs_client(endpoint).get_queue_url(QueueName=f"{name}-listed-steps")["QueueUrl"]
        sqs_client(endpoint).send_message(QueueUrl=url, MessageBody="a step")
        shown = platform.command("queue", "status")
        assert shown.returncode == 0, shown
        assert routes_of(platform) == ["default", "listed", "ruled", "served"]
        said = " ".join(shown.stdout.split())
        start = "is alive; start one with `dagster-taskiq worker start -q"
        assert "route ruled: 2 runs wait, the oldest for " in said
        assert f"no worker of route ruled that takes runs {start} ruled`" in said
        assert (
            f"1 step waits in {name}-listed-steps: no worker of route listed that takes steps {start} listed`" in said
        )
        assert routes_of(platform, "--route", "served") == ["served"]
        listed = platform.command("worker", "list")
        assert "route ruled: 2 runs wait" in " ".join(listed.stdout.split()), listed
