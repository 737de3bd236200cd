"""Whom a standing cancel means, for how long, and how rarely it comes back."""

from types import MappingProxyType
from typing import Any

import pytest
from taskiq import TaskiqMessage

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.errors import MessageUnreadable
from dagster_taskiq.messages import CancelRequest, StandingCancel, read_cancel
from dagster_taskiq.tasks.predicates import SENT_AT_LABEL, Predicate, Predicates, TaskView
from dagster_taskiq.tasks.standing_cancels import CLOCKS_DIFFER_S, EVERY_S, FORGOTTEN_S, SPREAD_S, StandingCancels

SENT = 1_000_000.0
ASKED = Cancellation(CancelKind.REQUESTED, "enough")


def view(task_id: str = "t", *, sent_at: float = SENT - 1, name: str = "upload", **labels: Any) -> TaskView:
    return TaskView(task_id, name, MappingProxyType(labels), sent_at)


def starts_with(task: TaskView, prefix: str) -> bool:
    return task.task_id.startswith(prefix)


def known(*requests: StandingCancel, at: float = SENT) -> StandingCancels:
    predicates = Predicates()
    predicates.add(starts_with)
    standing = StandingCancels(predicates, now=lambda: at)
    for number, request in enumerate(requests):
        assert standing.see(f"m-{number}", request, ASKED, SENT)
    return standing


@pytest.mark.parametrize(
    ("request_", "meant", "not_meant"),
    [
        (StandingCancel("group", "7"), view(group=7), view(group="8")),
        (StandingCancel("group", "None"), view(group="None"), view()),
        (StandingCancel("task_name", "upload"), view(), view(name="uploads")),
        (StandingCancel("predicate", f"{__name__}:starts_with", {"prefix": "a"}), view("ab"), view("ba")),
    ],
)
def test_it_means_tasks_that_were_sent_before_it(
    request_: StandingCancel, meant: TaskView, not_meant: TaskView
) -> None:
    standing = known(request_)
    assert standing.cancellation_of(meant) is ASKED
    assert standing.cancellation_of(not_meant) is None
    later = TaskView(meant.task_id, meant.task_name, meant.labels, SENT + 0.001)
    assert standing.cancellation_of(later) is None
    assert read_cancel(request_.to_json()) == request_


def test_it_ends_after_its_time_to_live() -> None:
    over = SENT + 61 + CLOCKS_DIFFER_S
    standing = known(StandingCancel("group", "a", ttl_s=60), StandingCancel("group", "b"), at=over)
    assert standing.is_over("m-0")
    assert standing.cancellation_of(view(group="a")) is None
    assert not standing.is_over("m-1")
    assert standing.cancellation_of(view(group="b")) is ASKED


@pytest.mark.parametrize(("workers", "pause_s"), [(1, EVERY_S), (8, 2), (100, 1)])
def test_it_comes_to_each_worker_now_and_then_however_many_there_are(workers: int, pause_s: int) -> None:
    request = StandingCancel("group", "a")
    standing = known(request)
    for _ in range(9):
        assert not standing.see("m-0", request, ASKED, SENT)
    assert standing.spreads("m-0")
    assert not known(request, at=SENT + SPREAD_S).spreads("m-0")
    assert standing.pause_s("m-0", 10 * workers) == pause_s


def test_so_many_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_taskiq.tasks.standing_cancels._MOST", 2)
    standing = known(*[StandingCancel("group", str(number)) for number in range(3)])
    meant = [standing.cancellation_of(view(group=number)) is not None for number in range(3)]
    assert meant == [False, True, True]


async def _ends_with(task: TaskView) -> bool:
    return False


def awaits(task: TaskView) -> object:
    return _ends_with(task)


def yields(task: TaskView) -> object:
    yield False


def leaves(task: TaskView) -> object:
    raise SystemExit(1)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("predicate", [awaits, yields, leaves])
def test_a_predicate_that_gives_no_answer_cancels_nothing(
    predicate: Predicate, caplog: pytest.LogCaptureFixture
) -> None:
    predicates = Predicates()
    predicates.add(predicate, "p")
    standing = StandingCancels(predicates, now=lambda: SENT)
    standing.see("m", StandingCancel("predicate", "p"), ASKED, SENT)
    assert [standing.cancellation_of(view()), standing.cancellation_of(view())] == [None, None]
    assert len(caplog.messages) == 1
    assert "predicate p failed, and cancels nothing" in caplog.text


def test_two_predicates_of_one_name_are_refused() -> None:
    predicates = Predicates()
    predicates.add(leaves, "p")
    predicates.add(leaves, "p")  # its module was imported again
    with pytest.raises(ValueError, match="another predicate has the name 'p' already"):
        predicates.add(yields, "p")
    assert predicates.get("p") is leaves


def test_other_clocks_do_not_make_it_go_round_for_longer_nor_delete_it() -> None:
    at = SENT - 600  # this machine's clock is ten minutes behind
    standing = StandingCancels(Predicates(), now=lambda: at)
    standing.see("m", StandingCancel("group", "a", ttl_s=60), ASKED, SENT)
    assert standing.spreads("m")
    at += SPREAD_S
    assert not standing.spreads("m")
    ahead = known(StandingCancel("group", "a", ttl_s=60), at=SENT + 60 + CLOCKS_DIFFER_S)
    assert ahead.cancellation_of(view(group="a")) is None
    assert not ahead.is_over("m-0")


def test_what_it_had_to_forget_sleeps_and_does_not_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_taskiq.tasks.standing_cancels._MOST", 2)
    requests = [StandingCancel("group", str(number)) for number in range(3)]
    standing = known(*requests)
    for _ in range(2):
        again = [standing.see(f"m-{number}", one, ASKED, SENT) for number, one in enumerate(requests)]
        assert again == [False, False, False]
    assert [standing.spreads(f"m-{number}") for number in range(3)] == [False, True, True]
    assert standing.pause_s("m-0", 100) == FORGOTTEN_S
    assert not standing.is_over("m-0")
    assert standing.cancellation_of(view(group=2)) is ASKED


def test_a_retry_is_as_old_as_its_first_try_and_nobody_makes_a_task_younger() -> None:
    def sent_at(label: object) -> float:
        labels = {} if label is None else {SENT_AT_LABEL: label}
        message = TaskiqMessage(task_id="t", task_name="n", labels=labels, args=[], kwargs={})
        return TaskView.of(message, SENT).sent_at

    assert [sent_at(label) for label in (None, SENT - 5, SENT + 5, -1.0, float("nan"), "x")] == [
        SENT,
        SENT - 5,
        *[SENT] * 4,
    ]


@pytest.mark.parametrize(
    "body",
    [
        '{"group": ""}',
        '{"group": 1}',
        '{"task_name": ["a"]}',
        '{"predicate": "a", "arguments": []}',
        '{"group": "a", "arguments": {"b": 1}}',
        '{"group": "a", "ttl_s": 0}',
        '{"group": "a", "ttl_s": NaN}',
        '{"group": "a", "ttl_s": 1e9}',
        '{"group": "a", "task_name": "b"}',
        '{"task_id": "a", "group": "b"}',
        '{"group": "a", "version": 2}',
        "{}",
    ],
)
def test_what_is_not_clear_is_not_read(body: str) -> None:
    with pytest.raises(MessageUnreadable):
        read_cancel(body)


def test_the_cancel_of_one_task_is_read_as_ever() -> None:
    assert read_cancel('{"task_id": "t", "other": 1}') == CancelRequest("t")
