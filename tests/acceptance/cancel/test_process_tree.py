"""A child and its keeper: real processes, real signals."""

import asyncio
import os
import re
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.waiting import wait_until

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.errors import ChildStartFailed
from dagster_taskiq.process import fork_server
from dagster_taskiq.process import supervise as supervise_module
from dagster_taskiq.process.child_handle import Child, ChildSpec, find_processes
from dagster_taskiq.process.fork_server import ForkServer
from dagster_taskiq.process.supervise import ChildEnd, supervise
from dagster_taskiq.worker.run_child import see_through

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


@dataclass
class Work:
    """One supervised child, cancelled the way a receiver does it."""

    server: ForkServer
    target: str
    grace_s: float = 5
    exit_patience_s: float = 60
    cancelled_exit_patience_s: float = 60
    hung_after_s: float = 0
    linger_s: float = 0.2
    argument: dict[str, Any] = field(default_factory=dict)
    child: Child | None = None
    killings: int = 0
    interruptions: int = 0
    stayed: list[tuple[str, ...]] = field(default_factory=list)
    killed_with: list[tuple[str, ...] | None] = field(default_factory=list)
    forked: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.signal = CancelSignal()
        self.task: asyncio.Task[ChildEnd | None] | None = None

    async def fork(self, spec: ChildSpec) -> Child:
        self.child = await self.server.fork(spec)
        self.forked.set()
        return self.child

    def interrupting(self, pid: int, grace_s: float) -> None:
        self.interruptions += 1

    def staying(self, pid: int, stays: Sequence[str], patience_s: float) -> None:
        self.stayed.append(tuple(stays))

    def killing(self, pid: int, waited_s: float, shield: str | None, stays: Sequence[str] | None) -> None:
        self.killings += 1
        self.killed_with.append(tuple(stays) if stays is not None else None)

    def start(self) -> "Work":
        target, patience_s = f"tests.support.targets:{self.target}", self.exit_patience_s
        spec = ChildSpec(target, self.argument, self.mark, self.grace_s, patience_s, self.cancelled_exit_patience_s)
        spec = replace(spec, hung_after_s=self.hung_after_s, linger_s=self.linger_s)
        body = supervise(self, spec, self.signal, self, lambda _: self.grace_s)
        self.task = asyncio.create_task(see_through(body, self.signal, name="work"))
        return self

    def cancel(self, kind: CancelKind = CancelKind.REQUESTED) -> None:
        self.signal.set(Cancellation(kind, "why", "who"))

    async def said(self, key: str) -> Any:
        async def look() -> Any:
            while True:
                for message in self.child.messages if self.child is not None else ():
                    if key in message:
                        return message[key]
                await asyncio.sleep(0.01)

        return await asyncio.wait_for(look(), 20)

    async def end(self) -> ChildEnd:
        assert self.task is not None
        end = await asyncio.wait_for(asyncio.shield(self.task), 30)
        assert end is not None
        assert find_processes(self.mark, session=end.pid) == []
        return end


@asynccontextmanager
async def server(**options: Any) -> AsyncIterator[ForkServer]:
    before = set(psutil.Process().children())
    server = ForkServer(preload=["tests.support.targets"], **options)
    try:
        yield server
    finally:
        await server.stop()
    assert set(psutil.Process().children()) <= before


def run(test: Callable[[ForkServer], Any], **options: Any) -> None:
    async def body() -> None:
        async with server(**options) as started:
            await test(started)

    asyncio.run(body())


both_ways = pytest.mark.parametrize("fresh", [False, True], ids=["forkserver", "spawn"])


@both_ways
def test_a_child_leads_its_own_session_and_has_no_stdin(fresh: bool) -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "ends", argument={"code": 7}).start()
        end = await work.end()
        assert end.exit_code == 7
        assert end.messages[0] == {"stdin": "", "session": end.pid, "pid": end.pid}

    run(test, fresh=fresh)


