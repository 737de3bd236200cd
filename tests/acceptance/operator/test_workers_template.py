"""The template of the workers: linted, deployed to an emulator beside the queues, and the container that it describes
started here, as far as that goes without ECS; its numbers are those of the settings."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from dagster import DagsterInstance, DagsterRunStatus
from tests.acceptance.operator.test_infra import client
from tests.support.cfn import Filled
from tests.support.ecs_agent import ecs_agent
from tests.support.moto import REGION
from tests.support.platform import ENTRYPOINT, STEP_JOBS, Platform, WorkerProcess, write_home

from dagster_taskiq import Settings
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.sqs.admin import CANCEL_RETENTION_S, CANCEL_VISIBILITY_S, WORK_RETENTION_S
from dagster_taskiq.storage.tags import QUEUE_TAG

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


SECRET = "arn:aws:secretsmanager:us-east-1:123456789012:secret:dagster-AbCdEf"
KEY = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
SECRETS = {
    "both": {"DatabaseSecretArn": f"{SECRET}:url::", "SecretKmsKeyArn": KEY},
    "steps": {"DatabaseSecretArn": SECRET},
}


@dataclass
class Fleet:
    """The stack of a fleet of workers, with that of its queues."""

    stack: str
    endpoint: str
    queue_url: str
    container: dict[str, Any]
    may_start_with: list[Any]
    """What the execution role may do beside AWS's own policy."""

    @property
    def environment(self) -> dict[str, str]:
        return {entry["name"]: str(entry["value"]) for entry in self.container["environment"]}


class Account:
    """Where stacks are deployed: on an emulator, with a cluster."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.cloud, self.ecs, self.iam, ec2 = (client(one, endpoint) for one in ("cloudformation", "ecs", "iam", "ec2"))
        self.name, self.cluster = f"fleet-{uuid4().hex[:8]}", f"cluster-{uuid4().hex[:8]}"
        self._subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
        self._group = ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]
        self._stacks: list[str] = []
        self.deploy(f"{self.name}-cluster", "cluster.yaml", Cluster=self.cluster)

    def deploy(self, stack: str, file: str, **parameters: str) -> dict[str, str]:
        """Its outputs."""
        self.cloud.create_stack(
            StackName=stack,
            TemplateBody=(INFRA / file).read_text(),
            Capabilities=["CAPABILITY_IAM"],
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        )
        self._stacks.append(stack)
        (described,) = self.cloud.describe_stacks(StackName=stack)["Stacks"]
        assert described["StackStatus"] == "CREATE_COMPLETE", described
        return {output["OutputKey"]: output["OutputValue"] for output in described["Outputs"]}

    def workers(self, stack: str, queues: str, **parameters: str) -> Fleet:
        """A fleet with the queues of that stack."""
        self.deploy(
            stack,
            "workers.yaml",
            QueuesStack=queues,
            QueueName=self.name,
            Cluster=self.cluster,
            Image="123456789012.dkr.ecr.us-east-1.amazonaws.com/workers:1",
            Subnets=self._subnet,
            SecurityGroups=self._group,
            **parameters,
        )
        (service,) = self.ecs.describe_services(cluster=self.cluster, services=[stack])["services"]
        task = self.ecs.describe_task_definition(taskDefinition=service["taskDefinition"])["taskDefinition"]
        assert task["family"] == stack
        (container,) = task["containerDefinitions"]
        described = {one["OutputKey"]: one["OutputValue"] for one in self._described(queues)}
        return Fleet(stack, self.endpoint, described["QueueUrl"], container, self._may_start_with(stack))

    def _described(self, stack: str) -> Any:
        return self.cloud.describe_stacks(StackName=stack)["Stacks"][0]["Outputs"]

    def _may_start_with(self, stack: str) -> list[Any]:
        found = self.cloud.describe_stack_resource(StackName=stack, LogicalResourceId="ExecutionRole")
        role = found["StackResourceDetail"]["PhysicalResourceId"]
        documents = [
            self.iam.get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
            for policy in self.iam.list_role_policies(RoleName=role)["PolicyNames"]
        ]
        return [one for document in documents for one in yaml.safe_load(document)["Statement"]]

    def close(self) -> None:
        for stack in reversed(self._stacks):
            self.cloud.delete_stack(StackName=stack)


@pytest.fixture
def account(endpoint: str) -> Iterator[Account]:
    account = Account(endpoint)
    yield account
    account.close()


@pytest.fixture(params=["both", "steps"])
def fleet(request: pytest.FixtureRequest, account: Account) -> Fleet:
    account.deploy(f"{account.name}-queues", "queues.yaml", QueueName=account.name)
    name, queues = f"{account.name}-{request.param}", f"{account.name}-queues"
    return account.workers(name, queues, Serve=request.param, **SECRETS[request.param])


@pytest.fixture
def fleets(account: Account) -> dict[str, Fleet]:
    """By route: the unnamed one's fleet, and that of `gpu`, as the guide has them deployed."""
    name = account.name
    account.deploy(f"{name}-queues", "queues.yaml", QueueName=name, SendToRoutes="true")
    account.deploy(f"{name}-queues-gpu", "queues.yaml", QueueName=name, Route="gpu")
    secret = {"DatabaseSecretArn": SECRET}
    return {
        "default": account.workers(f"{name}-workers", f"{name}-queues", **secret),
        "gpu": account.workers(f"{name}-workers-gpu", f"{name}-queues-gpu", Route="gpu", **secret),
    }


