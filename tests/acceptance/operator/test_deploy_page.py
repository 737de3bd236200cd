"""`docs/deploy-on-ecs.md`, command by command, from an empty account to a terminated run.

The commands are given in a copy of the checkout that is gone when the daemon hands the run over: worker and daemon run
elsewhere, as in a container, and have only what is installed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from dagster import DagsterInstance, DagsterRunStatus
from tests.acceptance.operator.test_infra import client
from tests.support.ecs_agent import FakeAgent, ecs_agent
from tests.support.moto import moto_server
from tests.support.pages import ROOT, blocks
from tests.support.shell import Shell, path_with_aws
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(600)]

PAGE = "docs/deploy-on-ecs.md"


def test_no_loop_on_the_page_is_endless() -> None:
    """One that waits for a run would wait for ever when the run fails."""
    assert not [one for one in blocks(PAGE, "bash") if re.search(r"\b(until|while)\b", one.text)]


def started_as_ecs_would(
    shell: Shell, endpoint: str, agent: FakeAgent, log: Path, service: str
) -> "subprocess.Popen[bytes]":
    """The container of the service, as its task definition says: without a checkout, in a folder of its own."""
    ecs = client("ecs", endpoint)
    arn = ecs.describe_services(cluster="data", services=[service])["services"][0]["taskDefinition"]
    (container,) = ecs.describe_task_definition(taskDefinition=arn)["taskDefinition"]["containerDefinitions"]
    told = {one["name"]: str(one["value"]) for one in container["environment"]}
    told["DAGSTER_TASKIQ_SQS_QUEUE_URL"] = shell.variable("DAGSTER_TASKIQ_SQS_QUEUE_URL")
    assert [secret["name"] for secret in container["secrets"]] == ["DAGSTER_POSTGRES_URL"]
    image = log.with_name(f"image of {service}")
    image.mkdir()
    shutil.copy(ROOT / "worker_entrypoint.py", image)
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "worker_entrypoint.py"],
            cwd=image,
            env=shell.environ | told | agent.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def is_ready(log: Path) -> bool:
    return " is ready" in log.read_text()


def daemon(environ: dict[str, str], cwd: Path) -> "subprocess.Popen[bytes]":
    """Where webserver and daemon run, which have the jobs as an installed module."""
    return subprocess.Popen(
        ["dagster-daemon", "run", "-m", "dagster_taskiq.examples.bakery.definitions"],
        cwd=cwd,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def assert_cancelled(shell: Shell, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DAGSTER_TASKIQ_SQS_QUEUE_URL", "DAGSTER_TASKIQ_SQS_ENDPOINT_URL"):
        monkeypatch.setenv(name, shell.variable(name))
    with DagsterInstance.from_config(str(home)) as instance:
        (run,) = instance.get_runs()
        assert run.status is DagsterRunStatus.CANCELED
        assert run.tags["dagster-taskiq/cancel_reason"] == "to see it stop"
        assert any("SIGKILL" in entry.message for entry in instance.all_logs(run.run_id))


def test_who_follows_the_page_terminates_a_run(tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", postgres)
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    home.mkdir()
    for part in ("infra", "src/dagster_taskiq/examples"):
        shutil.copytree(ROOT / part, checkout / part)
    with moto_server() as endpoint, ecs_agent() as agent:
        ec2 = client("ec2", endpoint)
        environ = os.environ | {
            "PATH": path_with_aws(tmp_path),
            "DAGSTER_HOME": str(home),
            "AWS_ENDPOINT_URL": endpoint,
            "DAGSTER_TASKIQ_SQS_ENDPOINT_URL": endpoint,
            "IMAGE": "123456789012.dkr.ecr.us-east-1.amazonaws.com/workers:1",
            "SUBNETS": ec2.describe_subnets()["Subnets"][0]["SubnetId"],
            "SECURITY_GROUPS": ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"],
            "DATABASE_SECRET_ARN": "arn:aws:secretsmanager:us-east-1:123456789012:secret:dagster-abc",
            "COLUMNS": "200",
        }
        shell = Shell(tmp_path, checkout, environ)
        started: list[subprocess.Popen[bytes]] = []
        configured: dict[str, object] = {}
        try:
            for block in blocks(PAGE):
                language, text = block.language, block.text
                if language == "yaml":
                    configured |= yaml.safe_load(text)
                    (home / "dagster.yaml").write_text(yaml.safe_dump(configured))
                elif language == "bash" and "dagster job launch" in text:
                    launch, rest = text.split("\nRUN_ID=", 1)
                    shell.run(launch)
                    shutil.rmtree(checkout / "src")
                    queue_url = shell.variable("DAGSTER_TASKIQ_SQS_QUEUE_URL")
                    started.append(daemon(environ | {"DAGSTER_TASKIQ_SQS_QUEUE_URL": queue_url}, home))
                    shell.run(f"RUN_ID={rest}")
                elif language == "bash":
                    shell.run(text)
                services = re.findall(r"--stack-name (\S+) [^-]*--template-file infra/workers.yaml", text)
                for service in services if language == "bash" else ():
                    log = tmp_path / f"log of {service}"
                    started.append(started_as_ecs_would(shell, endpoint, agent, log, service))
                    wait_until(partial(is_ready, log), "it is ready", within=60, seen=log.read_text)
                if "run cancel" in text:
                    assert_cancelled(shell, home, monkeypatch)
        finally:
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                process.wait(60)
