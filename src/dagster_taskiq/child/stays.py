"""What keeps a process when its work is over: an interpreter waits for it at its exit. Knows threads, not Dagster."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from dagster_taskiq._text import clean_text

_LOOK_EVERY_S: Final = 0.5
_NAMED: Final = 10
_LONGEST_NAME: Final = 80


def what_stays() -> list[str]:
    """The names of threads, and of processes of `multiprocessing`, that this process would wait for at its exit.

    Of pools, too, that have nothing to do: those end when they are asked to, at the exit.
    """
    threads = [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    processes = [f"{one.name}[{one.pid}]" for one in multiprocessing.active_children() if not one.daemon]
    names = [clean_text(name, _LONGEST_NAME) for name in (*threads, *processes)]
    return [*names[:_NAMED], *(["…"] if len(names) > _NAMED else [])]


def tell_what_stays(tell: Callable[..., Any]) -> None:
    """Call `tell(stays=names)` in a daemonic thread, now and when the names change, until this process has ended."""
    if what_stays():
        threading.Thread(target=_tell, args=(tell,), name="dagster-taskiq exit", daemon=True).start()


def _tell(tell: Callable[..., Any]) -> None:
    told: list[str] | None = None
    while True:
        if (names := what_stays()) != told:
            told = names
            tell(stays=names)
        time.sleep(_LOOK_EVERY_S)
