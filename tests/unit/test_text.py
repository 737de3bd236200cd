"""What others have given us, before it is stored, sent or shown."""

from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq._text import MAX_TEXT_LENGTH, clean_text
from dagster_taskiq.messages import CancelRequest, read_cancel

ANY = st.text(st.characters(exclude_categories=()) | st.sampled_from("\x00\ud800\udce9\udfff"), max_size=40)


@given(ANY)
def test_what_is_left_can_be_stored_and_shown(text: str) -> None:
    cleaned = clean_text(text)
    cleaned.encode()
    assert "\x00" not in cleaned
    assert len(cleaned) == len(text)
    assert clean_text(cleaned) == cleaned


def test_what_is_in_order_stays_as_it_is() -> None:
    assert clean_text("millésime\t😀\n") == "millésime\t😀\n"
    assert clean_text("a\x00b\udce9") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


def test_it_is_not_longer_than_asked_for() -> None:
    assert len(clean_text("x" * 5000)) == MAX_TEXT_LENGTH
    assert clean_text("abc", 2) == "ab"
    assert len(clean_text("x" * 5000, None)) == 5000


@given(ANY, ANY)
def test_a_cancel_message_is_cleaned_by_whoever_writes_it_and_by_whoever_reads_it(reason: str, by: str) -> None:
    sent = CancelRequest("task", reason, by).to_json()
    assert read_cancel(sent) == CancelRequest("task", clean_text(reason), clean_text(by))
    raw = '{"task_id": "task", "reason": "caf\\ud83d \\u0000"}'
    assert read_cancel(raw).reason == "caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}"
