"""The final state of a run, as a table."""

import pytest
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.worker.finalization import FinalAction, RunOutcome, decide

S, E, K, V = DagsterRunStatus, DagsterEventType, CancelKind, FinalAction

TABLE: list[tuple[str, RunOutcome, FinalAction]] = [
    ("deleted", RunOutcome(None), V.NOTHING),
    ("finished by the child", RunOutcome(S.SUCCESS, [E.RUN_SUCCESS]), V.NOTHING),
    ("failed by the child", RunOutcome(S.FAILURE, [E.RUN_FAILURE]), V.NOTHING),
    ("marked CANCELED", RunOutcome(S.CANCELED, [E.RUN_CANCELED], K.REQUESTED), V.NOTHING),
    ("marked CANCELED, then a late SUCCESS", RunOutcome(S.SUCCESS, [E.RUN_CANCELED, E.RUN_SUCCESS]), V.RESTORE),
    ("marked CANCELED after a SUCCESS", RunOutcome(S.CANCELED, [E.RUN_SUCCESS, E.RUN_CANCELED]), V.NOTHING),
    ("SUCCESS, then a late CANCELING", RunOutcome(S.CANCELING, [E.RUN_SUCCESS], K.REQUESTED), V.RESTORE),
    ("marked FAILURE", RunOutcome(S.FAILURE, [E.RUN_FAILURE], K.REQUESTED), V.NOTHING),
    ("terminated", RunOutcome(S.CANCELING, kind=K.REQUESTED, held=E.RUN_CANCELED, took_hold=True), V.CANCELED),
    ("terminated, killed", RunOutcome(S.CANCELING, kind=K.REQUESTED), V.CANCELED),
    ("terminated, failed meanwhile", RunOutcome(S.CANCELING, kind=K.REQUESTED, held=E.RUN_FAILURE), V.CANCELED),
    ("terminated, had finished", RunOutcome(S.CANCELING, kind=K.REQUESTED, held=E.RUN_SUCCESS), V.SUCCESS),
    (
        "terminated, swallowed it",
        RunOutcome(S.CANCELING, kind=K.REQUESTED, held=E.RUN_SUCCESS, took_hold=True),
        V.CANCELED,
    ),
    ("cancelled by a bare message", RunOutcome(S.STARTED, kind=K.REQUESTED), V.CANCELED),
    ("CANCELING when the child died", RunOutcome(S.CANCELING), V.CANCELED),
    ("CANCELING when the worker shut down", RunOutcome(S.CANCELING, kind=K.SHUTDOWN), V.CANCELED),
    ("CANCELING, but another worker has taken over", RunOutcome(S.CANCELING, kind=K.LEASE_LOST), V.NOTHING),
    ("lease lost", RunOutcome(S.STARTED, kind=K.LEASE_LOST), V.NOTHING),
    ("shutdown", RunOutcome(S.STARTED, kind=K.SHUTDOWN, held=E.RUN_FAILURE, took_hold=True), V.FAILURE),
    ("shutdown, resumable", RunOutcome(S.STARTED, kind=K.SHUTDOWN, took_hold=True, will_resume=True), V.RESUMABLE),
    ("shutdown, had finished", RunOutcome(S.STARTED, kind=K.SHUTDOWN, held=E.RUN_SUCCESS, will_resume=True), V.HELD),
    ("shutdown before RUN_START", RunOutcome(S.STARTING, kind=K.SHUTDOWN, held=E.RUN_FAILURE), V.RESUMABLE),
    ("kept by its threads", RunOutcome(S.STARTED, held=E.RUN_SUCCESS, came_first=True), V.HELD),
    ("kept by them after it failed", RunOutcome(S.STARTED, held=E.RUN_FAILURE, came_first=True), V.HELD),
    (
        "shut down while they kept it",
        RunOutcome(S.STARTED, kind=K.SHUTDOWN, held=E.RUN_SUCCESS, came_first=True, took_hold=True, will_resume=True),
        V.HELD,
    ),
    (
        "shut down while they kept it, failed",
        RunOutcome(S.STARTED, kind=K.SHUTDOWN, held=E.RUN_FAILURE, came_first=True, will_resume=True),
        V.HELD,
    ),
    (
        "terminated while they kept it",
        RunOutcome(S.CANCELING, kind=K.REQUESTED, held=E.RUN_SUCCESS, came_first=True),
        V.SUCCESS,
    ),
    (
        "terminated while they kept it, and killed",
        RunOutcome(S.CANCELING, kind=K.REQUESTED, held=E.RUN_SUCCESS, came_first=True, took_hold=True),
        V.CANCELED,
    ),
    ("bare SIGTERM", RunOutcome(S.STARTED, held=E.RUN_FAILURE, took_hold=True), V.HELD),
    ("bare SIGTERM, resumable", RunOutcome(S.STARTED, will_resume=True, clean_exit=True), V.RESUMABLE),
    ("timed out", RunOutcome(S.CANCELING, kind=K.DEADLINE, held=E.RUN_CANCELED, took_hold=True), V.FAILURE),
    ("timed out, not marked", RunOutcome(S.STARTED, kind=K.DEADLINE, held=E.RUN_FAILURE, took_hold=True), V.FAILURE),
    ("timed out, killed", RunOutcome(S.CANCELING, kind=K.DEADLINE, took_hold=True), V.FAILURE),
    ("timed out before RUN_START", RunOutcome(S.STARTING, kind=K.DEADLINE), V.FAILURE),
    ("timed out, resumable", RunOutcome(S.STARTED, kind=K.DEADLINE, will_resume=True), V.FAILURE),
    ("timed out, had finished", RunOutcome(S.CANCELING, kind=K.DEADLINE, held=E.RUN_SUCCESS), V.SUCCESS),
    (
        "timed out, swallowed it",
        RunOutcome(S.CANCELING, kind=K.DEADLINE, held=E.RUN_SUCCESS, took_hold=True),
        V.FAILURE,
    ),
    (
        "timed out while its threads kept it after it failed",
        RunOutcome(S.CANCELING, kind=K.DEADLINE, held=E.RUN_FAILURE, came_first=True),
        V.HELD,
    ),
    ("timed out, and marked CANCELED", RunOutcome(S.CANCELED, [E.RUN_CANCELED], K.DEADLINE), V.NOTHING),
    ("timed out, marked FAILURE", RunOutcome(S.FAILURE, [E.RUN_FAILURE], K.DEADLINE), V.NOTHING),
    ("timed out, SUCCESS before", RunOutcome(S.CANCELING, [E.RUN_SUCCESS], K.DEADLINE), V.RESTORE),
    ("the child died", RunOutcome(S.STARTED), V.FAILURE),
    ("the child died, monitored", RunOutcome(S.STARTED, will_resume=True), V.FAILURE),
    ("the child died before RUN_START", RunOutcome(S.STARTING), V.FAILURE),
]


@pytest.mark.parametrize(("ending", "verdict"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_run_that_was(ending: RunOutcome, verdict: FinalAction) -> None:
    assert decide(ending) is verdict


def test_nothing_turns_a_canceled_run_into_anything_else() -> None:
    """Whatever else is true of it."""
    for status in (S.CANCELED, S.SUCCESS, S.FAILURE, S.CANCELING, S.STARTED):
        for kind in (None, *K):
            for said in (None, E.RUN_SUCCESS, E.RUN_FAILURE):
                verdict = decide(RunOutcome(status, [E.RUN_CANCELED], kind, said))
                assert verdict is (V.NOTHING if status is S.CANCELED else V.RESTORE)
