"""Whatever a stranger writes into a queue: it is read, or refused with `MessageUnreadable`; nothing else happens."""

import base64
import json
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dagster_taskiq._text import MAX_TEXT_LENGTH
from dagster_taskiq.errors import MessageUnreadable
from dagster_taskiq.messages import (
    StandingCancel,
    StepMessage,
    is_run_id,
    is_task_id,
    pack,
    read_cancel,
    unpack,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=20,
)
SCOPES = ["group", "task_name", "predicate"]
OTHERS = ["version", "task_id", "reason", "requested_by", "requested_at", "ttl_s", "arguments", "run_id", "step_key"]
KEYS = st.sampled_from([*OTHERS, *SCOPES])


def read(body: str) -> None:
    try:
        request = read_cancel(body)
    except MessageUnreadable:
        return
    for text in (request.reason, request.requested_by):
        assert text is None or len(text) <= MAX_TEXT_LENGTH
    if isinstance(request, StandingCancel):
        assert 1 <= len(request.value) <= 256
        assert request.scope in SCOPES
    else:
        assert is_task_id(request.task_id)
    again = read_cancel(request.to_json())
    assert repr(replace(again, requested_at=request.requested_at)) == repr(request)


@given(st.text(max_size=2_000))
def test_any_text_as_a_cancel_message(body: str) -> None:
    read(body)


@given(st.dictionaries(KEYS | st.text(max_size=10), JSON, max_size=8))
def test_any_object_as_a_cancel_message(body: dict[str, Any]) -> None:
    read(json.dumps(body))


@example("0", "", "", 253402300800.0)  # the year 10000, which no date can say
@example("0", "", "", "0001-01-01T00:00:00+23:59")
@given(st.text(max_size=300), st.text(max_size=3_000), st.text(max_size=3_000), st.floats() | st.text(max_size=80))
def test_nearly_a_cancel_message(task_id: str, reason: str, by: str, at: float | str) -> None:
    read(json.dumps({"version": 1, "task_id": task_id, "reason": reason, "requested_by": by, "requested_at": at}))


@example("group", "a", {}, float("inf"))
@given(
    st.sampled_from(SCOPES),
    st.text(max_size=300),
    st.none() | st.dictionaries(st.text(max_size=20), JSON, max_size=5),
    st.none() | st.floats() | st.integers(),
)
def test_nearly_a_cancel_of_many_tasks(scope: str, value: str, arguments: Any, ttl_s: Any) -> None:
    read(json.dumps({scope: value, "arguments": arguments, "ttl_s": ttl_s, "reason": value}))


@given(st.dictionaries(st.sampled_from([*StepMessage.__slots__, "other"]), JSON, max_size=8))
def test_any_arguments_of_a_step(arguments: dict[str, Any]) -> None:
    try:
        order = StepMessage.from_kwargs(arguments)
    except MessageUnreadable:
        return
    assert is_run_id(order.run_id)
    assert is_task_id(order.task_id)
    assert StepMessage.from_kwargs(order.to_kwargs()) == order


@given(st.text(max_size=500) | st.binary(max_size=500).map(lambda data: base64.b64encode(data).decode()))
def test_anything_as_packed_state(text: str) -> None:
    try:
        unpack(text)
    except MessageUnreadable:
        return


@given(JSON)
def test_what_was_packed_is_unpacked(data: Any) -> None:
    assert json.dumps(unpack(pack(data))) == json.dumps(data)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_what_was_cut_off_or_changed_is_refused(data: bytes, at: int) -> None:
    packed = zlib.compress(json.dumps(data.hex()).encode())
    damaged = packed[: at % len(packed)]
    with pytest.raises(MessageUnreadable):
        unpack(base64.b64encode(damaged).decode())


def test_a_small_text_that_unpacks_to_far_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_taskiq.messages._MAX_UNPACKED", 1_000_000)
    with pytest.raises(MessageUnreadable, match="unpacks to more than"):
        unpack(base64.b64encode(zlib.compress(b'"' + b"x" * 2_000_000 + b'"')).decode())


@pytest.mark.parametrize("body", ["[" * 100_000, '{"a":' * 50_000, "9" * 10_000, '"\\ud800"', "\x00", "{}" * 40_000])
def test_what_has_broken_parsers_before(body: str) -> None:
    with pytest.raises(MessageUnreadable):
        read_cancel(body)
