"""The command line: what is wrong is said in one line that says what to do, with an exit code, without a traceback."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from click.testing import CliRunner
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.launcher import LaunchRunContext
from dagster._core.test_utils import create_run_for_test
from tests.support.moto import CREDENTIALS, create_queues, free_port, sqs_client
from tests.support.platform import ENTRYPOINT
from tests.support.proxy import sqs_proxy
from tests.support.waiting import wait_until

from dagster_taskiq.cli import main
from dagster_taskiq.errors import QueueError
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG

pytestmark = pytest.mark.acceptance


@dataclass
class Ended:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


@dataclass
class Desk:
    """A home and an environment in which commands are given."""

    home: Path
    endpoint_url: str
    queue_url: str

    def environment(self, without: tuple[str, ...], environ: Mapping[str, str]) -> dict[str, str | None]:
        """What is set, and (None) what is not."""
        unset = dict.fromkeys(name for name in os.environ if name.startswith(("AWS_", "DAGSTER_")))
        home = {"DAGSTER_HOME": str(self.home), "HOME": str(self.home)}
        return unset | CREDENTIALS | home | dict(environ) | dict.fromkeys(without)

    def ask(self, *arguments: str, without: tuple[str, ...] = (), **environ: str) -> Ended:
        """Give a command in this process: quicker, for what ends before any work begins."""
        result = CliRunner().invoke(main, arguments, env=self.environment(without, environ))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # nobody foresaw it: a person would see a traceback
        return Ended(result.exit_code, result.stdout, result.stderr)

    def start(self, script: Path, **environ: str) -> "subprocess.Popen[str]":
        """Start a program that stays."""
        wanted = {**os.environ, **self.environment((), environ)}
        environment = {name: value for name, value in wanted.items() if value is not None}
        return subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)

    def run(self, *arguments: str, script: Path | None = None, without: tuple[str, ...] = (), **environ: str) -> Ended:
        """Give a command as people do."""
        wanted = {**os.environ, **self.environment(without, environ)}
        environment = {name: value for name, value in wanted.items() if value is not None}
        program = [str(script)] if script else ["-m", "dagster_taskiq.cli"]
        done = subprocess.run(
            [sys.executable, *program, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=50,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def launcher(self, config_source: Mapping[str, Any] | None = None, **config: Any) -> None:
        """Write a dagster.yaml with our launcher."""
        whole = {"queue_url": self.queue_url, "region_name": "us-east-1", "endpoint_url": self.endpoint_url, **config}
        whole["config_source"] = dict(config_source or {})
        launcher = {"module": "dagster_taskiq.launcher", "class": "TaskiqRunLauncher", "config": whole}
        self.write("dagster.yaml", {"run_launcher": launcher})

    def write(self, name: str, document: Any) -> str:
        path = self.home / name
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
        return str(path)


@pytest.fixture
def desk(tmp_path: Path, endpoint: str) -> Desk:
    return Desk(tmp_path, endpoint, create_queues(endpoint, f"tasks-{uuid4()}"))


def assert_one_line(ended: Ended, *said: str) -> None:
    assert ended.code == 1, ended
    errors = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, ended.err
    assert ended.err.splitlines()[-1] == errors[0], ended.err
    assert "Traceback" not in ended.err + ended.out, ended.err
    for text in said:
        assert text in errors[0], errors[0]


def test_queues_are_created_once_and_shown(desk: Desk, endpoint: str) -> None:
    desk.launcher(queue_url=f"{endpoint}/123456789012/fresh.fifo")
    assert_one_line(desk.ask("queue", "status"), "fresh.fifo: no such queue", "dagster-taskiq queue create")
    first = desk.ask("queue", "create")
    assert (first.code, first.out.count("created")) == (0, 3), first
    second = desk.ask("queue", "create")
    assert (second.code, second.out.count("exists")) == (0, 3), second

    shown = desk.ask("queue", "status")
    assert shown.code == 0, shown
    assert "fresh-cancels.fifo" in shown.out

    listed = {queue["role"]: queue for queue in json.loads(desk.ask("queue", "status", "--json").out)}
    assert [listed[role]["name"] for role in ("work", "steps", "cancels")] == [
        "fresh.fifo",
        "fresh-steps.fifo",
        "fresh-cancels.fifo",
    ]
    assert all(queue["exists"] and queue["fifo"] for queue in listed.values())
    assert listed["cancels"]["visibility_timeout_s"] <= 10


def test_status_counts_what_waits(desk: Desk) -> None:
    client = sqs_client(desk.endpoint_url)
    client.send_message(QueueUrl=desk.queue_url, MessageBody="x")
    client.close()
    desk.launcher()
    listed = json.loads(desk.ask("queue", "status", "--json").out)
    assert [(queue["role"], queue["visible"]) for queue in listed] == [("work", 1), ("steps", 0), ("cancels", 0)]


def test_status_with_the_permissions_of_a_launcher(desk: Desk) -> None:
    """They do not reach the queue of the steps: what is seen of the others is shown all the same."""
    with sqs_proxy(desk.endpoint_url) as proxy:
        proxy.fail_with(403, queue="-steps", action="GetQueueAttributes")
        desk.launcher(endpoint_url=proxy.url)
        shown, listed = desk.ask("queue", "status"), desk.ask("queue", "status", "--json")
    assert shown.code == 0, shown
    assert "may not read its attributes" in shown.out
    known = [(one["role"], one["known"]) for one in json.loads(listed.out)]
    assert known == [("work", True), ("steps", False), ("cancels", True)]


def test_status_for_programs_says_what_waits_and_what_is_of_no_use(desk: Desk) -> None:
    desk.launcher()
    message = {"id": "m", "why": "unreadable", "received": 3, "again_at": 1_800_000_000}
    with DagsterInstance.from_config(str(desk.home)) as instance:
        create_run_for_test(instance, status=DagsterRunStatus.STARTING)
        facts = {"slots": [1, 0], "queue": desk.queue_url.rpartition("/")[2], "unusable": [message]}
        Heartbeats(instance, 15, 10).beat("worker", facts)
    work, steps, _ = json.loads(desk.ask("queue", "status", "--json").out)
    assert (work["runs_waiting"]["count"], work["unusable"]) == (1, [message])
    assert work["runs_waiting"]["oldest_s"] >= 0
    assert "1 of 1 slots are free" in work["runs_waiting"]["why"]
    assert "runs_waiting" not in steps
    shown = desk.ask("queue", "status").out
    assert "1 run waits, for " in shown
    assert "message m is of no use to any worker: received 3 times" in shown


def test_status_tells_apart_what_is_cancelled_already(desk: Desk) -> None:
    desk.launcher()
    client = sqs_client(desk.endpoint_url)
    for _ in range(3):
        client.send_message(QueueUrl=desk.queue_url, MessageBody="of a run")
    client.close()
    with DagsterInstance.from_config(str(desk.home)) as instance:
        create_run_for_test(instance, status=DagsterRunStatus.STARTING)
        create_run_for_test(instance, status=DagsterRunStatus.CANCELING)
        for tags in ({TASK_ID_TAG: "its message is in the queue"}, {}):
            create_run_for_test(instance, status=DagsterRunStatus.CANCELED, tags=tags)
    before = {*threading.enumerate()}
    work = json.loads(desk.ask("queue", "status", "--json").out)[0]
    assert work["cancelled"] == {"canceling": 1, "without_worker": 1, "messages": 1}
    shown = desk.ask("queue", "status").out
    assert "1 run waits, for " in shown
    assert "being cancelled: 1; no worker has 1 of them" in shown
    assert "of the 3 messages that wait in the work queue, about 1 are of runs that are cancelled already" in shown

    def left() -> list[str]:
        return [
            thread.name for thread in threading.enumerate() if thread not in before and thread.name == "the database"
        ]

    wait_until(lambda: not left(), "no thread is left", seen=left)


def test_status_of_the_queues_comes_without_the_database(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["dagster_taskiq.cli.queue"], "_ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and never answers
        url = f"postgresql+psycopg2://nobody@127.0.0.1:{silent.getsockname()[1]}/dagster"
        desk.launcher()
        configured = yaml.safe_load((desk.home / "dagster.yaml").read_text())
        desk.write("dagster.yaml", configured | {"storage": {"postgres": {"postgres_url": url}}})
        ended = desk.ask("queue", "status", "--json")
        work = json.loads(ended.out)[0]
        assert (ended.code, work["exists"], work["runs_waiting"], work["unusable"]) == (1, True, None, None)
        assert "runs that wait: " in ended.err


def test_a_database_that_somebody_keeps_locked_is_said_in_one_line(desk: Desk) -> None:
    desk.launcher()
    with DagsterInstance.from_config(str(desk.home)) as instance:
        create_run_for_test(instance)
    with closing(sqlite3.connect(next(desk.home.rglob("runs.db")))) as keeps:
        keeps.execute("PRAGMA locking_mode = EXCLUSIVE")
        keeps.execute("BEGIN EXCLUSIVE")
        said = "Dagster's database does not answer, see storage in $DAGSTER_HOME/dagster.yaml: database is locked"
        assert_one_line(desk.ask("worker", "list"), said)
        status = desk.ask("queue", "status")
        assert (status.code, status.err.splitlines()[-1]) == (1, f"runs that wait: {said}")
        assert "-cancels" in status.out, "the queues are shown all the same"


@pytest.mark.parametrize("wrapped", [True, False], ids=["executor's run configuration", "bare keys"])
def test_settings_come_from_a_file_in_both_forms(desk: Desk, wrapped: bool) -> None:
    bare = {"queue_url": {"env": "MY_QUEUE"}, "region_name": "us-east-1", "endpoint_url": desk.endpoint_url}
    executor = {"execution": {"config": {**bare, "max_concurrent": 3}}, "ops": {}}
    file = desk.write("config.yaml", executor if wrapped else bare)
    ended = desk.ask("queue", "status", "--config-yaml", file, without=("DAGSTER_HOME",), MY_QUEUE=desk.queue_url)
    assert ended.code == 0, ended
    assert_one_line(desk.ask("queue", "status", "-y", file), "environment variable MY_QUEUE, which is not set")


def test_the_environment_alone_is_enough(desk: Desk) -> None:
    ended = desk.ask(
        "queue",
        "status",
        without=("DAGSTER_HOME",),
        DAGSTER_TASKIQ_SQS_QUEUE_URL=desk.queue_url,
        DAGSTER_TASKIQ_SQS_ENDPOINT_URL=desk.endpoint_url,
    )
    assert ended.code == 0, ended


def test_a_missing_queue(desk: Desk) -> None:
    desk.launcher(queue_url=f"{desk.endpoint_url}/123456789012/nowhere")
    assert_one_line(desk.run("worker", "start"), "nowhere", "no such queue", "dagster-taskiq queue create")


def test_a_missing_cancel_queue(desk: Desk) -> None:
    client = sqs_client(desk.endpoint_url)
    client.delete_queue(QueueUrl=f"{desk.queue_url}-cancels")
    client.close()
    desk.launcher()
    assert_one_line(desk.run("worker", "start"), "-cancels: no such queue")


def test_the_wrong_region(desk: Desk) -> None:
    desk.launcher(region_name="eu-west-1")
    assert_one_line(desk.run("worker", "start"), "no such queue in region eu-west-1")


def test_no_credentials(desk: Desk) -> None:
    desk.launcher()
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    assert_one_line(desk.run("worker", "start", without=keys), "no usable AWS credentials", "IAM role")


def test_an_endpoint_that_is_down(desk: Desk) -> None:
    down = f"http://127.0.0.1:{free_port()}"
    desk.launcher(endpoint_url=down, queue_url=f"{down}/123456789012/tasks")
    assert_one_line(desk.run("worker", "start"), "cannot reach SQS", "check the network and endpoint_url")


def test_an_emulators_queue_without_its_endpoint(desk: Desk) -> None:
    """The requests would go to AWS, which is not what is wrong: one line names one host."""
    desk.launcher(endpoint_url=None, queue_url="http://127.0.0.1:4566/000000000000/q")
    for command in (("worker", "start"), ("queue", "status"), ("queue", "create")):
        ended = desk.run(*command)
        assert_one_line(ended, "there is no endpoint_url; set endpoint_url to http://127.0.0.1:4566 beside queue_url")
        assert "amazonaws" not in ended.err, ended
    with DagsterInstance.from_config(str(desk.home)) as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTING)
        with pytest.raises(QueueError, match=r"set endpoint_url to http://127.0.0.1:4566 beside") as refused:
            instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    assert "amazonaws" not in str(refused.value)


def test_a_database_url_without_its_driver(desk: Desk) -> None:
    """As SQLAlchemy 2.1 reads `postgresql://`."""
    desk.launcher()
    document = yaml.safe_load((desk.home / "dagster.yaml").read_text())
    url = "postgresql+psycopg://ada:s3cret@127.0.0.1:5432/dagster"
    desk.write("dagster.yaml", document | {"storage": {"postgres": {"postgres_url": url}}})
    said = "install dagster-taskiq[postgres], or write postgresql+psycopg2:// in the URL"
    for ended in (desk.ask("worker", "list"), desk.ask("run", "cancel", "x" * 36), desk.run("worker", "start")):
        assert_one_line(ended, "No module named 'psycopg'", said)
        assert "s3cret" not in ended.err
    findings = json.loads(desk.ask("doctor", "--json").out)
    (storage,) = [one for one in findings if one["check"] == "storage"]
    assert (storage["verdict"], storage["repair"]) == ("error", said)


def test_a_fifo_url_for_a_standard_queue(desk: Desk) -> None:
    desk.launcher(queue_url=f"{desk.queue_url}.fifo")
    assert_one_line(desk.run("worker", "start"), ".fifo: no such queue")


@pytest.mark.parametrize(
    ("config_source", "said"),
    [
        ({"grace_secnds": 5}, "grace_seconds"),
        ({"wait_time_seconds": 0.5}, "wait_time_seconds"),
        ({"max_number_of_messages": 0}, "max_number_of_messages must be between 1 and 10"),
        ({"max_concurrent_runs": -3}, "max_concurrent_runs must be between 0 and 1000"),
        ({"visibility_timeout_seconds": 10**9}, "visibility_timeout_seconds must be between 4 and 43200"),
        ({"drain_seconds": 60}, "stop_timeout_seconds"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be(desk: Desk, config_source: dict[str, Any], said: str) -> None:
    desk.launcher(config_source)
    assert_one_line(desk.ask("queue", "status"), said)
    bare = {"queue_url": desk.queue_url, "region_name": "us-east-1", "config_source": config_source}
    assert_one_line(desk.ask("queue", "status", "-y", desk.write("config.yaml", bare)), said)


def test_a_setting_in_the_wrong_place(desk: Desk) -> None:
    file = desk.write("config.yaml", {"queue_url": desk.queue_url, "region_name": "us-east-1", "grace_seconds": 5})
    assert_one_line(desk.ask("queue", "status", "-y", file), "'grace_seconds' belongs into config_source")


@pytest.mark.parametrize("number", ["-1", "1000000"])
@pytest.mark.parametrize("what", ["runs", "steps"])
def test_an_absurd_number_of_slots(desk: Desk, what: str, number: str) -> None:
    desk.launcher()
    said = f"max_concurrent_{what} must be between 0 and"
    assert_one_line(desk.run("worker", "start", f"--max-{what}", number), said)


def test_a_worker_that_would_do_nothing(desk: Desk) -> None:
    desk.launcher()
    assert_one_line(desk.run("worker", "start", "--max-runs", "0", "--max-steps", "0"), "both 0", "raise one of them")


@pytest.mark.parametrize("flags", [("--runs-only", "--steps-only"), ("--runs-only", "--max-steps", "2")])
def test_flags_that_contradict_each_other(desk: Desk, flags: tuple[str, ...]) -> None:
    ended = desk.run("worker", "start", *flags)
    assert ended.code == 2
    assert "--runs-only" in ended.err
    assert "Traceback" not in ended.err


def test_no_dagster_home(desk: Desk) -> None:
    assert_one_line(desk.run("worker", "start", without=("DAGSTER_HOME",)), "set DAGSTER_HOME", "-y FILE")
    file = desk.write("config.yaml", {"queue_url": desk.queue_url, "region_name": "us-east-1"})
    started = desk.run("worker", "start", "-y", file, without=("DAGSTER_HOME",))
    assert_one_line(started, "DAGSTER_HOME is not set", "same that the Dagster webserver and daemon use")


def test_a_dagster_home_that_is_not_there(desk: Desk) -> None:
    assert_one_line(desk.ask("queue", "status", DAGSTER_HOME=str(desk.home / "nowhere")), "does not exist")
    assert_one_line(desk.ask("queue", "status", DAGSTER_HOME="home"), "must be an absolute path")


def test_an_instance_with_another_launcher(desk: Desk) -> None:
    desk.write("dagster.yaml", "telemetry: {enabled: false}")
    assert_one_line(desk.ask("queue", "status"), "DefaultRunLauncher", "TaskiqRunLauncher")


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("run_launcher: [", "not readable as YAML"),
        ("run_lancher: {}", "run_lancher"),
        ("run_launcher: {module: nowhere.at.all, class: Launcher}", "nowhere.at.all"),
        ("storage: {postgres: {postgres_url: 'postgresql://127.0.0.1:1/none'}}", ""),
    ],
    ids=["no YAML", "unknown key", "unknown module", "database down"],
)
def test_a_dagster_yaml_that_does_not_load(desk: Desk, document: str, said: str) -> None:
    desk.write("dagster.yaml", document)
    assert_one_line(desk.ask("queue", "status"), said)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("queue_url: [", "not readable as YAML"),
        ("- queue_url", "must be a mapping"),
        ("", "no queue: set queue_url"),
        ("execution: {config: {}}\nqueue_url: x", "'queue_url' has no place beside 'execution'"),
        ("execution: {multiprocess: {}}", "only 'config' is known there"),
        (b"\xff\xfe".decode("latin-1"), ""),
    ],
    ids=["no YAML", "a list", "empty", "beside execution", "another executor", "no text"],
)
def test_a_file_that_is_no_configuration(desk: Desk, document: str, said: str) -> None:
    assert_one_line(desk.ask("queue", "status", "-y", desk.write("config.yaml", document)), said)


def test_a_file_that_is_not_there(desk: Desk) -> None:
    assert_one_line(desk.ask("queue", "status", "-y", str(desk.home / "nowhere.yaml")), "nowhere.yaml: no such file")


def test_a_flag_that_does_not_exist_is_a_matter_of_usage(desk: Desk) -> None:
    ended = desk.run("worker", "start", "--max-rums", "2")
    assert ended.code == 2
    assert "--max-runs" in ended.err
    assert "Traceback" not in ended.err


def test_dev_without_the_extra_says_how_to_install_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_taskiq.local.dev.find_spec", lambda name: None)
    assert_one_line(desk.ask("dev"), "pip install 'dagster-taskiq[local]'")


def test_dev_with_a_file_and_a_module_is_a_matter_of_usage(desk: Desk) -> None:
    assert desk.ask("dev", "-f", desk.write("defs.py", ""), "-m", "defs").code == 2


def test_dev_says_in_one_line_what_it_cannot_use(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write("dagster.yaml", "telemetry: [")
    assert_one_line(desk.run("dev", "--dagster-home", str(desk.home)), f"{desk.home}/dagster.yaml cannot be read")
    monkeypatch.chdir(desk.home)
    desk.write(".env", "DAGSTER_HOME=/somewhere")
    assert_one_line(desk.run("dev"), ".env sets DAGSTER_HOME", "export it instead")


def test_the_entrypoint_says_what_is_wrong_in_one_line(desk: Desk) -> None:
    desk.launcher(queue_url=f"{desk.endpoint_url}/123456789012/nowhere")
    assert_one_line(desk.run(script=ENTRYPOINT), "nowhere", "no such queue")
    assert_one_line(desk.run(script=ENTRYPOINT, DAGSTER_TASKIQ_LOG_LEVEL="LOUD"), "DAGSTER_TASKIQ_LOG_LEVEL")
    assert_one_line(
        desk.run(script=ENTRYPOINT, DAGSTER_TASKIQ_CREATE_QUEUES="please"), "must be one of 0, 1, true, false"
    )


def test_the_entrypoint_creates_queues_becomes_the_worker_and_stops_on_sigterm(desk: Desk) -> None:
    desk.launcher({"wait_time_seconds": 1}, queue_url=f"{desk.endpoint_url}/123456789012/created-{uuid4()}")
    with desk.start(ENTRYPOINT, DAGSTER_TASKIQ_CREATE_QUEUES="1", DAGSTER_TASKIQ_ROUTE="gpu, default") as worker:
        assert worker.stdout is not None
        lines = []
        for line in worker.stdout:
            lines.append(line)
            if " is ready" in line:
                break
        assert sum(line.startswith("created queue created-") for line in lines) == 6, lines
        assert sum("-gpu" in line for line in lines if line.startswith("created")) == 3, lines
        assert len([line for line in lines if "ready" in line]) == 1
        worker.terminate()
        assert worker.wait(30) == 0