@pytest.mark.parametrize("name", ["cluster.yaml", "queues.yaml", "workers.yaml"])
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
    payloads = ["HasPayloads", {"Fn::ImportValue": "${QueuesStack}-PayloadPolicyArn"}, "AWS::NoValue"]
    assert role["ManagedPolicyArns"] == [{"Fn::ImportValue": "${QueuesStack}-WorkerPolicyArn"}, payloads]
    (own,) = (policy["PolicyDocument"]["Statement"] for policy in role["Policies"])
    actions = [["ecs:GetTaskProtection", "ecs:UpdateTaskProtection"], "ecs:DescribeServices"]
    assert [statement["Action"] for statement in own] == actions
    assert fleet.environment["DAGSTER_TASKIQ_STOP_TIMEOUT"] == "120"


def test_ecs_may_read_the_secret_that_it_is_told_to_read(fleet: Fleet) -> None:
    (secret,) = fleet.container["secrets"]
    # Of what a condition leaves out, the emulator leaves a text.
    read, *decrypt = (one for one in fleet.may_start_with if isinstance(one, dict))
    assert (read["Action"], read["Resource"]) == ("secretsmanager:GetSecretValue", SECRET)
    if secret["valueFrom"] == SECRET:
        assert decrypt == []
    else:
        assert secret["valueFrom"] == f"{SECRET}:url::"
        ((action, key),) = [(one["Action"], one["Resource"]) for one in decrypt]
        assert (action, key) == ("kms:Decrypt", KEY)


def queues_in(value: Any) -> set[tuple[str, str]]:
    """The dimensions of metrics in there that name queues."""
    if isinstance(value, list):
        return {one for part in value for one in queues_in(part)}
    if not isinstance(value, dict):
        return set()
    if value.get("Name") in ("Queue", "QueueName"):
        return {(value["Name"], value["Value"])}
    return {one for part in value.values() for one in queues_in(part)}


def test_two_fleets_stand_beside_each_other(account: Account, fleets: dict[str, Fleet]) -> None:
    assert [fleets[route].environment["DAGSTER_TASKIQ_ROUTE"] for route in ("default", "gpu")] == ["default", "gpu"]
    urls = {fleet.environment["DAGSTER_TASKIQ_SQS_QUEUE_URL"] for fleet in fleets.values()}
    assert {url.rpartition("/")[2] for url in urls} == {account.name}, "settings derive the queues of the route"
    logs = {fleet.container["logConfiguration"]["options"]["awslogs-group"] for fleet in fleets.values()}
    assert len(logs) == 2
    watch = client("cloudwatch", account.endpoint)
    for fleet, queue in ((fleets["default"], account.name), (fleets["gpu"], f"{account.name}-gpu")):
        body = watch.get_dashboard(DashboardName=fleet.stack)["DashboardBody"]
        assert set(re.findall(r'"Queue(?:Name)?", "([^"]*)"', body)) == {queue, f"{queue}-steps"}


@pytest.mark.parametrize(
    ("queue", "route", "work", "steps"),
    [
        ("tasks", "default", "tasks", "tasks-steps"),
        ("tasks.fifo", "default", "tasks.fifo", "tasks-steps.fifo"),
        ("tasks", "gpu", "tasks-gpu", "tasks-gpu-steps"),
        ("tasks.fifo", "gpu", "tasks-gpu.fifo", "tasks-gpu-steps.fifo"),
    ],
)
@pytest.mark.parametrize("serve", ["both", "runs", "steps"])
def test_a_fleet_is_scaled_and_watched_by_the_queues_of_its_route(
    queue: str, route: str, work: str, steps: str, serve: str
) -> None:
    resources = filled(serve, QueueName=queue, Route=route)
    of_runs, of_steps = {("Queue", work), ("QueueName", work)}, {("QueueName", steps)}
    wanted = {"both": of_runs | of_steps, "runs": of_runs, "steps": of_steps}[serve]
    for scales in ("BacklogPolicy", "WorkWaitsForTheFirstTask"):
        assert queues_in(resources[scales]) == wanted
    assert resources.keys() >= {"both": {"OldestRunAlarm", "OldestStepAlarm"}}.get(serve, set())
    for alarm, named in (
        ("OldestRunAlarm", of_runs),
        ("OldestStepAlarm", {("Queue", work), ("QueueName", steps)}),
        ("SlowCancellationAlarm", {("Queue", work)}),
        ("CleanupFailedAlarm", {("Queue", work)}),
    ):
        assert alarm not in resources or queues_in(resources[alarm]) == named
    body = resources["Dashboard"]["Properties"]["DashboardBody"]
    assert set(re.findall(r'"Queue(?:Name)?", "([^"]*)"', body)) == {work, steps}
    assert json.loads(body)["widgets"]


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


