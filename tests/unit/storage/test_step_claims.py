"""What the claim on a step says of its route, and that workers of other versions understand it."""

import json

from dagster import DagsterInstance, job

from dagster_taskiq.dagster_compat.key_values import insert_value, values_between
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.step_claims import StepClaims, StepState


@job
def nothing() -> None: ...


def rows(instance: DagsterInstance) -> dict[str, dict[str, str]]:
    found = values_between(instance, "dagster-taskiq/step/", "dagster-taskiq/step/g")
    return {key: json.loads(value) for key, value in found.items()}


def test_a_claim_names_the_route_of_its_step_to_its_end() -> None:
    with DagsterInstance.ephemeral() as instance:
        run, claims = instance.create_run_for_job(nothing), StepClaims(instance)
        plain, gpu = StepRef("plain", "task-1"), StepRef("large", "task-2", "gpu")
        for step in (plain, gpu):
            claims.claim(run, step, "w1", "there")
        running = claims.running(run.run_id)
        assert {task_id: claim.route for task_id, claim in running.items()} == {"task-1": "default", "task-2": "gpu"}
        assert claims.lose(run.run_id, gpu, "w1")
        assert claims.end(run.run_id, plain, "w1")
        assert claims.running(run.run_id) == {}
        found = claims.find(run.run_id, gpu)
        assert found is not None
        assert (found.state, found.route) == (StepState.LOST, "gpu")


def test_who_does_not_know_the_route_can_end_a_claim_but_only_of_its_worker() -> None:
    with DagsterInstance.ephemeral() as instance:
        run, claims = instance.create_run_for_job(nothing), StepClaims(instance)
        claims.claim(run, StepRef("large", "task-1", "gpu"), "w1", "there")
        assert not claims.lose(run.run_id, StepRef("large", "task-1"), "w2")
        assert claims.lose(run.run_id, StepRef("large", "task-1"), "w1")
        assert not claims.end(run.run_id, StepRef("large", "task-1"), "w1")
        assert {(row["state"], row["route"]) for row in rows(instance).values()} == {("lost", "gpu")}


def test_rows_of_the_unnamed_route_are_those_of_older_workers() -> None:
    """They compare the whole text of a row, which this version writes as they do."""
    with DagsterInstance.ephemeral() as instance:
        run, step = instance.create_run_for_job(nothing), StepRef("plain", "task-1")
        StepClaims(instance).claim(run, step, "w1", "there")
        ((key, row),) = rows(instance).items()
        assert list(row) == ["run_id", "step_key", "task_id", "worker_id", "state"]
    with DagsterInstance.ephemeral() as other:
        insert_value(other, key, json.dumps(row))
        assert StepClaims(other).end(run.run_id, step, "w1")


def test_a_row_with_a_damaged_route_is_a_claim_all_the_same() -> None:
    with DagsterInstance.ephemeral() as instance:
        run, step = instance.create_run_for_job(nothing), StepRef("large", "task-1", "gpu")
        claims = StepClaims(instance)
        claims.claim(run, step, "w1", "there")
        ((key, row),) = rows(instance).items()
        instance.daemon_cursor_storage.set_cursor_values({key: json.dumps({**row, "route": "../other"})})
        assert [claim.route for claim in claims.running(run.run_id).values()] == ["default"], "and it is waited for"
