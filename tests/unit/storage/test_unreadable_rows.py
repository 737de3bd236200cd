"""A row of ours that is damaged, or of another version, keeps nobody from launching, working, holding and looking."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test
from tests.unit.storage.test_waiting import SETTINGS

from dagster_taskiq.dagster_compat.storage import put_value, values_under
from dagster_taskiq.run_fence import Fence, fence_for, put_up
from dagster_taskiq.run_query import RunQuery
from dagster_taskiq.storage.claims import Claims, ClaimState, forget_old_claims, held_claims
from dagster_taskiq.storage.fleet import HOLD_KEY, forget_old_stops, hold_fleet, read_hold, release_fleet, stop_key
from dagster_taskiq.storage.fleet_state import look_at_fleet
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.hold_notes import HoldNotes
from dagster_taskiq.storage.leadership import Leadership
from dagster_taskiq.storage.slots import RunSlots
from dagster_taskiq.storage.workers import list_workers
from dagster_taskiq.worker.orders import Orders

NO_TIMES: list[Any] = ["x", None, 1e300, float("nan"), [], 10**400]


def damaged_rows(now: float) -> list[str]:
    """What somebody has written at that time, in seconds since the epoch."""
    return [
        *("", "of a later version", "[]", "null", "5", '"x"', "[1]", "[{}]", "{}", "[" * 100_000),
        *(json.dumps({"since": at, "at": at, "until": at}) for at in NO_TIMES),
        json.dumps(
            {"at": now, "since": "x", "slots": 5, "work": 5, "stopping": 3, "queue": {}, "unusable": 7, "held": []}
        ),
        json.dumps({"at": now, "slots": ["a", "b"], "work": [[1]], "since": [], "stopping": {}, "where": {}}),
        json.dumps({"at": now, "slots": [1, 2], "work": [["r", "s", "t"]], "stopping": {"at": "x"}, "unusable": [{}]}),
        json.dumps([{"fence_id": 5, "until": now + 600, "query": {"job": ["x"], "tags": [1], "where": 7}}]),
    ]


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture(params=range(len(damaged_rows(0))), ids=lambda number: f"row {number}")
def damaged(request: pytest.FixtureRequest) -> str:
    return damaged_rows(time.time())[int(request.param)]


def run_of(instance: DagsterInstance, status: DagsterRunStatus = DagsterRunStatus.STARTING) -> DagsterRun:
    run: DagsterRun = create_run_for_test(instance, status=status)
    return run


def test_a_damaged_hold_or_request_to_stop_holds_and_stops_nobody(instance: DagsterInstance, damaged: str) -> None:
    damaged = damaged if damaged != "{}" else "[{}]"  # that is one, without an author
    asked: list[Any] = []
    orders = Orders("w", asked.append, 5)
    put_value(instance, HOLD_KEY, damaged)
    put_value(instance, stop_key("w"), damaged)
    if "slots" not in damaged or '"since": 3' in damaged:
        assert read_hold(instance) is None
    orders.hear({HOLD_KEY: damaged})
    look_at_fleet(instance, SETTINGS).to_json()
    forget_old_stops(instance)
    put_value(instance, "dagster-taskiq/fleet-hold-noted", damaged)
    hold = hold_fleet(instance, reason="migration", by="ada")
    assert read_hold(instance) == hold
    run = run_of(instance)
    HoldNotes(instance).write(hold)
    notes = [entry.dagster_event for entry in instance.all_logs(run.run_id)]
    assert any("migration" in (note.message or "") for note in notes if note is not None)
    put_value(instance, HOLD_KEY, damaged)
    release_fleet(instance)
    assert HOLD_KEY not in values_under(instance, HOLD_KEY), "a release removes it, whatever it is"


def test_a_damaged_heartbeat_costs_no_other_worker_its_slots(instance: DagsterInstance, damaged: str) -> None:
    heartbeats = Heartbeats.of_runs(instance, SETTINGS)
    heartbeats.beat("well-00000001", {"slots": [3, 4]})
    put_value(instance, "dagster-taskiq/heartbeat/ill-00000002", damaged)
    slots = RunSlots(instance, SETTINGS).count()
    assert slots == (4 if '"slots": [1, 2]' in damaged else 3)
    assert "well-00000001" in [worker.worker_id for worker in list_workers(instance, SETTINGS)]
    assert heartbeats.alive(["well-00000001", "ill-00000002"]) == {"well-00000001", "ill-00000002"}, "in doubt"
    list_workers(instance, SETTINGS, everybody=True)
    heartbeats.forget_the_long_dead()


def test_a_damaged_claim_is_taken_over_and_hides_no_other_one(instance: DagsterInstance, damaged: str) -> None:
    claims, run, other = Claims.of(instance, SETTINGS), run_of(instance), run_of(instance)
    assert claims.take(other, "well", "task", "here", None)
    put_value(instance, f"dagster-taskiq/claim/{run.run_id}", damaged)
    rows, *_ = claims.unfinished()
    assert rows.keys() == {run.run_id, other.run_id}
    owner = claims.owner(run.run_id)
    assert owner is not None
    assert owner.in_doubt, "nobody begins what another worker may be at work on"
    mine = claims.take(run, "well", "task", "here", owner.claim)
    assert mine is not None
    assert [claim.worker_id for claim in held_claims(instance)] == ["well", "well"]
    put_value(instance, f"dagster-taskiq/claim/{run.run_id}", damaged)
    instance.delete_run(run.run_id)
    passed_s = 0.0
    patient = Heartbeats(instance, 1, 1, monotonic=lambda: passed_s)
    patient.look(["(unknown)"])
    passed_s = 60.0
    forget_old_claims(instance, patient)
    assert [claim.run_id for claim in held_claims(instance)] == [other.run_id]


def test_a_claim_in_a_state_of_a_later_version_is_its_workers(instance: DagsterInstance) -> None:
    claims, run = Claims.of(instance, SETTINGS), run_of(instance)
    taken = claims.take(run, "newer", "task", "here", None)
    assert taken is not None
    facts = {**json.loads(taken.stored), "state": "suspended", "more": [1]}
    put_value(instance, f"dagster-taskiq/claim/{run.run_id}", json.dumps(facts))
    claim = claims.read([run.run_id])[run.run_id]
    assert (claim.worker_id, claim.state, claim.epoch) == ("newer", ClaimState.HELD, taken.epoch)


def test_damaged_fences_keep_no_run_from_being_launched_and_no_fence_from_standing(
    instance: DagsterInstance, damaged: str
) -> None:
    run, meant = run_of(instance), create_run_for_test(instance, "load", tags={"n": "many"})
    put_value(instance, "dagster-taskiq/fences", damaged)
    assert fence_for(instance, run) is None
    fence = Fence(RunQuery(job="load"), time.time() + 600, None, "ada")
    put_up(instance, fence)
    assert fence_for(instance, meant) == fence
    assert fence_for(instance, run) is None


def test_a_fence_that_cannot_be_asked_of_a_run_hides_no_other_one(instance: DagsterInstance) -> None:
    run = create_run_for_test(instance, "load", tags={"n": "many"})
    later = {
        "fence_id": "l",
        "until": time.time() + 600,
        "reason": None,
        "requested_by": "ada",
        "query": {"job": "load", "x": 1},
    }
    put_value(instance, "dagster-taskiq/fences", json.dumps([later]))
    put_up(instance, Fence(RunQuery(where="number(tags['n']) > 3"), time.time() + 600, None, "ada"))
    assert fence_for(instance, run) is None, "what a later version means is not guessed"
    put_up(instance, fence := Fence(RunQuery(job="load"), time.time() + 600, None, "ada"))
    assert fence_for(instance, run) == fence
    assert '"x": 1' in values_under(instance, "dagster-taskiq/fences")["dagster-taskiq/fences"], "others may know it"


def test_a_damaged_row_of_the_leader_lapses(instance: DagsterInstance, damaged: str) -> None:
    now = 0.0
    leadership = Leadership(instance, "look", "w", 5, monotonic=lambda: now)
    put_value(instance, leadership._key, damaged)
    assert not leadership.take()
    now = 6.0
    assert leadership.take()
