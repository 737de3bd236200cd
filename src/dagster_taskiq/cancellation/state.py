"""A small dictionary that outlives its process. Knows JSON and two callables; not where it is kept."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Final

from dagster_taskiq.errors import StateError

MAX_STATE: Final = 32_768
"""Characters of JSON, all keys of one step together: the key-value storage on MySQL holds 65,535 bytes."""


class State(MutableMapping[str, Any]):
    """What an op, or a task, keeps for its cleanup handler, and for its own next attempt.

    Each change is stored before it returns, so change several keys with one `update`. What is read is a copy: to
    change a list in it, assign the list anew. Threads may change it at the same time.
    Raises `StateError` for what is not JSON, or too large.
    """

    def __init__(
        self, load: Callable[[], str | None] = lambda: None, save: Callable[[str], None] = lambda _: None
    ) -> None:
        self._load = load
        self._save = save
        self._known: str | None = None
        self._changing = threading.RLock()

    def __getitem__(self, key: str) -> Any:
        return self._values()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        with self._changing:
            self._store(self._values() | {key: value})

    def __delitem__(self, key: str) -> None:
        with self._changing:
            values = self._values()
            del values[key]
            self._store(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __repr__(self) -> str:
        return f"State({sorted(self)})"  # the values may be secret

    def update(self, other: Any = (), /, **more: Any) -> None:
        """As that of a dict, stored at once."""
        with self._changing:
            self._store({**self._values(), **dict(other), **more})

    def replace(self, values: Mapping[str, Any]) -> None:
        """Have these instead of all that there was, stored at once."""
        with self._changing:
            self._store(values)

    def _values(self) -> dict[str, Any]:
        if self._known is None:
            self._known = self._load() or "{}"
        values: dict[str, Any] = json.loads(self._known)
        return values

    def _store(self, values: Mapping[str, Any]) -> None:
        keys: list[object] = list(values)
        wrong = next((key for key in keys if not isinstance(key, str)), None)
        if wrong is not None:
            raise StateError(f"the keys of a state are texts, not {type(wrong).__name__}")
        try:
            text = json.dumps(values, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StateError(f"only what is JSON can be kept in a state: {error}") from error
        if len(text) > MAX_STATE:
            raise StateError(
                f"a state of {len(text):,} characters; at most {MAX_STATE:,}."
                " Keep the name of a file or of an object in it, and there what is large"
            )
        self._save(text)
        self._known = text
