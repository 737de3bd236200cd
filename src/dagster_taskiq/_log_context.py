"""What a line of the log is about: run, step, task, worker. Knows `contextvars` and `logging` only."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Final

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_about: ContextVar[Mapping[str, str]] = ContextVar("dagster_taskiq_log_context", default=_NOTHING)


@contextmanager
def log_context(**facts: str | None) -> Iterator[None]:
    """Add these facts to every line logged inside, also by tasks and threads started there; None is left out."""
    token = _about.set({**_about.get(), **{name: value for name, value in facts.items() if value is not None}})
    try:
        yield
    finally:
        _about.reset(token)


def current() -> dict[str, str]:
    """The facts of lines that are logged here; pass them as `extra` when another task logs for this one."""
    return dict(_about.get())


class AddContext(logging.Filter):
    """Adds the context to each record that does not have its own value."""

    def __init__(self, *, without: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._without = without

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the context; the record is always logged."""
        for name, value in _about.get().items():
            if name not in self._without and not hasattr(record, name):
                setattr(record, name, value)
        return True
