"""`dagster-taskiq doctor` finds what was planted, and names the repair; where all is well it says so."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import yaml
from click.testing import CliRunner
from dagster import DagsterInstance, DagsterRunStatus, job, op
from tests.acceptance.operator.test_cli import Desk, Ended
from tests.support.moto import create_queues, sqs_client
from tests.support.proxy import SqsProxy, sqs_proxy

from dagster_taskiq.cli import main
from dagster_taskiq.queue_names import sibling_queue
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import ROUTE_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

COORDINATOR = {"module": "dagster_taskiq.coordinator", "class": "TaskiqRunCoordinator"}
BOUNDED = (
    "?connect_timeout=10&keepalives_idle=5&keepalives_interval=5&keepalives_count=3&tcp_user_timeout=20000"
    "&options=-c%20statement_timeout%3D60000"
)
MONITORING = {"enabled": True, "max_resume_run_attempts": 3, "start_timeout_seconds": 3600}


@dataclass
class Clinic:
    """A healthy platform, into which a mistake is planted; `environ` and `without` are for the command."""

    desk: Desk
    proxy: SqsProxy
    config: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    document: dict[str, Any] = field(
        default_factory=lambda: {"run_monitoring": dict(MONITORING), "run_coordinator": dict(COORDINATOR)}
    )
    environ: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    later_s: float = 0
    """By so much the doctor comes after what happened."""
    worker: dict[str, Any] | None = field(default_factory=lambda: {"slots": [4, 4], "work": []})

    def queue(self, suffix: str = "") -> str:
        return sibling_queue(self.desk.queue_url, suffix)

    def set(self, suffix: str, **attributes: Any) -> None:
        given = {name: str(value) for name, value in attributes.items()}
        sqs_client(self.desk.endpoint_url).set_queue_attributes(QueueUrl=self.queue(suffix), Attributes=given)

    def redrive(self, suffix: str, most: int) -> None:
        sqs = sqs_client(self.desk.endpoint_url)
        dead = sqs.create_queue(QueueName=f"dead-{uuid4()}")["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        self.set(suffix, RedrivePolicy=json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": most}))

    def send(self, suffix: str, many: int) -> None:
        for number in range(many):
            sqs_client(self.desk.endpoint_url).send_message(QueueUrl=self.queue(suffix), MessageBody=f"{number}")

    def settings(self) -> Settings:
        return Settings(queue_url=self.desk.queue_url, region_name="us-east-1")

    def write(self) -> None:
        whole = {
            "queue_url": self.desk.queue_url,
            "region_name": "us-east-1",
            "endpoint_url": self.proxy.url,
            **self.config,
            "config_source": self.source,
        }
        launcher = {"module": "dagster_taskiq.launcher", "class": "TaskiqRunLauncher", "config": whole}
        self.desk.write("dagster.yaml", {"run_launcher": launcher, "telemetry": {"enabled": False}, **self.document})

    def beat(self) -> None:
        if self.worker is not None:
            facts = dict(self.worker)
            ago = facts.pop("ago", 0)
            with self.instance() as instance:
                beating = Heartbeats(instance, 15, 10, clock=lambda: time.time() - ago)
                beating.beat("w-1", {"since": time.time() - 100, "where": "here", **facts})

    def instance(self) -> DagsterInstance:
        return DagsterInstance.from_config(str(self.desk.home))

    def examined(self) -> tuple[Ended, list[dict[str, str]]]:
        now = time.time

        def later() -> float:
            return now() + self.later_s

        with mock.patch("dagster_taskiq.doctor.checks.time.time", later):
            return self._examined()

    def _examined(self) -> tuple[Ended, list[dict[str, str]]]:
        ended = self.desk.ask("doctor", "--json", without=self.without, **self.environ)
        return ended, json.loads(ended.out)


@pytest.fixture
def clinic(tmp_path: Path, endpoint: str) -> Iterator[Clinic]:
    with sqs_proxy(endpoint) as proxy:
        clinic = Clinic(Desk(tmp_path, endpoint, create_queues(endpoint, f"tasks-{uuid4()}")), proxy)
        clinic.set("-cancels", MessageRetentionPeriod=600)
        yield clinic


def no_home(at: Clinic) -> None:
    at.without = ("DAGSTER_HOME",)


def home_that_is_not_there(at: Clinic) -> None:
    at.environ["DAGSTER_HOME"] = str(at.desk.home / "nowhere")


def home_without_a_file(at: Clinic) -> None:
    (at.desk.home / "empty").mkdir()
    at.environ["DAGSTER_HOME"] = str(at.desk.home / "empty")


def yaml_that_is_none(at: Clinic) -> None:
    (at.desk.home / "broken").mkdir()
    (at.desk.home / "broken" / "dagster.yaml").write_text("run_launcher: [")
    at.environ["DAGSTER_HOME"] = str(at.desk.home / "broken")


def another_launcher(at: Clinic) -> None:
    at.document["run_launcher"] = {"module": "dagster.core.launcher", "class": "DefaultRunLauncher"}
    at.document["run_monitoring"] = {"enabled": True}


def dagsters_own_run_queue(at: Clinic) -> None:
    del at.document["run_coordinator"]


def a_limit_that_replaces_ours(at: Clinic) -> None:
    at.document["concurrency"] = {"runs": {"max_concurrent_runs": 25}}


def a_misspelt_setting(at: Clinic) -> None:
    at.source["grace_second"] = 3
    at.worker = None  # with these settings nobody could


def cancellation_off(at: Clinic) -> None:
    at.environ["DAGSTER_TASKIQ_ENABLE_CANCELLATION"] = "0"


def another_region(at: Clinic) -> None:
    at.config["queue_url"] = "https://sqs.eu-west-1.amazonaws.com/123456789012/x"


def no_credentials(at: Clinic) -> None:
    at.without = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def no_endpoint(at: Clinic) -> None:
    at.proxy.away()


def a_route_of_a_rule_has_no_steps_queue(at: Clinic) -> None:
    url = create_queues(at.desk.endpoint_url, f"{at.queue().rpartition('/')[2]}-gpu")
    sqs_client(at.desk.endpoint_url).delete_queue(QueueUrl=f"{url}-steps")
    at.source["routes"] = [{"route": "gpu", "job": "train_*"}]


def a_run_waits_for_a_route_without_queues_and_workers(at: Clinic) -> None:
    at.write()
    with at.instance() as instance:
        instance.create_run_for_job(a_job, status=DagsterRunStatus.STARTING, tags={ROUTE_TAG: "gpu"})


def a_queue_is_missing(suffix: str) -> Callable[[Clinic], None]:
    def plant(at: Clinic) -> None:
        sqs_client(at.desk.endpoint_url).delete_queue(QueueUrl=at.queue(suffix))

    return plant


def forbidden(action: str, queue: str) -> Callable[[Clinic], None]:
    return lambda at: at.proxy.fail_with(403, queue=queue, action=action)


def monitoring(**changes: Any) -> Callable[[Clinic], None]:
    return lambda at: at.document["run_monitoring"].update(changes)


def worker(**facts: Any) -> Callable[[Clinic], None]:
    def plant(at: Clinic) -> None:
        assert at.worker is not None
        at.worker.update(facts)

    return plant


def nobody(at: Clinic) -> None:
    at.worker = None


def only_steps_are_served(at: Clinic) -> None:
    worker(slots=[0, 4])(at)
    at.send("", 1)


@op
def nothing() -> None:
    """Does it."""


@job
def a_job() -> None:
    nothing()


def a_run_that_hangs(at: Clinic) -> None:
    at.write()
    with at.instance() as instance:
        instance.report_run_canceling(instance.create_run_for_job(a_job, status=DagsterRunStatus.STARTED))
    at.later_s = 1_000


def a_message_that_is_gone(at: Clinic) -> None:
    at.write()
    with at.instance() as instance:
        instance.create_run_for_job(a_job, status=DagsterRunStatus.STARTING)
    at.later_s = 1_000
    worker(ago=-1_000)(at)


def work_that_was_lost(at: Clinic) -> None:
    at.write()
    with at.instance() as instance:
        run = instance.create_run_for_job(a_job, status=DagsterRunStatus.STARTED)
    worker(ago=1_000, work=[[run.run_id, None, time.time()]])(at)


MISTAKES: dict[str, tuple[Callable[[Clinic], None], str, str, str]] = {
    # what is planted, and then: the check, its verdict, and what the repair names
    "no home": (no_home, "DAGSTER_HOME", "error", "export DAGSTER_HOME="),
    "no folder": (home_that_is_not_there, "DAGSTER_HOME", "error", "mkdir -p"),
    "no dagster.yaml": (home_without_a_file, "DAGSTER_HOME", "error", "write "),
    "no YAML": (yaml_that_is_none, "DAGSTER_HOME", "error", "valid YAML"),
    "another launcher": (another_launcher, "run launcher", "error", "TaskiqRunLauncher"),
    "Dagster's own run queue": (dagsters_own_run_queue, "run coordinator", "warning", "dagster_taskiq.coordinator"),
    "a limit that replaces ours": (a_limit_that_replaces_ours, "run coordinator", "error", "correct dagster.yaml"),
    "a misspelt setting": (a_misspelt_setting, "run launcher", "error", "run_launcher: config:"),
    "cancellation is off": (cancellation_off, "cancellation", "error", "unset DAGSTER_TASKIQ_ENABLE_CANCELLATION"),
    "another region": (another_region, "region", "error", "region_name"),
    "no credentials": (no_credentials, "credentials", "error", "IAM role"),
    "no endpoint": (no_endpoint, "queue work", "error", "endpoint_url"),
    "no work queue": (a_queue_is_missing(""), "queue work", "error", "dagster-taskiq queue create"),
    "no steps queue": (a_queue_is_missing("-steps"), "queue steps", "error", "dagster-taskiq queue create"),
    "no cancel queue": (a_queue_is_missing("-cancels"), "queue cancels", "error", "dagster-taskiq queue create"),
    "no steps queue of a route": (
        a_route_of_a_rule_has_no_steps_queue,
        "queue steps of route gpu",
        "error",
        "dagster-taskiq queue create --route gpu",
    ),
    "no queues of a route that only a run names": (
        a_run_waits_for_a_route_without_queues_and_workers,
        "queue work of route gpu",
        "error",
        "dagster-taskiq queue create --route gpu",
    ),
    "no worker of a route": (
        a_run_waits_for_a_route_without_queues_and_workers,
        "workers of route gpu",
        "warning",
        "dagster-taskiq worker start -q gpu",
    ),
    "redrive of cancels": (lambda at: at.redrive("-cancels", 10), "queue cancels", "error", "'RedrivePolicy='"),
    "hidden cancels": (
        lambda at: at.set("-cancels", VisibilityTimeout=300),
        "queue cancels",
        "warning",
        "'VisibilityTimeout=5'",
    ),
    "old cancels": (
        lambda at: at.set("-cancels", MessageRetentionPeriod=345_600),
        "queue cancels",
        "warning",
        "'MessageRetentionPeriod=600'",
    ),
    "many cancels": (lambda at: at.send("-cancels", 25), "queue cancels", "warning", "dagster-taskiq worker list"),
    "runs are dropped": (
        lambda at: at.set("", MessageRetentionPeriod=3_600),
        "queue work",
        "error",
        "'MessageRetentionPeriod=1209600'",
    ),
    "another visibility": (
        lambda at: at.set("-steps", VisibilityTimeout=99),
        "queue steps",
        "warning",
        "'VisibilityTimeout=30'",
    ),
    "redrive of runs": (lambda at: at.redrive("", 3), "queue work", "warning", "'RedrivePolicy='"),
    "delayed runs": (lambda at: at.set("", DelaySeconds=60), "queue work", "warning", "'DelaySeconds=0'"),
    "may not send": (forbidden("SendMessage", ""), "permissions of a launcher", "warning", "LauncherPolicy"),
    "may not hide": (
        forbidden("ChangeMessageVisibility", "-cancels"),
        "permissions of a worker",
        "warning",
        "WorkerPolicy",
    ),
    "may not look": (forbidden("GetQueueAttributes", ""), "queue work", "unknown", "sqs:GetQueueAttributes"),
    "a launcher's role": (forbidden("GetQueueAttributes", "-steps"), "queue steps", "unknown", "nothing, for a launch"),
    "no queue to try on": (a_queue_is_missing(""), "permissions of a launcher", "unknown", "the queues first"),
    "no answer to try on": (no_endpoint, "permissions of a worker", "unknown", "the queues first"),
    "no clock of AWS": (no_endpoint, "clock", "unknown", "the queues first"),
    "no monitoring": (monitoring(enabled=False), "run monitoring", "warning", "enabled: true"),
    "a short cancel timeout": (
        monitoring(cancel_timeout_seconds=20),
        "run monitoring",
        "error",
        "cancel_timeout_seconds: 65",
    ),
    "a short start timeout": (
        monitoring(start_timeout_seconds=60),
        "run monitoring",
        "warning",
        "start_timeout_seconds: 3600",
    ),
    "nobody works": (nobody, "workers", "error", "dagster-taskiq worker start"),
    "nobody takes runs": (only_steps_are_served, "workers", "error", "--runs-only"),
    "a clock in the future": (worker(ago=-12), "clock of workers", "warning", "timedatectl"),
    "lost work": (work_that_was_lost, "lost work", "warning", "dagster-taskiq worker list --all"),
    "no bucket": (
        lambda at: at.source.update(payload_bucket="nowhere-to-be-found"),
        "payload bucket",
        "error",
        "aws s3 mb s3://nowhere-to-be-found",
    ),
    "one machine's database": (lambda at: None, "storage", "warning", "postgres"),
    "a message that is gone": (a_message_that_is_gone, "waiting runs", "warning", "terminate them"),
    "a cancellation that hangs": (a_run_that_hangs, "cancellations", "warning", "dagster-taskiq worker list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_finds_what_was_planted_and_names_the_repair(clinic: Clinic, mistake: str) -> None:
    plant, check, verdict, repair = MISTAKES[mistake]
    clinic.environ["AWS_ENDPOINT_URL_S3"] = clinic.desk.endpoint_url
    plant(clinic)
    clinic.write()
    if not clinic.without and not clinic.environ.get("DAGSTER_HOME") and "run_launcher" not in clinic.document:
        clinic.beat()
    ended, findings = clinic.examined()
    found = [one for one in findings if one["check"] == check and one["verdict"] == verdict]
    assert any(repair in one["repair"] for one in found), findings
    assert all(one["reason"] for one in findings)
    assert ended.code == int(any(one["verdict"] == "error" for one in findings))
    assert "Traceback" not in ended.err


def test_where_all_is_well_it_says_so(clinic: Clinic, postgres: str) -> None:
    clinic.document["storage"] = {"postgres": {"postgres_url": postgres + BOUNDED}}
    clinic.write()
    clinic.beat()
    ended, findings = clinic.examined()
    assert [one for one in findings if one["verdict"] != "ok"] == []
    assert ended.code == 0
    for_people = clinic.desk.ask("doctor")
    assert for_people.code == 0
    assert len(for_people.out.splitlines()) == len(findings) + 1
    assert for_people.out.splitlines()[-1] == f"{len(findings)} ok"


class Bucket(BaseHTTPRequestHandler):
    """S3, as far as PayloadPolicy allows it: objects under the prefix, and nothing about the bucket."""

    protocol_version = "HTTP/1.1"  # botocore expects a 100 before it sends the body

    def answer(self, status: int, body: bytes = b"") -> None:
        allowed = self.path.startswith("/payloads-here/dagster-taskiq/payloads/") and self.command != "HEAD"
        denied = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        body = body if allowed else b"" if self.command == "HEAD" else denied
        self.server.asked.append(self.command)  # type: ignore[attr-defined]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status if allowed else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_PUT = do_GET = do_DELETE = lambda self: self.answer(204 if self.command == "DELETE" else 200)  # noqa: N815 - names of the library

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""


@pytest.mark.parametrize(("bucket", "verdict"), [("payloads-here", "ok"), ("somebody-elses", "warning")])
def test_a_bucket_is_tried_with_what_its_policy_allows(clinic: Clinic, bucket: str, verdict: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as s3:
        s3.asked = []  # type: ignore[attr-defined]
        serving = Thread(target=s3.serve_forever, name="s3")
        serving.start()
        clinic.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{s3.server_port}"
        clinic.source["payload_bucket"] = bucket
        clinic.write()
        try:
            _, findings = clinic.examined()
        finally:
            s3.shutdown()
            serving.join()
    (found,) = [one for one in findings if one["check"] == "payload bucket"]
    assert found["verdict"] == verdict, found
    assert ("PayloadPolicy" in found["repair"]) is (verdict == "warning")
    assert s3.asked == (["PUT", "GET", "DELETE"] if verdict == "ok" else ["PUT"])  # type: ignore[attr-defined]


def test_colours_are_for_terminals_that_want_them(clinic: Clinic) -> None:
    def shown(**environ: str) -> str:
        result = CliRunner().invoke(main, ["doctor"], env=clinic.desk.environment((), environ), color=True)
        assert "1 error" in result.stdout.splitlines()[-1], result.stdout
        return result.stdout

    assert "\x1b[" in shown(NO_COLOR="")
    assert "\x1b[" not in shown(NO_COLOR="1")


@pytest.mark.parametrize("as_url", [True, False])
def test_a_database_whose_connections_have_no_bound(clinic: Clinic, postgres: str, as_url: bool) -> None:
    """It says what to add, and is content when that is added."""
    parts = urlsplit(postgres)
    server = {"hostname": parts.hostname, "port": parts.port or 5432, "db_name": parts.path[1:]}
    named: dict[str, Any] = {**server, "username": parts.username, "scheme": parts.scheme}
    described: dict[str, Any] = {"postgres_url": f"{postgres}?connect_timeout=3"} if as_url else {"postgres_db": named}

    def verdict() -> tuple[str, str, str]:
        clinic.document["storage"] = {"postgres": described}
        clinic.write()
        _, findings = clinic.examined()
        (found,) = [one for one in findings if one["check"] == "database timeouts"]
        return found["verdict"], found["reason"], found["repair"]

    bad, why, repair = verdict()
    assert bad == "warning"
    assert "keepalives_idle, keepalives_interval, keepalives_count, tcp_user_timeout, statement_timeout" in why
    assert ("connect_timeout" in why) != as_url
    if as_url:
        described["postgres_url"] += "&" + repair.partition("?")[2]
    else:
        named["params"] = yaml.safe_load(repair.partition("params: ")[2])
    assert verdict()[0] == "ok"


def test_a_clock_that_is_wrong(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.config["endpoint_url"] = clinic.desk.endpoint_url  # the proxy has the clock of this process
    clinic.write()
    clinic.beat()
    true = time.time
    monkeypatch.setattr("dagster_taskiq.sqs.probe.time.time", lambda: true() + 400)
    _, findings = clinic.examined()
    (clock,) = [one for one in findings if one["check"] == "clock"]
    assert (clock["verdict"], "timedatectl" in clock["repair"]) == ("error", True), clock


def test_it_takes_no_message_and_leaves_none(clinic: Clinic) -> None:
    clinic.write()
    clinic.send("", 1)
    clinic.examined()
    sqs = sqs_client(clinic.desk.endpoint_url)
    for suffix, expected in (("", "1"), ("-steps", "0"), ("-cancels", "0")):
        has = sqs.get_queue_attributes(QueueUrl=clinic.queue(suffix), AttributeNames=["All"])["Attributes"]
        counts = (has["ApproximateNumberOfMessages"], has["ApproximateNumberOfMessagesNotVisible"])
        assert counts == (expected, "0"), suffix
    (message,) = sqs.receive_message(QueueUrl=clinic.queue(), AttributeNames=["ApproximateReceiveCount"])["Messages"]
    assert message["Attributes"]["ApproximateReceiveCount"] == "1"


def test_it_knows_no_secret(clinic: Clinic) -> None:
    clinic.document["storage"] = {"postgres": {"postgres_url": "postgresql+psycopg2://ada:s3cret@127.0.0.1:9/x"}}
    clinic.write()
    ended, _ = clinic.examined()
    assert ended.code == 1
    assert "s3cret" not in ended.out + ended.err
    assert yaml.safe_load(ended.out)
