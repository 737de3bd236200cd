"""The CloudFormation template: linted, deployed to an emulator, and a run cancelled through the queues that it made."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import botocore.session
import pytest
from dagster import DagsterInstance, DagsterRunStatus
from tests.support.moto import CREDENTIALS, REGION, sqs_client
from tests.support.platform import Platform, write_home

from dagster_taskiq import Settings
from dagster_taskiq.queue_names import is_route, queue_name
from dagster_taskiq.sqs.admin import queue_urls
from dagster_taskiq.sqs.permissions import NEEDS

pytestmark = pytest.mark.acceptance

TEMPLATE: Final = Path(__file__).parents[3] / "infra" / "queues.yaml"
LOOKS: Final = {"sqs:GetQueueUrl", "sqs:GetQueueAttributes"}
"""For `queue status` and `doctor`."""

BUCKET: Final = "too-large-for-a-message"
KEY: Final = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@dataclass
class Stack:
    """A deployed template."""

    name: str
    endpoint: str
    outputs: dict[str, str]

    def url(self, output: str) -> str:
        """A queue's URL as it is reached here: the emulator answers with one of AWS's own hosts."""
        return self.endpoint + urlsplit(self.outputs[output]).path


def client(service: str, endpoint: str) -> Any:
    session = botocore.session.Session()
    session.set_credentials(CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
    return session.create_client(service, region_name=REGION, endpoint_url=endpoint)


@contextmanager
def deployed(endpoint: str, name: str, **parameters: str) -> Iterator[Stack]:
    cloud = client("cloudformation", endpoint)
    cloud.create_stack(
        StackName=name,
        TemplateBody=TEMPLATE.read_text(),
        Capabilities=["CAPABILITY_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
    )
    (described,) = cloud.describe_stacks(StackName=name)["Stacks"]
    assert described["StackStatus"] == "CREATE_COMPLETE", described
    yield Stack(name, endpoint, {output["OutputKey"]: output["OutputValue"] for output in described["Outputs"]})
    cloud.delete_stack(StackName=name)
    cloud.close()


@pytest.fixture(params=["false", "true"], ids=["standard", "fifo"])
def fifo(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stack(fifo: str, endpoint: str) -> Iterator[Stack]:
    name = f"stack-{uuid4().hex[:8]}"
    parameters = {"QueueName": name, "Fifo": fifo, "VisibilityTimeout": "8"}
    if fifo == "true":
        parameters |= {"PayloadBucket": BUCKET, "PayloadKmsKeyArn": KEY}
    with deployed(endpoint, name, **parameters) as stack:
        yield stack


@dataclass
class Routes:
    """The stacks of two routes of one deployment, the unnamed one and `gpu`."""

    unnamed: Stack
    gpu: Stack


@pytest.fixture
def routes(fifo: str, endpoint: str) -> Iterator[Routes]:
    name = f"stack-{uuid4().hex[:8]}"
    with (
        deployed(endpoint, name, QueueName=name, Fifo=fifo, SendToRoutes="true") as unnamed,
        deployed(endpoint, f"{name}-gpu", QueueName=name, Fifo=fifo, Route="gpu") as gpu,
    ):
        yield Routes(unnamed, gpu)


def test_the_queues_are_those_that_launcher_and_worker_derive(stack: Stack) -> None:
    derived = queue_urls(stack.url("QueueUrl"))
    assert derived["work"] == stack.url("WorkQueueUrl")
    assert derived["steps"] == stack.url("StepQueueUrl")
    assert derived["cancels"] == stack.url("CancelQueueUrl")
    sqs = sqs_client(stack.endpoint)
    for role, url in derived.items():
        attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        assert attributes["VisibilityTimeout"] == ("5" if role == "cancels" else "8")
        assert attributes["MessageRetentionPeriod"] == ("600" if role == "cancels" else "1209600")
        assert "RedrivePolicy" not in attributes
        assert (attributes.get("FifoQueue") == "true") is queue_name(url).endswith(".fifo")
    sqs.close()


def test_the_policies_allow_what_is_needed_and_nothing_else(stack: Stack) -> None:
    work, steps, cancels = queues(stack)
    names = {"work": work, "steps": steps, "cancels": cancels}
    for who, output in (("launcher", "LauncherPolicyArn"), ("worker", "WorkerPolicyArn")):
        needed = {names[role]: {*actions, *LOOKS} for role, actions in NEEDS[who].items() if role in names}
        assert allowed(stack, output) == needed
    if "PayloadPolicyArn" in stack.outputs:
        assert allowed(stack, "PayloadPolicyArn") == {
            f"{BUCKET}/dagster-taskiq/payloads/*": set(NEEDS["worker"]["payloads"]),
            KEY.rpartition(":")[2]: {"kms:Decrypt", "kms:GenerateDataKey"},
        }
    assert ("PayloadPolicyArn" in stack.outputs) is queue_name(work).endswith(".fifo")


def test_the_queues_of_a_route_are_derived_from_those_of_the_unnamed_one(routes: Routes) -> None:
    assert routes.gpu.outputs["QueueUrl"] == routes.unnamed.outputs["QueueUrl"], "one queue_url for all"
    settings = Settings(queue_url=routes.gpu.url("QueueUrl"), region_name=REGION).of_route("gpu")
    derived = [settings.queue_url, settings.steps_queue_url, settings.cancel_queue_url]
    assert derived == [routes.gpu.url(name) for name in ("WorkQueueUrl", "StepQueueUrl", "CancelQueueUrl")]
    sqs = sqs_client(routes.gpu.endpoint)
    for url in derived:
        sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
    sqs.close()


def test_everybody_may_send_to_a_route_and_only_its_workers_receive_from_it(routes: Routes) -> None:
    launcher = allowed(routes.unnamed, "LauncherPolicyArn")
    workers = {"default": allowed(routes.unnamed, "WorkerPolicyArn"), "gpu": allowed(routes.gpu, "WorkerPolicyArn")}
    assert "LauncherPolicyArn" not in routes.gpu.outputs, "one policy of the launcher is for all routes"
    base = Settings(queue_url=routes.unnamed.url("QueueUrl"), region_name=REGION)
    takes = set(NEEDS["worker"]["work"])
    for route in ("default", "gpu", "made-tomorrow"):
        urls = queue_urls(base.of_route(route).queue_url)
        names = {role: queue_name(url) for role, url in urls.items()}
        assert {"sqs:SendMessage", *LOOKS} <= may(launcher, names["work"]) & may(launcher, names["cancels"])
        for own, worker in workers.items():
            for name in names.values():
                assert (takes <= may(worker, name)) is (route == own), (route, own, name)
                assert ("sqs:ReceiveMessage" in may(worker, name)) is (route == own)
            assert {"sqs:SendMessage", *LOOKS} <= may(worker, names["steps"]) & may(worker, names["cancels"])
            assert "sqs:SendMessage" not in may(worker, names["work"])
    assert may(launcher, "of-somebody-else") == {"sqs:ListQueues"}
    assert not any(may(worker, "of-somebody-else") for worker in workers.values())


@pytest.mark.parametrize("name", ["queues.yaml", "workers.yaml"])
@pytest.mark.parametrize(
    "route", ["default", "gpu", "2", "a_b-c", "my-steps-2", "", "-a", "a-", "A", "a.b", "steps", "my-cancels", "a" * 31]
)
def test_the_template_admits_the_names_that_the_settings_admit(name: str, route: str) -> None:
    template = (TEMPLATE.parent / name).read_text()
    pattern = re.search(r'\n  Route:\n(?:    .*\n)+?    AllowedPattern: "(.*)"\n', template)
    assert pattern
    assert (re.fullmatch(pattern[1], route) is not None) is is_route(route)


def may(policy: dict[str, set[str]], name: str) -> set[str]:
    """Which actions a policy allows on the queue of that name."""
    return {action for pattern, actions in policy.items() if fnmatchcase(name, pattern) for action in actions}


def queues(stack: Stack) -> list[str]:
    return [queue_name(url) for url in queue_urls(stack.url("QueueUrl")).values()]


def allowed(stack: Stack, output: str) -> dict[str, set[str]]:
    """Which actions a policy allows on which queue."""
    iam = client("iam", stack.endpoint)
    arn = stack.outputs[output]
    version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
    document = iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
    iam.close()
    document = json.loads(document) if isinstance(document, str) else document
    found: dict[str, set[str]] = {}
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"]
        resources = statement["Resource"]
        for resource in [resources] if isinstance(resources, str) else resources:
            found.setdefault(resource.rsplit(":", 1)[-1], set()).update(
                [actions] if isinstance(actions, str) else actions
            )
    return found


@pytest.mark.slow
def test_a_run_is_cancelled_through_the_queues_of_the_template(stack: Stack, tmp_path: Path) -> None:
    queue_url = stack.url("QueueUrl")
    # Long status polls: it is the cancel queue of the template that has to carry the cancellation.
    source = {"wait_time_seconds": 1, "visibility_timeout_seconds": 8, "status_poll_seconds": 60, "cancel_ttl": 90}
    write_home(tmp_path, queue_url, stack.endpoint, source=source, extra={})
    with DagsterInstance.from_config(str(tmp_path)) as instance:
        platform = Platform(tmp_path, queue_url, stack.endpoint, instance)
        with platform.worker():
            run_id = platform.launch("sleepy_job")
            platform.marked(run_id, "started")
            assert platform.launcher.terminate(run_id)
            assert platform.finished(run_id) is DagsterRunStatus.CANCELED
            platform.assert_nothing_left(run_id)