@both_ways
def test_the_intent_comes_before_the_signal(fresh: bool) -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "polite").start()
        await work.said("up")
        work.cancel()
        end = await work.end()
        told = next(message for message in end.messages if "interrupted" in message)
        assert '"intent": "REQUESTED"' in told["heard"]
        assert '"by": "who"' in told["heard"]
        assert (end.exit_code, end.killed, work.killings) == (0, (), 0)

    run(test, fresh=fresh)


def test_a_shutdown_is_told_as_one_and_not_as_a_cancellation() -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "polite").start()
        await work.said("up")
        work.cancel(CancelKind.SHUTDOWN)
        end = await work.end()
        told = next(message for message in end.messages if "interrupted" in message)
        assert '"intent": "SHUTDOWN"' in told["heard"]

    run(test)


@both_ways
def test_a_signal_before_the_handlers_stand_is_not_lost(fresh: bool) -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "slow_to_set_up").start()
        await work.forked.wait()
        work.cancel()
        end = await work.end()
        assert any("interrupted" in message for message in end.messages)
        assert work.killings == 0

    run(test, fresh=fresh)


@both_ways
def test_a_signal_in_the_moment_before_the_child_sleeps_is_not_lost(fresh: bool) -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "falls_asleep", grace_s=20).start()
        await work.said("up")
        work.cancel()
        end = await work.end()
        assert (work.killings, end.exit_code) == (0, 0)
        assert any("interrupted" in message for message in end.messages)

    run(test, fresh=fresh)


@both_ways
def test_the_whole_tree_is_killed_wherever_it_hides(fresh: bool) -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "stubborn", grace_s=0.3).start()
        pids = await work.said("pids")
        work.cancel()
        work.cancel()  # a second cancel while the ladder runs orphans nothing
        end = await work.end()
        assert work.interruptions == work.killings == 1
        assert end.killed_by == "SIGKILL"
        assert not [pid for pid in pids if alive(pid)]

    run(test, fresh=fresh)


@pytest.mark.parametrize("leaves", [False, True], ids=["same session", "session of its own"])
@pytest.mark.parametrize("obeys", [False, True])
def test_who_had_to_be_killed_is_named_and_who_was_ending_is_not(tmp_path: Path, obeys: bool, leaves: bool) -> None:
    async def test(server: ForkServer) -> None:
        argument = {"folder": str(tmp_path), "obeys": obeys, "leaves": leaves}
        work = Work(server, "has_helpers", argument=argument, grace_s=0.3).start()
        tracker, script = await work.said("up")
        work.cancel()
        end = await work.end()
        named = {re.sub(r"^python[\d.]*", "python", name) for name in end.killed}
        assert named == {f"python goes_on.py[{script}]"} | ({f"main process[{end.pid}]"} if not obeys else set())
        assert not psutil.pid_exists(tracker)

    run(test)


def test_a_tree_that_forks_faster_than_one_can_look_is_killed() -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "storms", grace_s=0.5).start()
        await work.said("up")
        work.cancel()
        end = await work.end()
        assert end.kill_at is not None

    run(test)


def test_a_cancel_in_the_middle_of_the_start_orphans_nothing() -> None:
    async def test(server: ForkServer) -> None:
        for delay in (0.0, 0.0005, 0.001, 0.002, 0.004, 0.008) * 4:
            work = Work(server, "polite", grace_s=20).start()
            await asyncio.sleep(delay)
            work.cancel()
            await work.end()
            assert work.killings == 0

    run(test)


def test_a_child_that_has_finished_is_waited_for_and_its_threads_are_named() -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "finishes_but_stays", grace_s=0.1, argument={"seconds": 4}).start()
        end = await work.end()
        assert (end.exit_code, work.interruptions, work.killings) == (0, 0, 0)
        assert work.stayed == [("upload-1",)]

    run(test)


def test_a_child_that_has_finished_but_stays_is_killed_after_its_patience() -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "finishes_but_stays", exit_patience_s=1, argument={"seconds": 300}).start()
        end = await work.end()
        assert (work.interruptions, work.killings, work.stayed) == (0, 1, [])
        assert (end.killed_by, work.killed_with) == ("SIGKILL", [("upload-1",)])

    run(test)


