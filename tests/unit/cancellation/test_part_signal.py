"""A part of the work can be cancelled alone, and is with the whole."""

import gc

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal, PartSignal

LATE = Cancellation(CancelKind.DEADLINE, "it takes too long")
ASKED = Cancellation(CancelKind.REQUESTED, "wrong file")


def test_a_part_is_cancelled_alone() -> None:
    whole = CancelSignal()
    part, other = PartSignal(whole), PartSignal(whole)
    called: list[str] = []
    part.on_notified(lambda: called.append("part"))
    part.set(LATE)
    assert (whole.cancellation, part.cancellation, other.cancellation) == (None, LATE, None)
    assert part.wait(0)
    assert not other.wait(0)
    assert called == ["part"]


def test_the_whole_is_seen_at_once_and_the_stronger_one_counts() -> None:
    whole = CancelSignal()
    part = PartSignal(whole)
    part.set(LATE)
    whole.record(ASKED)  # in a signal handler: nobody is notified yet
    assert part.cancellation == ASKED
    assert part.own == LATE


def test_who_waits_for_a_part_is_woken_by_the_whole() -> None:
    whole = CancelSignal()
    part = PartSignal(whole)
    called: list[str] = []
    part.on_notified(lambda: called.append("part"))
    whole.set(ASKED)
    assert part.wait(0)
    assert called == ["part"]


def test_a_part_is_cancelled_when_the_whole_was_before() -> None:
    whole = CancelSignal()
    whole.set(ASKED)
    assert PartSignal(whole).wait(0)


def test_its_shields_are_those_of_the_whole_and_the_one_that_is_open_is_told() -> None:
    told: list[str] = []
    whole = CancelSignal(on_shield=told.append)
    part = PartSignal(whole)
    part.open_shield("writing")
    assert whole.has_shields
    assert part.has_shields
    part.set(LATE)
    part.open_shield("again")
    assert told == ["writing", "again"]
    assert not part.close_shield("again")
    assert part.close_shield("writing")
    assert not whole.has_shields


def test_a_part_that_is_forgotten_is_no_load_for_the_whole() -> None:
    whole = CancelSignal()
    part = PartSignal(whole)
    called: list[str] = []
    part.on_notified(lambda: called.append("part"))
    del part
    gc.collect()
    whole.set(ASKED)
    assert called == []
