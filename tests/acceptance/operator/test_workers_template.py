"""The template of the workers: linted, deployed to an emulator beside the queues, and the container that it describes
started here, as far as that goes without ECS; its numbers are those of the settings."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from dagster import DagsterInstance, DagsterRunStatus
from tests.acceptance.operator.test_infra import client
from tests.support.ecs_agent import ecs_agent
from tests.support.moto import REGION
from tests.support.platform import ENTRYPOINT, Platform, write_home

from dagster_taskiq import Settings
from dagster_taskiq.sqs.admin import CANCEL_RETENTION_S, CANCEL_VISIBILITY_S, WORK_RETENTION_S

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[3]
INFRA = ROOT / "infra"
DEFAULTS = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1")


class _Loader(yaml.SafeLoader):
    """Reads CloudFormation's own tags as plain values."""


_Loader.add_multi_constructor(
    "!",
    lambda loader, _, node: (
        loader.construct_scalar(node)
        if isinstance(node, yaml.ScalarNode)
        else loader.construct_sequence(node, deep=True)
        if isinstance(node, yaml.SequenceNode)
        else loader.construct_mapping(node, deep=True)
    ),
)


def template(name: str) -> Any:
    return yaml.load((INFRA / name).read_text(), _Loader)  # noqa: S506 - a SafeLoader


@dataclass
class Fleet:
    """Both stacks."""

    endpoint: str
    queue_url: str
    container: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return {entry["name"]: str(entry["value"]) for entry in self.container["environment"]}


@pytest.fixture(params=["both", "steps"])
def fleet(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Fleet]:
    cloud, ecs, ec2 = (client(service, endpoint) for service in ("cloudformation", "ecs", "ec2"))
    name, cluster = f"fleet-{uuid4().hex[:8]}", f"cluster-{uuid4().hex[:8]}"
    ecs.create_cluster(clusterName=cluster)
    network = ec2.describe_subnets()["Subnets"][0]
    group = ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]

    def deploy(stack: str, file: str, **parameters: str) -> dict[str, str]:
        cloud.create_stack(
            StackName=stack,
            TemplateBody=(INFRA / file).read_text(),
            Capabilities=["CAPABILITY_IAM"],
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        )
        (described,) = cloud.describe_stacks(StackName=stack)["Stacks"]
        assert described["StackStatus"] == "CREATE_COMPLETE", described
        return {output["OutputKey"]: output["OutputValue"] for output in described["Outputs"]}

    queues = deploy(f"{name}-queues", "queues.yaml", QueueName=name)
    deploy(
        f"{name}-{request.param}",
        "workers.yaml",
        QueuesStack=f"{name}-queues",
        QueueName=name,
        Serve=request.param,
        Cluster=cluster,
        Image="123456789012.dkr.ecr.us-east-1.amazonaws.com/workers:1",
        Subnets=network["SubnetId"],
        SecurityGroups=group,
    )
    (arn,) = ecs.list_task_definitions(familyPrefix=f"{name}-{request.param}")["taskDefinitionArns"]
    task = ecs.describe_task_definition(taskDefinition=arn)["taskDefinition"]
    (service,) = ecs.describe_services(cluster=cluster, services=[f"{name}-{request.param}"])["services"]
    assert service["taskDefinition"] == arn
    (container,) = task["containerDefinitions"]
    yield Fleet(endpoint, queues["QueueUrl"], container)
    for stack in (f"{name}-{request.param}", f"{name}-queues"):
        cloud.delete_stack(StackName=stack)