@pytest.mark.parametrize("kind", [CancelKind.REQUESTED, CancelKind.SHUTDOWN])
@pytest.mark.parametrize("before", [False, True], ids=["ends when cancelled", "had ended before"])
def test_threads_of_a_cancelled_child_are_not_waited_for_as_long_as_the_grace(before: bool, kind: CancelKind) -> None:
    """But in a shutdown, where what has finished may go on for as long as there is time."""

    async def test(server: ForkServer) -> None:
        requested = kind is CancelKind.REQUESTED
        argument = {"seconds": 300, "waits": not before}
        work = Work(server, "finishes_but_stays", argument=argument)
        work.grace_s, work.cancelled_exit_patience_s = (300, 0.5) if requested else (1, 300)
        work.start()
        if not before:
            await work.said("up")
        else:
            await work.said("finished")
        work.cancel(kind)
        end = await work.end()
        assert (end.killed_by, work.interruptions, work.killed_with) == ("SIGKILL", 1, [("upload-1",)])

    run(test)


def test_a_worker_that_hangs_has_its_child_stopped_and_hears_of_it() -> None:
    async def test(server: ForkServer) -> None:
        for target, killed in (("polite", False), ("stubborn", True)):
            work = Work(server, target, hung_after_s=1, grace_s=0.5).start()
            await work.said("pids" if killed else "up")
            # It goes on for longer than that as long as the event loop does.
            _, waiting = await asyncio.wait({work.task} if work.task else set(), timeout=2)
            assert waiting
            assert work.child is not None
            hang_until_gone(work.child.pid)
            end = await work.end()
            assert end.abandoned
            assert (work.interruptions, work.killings) == (0, 0), "this worker did nothing"
            assert (end.killed_by == "SIGKILL") is killed

    run(test)


def hang_until_gone(pid: int) -> None:
    """What must not be done in an event loop."""
    wait_until(lambda: not alive(pid), "the child is gone while its worker hangs")


def test_a_keeper_that_is_killed_takes_its_tree_with_it() -> None:
    async def test(server: ForkServer) -> None:
        work = Work(server, "stubborn").start()
        pids = await work.said("pids")
        assert work.child is not None
        os.kill(psutil.Process(work.child.pid).ppid(), signal.SIGKILL)
        end = await work.end()
        assert end.exit_code == -signal.SIGKILL
        assert not [pid for pid in pids if alive(pid)]

    run(test)


def test_a_keeper_that_hangs_is_killed_and_its_tree_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise_module, "SHIM_ANSWERS_S", 0.5)

    async def test(server: ForkServer) -> None:
        work = Work(server, "stubborn", grace_s=0.3).start()
        pids = await work.said("pids")
        assert work.child is not None
        psutil.Process(psutil.Process(work.child.pid).ppid()).suspend()
        work.cancel()
        end = await work.end()
        assert (end.exit_code, work.killings) == (-signal.SIGKILL, 1)
        assert not [pid for pid in pids if alive(pid)]

    run(test)


