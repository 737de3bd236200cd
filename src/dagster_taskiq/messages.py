"""Cancel requests and work payloads to and from JSON. Knows the wire, not who sends or receives.

All input is untrusted: its size is limited, each field is checked, and it can only *name* existing work.
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeGuard

from dagster_taskiq._text import clean_text
from dagster_taskiq.errors import MessageUnreadable

CANCEL_MESSAGE_VERSION: Final = 1
_MAX_CANCEL_BODY: Final = 64 * 1024
_MAX_NAME: Final = 256
_MAX_TTL_S: Final = 1_209_600
"""Fourteen days, the longest that SQS keeps a message."""
_TASK_ID = re.compile(r"[\x21-\x7e]{1,256}")
_RUN_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_STEP_TASK_ID = re.compile(r"([0-9A-Za-z_-]{1,64})\.[0-9a-f]{16}\.[0-9]{1,5}(?:\.[0-9]{1,4})?")
_END_OF_TIME_S: Final = 253_402_300_000
"""In the year 9999, the last one that can be written as a date."""
_MAX_STEP_KEY: Final = 4096
_MAX_ATTEMPT: Final = 99_999
_MAX_INTERRUPTION: Final = 1_000
_MAX_UNPACKED: Final = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """One message on the cancel queue. `requested_at` is in seconds since the epoch."""

    task_id: str
    reason: str | None = None
    requested_by: str | None = None
    requested_at: float | None = None
    status_follows: bool = False
    """Whether the sender also marks the run as CANCELING, as our launcher does."""
    timed_out: bool = False
    """Whether it is stopped because it, or its run, has taken longer than it may: then it has failed."""

    def to_json(self) -> str:
        """The message body. Raises `MessageUnreadable` for a task id that `from_data` would refuse."""
        if not is_task_id(self.task_id):
            raise MessageUnreadable(f"not a task id (1 to 256 printable ASCII characters, no spaces): {self.task_id!r}")
        body: dict[str, Any] = {"version": CANCEL_MESSAGE_VERSION, "task_id": self.task_id}
        if self.reason is not None:
            body["reason"] = clean_text(self.reason)
        if self.requested_by is not None:
            body["requested_by"] = clean_text(self.requested_by)
        if self.requested_at is not None:
            body["requested_at"] = datetime.fromtimestamp(self.requested_at, UTC).isoformat()
        if self.status_follows:
            body["status_follows"] = True
        if self.timed_out:
            body["timed_out"] = True
        return json.dumps(body)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "CancelRequest":
        """Read the JSON object of a message; only `task_id` is required, unknown fields are ignored.

        Raises `MessageUnreadable` with the reason for anything else.
        """
        task_id = data.get("task_id")
        if not is_task_id(task_id):
            raise MessageUnreadable("cancel message without a valid task_id")
        return cls(
            task_id,
            _text(data, "reason"),
            _text(data, "requested_by"),
            _moment(data.get("requested_at")),
            status_follows=data.get("status_follows") is True,
            timed_out=data.get("timed_out") is True,
        )


Scope = Literal["group", "task_name", "predicate"]
_SCOPES: Final[tuple[Scope, ...]] = ("group", "task_name", "predicate")


@dataclass(frozen=True, slots=True)
class StandingCancel:
    """One message on the cancel queue that is about many plain taskiq tasks: those that were sent before it.

    `value` is the group, the task's name, or the name under which a predicate is registered; code never travels.
    """

    scope: Scope
    value: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the predicate: JSON."""
    reason: str | None = None
    requested_by: str | None = None
    requested_at: float | None = None
    """In seconds since the epoch."""
    ttl_s: float | None = None
    """For how many seconds after it was sent it counts; None: the default of the workers."""

    def to_json(self) -> str:
        """The message body. Raises `MessageUnreadable` for what `from_data` would refuse."""
        body: dict[str, Any] = {"version": CANCEL_MESSAGE_VERSION, self.scope: self.value}
        if self.arguments:
            body["arguments"] = dict(self.arguments)
        if self.reason is not None:
            body["reason"] = clean_text(self.reason)
        if self.requested_by is not None:
            body["requested_by"] = clean_text(self.requested_by)
        if self.requested_at is not None:
            body["requested_at"] = datetime.fromtimestamp(self.requested_at, UTC).isoformat()
        if self.ttl_s is not None:
            body["ttl_s"] = self.ttl_s
        try:
            text = json.dumps(body)
        except (TypeError, ValueError, RecursionError) as error:
            raise MessageUnreadable(f"the arguments of a predicate have to be JSON: {error}") from error
        self.from_data(_cancel_data(text))
        return text

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "StandingCancel":
        """Read the JSON object of a message; unknown fields are ignored. Raises `MessageUnreadable` with the reason."""
        scope = next((key for key in _SCOPES if data.get(key) is not None), None)
        value = data.get(scope) if scope is not None else None
        if scope is None or not isinstance(value, str) or not 1 <= len(value) <= _MAX_NAME:
            raise MessageUnreadable(f"cancel message without a valid {scope or 'group'}")
        arguments, ttl_s = data.get("arguments"), data.get("ttl_s")
        if arguments is not None and (not isinstance(arguments, dict) or scope != "predicate"):
            raise MessageUnreadable("cancel message whose arguments are not those of a predicate")
        if ttl_s is not None and (type(ttl_s) not in (int, float) or not 0 < ttl_s <= _MAX_TTL_S):  # not bool
            raise MessageUnreadable(f"cancel message whose ttl_s is not between 0 and {_MAX_TTL_S:,}")
        reason, by, at = _text(data, "reason"), _text(data, "requested_by"), _moment(data.get("requested_at"))
        return cls(scope, value, arguments or {}, reason, by, at, float(ttl_s) if ttl_s is not None else None)


