"""What keeps a process when its work is over."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.support.waiting import wait_until

from dagster_taskiq.child.stays import tell_what_stays, what_stays


@contextmanager
def thread(name: str, *, daemon: bool = False) -> Iterator[None]:
    over = threading.Event()
    started = threading.Thread(target=over.wait, name=name, daemon=daemon)
    started.start()
    try:
        yield
    finally:
        over.set()
        started.join()


def test_what_an_interpreter_waits_for() -> None:
    before = what_stays()
    with thread("upload-1"), thread("heartbeat", daemon=True), ThreadPoolExecutor(thread_name_prefix="pool") as pool:
        pool.submit(int).result()
        assert set(what_stays()) - set(before) == {"upload-1", "pool_0"}


def test_names_of_others_are_bounded() -> None:
    with thread("x" * 10_000 + "\x00"):
        assert all(len(name) <= 80 and "\x00" not in name for name in what_stays())


def test_it_is_told_when_the_names_change() -> None:
    told: list[list[str]] = []
    with thread("upload-1"), thread("upload-2"):
        tell_what_stays(lambda *, stays: told.append(stays))
        wait_until(lambda: told, "the names are told")
    wait_until(lambda: len(told) > 1, "and that there are none any more", seen=lambda: told)
    assert {"upload-1", "upload-2"} <= set(told[0])
    assert not {"upload-1", "upload-2"} & set(told[-1])
