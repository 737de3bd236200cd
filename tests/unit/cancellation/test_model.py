"""A cancel always has a kind, and the strongest wins, not the last."""

import itertools

from dagster_taskiq.cancellation.model import CancelKind, Cancellation, stronger
from dagster_taskiq.sqs.settlement import AFTER_CANCEL, Settlement


def test_the_strongest_wins_whatever_the_order() -> None:
    for kinds in itertools.permutations(CancelKind):
        current: Cancellation | None = None
        for kind in kinds:
            current = stronger(current, Cancellation(kind))
        assert current is not None
        assert current.kind is CancelKind.LEASE_LOST


def test_of_equals_the_first_stays() -> None:
    first = Cancellation(CancelKind.REQUESTED, "first")
    assert stronger(first, Cancellation(CancelKind.REQUESTED, "second")) is first


def test_a_shutdown_does_not_revive_what_a_person_stopped() -> None:
    person = Cancellation(CancelKind.REQUESTED)
    assert stronger(person, Cancellation(CancelKind.SHUTDOWN)) is person
    assert AFTER_CANCEL[person.kind] == (Settlement.DELETE, 0)


def test_every_kind_has_its_settlement() -> None:
    assert set(AFTER_CANCEL) == set(CancelKind)
