"""What a child is told, and what a process below it hears of that."""

import json
import os
import socket
import threading
import time

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.child.control_channel import ControlChannel, join
from dagster_taskiq.child.control_listener import ControlListener

ASKED = Cancellation(CancelKind.REQUESTED, "wrong input", "ada", deadline=5.0)
INTENT = {"intent": "REQUESTED", "reason": "wrong input", "by": "ada", "deadline": 5.0}


def told(theirs: socket.socket, intent: dict[str, object]) -> None:
    theirs.sendall(json.dumps(intent).encode() + b"\n")


def test_the_intent_is_known_as_soon_as_it_was_told() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        voice = ControlChannel(ours)
        assert not voice.must_stop()
        told(theirs, INTENT)
        assert voice.is_cancelled()
        assert voice.signal.cancellation == ASKED


def test_a_shutdown_is_no_cancellation_and_a_worker_that_is_gone_is_one_reason_to_stop() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        voice = ControlChannel(ours)
        with theirs:
            told(theirs, INTENT | {"intent": "SHUTDOWN"})
            assert not voice.must_stop()
            assert voice.signal.is_set
        assert voice.worker_is_gone()
        assert voice.must_stop()
        assert not voice.is_cancelled()


def test_a_worker_that_is_gone_has_given_no_reason() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        voice = ControlChannel(ours)
        theirs.close()
        voice.listen()
        assert voice.signal.cancellation is not None
        assert (voice.signal.cancellation.kind, voice.signal.cancellation.reason) == (CancelKind.SHUTDOWN, None)


def test_a_guest_whose_interrupt_is_quicker_than_the_intent_waits_a_moment_for_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guest = join(ControlListener(ControlChannel(ours)).admit())
        assert guest is not None
        with guest.channel:
            later = threading.Timer(0.1, told, (theirs, INTENT))
            later.start()
            guest.wait_for_intent()
            assert guest.signal.cancellation == ASKED
            later.join()


def test_a_guest_that_comes_later_is_told_what_was_told_before() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ear = ControlListener(ControlChannel(ours))
        address = ear.admit()
        told(theirs, INTENT)
        guest = join(address)
        assert guest is not None
        with guest.channel:
            guest.wait_for_intent()
            assert guest.is_cancelled()


def test_nobody_waits_in_vain_for_long() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guest = join(ControlListener(ControlChannel(ours)).admit())
        assert guest is not None
        with guest.channel:
            began = time.monotonic()
            guest.wait_for_intent()
            assert guest.signal.cancellation is None
            assert time.monotonic() - began < 10


def test_without_a_child_there_is_nothing_to_join() -> None:
    assert join(f"dagster-taskiq-{os.getpid()}-nobody") is None
