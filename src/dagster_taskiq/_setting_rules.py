"""The values that a setting may have, and how a text becomes one. Knows no setting."""

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from dagster_taskiq.errors import SettingsError

RULE: Final = "rule"
"""In the metadata of a field: by what its value is checked."""


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a setting may have; whole ones only, if its field is an `int`."""

    low: float
    high: float
    unit: str

    def __str__(self) -> str:
        """As documentation says it."""
        return f"{self.low:,g} to {self.high:,g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Name:
    """The texts that a setting may have."""

    pattern: str
    what: str

    def __str__(self) -> str:
        """As documentation says it."""
        return f"the name of {self.what}"


def name_of(key: str, value: Any, rule: Name) -> str | None:
    """A text of that form. Raises `SettingsError`."""
    if value is None and key == "payload_bucket":
        return None
    if not isinstance(value, str) or not re.fullmatch(rule.pattern, value):
        raise SettingsError(f"{key} must be the name of {rule.what}, not {value!r}")
    return value


def number_of(key: str, value: Any, allowed: Range, *, whole: bool) -> float:
    """A number in the range. Raises `SettingsError`."""
    number = _as_number(value)
    if number is None or (whole and not number.is_integer()):
        kind = "a whole number" if whole else "a number"
        raise SettingsError(f"{key} must be {kind} of {allowed.unit}, not {value!r}")
    if not allowed.low <= number <= allowed.high:
        raise SettingsError(f"{key} must be between {allowed.low:g} and {allowed.high:g} {allowed.unit}, not {value}")
    return int(number) if whole else number


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def boolean_of(key: str, value: Any) -> bool:
    """True or false, also as a text. Raises `SettingsError`."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in {"1", "true", "yes", "on"}:
        return True
    if text in {"0", "false", "no", "off"}:
        return False
    raise SettingsError(f"{key} must be true or false, not {value!r}")


def url_of(key: str, value: Any) -> str | None:
    """An address; of a queue one with its name. Raises `SettingsError`."""
    if value is None and key == "endpoint_url":
        return None
    parts = urlsplit(value) if isinstance(value, str) else None
    if parts is None or parts.scheme not in {"http", "https"} or not parts.netloc:
        raise SettingsError(f"{key} must be a URL that begins with http:// or https://, not {value!r}")
    if key == "queue_url" and not parts.path.strip("/"):
        raise SettingsError(
            f"queue_url must end with the queue's name, as 'aws sqs get-queue-url' prints it; not {value!r}"
        )
    return str(value)