def read_cancel(body: str) -> CancelRequest | StandingCancel:
    """Read any message of the cancel queue.

    Raises `MessageUnreadable` with the reason for anything else, also for an unknown version.
    """
    data = _cancel_data(body)
    named = [key for key in ("task_id", *_SCOPES) if data.get(key) is not None]
    if len(named) > 1:
        raise MessageUnreadable(f"cancel message with {' and '.join(named)}: it has to name one of them")
    return CancelRequest.from_data(data) if named in ([], ["task_id"]) else StandingCancel.from_data(data)


def _cancel_data(body: str) -> Mapping[str, Any]:
    if len(body) > _MAX_CANCEL_BODY:
        raise MessageUnreadable(f"cancel message of {len(body)} characters; at most {_MAX_CANCEL_BODY}")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MessageUnreadable("cancel message is not JSON") from error
    if not isinstance(data, dict):
        raise MessageUnreadable("cancel message is not a JSON object")
    version = data.get("version", CANCEL_MESSAGE_VERSION)
    if version != CANCEL_MESSAGE_VERSION or isinstance(version, bool):
        raise MessageUnreadable(f"cancel message of an unknown version {str(version)[:20]!r}")
    return data


RetryKind = Literal["deferred", "disabled"]


@dataclass(frozen=True, slots=True)
class StepMessage:
    """The content of a message on the steps queue: which step of which run, and what its process has to know."""

    run_id: str
    step_key: str
    attempt: int
    """1 for the first."""
    retries: RetryKind
    """Whether a step that fails may ask its run for a retry."""
    reexecution: bool = False
    """Whether the run uses outputs of an earlier run; the run's plan has the list of them."""
    state: str | None = None
    """What the run's steps have done so far, `pack`ed. None: it is in the payload bucket, under the task id."""
    interruption: int = 0
    """How often this attempt was interrupted before, by the end of its worker."""
    begins_again: bool = False
    """Whether the end of its worker is no failure of the step: its run decides."""

    @property
    def task_id(self) -> str:
        """Derived from the other fields, so it is not stored anywhere."""
        return step_task_id(self.run_id, self.step_key, self.attempt, self.interruption)

    def to_kwargs(self) -> dict[str, Any]:
        """The arguments of the task."""
        return {
            "run_id": self.run_id,
            "step_key": self.step_key,
            "attempt": self.attempt,
            "retries": self.retries,
            "reexecution": self.reexecution,
            "state": self.state,
            "interruption": self.interruption,
            "begins_again": self.begins_again,
        }

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> "StepMessage":
        """Read the arguments of the task; unknown ones are ignored. Raises `MessageUnreadable` with the reason."""
        run_id, step_key, attempt = kwargs.get("run_id"), kwargs.get("step_key"), kwargs.get("attempt", 1)
        retries, state = kwargs.get("retries", "deferred"), kwargs.get("state")
        interruption = kwargs.get("interruption", 0)
        if not is_run_id(run_id):
            raise MessageUnreadable("step message without a valid run_id")
        if not isinstance(step_key, str) or not 1 <= len(step_key) <= _MAX_STEP_KEY:
            raise MessageUnreadable("step message without a valid step_key")
        if type(attempt) is not int or not 1 <= attempt <= _MAX_ATTEMPT:  # not bool
            raise MessageUnreadable("step message without a valid attempt")
        if type(interruption) is not int or not 0 <= interruption <= _MAX_INTERRUPTION:
            raise MessageUnreadable(f"step message whose interruption is not between 0 and {_MAX_INTERRUPTION:,}")
        if retries not in ("deferred", "disabled"):
            raise MessageUnreadable("step message whose retries are neither 'deferred' nor 'disabled'")
        if state is not None and not isinstance(state, str):
            raise MessageUnreadable("step message whose state is not a text")
        reexecution, begins_again = kwargs.get("reexecution") is True, kwargs.get("begins_again") is True
        return cls(run_id, step_key, attempt, retries, reexecution, state, interruption, begins_again)


