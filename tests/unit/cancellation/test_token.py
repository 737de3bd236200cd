"""The token where nobody cancels, in tests of users, and what it is made of."""

import asyncio
import threading
import time
from collections.abc import Callable

import dagster as dg
import pytest

from dagster_taskiq import CancelKind, OpCancelled, cancellation_token, fake_token
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal


@dg.op
def counts() -> int:
    """Uses all that a token has."""
    token = cancellation_token()
    token.state["step"] = 1
    done = 0
    for _ in range(3):
        token.raise_if_cancelled()
        with token.shield():
            done += 1
        token.state["step"] = done
    token.on_cancelled(lambda: None)()
    assert (token.is_cancelled, token.reason, token.kind, token.requested_by) == (False, None, None, None)
    assert token.remaining() is None
    assert not token.wait(0)
    return done


@dg.asset
def asks_twice() -> None:
    cancellation_token().state["a"] = 1
    assert dict(cancellation_token().state) == {"a": 1}, "an op has one state, however often it asks"


def test_it_does_nothing_in_a_unit_test_nor_under_another_executor() -> None:
    @dg.job(executor_def=dg.in_process_executor)
    def job() -> None:
        counts()
        counts.alias("again")()

    assert counts(dg.build_op_context()) == 3
    assert job.execute_in_process().success
    assert dg.materialize([asks_twice]).success


def test_outside_of_everything_its_state_is_its_own() -> None:
    cancellation_token().state["a"] = 1
    assert dict(cancellation_token().state) == {}


def test_a_fake_token_is_cancelled_at_the_look_that_the_test_wants() -> None:
    with fake_token(cancel_after=2, state={"step": 0}) as token, pytest.raises(OpCancelled, match=r"^cancelled$"):
        counts()
    assert token.checks == 3
    assert token.state["step"] == 2
    assert token.kind is CancelKind.REQUESTED
    assert cancellation_token() is not token


def test_a_fake_token_is_cancelled_when_the_test_says_so() -> None:
    called: list[str] = []
    with fake_token() as token:
        assert cancellation_token() is token
        token.on_cancelled(lambda: called.append("back"))
        token.cancel("enough", requested_by="me", kill_at=time.time() + 100)
        assert called == ["back"]
        assert (token.is_cancelled, token.reason, token.requested_by) == (True, "enough", "me")
        left = token.remaining()
        assert left is not None
        assert 90 < left <= 100
        token.on_cancelled(lambda: called.append("at once"))
        assert called == ["back", "at once"]
        with pytest.raises(OpCancelled, match="cancelled: enough"):
            token.raise_if_cancelled()


def test_a_fake_token_that_is_cancelled_in_a_shield_raises_at_its_end() -> None:
    steps = []
    with fake_token() as token, pytest.raises(OpCancelled):  # noqa: PT012 - the order is what is tested
        with token.shield():
            token.cancel()
            steps.append("inside")
        steps.append("unreachable")
    assert steps == ["inside"]


async def _in_a_coroutine(raises: Callable[[], None]) -> None:
    with pytest.raises(asyncio.CancelledError):
        raises()


def test_in_a_coroutine_it_is_a_cancelled_error() -> None:
    with fake_token() as token:
        token.cancel()
        asyncio.run(_in_a_coroutine(token.raise_if_cancelled))


def test_no_except_exception_takes_it_for_an_error() -> None:
    assert not issubclass(OpCancelled, Exception)
    assert issubclass(OpCancelled, dg.DagsterExecutionInterruptedError)


def test_the_stronger_kind_stays() -> None:
    signal = CancelSignal()
    signal.record(Cancellation(CancelKind.SHUTDOWN, "shutdown"))
    signal.record(Cancellation(CancelKind.REQUESTED, "asked"))
    signal.record(Cancellation(CancelKind.SHUTDOWN, "again"))
    assert signal.cancellation == Cancellation(CancelKind.REQUESTED, "asked")
    assert signal.is_set


def test_who_waits_is_woken() -> None:
    signal = CancelSignal()
    woken: list[bool] = []
    waiting = threading.Thread(target=lambda: woken.append(signal.wait(20)))
    waiting.start()
    signal.record(Cancellation(CancelKind.REQUESTED))
    signal.notify()
    waiting.join(20)
    assert woken == [True]


def test_a_shield_is_told_of_whenever_it_meets_a_cancellation() -> None:
    told: list[str] = []
    signal = CancelSignal(on_shield=told.append)
    signal.open_shield("open")
    signal.open_shield("inner")
    signal.record(Cancellation(CancelKind.REQUESTED))
    signal.notify()
    assert not signal.close_shield("open"), "in any order"
    assert signal.came_while_shielded
    assert signal.close_shield("inner")
    assert not signal.has_shields
    signal.open_shield("closed afterwards")
    assert not signal.came_while_shielded
    assert signal.close_shield("closed afterwards")
    assert told == ["inner", "closed afterwards"]