@pytest.mark.parametrize("name", ["queues.yaml", "workers.yaml"])
def test_the_template_has_no_lint(name: str) -> None:
    linter = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run([linter, "-r", REGION, "--", INFRA / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_task_is_what_a_worker_needs(fleet: Fleet) -> None:
    container = fleet.container
    assert container["stopTimeout"] == 120
    assert container["linuxParameters"]["initProcessEnabled"] is True
    assert container["healthCheck"]["command"] == ["CMD", "dagster-taskiq", "worker", "health"]
    assert container["logConfiguration"]["logDriver"] == "awslogs"
    # The emulator does not attach imported policies, so it is the template that has to say so.
    role = template("workers.yaml")["Resources"]["TaskRole"]["Properties"]
    assert role["ManagedPolicyArns"] == [{"Fn::ImportValue": "${QueuesStack}-WorkerPolicyArn"}]
    (own,) = (policy["PolicyDocument"]["Statement"] for policy in role["Policies"])
    assert [statement["Action"] for statement in own] == [["ecs:GetTaskProtection", "ecs:UpdateTaskProtection"]]
    assert fleet.environment["DAGSTER_TASKIQ_STOP_TIMEOUT"] == "120"


@pytest.mark.slow
def test_the_container_works_and_a_run_is_cancelled(fleet: Fleet, tmp_path: Path) -> None:
    queue_url = fleet.endpoint + "/" + fleet.queue_url.split("/", 3)[3]
    source = {"wait_time_seconds": 1, "visibility_timeout_seconds": 8}
    write_home(tmp_path, queue_url, fleet.endpoint, source=source, extra={})
    serves_runs = fleet.environment["DAGSTER_TASKIQ_SERVE"] == "both"
    # The emulator names queues by AWS's own address, so the worker takes it from dagster.yaml.
    environment = {key: value for key, value in fleet.environment.items() if key != "DAGSTER_TASKIQ_SQS_QUEUE_URL"}
    with ecs_agent() as agent, DagsterInstance.from_config(str(tmp_path)) as instance:
        platform = Platform(tmp_path, queue_url, fleet.endpoint, instance)
        program = (sys.executable, str(ENTRYPOINT))
        with platform.worker(program=program, env=environment | agent.environment) as worker:
            listens = re.search(r"is ready: it listens to (.*)", worker.log())
            assert listens, worker.log()
            assert (" and " in listens[1]) is serves_runs, worker.log()
            if serves_runs:
                run_id = platform.launch("sleepy_job")
                platform.marked(run_id, "started")
                assert platform.launcher.terminate(run_id)
                assert platform.finished(run_id) is DagsterRunStatus.CANCELED
            assert worker.stop(within=60) == 0, worker.log()


def test_the_numbers_of_the_templates_are_those_of_the_settings() -> None:
    queues, workers = template("queues.yaml"), template("workers.yaml")
    parameters = {name: one["Default"] for name, one in queues["Parameters"].items() if "Default" in one}
    assert parameters["VisibilityTimeout"] == DEFAULTS.visibility_timeout_seconds
    assert parameters["WorkRetention"] == WORK_RETENTION_S
    assert parameters["CancelRetention"] == CANCEL_RETENTION_S
    assert parameters["CancelRetention"] > DEFAULTS.cancel_ttl
    cancels = queues["Resources"]["CancelQueue"]["Properties"]
    assert cancels["VisibilityTimeout"] == CANCEL_VISIBILITY_S
    assert cancels["ReceiveMessageWaitTimeSeconds"] == DEFAULTS.wait_time_seconds
    defaults = {name: one["Default"] for name, one in workers["Parameters"].items() if "Default" in one}
    assert defaults["MaxRuns"] == DEFAULTS.max_concurrent_runs
    assert defaults["MaxSteps"] == DEFAULTS.max_concurrent_steps
    # The ladder, the polling and the steps' patience fit before the alarm, and before the container is killed.
    assert defaults["SlowCancellationAlarmSeconds"] > DEFAULTS.steps_patience_s(DEFAULTS.grace_seconds)
    assert defaults["StopTimeout"] == workers["Parameters"]["StopTimeout"]["MaxValue"] == 120
    assert defaults["StopTimeout"] > DEFAULTS.grace_seconds
    health = workers["Resources"]["TaskDefinition"]["Properties"]["ContainerDefinitions"][0]["HealthCheck"]
    assert health["Timeout"] > 3
    assert health["Retries"] * health["Interval"] > DEFAULTS.hung_after_s


def test_the_metrics_of_alarms_and_dashboard_are_those_that_workers_write() -> None:
    from dagster_taskiq.metrics import ALL, NAMESPACE

    text = (INFRA / "workers.yaml").read_text()
    ours = set(re.findall(r'"([A-Z][A-Za-z]+)", "(?:Queue|\.)"', text)) | set(re.findall(r"MetricName: (\w+)", text))
    aws = {"ApproximateNumberOfMessagesVisible", "ApproximateNumberOfMessagesNotVisible"}
    aws |= {"ApproximateAgeOfOldestMessage", "RunningTaskCount"}
    assert ours - aws <= {metric.name for metric in ALL}
    assert {"SecondsToFinal", "ForcedKills", "WorkRunning"} <= ours
    assert NAMESPACE == "dagster-taskiq"


def value_of(resource: Any, ident: str, *, serves_runs: bool = True, **metrics: float | None) -> float:
    """What an expression of the template gives for these values; None, or left out: there is no data."""
    expressions = {one["Id"]: one["Expression"] for one in resource if isinstance(one, dict) and "Expression" in one}
    found = expressions[ident]
    text = found if isinstance(found, str) else found[1 if serves_runs else 2]
    known: dict[str, Any] = dict.fromkeys(("queued", "waiting", "working", "tasks", "oldest", "age")) | metrics
    known |= {"IF": lambda yes, one, other: one if yes else other, "FILL": lambda one, no: no if one is None else one}
    return float(eval(text.replace(" AND ", " and "), {"__builtins__": {}}, known))  # noqa: S307 - our own template


def test_a_fleet_scales_on_what_waits_in_dagster_and_wakes_up_for_it() -> None:
    resources = template("workers.yaml")["Resources"]
    policy = resources["BacklogPolicy"]["Properties"]["TargetTrackingScalingPolicyConfiguration"]
    backlog = policy["CustomizedMetricSpecification"]["Metrics"]
    assert value_of(backlog, "backlog", queued=40, waiting=1, working=8, tasks=2) == 24
    assert value_of(backlog, "backlog", queued=40, waiting=1) == 40, "no task yet"
    assert value_of(backlog, "backlog", waiting=12, working=8, tasks=2) == 10, "another coordinator: they are in SQS"
    assert value_of(backlog, "backlog", serves_runs=False, waiting=12, working=8, tasks=2) == 10
    wake_up = resources["WorkWaitsForTheFirstTask"]["Properties"]["Metrics"]
    assert value_of(wake_up, "asleep", queued=1) == 1, "the queue in SQS tells nothing when it was idle for hours"
    assert value_of(wake_up, "asleep", waiting=1, tasks=0) == 1
    assert value_of(wake_up, "asleep", queued=1, tasks=1) == 0
    assert value_of(wake_up, "asleep", queued=0, waiting=0) == 0
    assert value_of(wake_up, "asleep", serves_runs=False, waiting=1) == 1


def test_the_alarms_are_for_what_waits_and_not_for_what_takes_long() -> None:
    resources = template("workers.yaml")["Resources"]
    runs = resources["OldestRunAlarm"]["Properties"]["Metrics"]
    assert value_of(runs, "waited", oldest=1_000, waiting=1, age=5) == 1_000
    assert value_of(runs, "waited", oldest=0, waiting=0, age=5_000) == 0, "a message in flight: a run at work"
    assert value_of(runs, "waited", waiting=0, age=5_000) == 0
    assert value_of(runs, "waited", waiting=2, age=5_000) == 5_000, "another coordinator"
    steps = resources["OldestStepAlarm"]["Properties"]["Metrics"]
    assert value_of(steps, "waited", waiting=0, age=5_000) == 0
    assert value_of(steps, "waited", waiting=2, age=5_000) == 5_000
