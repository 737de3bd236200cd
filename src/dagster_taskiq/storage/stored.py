"""What stands in a row of ours, which may be of a newer version, or damaged. A leaf.

One row that cannot be read must not keep others from being read, nor runs from being launched.
"""

import json
import logging
import math
from typing import Any, Final

logger = logging.getLogger(__name__)

_SHOWN: Final = 80
_LATEST: Final = 250_000_000_000.0
"""Seconds since the epoch: what `datetime` can show."""
_REMEMBERED: Final = 1_000
_told: set[str] = set()


class Unreadable(ValueError):
    """The row is not what its reader takes."""


def stored_object(text: str) -> dict[str, Any]:
    """The JSON object that is stored as this text. Raises `Unreadable`."""
    found = _loaded(text)
    if not isinstance(found, dict):
        raise Unreadable(f"it is no JSON object: {text[:_SHOWN]!r}")
    return found


def stored_list(text: str) -> list[Any]:
    """The JSON array that is stored as this text. Raises `Unreadable`."""
    found = _loaded(text)
    if not isinstance(found, list):
        raise Unreadable(f"it is no JSON array: {text[:_SHOWN]!r}")
    return found


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is no JSON: {text[:_SHOWN]!r}") from error


def stored_time(value: object) -> float:
    """Seconds since the epoch. Raises `Unreadable`."""
    if not is_number(value) or not 0 <= (at := float(value)) < _LATEST:  # type: ignore[arg-type]
        raise Unreadable(f"it has no time: {str(value)[:_SHOWN]!r}")
    return at


def is_number(value: object) -> bool:
    """Whether it is one that can be compared: a JSON text may also have NaN, and a whole number without end."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def tell_unreadable(what: str, error: Exception) -> None:
    """Say in the log that a row is not read; of each one once in a process, however often it is looked at."""
    if what not in _told and len(_told) < _REMEMBERED:
        _told.add(what)
        logger.warning("%s cannot be read, and does not count: %s", what, error)
