"""`dagster-taskiq doctor` asks IAM what the credentials may do, and tries it where IAM does not tell."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from dagster import DagsterInstance
from tests.acceptance.operator.test_cli import Desk
from tests.acceptance.operator.test_doctor import Clinic
from tests.support.iam import FakeIam, iam_server
from tests.support.moto import create_queues
from tests.support.proxy import sqs_proxy

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.storage.heartbeats import Heartbeats

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

ROLE = "arn:aws:sts::123456789012:assumed-role/workers/0a1b2c"
WHOLE_ROLE = "arn:aws:iam::123456789012:role/data/workers"
USER = "arn:aws:iam::123456789012:user/people/ada"
ROOT = "arn:aws:iam::123456789012:root"
WHO = ("launcher", "worker")
LOOKS = {"sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:ChangeMessageVisibility", "sqs:GetQueueAttributes"}
BY_IAM, BY_TRYING = "says iam:SimulatePrincipalPolicy", "was tried"


@dataclass
class Ward:
    """A healthy platform whose queues are reached as those of AWS are: without `endpoint_url`."""

    clinic: Clinic
    iam: FakeIam

    @property
    def name(self) -> str:
        return queue_name(self.clinic.desk.queue_url)

    def forbid(self, action: str, suffix: str) -> None:
        """As AWS does it: IAM denies it, and SQS refuses it."""
        self.iam.denied[f"sqs:{action}", self.name + suffix] = "implicitDeny"
        self.clinic.proxy.fail_with(403, queue=suffix, action=action)

    def permissions(self) -> list[tuple[str, str, str]]:
        """Verdict, reason and repair: of a launcher, and of a worker."""
        found = self.checked()
        return [found[f"permissions of a {who}"] for who in WHO]

    def checked(self) -> dict[str, tuple[str, str, str]]:
        """Verdict, reason and repair of each check."""
        self.clinic.write()
        ended, findings = self.clinic.examined()
        assert ended.code == int(any(one["verdict"] == "error" for one in findings)), findings
        return {one["check"]: (one["verdict"], one["reason"], one["repair"]) for one in findings}


@pytest.fixture
def ward(tmp_path: Path, endpoint: str) -> Iterator[Ward]:
    with sqs_proxy(endpoint) as proxy, iam_server(ROLE, "/data/") as iam:
        clinic = Clinic(Desk(tmp_path, endpoint, create_queues(endpoint, f"tasks-{uuid4()}")), proxy)
        clinic.config["endpoint_url"] = None
        clinic.environ |= {
            "AWS_ENDPOINT_URL_SQS": proxy.url,
            "AWS_ENDPOINT_URL_IAM": iam.url,
            "AWS_ENDPOINT_URL_STS": iam.url,
            "AWS_ENDPOINT_URL_S3": endpoint,
        }
        yield Ward(clinic, iam)


def test_iam_is_asked_for_what_is_needed_and_nothing_else(ward: Ward) -> None:
    ward.clinic.source["payload_bucket"] = "too-large"
    launcher, worker = ward.permissions()
    for verdict, reason, _ in (launcher, worker):
        assert verdict == "ok"
        assert reason.startswith(WHOLE_ROLE), "with the path, which the assumed role's ARN lacks"
        assert BY_IAM in reason
    arn = f"arn:aws:sqs:us-east-1:123456789012:{ward.name}"
    objects = "arn:aws:s3:::too-large/dagster-taskiq/payloads/doctor"
    needed = {
        arn: {"sqs:SendMessage", *LOOKS},
        f"{arn}-steps": {"sqs:SendMessage", *LOOKS},
        f"{arn}-cancels": {"sqs:SendMessage", *LOOKS},
        objects: {"s3:PutObject", "s3:GetObject", "s3:DeleteObject"},
    }
    asked = {(WHOLE_ROLE, action, resource) for resource, actions in needed.items() for action in actions}
    assert ward.iam.simulated == asked


def test_a_worker_receives_only_from_the_queues_of_its_route_and_sends_to_those_of_all(ward: Ward) -> None:
    for route in ("gpu", "ml"):
        create_queues(ward.clinic.desk.endpoint_url, f"{ward.name}-{route}")
    ward.clinic.source["routes"] = [{"route": "ml", "code_location": "ml"}]
    ward.clinic.source["serves"] = ["gpu"]
    assert [verdict for verdict, _, _ in ward.permissions()] == ["ok", "ok"]
    arn = f"arn:aws:sqs:us-east-1:123456789012:{ward.name}"
    sent = {f"{arn}{of_route}{suffix}" for of_route in ("", "-gpu", "-ml") for suffix in ("", "-steps", "-cancels")}
    taken = {f"{arn}-gpu{suffix}" for suffix in ("", "-steps", "-cancels")}
    needed = {resource: {"sqs:SendMessage"} for resource in sent} | {one: {"sqs:SendMessage", *LOOKS} for one in taken}
    asked = {(WHOLE_ROLE, action, resource) for resource, actions in needed.items() for action in actions}
    assert ward.iam.simulated == asked

    ward.forbid("SendMessage", "-ml-steps")
    found = {check: said for check, said in ward.checked().items() if check.startswith("permissions ")}
    (verdict, reason, repair) = found.pop("permissions for route ml")
    assert verdict == "warning", "a launcher sends no steps"
    assert f"lacks sqs:SendMessage on {arn}-ml-steps (implicitDeny), which a worker needs, " in reason
    assert "attach WorkerPolicy " in repair
    assert "SendToRoutes=true" in repair
    assert [verdict for verdict, *_ in found.values()] == ["ok", "ok", "ok"], found
    assert "permissions for route gpu" in found

    ward.forbid("SendMessage", "-ml-cancels")
    (verdict, reason, repair) = ward.checked()["permissions for route ml"]
    assert verdict == "error"
    assert ", which launcher and worker need, " in reason
    assert "attach LauncherPolicy or WorkerPolicy " in repair


def test_a_route_that_only_a_living_worker_names_is_looked_at(ward: Ward) -> None:
    create_queues(ward.clinic.desk.endpoint_url, f"{ward.name}-gpu")
    ward.clinic.write()
    with DagsterInstance.from_config(str(ward.clinic.desk.home)) as instance:
        facts = {"slots": [1, 4], "queue": ward.name, "routes": ["gpu"]}
        Heartbeats(instance, 30, 10).beat("loader", facts)
    assert ward.checked()["permissions for route gpu"][0] == "ok"
    ward.forbid("SendMessage", "-gpu")
    verdict, reason, _ = ward.checked()["permissions for route gpu"]
    assert (verdict, f"{ward.name}-gpu (implicitDeny), which a launcher needs, " in reason) == ("warning", True)


def test_what_is_denied_is_named_with_what_to_add(ward: Ward) -> None:
    """Neither a launcher nor a worker could work with these: two errors."""
    ward.iam.caller = USER
    ward.forbid("SendMessage", "-cancels")
    ward.iam.denied["s3:GetObject", "nobody-has-it/dagster-taskiq/payloads/doctor"] = "explicitDeny"
    ward.clinic.source["payload_bucket"] = "nobody-has-it"
    for who, (verdict, reason, repair) in zip(WHO, ward.permissions(), strict=True):
        assert verdict == "error"
        assert reason.startswith(USER)
        lacks = f"sqs:SendMessage on arn:aws:sqs:us-east-1:123456789012:{ward.name}-cancels (implicitDeny)"
        assert lacks in reason
        assert BY_IAM in reason
        object_named = "s3:GetObject on arn:aws:s3:::nobody-has-it/dagster-taskiq/payloads/doctor (explicitDeny)"
        assert (object_named in reason) is (who == "worker")
        expected = "LauncherPolicy" if who == "launcher" else "WorkerPolicy and PayloadPolicy"
        assert f"attach {expected} of infra/queues.yaml" in repair
        assert ("remove what denies it" in repair) is (who == "worker")


def test_a_launchers_role_need_not_be_a_workers(ward: Ward) -> None:
    ward.forbid("ReceiveMessage", "")
    launcher, worker = ward.permissions()
    assert launcher[0] == "ok"
    assert worker[0] == "warning"
    assert "sqs:ReceiveMessage on" in worker[1]


def test_what_the_queues_own_policy_allows_is_not_denied(ward: Ward) -> None:
    ward.iam.denied["sqs:SendMessage", ward.name] = "implicitDeny"  # and SQS does it
    assert [verdict for verdict, _, _ in ward.permissions()] == ["ok", "ok"]


@pytest.mark.parametrize("why", ["no GetRole", "no Simulate", "root", "no answer", "nobody there"])
def test_where_iam_does_not_tell_it_is_tried(ward: Ward, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no answer":
        monkeypatch.setattr("dagster_taskiq.sqs.permissions._WITHIN_S", 1.0)
        ward.iam.hangs = True
    elif why == "nobody there":
        ward.clinic.environ["AWS_ENDPOINT_URL_IAM"] = "http://127.0.0.1:9"
    elif why == "root":
        ward.iam.caller = ROOT
    else:
        ward.iam.refused.add({"no GetRole": "GetRole", "no Simulate": "SimulatePrincipalPolicy"}[why])
    ward.forbid("ChangeMessageVisibility", "-steps")
    launcher, worker = ward.permissions()
    assert launcher[0] == "ok"
    assert worker[0] == "warning"
    assert f"sqs:ChangeMessageVisibility on {ward.name}-steps" in worker[1]
    assert BY_TRYING in launcher[1]
    assert BY_TRYING in worker[1]


def test_an_emulator_is_not_asked(ward: Ward) -> None:
    ward.clinic.config["endpoint_url"] = ward.clinic.proxy.url
    assert all(BY_TRYING in reason for _, reason, _ in ward.permissions())
    assert ward.iam.simulated == set()
