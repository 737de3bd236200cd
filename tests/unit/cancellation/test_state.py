"""What an op keeps for its cleanup handler."""

import json
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRunStatus, op
from sqlalchemy.exc import OperationalError

from dagster_taskiq import StateError, _retry
from dagster_taskiq.cancellation.state import MAX_STATE, State
from dagster_taskiq.dagster_compat.storage import values_under
from dagster_taskiq.storage.step_state import forget_old_states, forget_states, state_of


class Shelf:
    """Where a state is kept."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.saves = 0

    def load(self) -> str | None:
        return self.text

    def save(self, text: str) -> None:
        self.text, self.saves = text, self.saves + 1

    def state(self) -> State:
        return State(self.load, self.save)


def test_what_is_kept_is_there_for_another_process() -> None:
    shelf = Shelf()
    shelf.state()["upload_id"] = "u-1"
    state = shelf.state()
    assert dict(state) == {"upload_id": "u-1"}
    state["parts"] = [1, 2]
    del state["upload_id"]
    assert dict(shelf.state()) == {"parts": [1, 2]}


def test_several_keys_are_stored_at_once() -> None:
    shelf = Shelf()
    shelf.state().update({"a": 1}, b=2)
    assert (shelf.saves, dict(shelf.state())) == (1, {"a": 1, "b": 2})


def test_what_is_read_is_a_copy() -> None:
    state = Shelf().state()
    state["parts"] = [1]
    state["parts"].append(2)
    assert state["parts"] == [1]


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, float("nan"), b"x", "x" * MAX_STATE], ids=lambda value: type(value).__name__
)
def test_what_cannot_be_kept_is_refused_and_the_rest_stays(value: Any) -> None:
    shelf = Shelf()
    state = shelf.state()
    state["a"] = 1
    with pytest.raises(StateError):
        state["b"] = value
    assert dict(state) == dict(shelf.state()) == {"a": 1}
    with pytest.raises(StateError, match="the keys of a state are texts"):
        state.update({1: 2})


def test_its_text_does_not_tell_the_values() -> None:
    state = State()
    state["password"] = "s3cret"
    assert "s3cret" not in f"{state} {state!r}"


def test_in_dagsters_storage_each_step_has_its_own() -> None:
    with DagsterInstance.ephemeral() as instance:
        state_of(instance, "run", "one")["key"] = 1
        state_of(instance, "run", "two[äö|]")["key"] = 2
        state_of(instance, "other", "one")["key"] = 3
        assert state_of(instance, "run", "one")["key"] == 1
        assert state_of(instance, "run", "two[äö|]")["key"] == 2
        forget_states(instance, "run", "one")
        assert dict(state_of(instance, "run", "one")) == {}
        forget_states(instance, "run")
        kept = values_under(instance, "dagster-taskiq/state/")
        assert [json.loads(text) for text in kept.values()] == [{"key": 3}]


def test_they_are_forgotten_although_the_database_was_away_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "_FIRST_PAUSE_S", 0.001)
    with DagsterInstance.ephemeral() as instance:
        storage: Any = instance.run_storage
        connect, outages = storage.connect, iter([True, True])

        def unsteady() -> Any:
            if next(outages, False):
                raise OperationalError("delete", {}, ConnectionResetError())
            return connect()

        state_of(instance, "run", "one")["key"] = 1
        monkeypatch.setattr(storage, "connect", unsteady)
        forget_states(instance, "run", "one")
        assert not values_under(instance, "dagster-taskiq/state/")


def test_states_of_runs_that_are_long_over_are_forgotten() -> None:
    @op
    def nothing() -> None:
        """Does it."""

    with DagsterInstance.ephemeral() as instance:
        runs = {
            status: instance.create_run_for_job(core_job(nothing), status=DagsterRunStatus.NOT_STARTED)
            for status in ("over", "open")
        }
        instance.report_run_failed(runs["over"])
        for run_id in (runs["over"].run_id, runs["open"].run_id, "deleted"):
            state_of(instance, run_id, "one")["key"] = run_id
        forget_old_states(instance)
        assert not dict(state_of(instance, "deleted", "one"))
        assert dict(state_of(instance, runs["over"].run_id, "one"))
        ended = instance.get_run_record_by_id(runs["over"].run_id)
        assert ended is not None
        assert ended.end_time is not None
        forget_old_states(instance, lambda: (ended.end_time or 0) + 8 * 86_400)
        assert not dict(state_of(instance, runs["over"].run_id, "one"))
        assert dict(state_of(instance, runs["open"].run_id, "one"))


def core_job(node: Any) -> Any:
    """A job of one op."""
    from dagster import job

    @job(name="one_op")
    def definition() -> None:
        node()

    return definition
