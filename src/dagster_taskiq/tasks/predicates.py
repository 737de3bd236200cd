"""What a task looks like to whoever asks whether it is meant, and the predicates that a broker knows. No queues.

Producers and workers import the same module, so both know a predicate by the same name. Code never travels.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from taskiq import TaskiqMessage

GROUP_LABEL: Final = "group"
SENT_AT_LABEL: Final = "dagster_taskiq_sent_at"
"""When the first try of a task was sent: a retry is a new message, and an old task."""
RESERVED: Final = frozenset({"reason", "requested_by", "ttl_s"})


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as a predicate sees it."""

    task_id: str
    task_name: str
    labels: Mapping[str, Any]
    sent_at: float = 0.0
    """When it was sent, its first try, in seconds since the epoch by the clock of SQS; 0: not known."""

    @property
    def group(self) -> str | None:
        """What `cancel_group` compares."""
        group = self.labels.get(GROUP_LABEL)
        return str(group) if group is not None else None

    @classmethod
    def of(cls, message: TaskiqMessage, sent_at: float) -> "TaskView":
        """`sent_at` is that of this message."""
        first = message.labels.get(SENT_AT_LABEL)
        if isinstance(first, float) and 0 < first < sent_at:
            sent_at = first
        return cls(message.task_id, message.task_name, MappingProxyType(dict(message.labels)), sent_at)


Predicate = Callable[..., object]


class Predicates:
    """Those of one broker, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Predicate] = {}

    def add(self, predicate: Predicate, name: str | None = None) -> None:
        """Register it, by default under its module and name. Raises `ValueError` for what cannot be found again."""
        if inspect.iscoroutinefunction(predicate):
            raise ValueError(f"{predicate!r}: a predicate is a plain function, and quick")
        if taken := RESERVED & inspect.signature(predicate).parameters.keys():
            raise ValueError(f"{predicate!r}: {', '.join(sorted(taken))}: cancel_where has arguments of that name")
        module, own = getattr(predicate, "__module__", None), getattr(predicate, "__qualname__", "")
        if name is None and (module in (None, "__main__") or "<" in own):
            raise ValueError(f"{predicate!r}: give it a name, or define it in a module that workers import, too")
        name = name or f"{module}:{own}"
        known = self._by_name.get(name, predicate)
        if (known.__module__, known.__qualname__) != (module, own):
            raise ValueError(f"{predicate!r}: another predicate has the name {name!r} already")
        self._by_name[name] = predicate

    def get(self, name: str) -> Predicate | None:
        """The predicate of that name, if there is one."""
        return self._by_name.get(name)

    def name_of(self, predicate: Predicate | str) -> str:
        """Raises `ValueError` when it is not registered."""
        for name, known in self._by_name.items():
            if predicate in (known, name):
                return name
        raise ValueError(f"{predicate!r} is not known to this broker; decorate it with @broker.predicate")