@pytest.mark.slow
def test_a_run_goes_through_the_containers_of_two_fleets_and_is_cancelled(
    fleets: dict[str, Fleet], tmp_path: Path
) -> None:
    """Its steps are sent from the fleet of the unnamed route to `gpu`; another run is on `gpu` as a whole."""
    unnamed = fleets["default"]
    queue_url = unnamed.endpoint + "/" + unnamed.queue_url.split("/", 3)[3]
    source = {"wait_time_seconds": 1, "visibility_timeout_seconds": 20, "status_poll_seconds": 60, "cancel_ttl": 90}
    write_home(tmp_path, queue_url, unnamed.endpoint, source=source, extra={})
    with ExitStack() as stack:
        instance = stack.enter_context(DagsterInstance.from_config(str(tmp_path)))
        platform = Platform(tmp_path, queue_url, unnamed.endpoint, instance, STEP_JOBS)
        workers: dict[str, WorkerProcess] = {}
        for route, fleet in fleets.items():
            agent = stack.enter_context(ecs_agent())
            environment = {key: value for key, value in fleet.environment.items() if not key.endswith("QUEUE_URL")}
            program = (sys.executable, str(ENTRYPOINT))
            worker = stack.enter_context(platform.worker(program=program, env=environment | agent.environment))
            workers[route] = worker
            work = queue_name(Settings(queue_url=queue_url, region_name=REGION).of_route(route).queue_url)
            assert f"is ready: it listens to {work} and {work}-steps" in worker.log()
        run_id = platform.launch("routed_dynamic_steps", seconds=300, count=2)
        whole = platform.launch("two_steps", tags={QUEUE_TAG: "gpu"}, seconds=300)
        platform.wait_started(run_id, 3)
        platform.wait_started(whole, 1)
        for one in (run_id, whole):
            assert platform.launcher.terminate(one)
        for one in (run_id, whole):
            assert platform.finished(one) is DagsterRunStatus.CANCELED, platform.story(one)
            platform.assert_nothing_left(one)
        for route, worker in workers.items():
            measured = {one["Queue"] for one in map(json.loads, worker.log().splitlines()) if "_aws" in one}
            assert measured == {unnamed.queue_url.rpartition("/")[2] + ("-gpu" if route == "gpu" else "")}
        name, told = unnamed.queue_url.rpartition("/")[2], "\n".join(platform.story(run_id))
        for queue, tasks in ((name, 1), (f"{name}-steps", 1), (f"{name}-gpu-steps", 2)):
            assert told.count(f"Submitted to queue {queue} as task") == tasks, told
        assert all(f"Submitted to queue {name}-gpu" in line for line in platform.story(whole) if "Submitted" in line)


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


def filled(serve: str = "both", **parameters: str) -> Any:
    """The resources for a fleet that takes this."""
    return Filled(INFRA / "workers.yaml", Serve=serve, **parameters).resources()


def value_of(listed: Any, ident: str, **metrics: float | None) -> float:
    """What an expression of the template gives for these values; None, or left out: there is no data."""
    known: dict[str, Any] = dict.fromkeys(one["Id"] for one in listed)
    assert metrics.keys() <= known.keys()
    known |= metrics
    known |= {"IF": lambda yes, one, other: one if yes else other, "FILL": lambda one, no: no if one is None else one}
    for one in listed:  # in their order: each uses those before it
        if "Expression" in one:
            text = one["Expression"].replace(" AND ", " and ")
            known[one["Id"]] = eval(text, {"__builtins__": {}}, known)  # noqa: S307 - our own template
    return float(known[ident])


def fullness(serve: str, *, fleet: dict[str, str] | None = None, **metrics: float) -> float:
    """What the service is scaled on: 1 is when its tasks are full."""
    policy = filled(serve, **fleet or {})["BacklogPolicy"]["Properties"]["TargetTrackingScalingPolicyConfiguration"]
    assert policy["TargetValue"] == 1
    return value_of(policy["CustomizedMetricSpecification"]["Metrics"], "backlog", **metrics)


