"""Cancel requests and work payloads to and from JSON. Knows the wire, not who sends or receives.

Whatever arrives is untrusted: it is bounded and checked field by field, and it can only *name* existing work.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeGuard

from dagster_taskiq.errors import MessageUnreadable

CANCEL_MESSAGE_VERSION: Final = 1
MAX_TEXT_LENGTH: Final = 1024
_MAX_CANCEL_BODY: Final = 64 * 1024
_TASK_ID = re.compile(r"[\x21-\x7e]{1,256}")
_RUN_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """One message on the cancel queue. `requested_at` is in seconds since the epoch."""

    task_id: str
    reason: str | None = None
    requested_by: str | None = None
    requested_at: float | None = None

    def to_json(self) -> str:
        """The message body. Raises `MessageUnreadable` when the task id could not be read back."""
        if not is_task_id(self.task_id):
            raise MessageUnreadable(f"not a task id (1 to 256 printable ASCII characters, no spaces): {self.task_id!r}")
        body: dict[str, Any] = {"version": CANCEL_MESSAGE_VERSION, "task_id": self.task_id}
        if self.reason is not None:
            body["reason"] = self.reason[:MAX_TEXT_LENGTH]
        if self.requested_by is not None:
            body["requested_by"] = self.requested_by[:MAX_TEXT_LENGTH]
        if self.requested_at is not None:
            body["requested_at"] = datetime.fromtimestamp(self.requested_at, UTC).isoformat()
        return json.dumps(body)

    @classmethod
    def from_json(cls, body: str) -> "CancelRequest":
        """Read a message body; only `task_id` is required, unknown fields are ignored.

        Raises `MessageUnreadable` with the reason, for anything else and for a version that is not ours.
        """
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
        task_id = data.get("task_id")
        if not is_task_id(task_id):
            raise MessageUnreadable("cancel message without a valid task_id")
        return cls(task_id, _text(data, "reason"), _text(data, "requested_by"), _moment(data.get("requested_at")))


def is_task_id(value: object) -> TypeGuard[str]:
    """Whether the value may be a taskiq task id: 1 to 256 printable ASCII characters without spaces."""
    return isinstance(value, str) and _TASK_ID.fullmatch(value) is not None


def is_run_id(value: object) -> TypeGuard[str]:
    """Whether the value may be a Dagster run id (a UUID by default; users may choose others of its alphabet)."""
    return isinstance(value, str) and _RUN_ID.fullmatch(value) is not None


def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise MessageUnreadable(f"cancel message whose {key} is not a text")
    return value[:MAX_TEXT_LENGTH]


def _moment(value: object) -> float | None:
    """Seconds since the epoch from an ISO 8601 text or a number; None for a moment that cannot be read."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value[:64])
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except (ValueError, OverflowError):
        pass
    return None
