"""Cancel requests and orders of steps survive the wire, and garbage is refused with one kind of error."""

import base64
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq import messages
from dagster_taskiq._text import MAX_TEXT_LENGTH
from dagster_taskiq.errors import MessageUnreadable
from dagster_taskiq.messages import (
    CancelRequest,
    StandingCancel,
    StepMessage,
    is_run_id,
    is_task_id,
    pack,
    read_cancel,
    run_of_step_task,
    step_task_id,
    unpack,
)

TASK_IDS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=256)
TEXTS = st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300)
MOMENTS = st.none() | st.integers(min_value=0, max_value=4_000_000_000).map(float)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
RUN_IDS = st.from_regex(r"\A[0-9A-Za-z_-]{1,64}\Z")
STEP_KEYS = st.text(min_size=1, max_size=300)
ORDERS = st.builds(
    StepMessage,
    RUN_IDS,
    STEP_KEYS,
    st.integers(1, 99_999),
    st.sampled_from(["deferred", "disabled"]),
    st.booleans(),
    st.none() | st.text(),
)
ORDER_FIELDS = st.sampled_from(["run_id", "step_key", "attempt", "retries", "reexecution", "state", "other"])
FIELDS = st.sampled_from(["version", "task_id", "reason", "requested_by", "requested_at", "status_follows", "other"])


@given(TASK_IDS, TEXTS, TEXTS, MOMENTS, st.booleans())
def test_what_is_written_is_read(
    task_id: str, reason: str | None, requested_by: str | None, requested_at: float | None, status_follows: bool
) -> None:
    request = CancelRequest(task_id, reason, requested_by, requested_at, status_follows)
    assert read_cancel(request.to_json()) == request


@given(st.text())
def test_any_text_is_read_or_refused(body: str) -> None:
    _read_or_refuse(body)


@given(JSON)
def test_any_json_is_read_or_refused(value: Any) -> None:
    _read_or_refuse(json.dumps(value))


@given(st.dictionaries(FIELDS, JSON))
def test_any_object_with_our_fields_is_read_or_refused(value: dict[str, Any]) -> None:
    _read_or_refuse(json.dumps(value))


@given(TASK_IDS, st.dictionaries(FIELDS, JSON))
def test_what_is_read_is_bounded(task_id: str, others: dict[str, Any]) -> None:
    request = _read_or_refuse(json.dumps({**others, "task_id": task_id, "version": 1}))
    if request is not None:
        assert len(request.reason or "") <= MAX_TEXT_LENGTH
        assert len(request.requested_by or "") <= MAX_TEXT_LENGTH


def _read_or_refuse(body: str) -> CancelRequest | StandingCancel | None:
    try:
        return read_cancel(body)
    except MessageUnreadable as error:
        assert str(error)  # noqa: PT017  both ways are right
        return None


def test_only_the_task_id_is_required() -> None:
    assert read_cancel('{"task_id": "t-1"}') == CancelRequest("t-1")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not json",
        "[]",
        "null",
        '"t-1"',
        "{}",
        '{"task_id": ""}',
        '{"task_id": "a b"}',
        '{"task_id": 7}',
        '{"task_id": "t", "version": 2}',
        '{"task_id": "t", "version": true}',
        '{"task_id": "t", "version": "1"}',
        '{"task_id": "t", "reason": 1}',
        "[" * 10_000,
        json.dumps({"task_id": "t", "reason": "x" * 70_000}),
        json.dumps({"task_id": "t" * 257}),
    ],
)
def test_what_is_no_cancel_request_is_refused(body: str) -> None:
    with pytest.raises(MessageUnreadable):
        read_cancel(body)


def test_an_unreadable_moment_is_no_reason_to_refuse() -> None:
    assert read_cancel('{"task_id": "t", "requested_at": "yesterday"}').requested_at is None


def test_a_task_id_that_could_not_be_read_back_is_not_sent() -> None:
    with pytest.raises(MessageUnreadable, match="not a task id"):
        CancelRequest("a b").to_json()


def test_ids() -> None:
    assert is_task_id("0123-abc")
    assert not is_task_id(None)
    assert is_run_id("0e4f2a7c-1111-2222-3333-444455556666")
    assert not is_run_id("../../etc")


@given(ORDERS)
def test_an_order_is_read_as_it_was_written(order: StepMessage) -> None:
    assert StepMessage.from_kwargs(json.loads(json.dumps(order.to_kwargs()))) == order


@given(st.dictionaries(ORDER_FIELDS, JSON), RUN_IDS, STEP_KEYS)
def test_any_order_is_read_or_refused(fields: dict[str, Any], run_id: str, step_key: str) -> None:
    for kwargs in (fields, {"run_id": run_id, "step_key": step_key, **fields}):
        try:
            order = StepMessage.from_kwargs(kwargs)
        except MessageUnreadable as error:
            assert str(error)  # noqa: PT017  both ways are right
        else:
            assert is_task_id(order.task_id)


@pytest.mark.parametrize(
    "wrong",
    [
        {"run_id": "../etc"},
        {"run_id": None},
        {"step_key": ""},
        {"step_key": "x" * 5000},
        {"step_key": ["one", "two"]},
        {"attempt": 0},
        {"attempt": True},
        {"attempt": 100_000},
        {"retries": "enabled"},
        {"state": {"module": "os"}},
        {"interruption": -1},
        {"interruption": True},
        {"interruption": 1_001},
        {"interruption": "1"},
    ],
    ids=str,
)
def test_a_wrong_order_is_refused_with_the_name_of_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(MessageUnreadable, match=next(iter(wrong))):
        StepMessage.from_kwargs({"run_id": "r", "step_key": "s", **wrong})


@given(RUN_IDS, STEP_KEYS, st.integers(1, 99_999), st.integers(0, 1_000))
def test_the_task_id_of_a_step_is_one_and_names_its_run(
    run_id: str, step_key: str, attempt: int, interruption: int
) -> None:
    task_id = step_task_id(run_id, step_key, attempt, interruption)
    assert step_task_id(run_id, step_key, attempt, interruption + 1) != task_id
    assert is_task_id(task_id)
    assert run_of_step_task(task_id) == run_id
    assert step_task_id(run_id, step_key, attempt + 1) != task_id
    assert step_task_id(run_id, step_key + "'", attempt) != task_id


@pytest.mark.parametrize("task_id", ["0123456789abcdef0123456789abcdef", "", "a.b.1", "run.0123456789abcdef.1\n", ".."])
def test_the_task_id_of_a_run_is_no_steps(task_id: str) -> None:
    assert run_of_step_task(task_id) is None


@given(JSON)
def test_what_is_packed_is_unpacked(value: Any) -> None:
    assert json.dumps(unpack(pack(value))) == json.dumps(value)


@given(st.text() | st.binary(max_size=200).map(lambda data: base64.b64encode(data).decode()))
def test_any_text_is_unpacked_or_refused(text: str) -> None:
    try:
        unpack(text)
    except MessageUnreadable as error:
        assert str(error)  # noqa: PT017  both ways are right


def test_what_is_cut_off_or_unpacks_to_far_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = base64.b64decode(pack(list(range(1000))))
    with pytest.raises(MessageUnreadable):
        unpack(base64.b64encode(whole[:-8]).decode())
    monkeypatch.setattr(messages, "_MAX_UNPACKED", 1_000_000)
    bomb = base64.b64encode(zlib.compress(b" " * 2_000_000 + b"1")).decode()
    with pytest.raises(MessageUnreadable, match="1,000,000 bytes"):
        unpack(bomb)