def test_a_fleet_scales_on_what_waits_in_dagster() -> None:
    for serve in ("both", "runs"):
        assert fullness(serve, queued=40, waiting=1, working=8, tasks=2) == 24 / 4
        assert fullness(serve, queued=40, waiting=1) == 40 / 4, "no task yet"
        in_sqs = fullness(serve, waiting=12, working=8, tasks=2)
        assert in_sqs == 10 / 4, "another coordinator: they are in SQS"
    for serve in ("both", "steps"):
        assert fullness(serve, steps_waiting=12, steps_working=8, tasks=2) == 10 / 4
    most_steps = fullness("both", queued=2, working=2, steps_waiting=90, steps_working=10, tasks=4)
    assert most_steps == 25 / 4, "the greater backlog: runs that wait for a hundred steps are few"


def test_a_fleet_with_one_slot_for_each_task_has_a_task_for_each_piece_of_work() -> None:
    large = {"MaxRuns": "1", "MaxSteps": "1", "Route": "large"}
    assert fullness("both", fleet=large, steps_waiting=3, steps_working=1, tasks=1) == 4
    assert fullness("steps", fleet=large, steps_working=4, tasks=4) == 1
    uneven = {"MaxRuns": "1", "MaxSteps": "10"}
    assert fullness("both", fleet=uneven, working=1, steps_working=10, tasks=1) == 1, "full with either"
    assert fullness("both", fleet=uneven, queued=1, working=1, tasks=1) == 2, "one more run needs one more task"
    assert fullness("steps", fleet={"BacklogPerTask": "8"}, steps_waiting=12, steps_working=4, tasks=2) == 1


def test_a_fleet_wakes_up_for_what_waits() -> None:
    for serve in ("both", "runs"):
        wake_up = filled(serve)["WorkWaitsForTheFirstTask"]["Properties"]["Metrics"]
        assert value_of(wake_up, "asleep", queued=1) == 1, "SQS tells nothing when it was idle for hours"
        assert value_of(wake_up, "asleep", waiting=1, tasks=0) == 1
        assert value_of(wake_up, "asleep", queued=1, tasks=1) == 0
        assert value_of(wake_up, "asleep", queued=0, waiting=0) == 0
    for serve in ("both", "steps"):
        wake_up = filled(serve)["WorkWaitsForTheFirstTask"]["Properties"]["Metrics"]
        assert value_of(wake_up, "asleep", steps_waiting=1) == 1
        assert value_of(wake_up, "asleep", steps_waiting=1, tasks=1) == 0


def test_the_alarms_are_for_what_waits_and_not_for_what_takes_long() -> None:
    resources = filled()
    runs = resources["OldestRunAlarm"]["Properties"]["Metrics"]
    assert value_of(runs, "waited", oldest=1_000, waiting=1, age=5) == 1_000
    assert value_of(runs, "waited", oldest=0, waiting=0, working=1, age=5_000) == 0, "a run at work"
    assert value_of(runs, "waited", oldest=0, started=1_000) == 0, "it waits no longer, and the daemon knows"
    steps = resources["OldestStepAlarm"]["Properties"]["Metrics"]
    for in_sqs in (runs, steps):  # runs: of another coordinator
        assert value_of(in_sqs, "waited", waiting=0, working=1, age=5_000) == 0, "at work, and that takes long"
        assert value_of(in_sqs, "waited", waiting=1, working=1, age=5_000) == 0, "and one has just been sent"
        assert value_of(in_sqs, "waited", waiting=1, working=1, age=5_000, started=1_000) == 1_000
        assert value_of(in_sqs, "waited", waiting=2, working=0, age=5_000) == 5_000, "nobody takes any"
        assert value_of(in_sqs, "waited", waiting=2, age=5_000, started=3) == 5_000
        assert value_of(in_sqs, "waited") == 0


def test_the_cluster_is_associated_with_what_the_service_runs_on() -> None:
    cluster, workers = template("cluster.yaml")["Resources"], template("workers.yaml")["Resources"]
    association = cluster["CapacityProviders"]
    assert association["Type"] == "AWS::ECS::ClusterCapacityProviderAssociations"
    service = workers["Service"]["Properties"]
    (strategy,) = service["CapacityProviderStrategy"]
    assert set(strategy["CapacityProvider"][1:]) == set(association["Properties"]["CapacityProviders"])
    assert "DesiredCount" not in service, "each update would undo what scaling has done"
    assert cluster["EcsCluster"]["Properties"]["ClusterSettings"] == [{"Name": "containerInsights", "Value": "enabled"}]
