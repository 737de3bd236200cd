"""The thread that closes connections under statements that are late."""

import math
import socket
import threading
import time
import weakref
from collections.abc import Callable

from dagster_taskiq.dagster_compat.connections import _Watch


class Connection:
    """As much of one as the watch looks at. `beside`: what happens in its thread meanwhile."""

    def __init__(self, ours: socket.socket, beside: Callable[[], object] = lambda: None) -> None:
        self._socket = ours
        self._beside = beside

    def fileno(self) -> int:
        self._beside()
        return self._socket.fileno()


def test_garbage_that_is_collected_in_its_thread_does_not_stop_it() -> None:
    watch = _Watch()
    ours, peer = socket.socketpair()
    with ours, peer:
        peer.settimeout(5)
        # A connection that is garbage goes back to its pool, which says that it is not waited for any more.
        watch.wait(Connection(ours, beside=watch.answered), time.monotonic())
        assert peer.recv(1) == b""


def test_what_may_take_for_ever_is_neither_watched_nor_kept() -> None:
    threads, watch = threading.active_count(), _Watch()
    ours, peer = socket.socketpair()
    with ours, peer:
        connection = Connection(ours)
        watch.wait(connection, math.inf)
        kept = weakref.ref(connection)
        del connection
        assert kept() is None
        assert threading.active_count() == threads
