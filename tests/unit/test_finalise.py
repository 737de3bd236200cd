"""The final state of a run, as a table."""

import pytest
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq.cancellation import CancelKind
from dagster_taskiq.finalise import Ending, Verdict, decide

S, E, K, V = DagsterRunStatus, DagsterEventType, CancelKind, Verdict

TABLE: list[tuple[str, Ending, Verdict]] = [
    ("deleted", Ending(None), V.NOTHING),
    ("finished by the child", Ending(S.SUCCESS, [E.RUN_SUCCESS]), V.NOTHING),
    ("failed by the child", Ending(S.FAILURE, [E.RUN_FAILURE]), V.NOTHING),
    ("marked CANCELED", Ending(S.CANCELED, [E.RUN_CANCELED], K.REQUESTED), V.NOTHING),
    ("marked CANCELED, then a late SUCCESS", Ending(S.SUCCESS, [E.RUN_CANCELED, E.RUN_SUCCESS]), V.RESTORE),
    ("marked CANCELED after a SUCCESS", Ending(S.CANCELED, [E.RUN_SUCCESS, E.RUN_CANCELED]), V.NOTHING),
    ("SUCCESS, then a late CANCELING", Ending(S.CANCELING, [E.RUN_SUCCESS], K.REQUESTED), V.RESTORE),
    ("marked FAILURE", Ending(S.FAILURE, [E.RUN_FAILURE], K.REQUESTED), V.NOTHING),
    ("terminated", Ending(S.CANCELING, kind=K.REQUESTED, said=E.RUN_CANCELED, took_hold=True), V.CANCELED),
    ("terminated, killed", Ending(S.CANCELING, kind=K.REQUESTED), V.CANCELED),
    ("terminated, failed meanwhile", Ending(S.CANCELING, kind=K.REQUESTED, said=E.RUN_FAILURE), V.CANCELED),
    ("terminated, had finished", Ending(S.CANCELING, kind=K.REQUESTED, said=E.RUN_SUCCESS), V.SUCCESS),
    ("terminated, swallowed it", Ending(S.CANCELING, kind=K.REQUESTED, said=E.RUN_SUCCESS, took_hold=True), V.CANCELED),
    ("cancelled by a bare message", Ending(S.STARTED, kind=K.REQUESTED), V.CANCELED),
    ("CANCELING when the child died", Ending(S.CANCELING), V.CANCELED),
    ("CANCELING when the worker shut down", Ending(S.CANCELING, kind=K.SHUTDOWN), V.CANCELED),
    ("CANCELING, but another worker has taken over", Ending(S.CANCELING, kind=K.LEASE_LOST), V.NOTHING),
    ("lease lost", Ending(S.STARTED, kind=K.LEASE_LOST), V.NOTHING),
    ("shutdown", Ending(S.STARTED, kind=K.SHUTDOWN, said=E.RUN_FAILURE, took_hold=True), V.FAILURE),
    ("shutdown, resumable", Ending(S.STARTED, kind=K.SHUTDOWN, took_hold=True, will_resume=True), V.RESUMABLE),
    ("shutdown, had finished", Ending(S.STARTED, kind=K.SHUTDOWN, said=E.RUN_SUCCESS, will_resume=True), V.HELD),
    ("shutdown before RUN_START", Ending(S.STARTING, kind=K.SHUTDOWN, said=E.RUN_FAILURE), V.RESUMABLE),
    ("bare SIGTERM", Ending(S.STARTED, said=E.RUN_FAILURE, took_hold=True), V.HELD),
    ("bare SIGTERM, resumable", Ending(S.STARTED, will_resume=True, clean_exit=True), V.RESUMABLE),
    ("the child died", Ending(S.STARTED), V.FAILURE),
    ("the child died, monitored", Ending(S.STARTED, will_resume=True), V.FAILURE),
    ("the child died before RUN_START", Ending(S.STARTING), V.FAILURE),
]


@pytest.mark.parametrize(("ending", "verdict"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_run_that_was(ending: Ending, verdict: Verdict) -> None:
    assert decide(ending) is verdict


def test_nothing_turns_a_canceled_run_into_anything_else() -> None:
    """Whatever else is true of it."""
    for status in (S.CANCELED, S.SUCCESS, S.FAILURE, S.CANCELING, S.STARTED):
        for kind in (None, *K):
            for said in (None, E.RUN_SUCCESS, E.RUN_FAILURE):
                verdict = decide(Ending(status, [E.RUN_CANCELED], kind, said))
                assert verdict is (V.NOTHING if status is S.CANCELED else V.RESTORE)
