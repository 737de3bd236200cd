"""One cleanup handler of a taskiq task, in a process of its own: what runs in there.

Its log lines and its changes of the state go to the worker as they come. Knows the handler; no queues.
"""

import base64
import importlib
import json
import logging
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from typing import Any, Final

from dagster_taskiq._attempt_limit import attempt_limit, too_long
from dagster_taskiq._last_words import print_traceback
from dagster_taskiq._text import clean_text
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.process.json_lines import line_of
from dagster_taskiq.tasks.cleanup import TaskCleanupContext, call_handler

_MAX_LINE: Final = 100_000
_INTERRUPTS: Final = {signal.SIGTERM, signal.SIGINT}


class _Stopped(BaseException):
    """SIGTERM: the worker is gone."""


def run(argument: dict[str, Any], channel: socket.socket) -> int:
    """Call the handler that `argument` names. Starts with SIGTERM and SIGINT blocked; returns an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    sending = threading.Lock()

    def tell(**message: Any) -> None:
        with sending, suppress(OSError):  # nobody listens any more
            channel.sendall(line_of(message))

    logging.basicConfig(handlers=[_ToWorker(tell)], level=argument["level"], force=True)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        sys.path[:] = argument["path"]
        call: Any = reduce(getattr, argument["name"].split("."), importlib.import_module(argument["module"]))
        # Written by the worker, for this process alone.
        given = pickle.loads(base64.b64decode(argument["given"]))  # noqa: S301
        state = State(lambda: json.dumps(argument["state"]), lambda text: tell(state=json.loads(text)))
        context = TaskCleanupContext(**given, state=state, log=logging.getLogger(argument["logger"]))
        tell(began=True)
        with attempt_limit(argument["timeout_s"]):
            call_handler(call, context)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the attempt has failed
        print_traceback()
        limit = too_long(argument["timeout_s"])
        tell(failed=limit if str(error) == limit else clean_text(f"{type(error).__name__}: {error}"))
        return 1
    else:
        tell(succeeded=True)
        return 0
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        tell(finished=True)


def _stop(*_: object) -> None:
    raise _Stopped


class _ToWorker(logging.Handler):
    """Each line goes to the worker, which logs it as its own."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            line = {"logger": record.name, "level": record.levelno, "text": self.format(record)[:_MAX_LINE]}
        except Exception:  # noqa: BLE001 - what cannot be formatted
            self.handleError(record)
        else:
            self._tell(log=line)
