"""A cancel always has a kind, and the strongest wins, not the last."""

import ast
import itertools
from pathlib import Path

import dagster_taskiq
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


def test_a_reason_is_never_a_text_of_ours() -> None:
    """Whoever makes a cancellation passes on what a person said; a text of ours is its cause."""
    root = Path(dagster_taskiq.__file__).parent
    ours = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Cancellation":
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                reason = keywords.get("reason", node.args[1] if len(node.args) > 1 else None)
                text = ast.unparse(reason) if reason is not None else "reason"
                if "reason" not in text.lower():
                    ours.append(f"{path.relative_to(root)}:{node.lineno}: {text}")
    assert not ours


def test_every_kind_has_its_settlement() -> None:
    assert set(AFTER_CANCEL) == set(CancelKind)


def test_a_kind_is_logged_by_its_name() -> None:
    assert f"{CancelKind.DEADLINE} {CancelKind.REQUESTED!s} %s" % CancelKind.SHUTDOWN == "DEADLINE REQUESTED SHUTDOWN"
