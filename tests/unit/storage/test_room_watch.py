"""Runs that came into the queue before routes were in use are given theirs."""

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRunStatus
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.room_watch import RoomWatch
from dagster_taskiq.storage.routing import Routing, route_of_run
from dagster_taskiq.storage.tags import QUEUE_TAG, ROUTE_TAG

SETTINGS = Settings(queue_url="https://sqs.us-east-1.amazonaws.com/123456789012/q", region_name="us-east-1")


ORIGIN = RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("shop"), "__repository__"), "nothing")


def put_into_queue(instance: DagsterInstance, route: str) -> str:
    tags, queued = {QUEUE_TAG: route}, DagsterRunStatus.QUEUED
    return str(create_run_for_test(instance, status=queued, tags=tags, remote_job_origin=ORIGIN).run_id)


def test_runs_that_have_left_the_queue_keep_no_other_from_its_route() -> None:
    with DagsterInstance.ephemeral() as instance:
        watch, routing = RoomWatch(instance, SETTINGS, look_ahead=1), Routing(instance, SETTINGS)

        def look() -> None:
            watch.look({"gpu": 1})
            watch.tag_what_waits(routing)

        unroutable = [put_into_queue(instance, "no route!") for _ in range(2)]
        look()
        for run_id in unroutable:
            failed = DagsterEvent(DagsterEventType.RUN_FAILURE.value, "nothing", message="no such route")
            instance.report_dagster_event(failed, run_id)
        later = put_into_queue(instance, "gpu")
        look()
        run = instance.get_run_by_id(later)
        assert run is not None
        assert ROUTE_TAG in run.tags, "it was taken for one that cannot be given a route"
        assert route_of_run(run) == "gpu"
