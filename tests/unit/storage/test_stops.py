"""Why a run is being stopped: somebody who has asked for it is stronger than its time limit, whoever writes when."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from typing import Any, Final, cast

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.storage.stops import stored_stop
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, RUN_ID_TAG, TASK_ID_TAG, TIMED_OUT_TAG
from dagster_taskiq.storage.time_limits import mark_timed_out
from dagster_taskiq.worker.finalization import FinalAction, examine

STATUS, DEADLINE, REQUESTED = DagsterRunStatus, CancelKind.DEADLINE, CancelKind.REQUESTED
WHY = "run timed out: longer than its limit of 5 s (dagster-taskiq/timeout_seconds)"
LATE, ADA, SAID = {TIMED_OUT_TAG: WHY}, {CANCELLED_BY_TAG: "ada"}, {CANCEL_REASON_TAG: "wrong file"}
COPIED = {RUN_ID_TAG: "another run"}
FORGED: Final = Cancellation(DEADLINE, "run timed out: says who", channel=CancelChannel.CANCEL_QUEUE)
BY_CLOCK: Final = Cancellation(DEADLINE, WHY)


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


def a_run(
    instance: DagsterInstance, status: DagsterRunStatus = STATUS.STARTED, tags: dict[str, str] | None = None
) -> DagsterRun:
    run = create_run_for_test(instance, job_name="a_job", status=status)
    instance.add_run_tags(run.run_id, {TASK_ID_TAG: "task", RUN_ID_TAG: run.run_id, **(tags or {})})
    return now(instance, run)


def now(instance: DagsterInstance, run: DagsterRun) -> DagsterRun:
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("status", "tags", "kind", "reason", "by"),
    [
        (STATUS.STARTED, {}, None, None, None),
        (STATUS.STARTED, LATE, DEADLINE, WHY, None),
        (STATUS.CANCELING, LATE, DEADLINE, WHY, None),
        (STATUS.FAILURE, LATE, DEADLINE, WHY, None),
        (STATUS.FAILURE, {}, None, None, None),
        (STATUS.CANCELED, LATE, REQUESTED, None, UNKNOWN_AUTHOR),
        (STATUS.CANCELING, {}, REQUESTED, None, UNKNOWN_AUTHOR),
        (STATUS.CANCELING, LATE | ADA, REQUESTED, None, "ada"),
        (STATUS.CANCELING, LATE | SAID, REQUESTED, "wrong file", UNKNOWN_AUTHOR),
        (STATUS.CANCELING, LATE | ADA | COPIED, REQUESTED, None, UNKNOWN_AUTHOR),
        (STATUS.STARTED, LATE | ADA | COPIED, None, None, None),
    ],
)
def test_what_the_database_says(
    instance: DagsterInstance,
    status: DagsterRunStatus,
    tags: dict[str, str],
    kind: CancelKind | None,
    reason: str | None,
    by: str | None,
) -> None:
    stop = stored_stop(instance, a_run(instance, status, tags))
    assert (stop and stop.kind, stop and stop.reason, stop and stop.requested_by) == (kind, reason, by)


@pytest.mark.parametrize(
    ("status", "tags", "told", "action"),
    [
        (STATUS.CANCELING, LATE, None, FinalAction.FAILURE),
        (STATUS.CANCELING, LATE, Cancellation(CancelKind.SHUTDOWN), FinalAction.FAILURE),
        (STATUS.CANCELING, LATE, BY_CLOCK, FinalAction.FAILURE),
        (STATUS.STARTED, {}, BY_CLOCK, FinalAction.FAILURE),
        (STATUS.CANCELING, LATE | ADA, None, FinalAction.CANCELED),
        (STATUS.CANCELING, LATE | ADA, BY_CLOCK, FinalAction.CANCELED),
        (STATUS.CANCELING, {}, BY_CLOCK, FinalAction.CANCELED),
        (STATUS.CANCELING, LATE, Cancellation(REQUESTED), FinalAction.CANCELED),
        (STATUS.STARTED, {}, FORGED, FinalAction.CANCELED),
        (STATUS.CANCELING, {}, FORGED, FinalAction.CANCELED),
        (STATUS.CANCELING, ADA, FORGED, FinalAction.CANCELED),
        (STATUS.CANCELING, LATE, FORGED, FinalAction.FAILURE),
    ],
)
def test_how_the_run_ends(
    instance: DagsterInstance,
    status: DagsterRunStatus,
    tags: dict[str, str],
    told: Cancellation | None,
    action: FinalAction,
) -> None:
    """A message alone makes no FAILURE, which run retries would try again."""
    conclusion = examine(instance, a_run(instance, status, tags).run_id, None, told, "a worker")
    assert conclusion.action is action
    reason = conclusion.reason(None) or ""
    assert reason == WHY if action is FinalAction.FAILURE else WHY not in reason, reason
    assert ("by ada" in reason) is (CANCELLED_BY_TAG in tags)


class Killed(BaseException):
    """The process that writes is gone."""


class Moments:
    """Every moment between two transactions in Dagster's storage of runs: reading a run, writing it back."""

    def __init__(self, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = 0
        self._before: Callable[[int], None] = lambda _: None
        connect = instance.run_storage.connect  # type: ignore[attr-defined]

        def connecting() -> AbstractContextManager[Any]:
            self._count += 1
            self._before(self._count)
            return cast("AbstractContextManager[Any]", connect())

        monkeypatch.setattr(instance.run_storage, "connect", connecting)

    def of(self, what: Callable[[], object], before: Callable[[int], None] = lambda _: None) -> int:
        """Do it; `before` each of its moments something else may happen. How many it had."""
        outer, (self._count, self._before) = (self._count, self._before), (0, before)
        with suppress(Killed):
            what()
        had, (self._count, self._before) = self._count, outer
        return had


@pytest.fixture
def ask(instance: DagsterInstance) -> Iterator[Callable[[DagsterRun], object]]:
    """Terminate a run as Dagster's page does, without a name; the message is lost."""
    launcher = TaskiqRunLauncher("http://127.0.0.1/1/q", "us-east-1")
    launcher.register_instance(instance)
    sent: Future[None] = Future()
    sent.set_result(None)
    yield lambda run: launcher._termination().cancel(run, None, UNKNOWN_AUTHOR, sent)
    launcher.dispose()


def killed_at(moment: int | None) -> Callable[[int], None]:
    def die(at: int) -> None:
        if at == moment:
            raise Killed

    return die


@pytest.mark.slow
def test_who_asks_when_the_time_is_over_has_it_canceled_whenever_the_worker_dies(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch, ask: Callable[[DagsterRun], object]
) -> None:
    """Each reads the run before the other writes, at every moment, and writes back what it has read."""
    moments = Moments(instance, monkeypatch)

    def strike(run: DagsterRun, dies_at: int | None, before: Callable[[int], None] = lambda _: None) -> int:
        def both(at: int) -> None:
            before(at)
            killed_at(dies_at)(at)

        return moments.of(lambda: mark_timed_out(instance, run.run_id, WHY), both)

    def at_moment(moment: int, what: Callable[[], object]) -> Callable[[int], None]:
        def perhaps(at: int) -> None:
            if at == moment:
                what()

        return perhaps

    asking, striking = moments.of(lambda: ask(a_run(instance))), strike(a_run(instance), None)
    assert min(asking, striking) > 4, "there are moments in between"
    for dies_at in (*range(1, striking + 1), None):
        for moment in range(1, asking + 1):
            run = a_run(instance)
            moments.of(lambda: ask(run), at_moment(moment, lambda: strike(run, dies_at)))  # noqa: B023
            assert how_it_ends(instance, run) is FinalAction.CANCELED, (dies_at, moment, "of asking")
        for moment in range(1, (dies_at or striking) + 1):
            run = a_run(instance)
            strike(run, dies_at, at_moment(moment, lambda: moments.of(lambda: ask(run))))  # noqa: B023
            assert how_it_ends(instance, run) is FinalAction.CANCELED, (dies_at, moment, "of striking")


def how_it_ends(instance: DagsterInstance, run: DagsterRun) -> FinalAction:
    """As another worker finds it."""
    return examine(instance, run.run_id, None, None, "another worker").action