def step_task_id(run_id: str, step_key: str, attempt: int, interruption: int = 0) -> str:
    """The task id of one attempt of one step: the run's id can be read from it, the step's key cannot.

    `interruption`: how often that attempt was interrupted before; each time it begins again as another task.
    """
    digest = hashlib.blake2s(step_key.encode(), digest_size=8).hexdigest()
    return f"{run_id}.{digest}.{attempt}" + (f".{interruption}" if interruption else "")


def run_of_step_task(task_id: str) -> str | None:
    """The run that a step's task id belongs to; None when it is not the task id of a step."""
    match = _STEP_TASK_ID.fullmatch(task_id)
    return match[1] if match else None


def pack(data: object) -> str:
    """JSON, compressed, as text."""
    return base64.b64encode(zlib.compress(json.dumps(data, separators=(",", ":")).encode())).decode()


def unpack(text: str) -> Any:
    """The reverse of `pack`. Raises `MessageUnreadable`, also for a small text that unpacks to too much data."""
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(text, validate=True), _MAX_UNPACKED)
        if not inflater.eof:
            raise MessageUnreadable(f"packed data that is cut off, or unpacks to more than {_MAX_UNPACKED:,} bytes")
        return json.loads(data)
    except (ValueError, zlib.error, RecursionError) as error:
        raise MessageUnreadable(f"packed data that cannot be read: {error}") from error


def is_task_id(value: object) -> TypeGuard[str]:
    """Whether the value may be a taskiq task id: 1 to 256 printable ASCII characters without spaces."""
    return isinstance(value, str) and _TASK_ID.fullmatch(value) is not None


def is_run_id(value: object) -> TypeGuard[str]:
    """Whether the value may be a Dagster run id (a UUID by default; users may choose others with these characters)."""
    return isinstance(value, str) and _RUN_ID.fullmatch(value) is not None


def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise MessageUnreadable(f"cancel message whose {key} is not a text")
    return clean_text(value)


def _moment(value: object) -> float | None:
    """Seconds since the epoch, from an ISO 8601 text or a number; None when it cannot be read."""
    seconds: float | None = None
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value[:64])
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
    except (ValueError, OverflowError):
        return None
    return seconds if seconds is not None and 0 <= seconds < _END_OF_TIME_S else None


EXECUTE_STEP: Final = "dagster_taskiq.execute_step"

EXECUTE_RUN: Final = "dagster_taskiq.execute_run"
RESUME_RUN: Final = "dagster_taskiq.resume_run"