def test_a_keeper_that_cannot_end_what_the_work_has_left_behind_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one does that may not kill what the work has left behind: it belongs to another user, or hangs itself."""
    monkeypatch.setattr(supervise_module, "SHIM_ANSWERS_S", 0.5)

    async def test(server: ForkServer) -> None:
        work = Work(server, "leaves_one_behind", linger_s=5).start()
        pid, shim = await work.said("left"), psutil.Process(await work.said("shim"))
        assert work.child is not None
        work.child.exited.add_done_callback(lambda _: shim.suspend())
        end = await work.end()
        assert (end.exit_code, work.killings) == (0, 0)
        assert not alive(pid)

    run(test)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_fork_server_that_is_killed_is_started_anew_and_its_children_go_on() -> None:
    async def test(server: ForkServer) -> None:
        before = Work(server, "polite").start()
        await before.said("up")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        after = Work(server, "ends", argument={"code": 3}).start()
        assert (await after.end()).exit_code == 3
        before.cancel()
        end = await before.end()
        assert (end.exit_code, before.killings) == (0, 0)

    run(test)


def test_a_fork_server_that_hangs_is_replaced_and_its_children_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "ANSWER_S", 1.0)

    async def test(server: ForkServer) -> None:
        before = Work(server, "polite").start()
        await before.said("up")
        assert server.pid is not None
        hanging = psutil.Process(server.pid)
        hanging.suspend()
        after = [Work(server, "ends", argument={"code": code}).start() for code in range(5)]
        assert [(await work.end()).exit_code for work in after] == list(range(5))
        assert not hanging.is_running()
        before.cancel()
        end = await before.end()
        assert (end.exit_code, before.killings) == (0, 0)

    run(test)


def test_a_cancel_does_not_wait_for_a_fork_server_that_hangs() -> None:
    async def test(server: ForkServer) -> None:
        await Work(server, "ends").start().end()
        assert server.pid is not None
        hanging = psutil.Process(server.pid)
        hanging.suspend()
        work = Work(server, "polite").start()
        await asyncio.sleep(0)
        work.cancel()
        assert work.task is not None
        assert await asyncio.wait_for(work.task, 5) is None
        hanging.resume()  # it forks what it was asked for, and that has nothing to do
        await Work(server, "ends").start().end()
        await asyncio.to_thread(wait_until, lambda: not find_processes(work.mark), "what came too late is gone")

    run(test)


def test_a_fork_server_that_hangs_can_be_stopped() -> None:
    async def test(server: ForkServer) -> None:
        starting = asyncio.create_task(server.start())
        await asyncio.sleep(0.05)  # it imports
        assert server.pid is not None
        hanging = psutil.Process(server.pid)
        hanging.suspend()
        await asyncio.wait_for(server.stop(), 5)
        assert not hanging.is_running()
        await asyncio.wait({starting})

    run(test)


def test_nobody_waits_for_a_fork_server_that_takes_long_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is of no use, because what it has imported has started a thread."""
    (tmp_path / "takes_long.py").write_text(
        "import os, threading, time\n"
        "os._exit = lambda code: time.sleep(60)\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def test(_: ForkServer) -> None:
        useless = ForkServer(preload=["takes_long"])
        starting = asyncio.create_task(useless.start())
        await asyncio.sleep(0.05)  # it imports
        assert useless.pid is not None
        process = psutil.Process(useless.pid)
        seen = 0
        while not starting.done():
            await asyncio.sleep(0.01)
            seen += useless.pid is None and process.is_running()
        with pytest.raises(ChildStartFailed, match="started 1 threads"):
            starting.result()
        assert seen, "others have had their turn while it ended"
        assert not process.is_running()

    run(test)


def test_many_children_at_once() -> None:
    async def test(server: ForkServer) -> None:
        works = [Work(server, "ends", argument={"code": code}).start() for code in range(40)]
        assert [(await work.end()).exit_code for work in works] == list(range(40))

    run(test)


def test_no_descriptor_and_no_task_is_left() -> None:
    async def test(server: ForkServer) -> None:
        await Work(server, "ends").start().end()
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - descriptors
        for _ in range(10):
            await Work(server, "ends").start().end()
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - descriptors
        assert len(asyncio.all_tasks()) == 1

    run(test)


def test_modules_that_cannot_be_preloaded_are_named() -> None:
    async def test() -> None:
        bad = ForkServer(preload=["no_such_module_at_all"])
        with pytest.raises(ChildStartFailed, match=r"no_such_module_at_all.*start_method: spawn"):
            await bad.start()

    asyncio.run(test())


def test_modules_that_start_threads_are_refused() -> None:
    async def test() -> None:
        bad = ForkServer(warm_up={"tests.support.targets:start_a_thread": [None]})
        with pytest.raises(ChildStartFailed, match="started 1 threads"):
            await bad.start()

    asyncio.run(test())
