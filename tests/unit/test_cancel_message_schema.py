"""The JSON Schema of the cancel message, its examples, and the reader of the workers say the same."""

import json
from importlib.resources import files
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from dagster_taskiq.errors import MessageUnreadable
from dagster_taskiq.messages import CancelRequest, StandingCancel, read_cancel

SCHEMAS = files("dagster_taskiq") / "schemas"
SCHEMA: Final[dict[str, Any]] = json.loads((SCHEMAS / "cancel_message.schema.json").read_text("utf-8"))
EXAMPLES: Final[dict[str, Any]] = json.loads((SCHEMAS / "cancel_message.examples.json").read_text("utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 1.0, 0.5, -1, 1_209_600, 1_209_601])
    | st.text(st.characters(min_codepoint=0x09, max_codepoint=0x7F), max_size=4)
    | st.sampled_from([256, 257]).map("x".__mul__)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
NAMES = st.sampled_from(["task_id", "group", "task_name", "predicate"])
NAMED = st.dictionaries(NAMES, SCALARS, min_size=1, max_size=2)
OTHERS = st.dictionaries(st.sampled_from([*SCHEMA["properties"], "other"]), VALUES, max_size=2)


def is_read(body: object) -> bool:
    try:
        read_cancel(json.dumps(body))
    except MessageUnreadable:
        return False
    return True


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("example", EXAMPLES["valid"], ids=lambda example: example["about"])
def test_what_is_valid_is_read(example: dict[str, Any]) -> None:
    VALIDATOR.validate(example["body"])
    assert is_read(example["body"])


@pytest.mark.parametrize("example", EXAMPLES["invalid"], ids=lambda example: example["about"])
def test_what_is_invalid_is_refused(example: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(example["body"])
    assert not is_read(example["body"])


@settings(max_examples=500)
@given(st.builds(lambda named, others: others | named, NAMED, OTHERS) | VALUES)
def test_the_reader_and_the_schema_agree(body: object) -> None:
    assert is_read(body) == VALIDATOR.is_valid(body)


@pytest.mark.parametrize(
    "sent",
    [
        CancelRequest("t-1", "wrong partition", "ada", 1_795_176_000.5, status_follows=True, timed_out=True),
        StandingCancel("group", "a", reason="no longer needed", requested_by="ada", requested_at=1.0, ttl_s=600.0),
        StandingCancel("predicate", "module:is_below", {"folder": "/a/"}),
    ],
    ids=["one", "a group", "a predicate"],
)
def test_what_this_package_sends_is_valid_and_every_field_of_it_is_described(
    sent: CancelRequest | StandingCancel,
) -> None:
    body = json.loads(sent.to_json())
    VALIDATOR.validate(body)
    assert set(body) <= set(SCHEMA["properties"])
