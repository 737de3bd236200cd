"""Which code locations can this worker load, and who else may be able to, for the work that it has received?

Knows code pointers, heartbeats and time; not what becomes of the message.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Final, NoReturn

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq._lane import Lane
from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.dagster_compat.code_origin import CodePointer, pointer_of, why_not_here
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.code_locations import (
    ASK_KEY,
    Code,
    WorkSlots,
    ask_for,
    asked_for,
    code_of,
    heard,
    nobody_can,
    recent_code,
    told,
    who_serves,
)
from dagster_taskiq.storage.heartbeats import Heartbeats

logger = logging.getLogger(__name__)

_MOST_KNOWN: Final = 100
_IS_HERE_FOR_S: Final = 30.0
_IS_MISSING_FOR_S: Final = 3.0
"""A volume may be mounted, a package installed."""
_LOOK_AGAIN_EVERY_S: Final = 15.0
_ASK_AGAIN_AFTER_S: Final = 5.0
_LOOK_S: Final = 10.0
_LONGEST_DELAY_S: Final = 30
_TURNS: Final = 4
_LOOK_EVERY_S: Final = 5
"""At what waits for its code: a worker that has come with it is to have the work soon."""
_LOOKS_PER_S: Final = 2
"""At all that waits, by each worker."""


@dataclass(frozen=True, slots=True)
class CodeMissing:
    """This worker cannot load the code. `others`: another living worker of that route may be able to."""

    why: str
    others: bool


FindCode = Callable[[DagsterRun, str, WorkSlots], CodeMissing | None]
"""See `CodeCheck.missing`."""


def is_here(_: DagsterRun, __: str, ___: WorkSlots) -> None:
    """For who does not check."""


def hand_on_after_s(receive_count: int) -> int:
    """How long a message stays invisible whose code is elsewhere: the longer the more often it was received.

    Slowly: among many workers it takes some turns until the right one has it.
    """
    return min(_LONGEST_DELAY_S, 1 + max(0, receive_count) // _TURNS)


class Turns:
    """When a message comes again whose code is not here. Of one worker, and of its event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, float] = {}
        """By task id, the last look at what waits."""

    def after_s(self, task_id: str, receive_count: int, *, waits: bool) -> int:
        """In seconds. `waits`: nobody has the code yet.

        A look at what waits takes a slot for a moment. So the more waits here, the less often each is looked at, or
        what can run would stand behind it.
        """
        if not waits:
            return hand_on_after_s(receive_count)
        now = self._clock()
        self._seen.pop(task_id, None)
        self._seen[task_id] = now
        while now - next(iter(self._seen.values())) > 2 * _LONGEST_DELAY_S:
            del self._seen[next(iter(self._seen))]
        return min(_LONGEST_DELAY_S, max(_LOOK_EVERY_S, len(self._seen) // _LOOKS_PER_S))


class CodeCheck:
    """Of one worker. `missing` blocks on the file system, and on the database when the code is not here."""

    def __init__(
        self, instance: DagsterInstance, settings: Settings, worker_id: str, on_news: Callable[[], object]
    ) -> None:
        """`on_news`: called, from any thread, when others should read at once what has changed."""
        self._instance = instance
        self._settings = settings
        self._worker_id = worker_id
        self._on_news = on_news
        self._heartbeats = Heartbeats.of_runs(instance, settings)
        self._here: TTLCache[str] = TTLCache(at_most=_MOST_KNOWN, ttl_s=_IS_HERE_FOR_S)
        self._absent: TTLCache[str] = TTLCache(at_most=_MOST_KNOWN, ttl_s=_IS_MISSING_FOR_S)
        self._asked: TTLCache[str] = TTLCache(at_most=_MOST_KNOWN, ttl_s=_ASK_AGAIN_AFTER_S)
        self._heard: tuple[str, str] | None = None
        self._question: str | None = None
        """A run that somebody asks for, until it was looked at."""
        self._is_asked = asyncio.Event()
        self._known: dict[Code, tuple[CodePointer, str]] = {}
        self._lock = Lock()
        self._lane = Lane("the file system, for code locations", _LOOK_S)

    def missing(self, run: DagsterRun, route: str, slots: WorkSlots) -> CodeMissing | None:
        """None: the code of the run is here, or only an import would tell."""
        code, pointer = code_of(run), pointer_of(run)
        if code is None or pointer is None or not (why := self._look(code, pointer)):
            return None
        queue = queue_name(self._settings.queue_url)
        others = who_serves(self._heartbeats.living(), queue, route, slots, but=self._worker_id)
        said = {beat.worker_id: heard(beat.facts).get(code) for beat in others}
        for worker_id, of_other in said.items():
            if of_other == "":
                return CodeMissing(f"{why}; worker {worker_id} has the code", others=True)
        for worker_id, of_other in said.items():
            if of_other is None:
                self._ask(code, run, route)
                return CodeMissing(f"{why}; worker {worker_id} may have the code", others=True)
        refusals = {self._worker_id: why} | {worker_id: of_other or "" for worker_id, of_other in said.items()}
        return CodeMissing(nobody_can(code, route, refusals), others=False)

    def _ask(self, code: Code, run: DagsterRun, route: str) -> None:
        with self._lock:
            if code.mark in self._asked:
                return
            self._asked.add(code.mark, run.run_id)
        ask_for(self._instance, run, route)

    def hear(self, values: Mapping[str, str]) -> None:
        """What is stored at `ASK_KEY`: somebody asks who has the code of a run."""
        asked = asked_for(values.get(ASK_KEY))
        if asked is not None and asked != self._heard and asked[1] in self._settings.serves:
            with self._lock:
                self._heard, self._question = asked, asked[0]
            self._is_asked.set()

    def known(self) -> Mapping[Code, str]:
        """What was found out so far; the newest at the end."""
        with self._lock:
            return {code: why for code, (_, why) in self._known.items()}

    def told(self) -> list[list[str]]:
        """The same for the heartbeat."""
        return told(self.known())

    async def run(self) -> NoReturn:
        """Look for the code of recent runs and say in the log what is here; then again for what was missing."""
        try:
            await self._try(self._look_at_recent_runs)
            self._log()
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AGAIN_EVERY_S):
                        await self._is_asked.wait()
                self._is_asked.clear()
                if self._question is not None or any(self.known().values()):
                    await self._try(self._look_again)
        finally:
            self._lane.close()

    async def _try(self, look: Callable[[], None]) -> None:
        try:
            await self._lane.call(look)
        except Exception as error:  # noqa: BLE001 - the work that comes is looked at all the same
            logger.warning("cannot look for the code of runs: %s", error)

    def _look_at_recent_runs(self) -> None:
        for run in recent_code(self._instance, self._settings.serves).values():
            self._look_for(run)

    def _look_for(self, run: DagsterRun) -> None:
        code, pointer = code_of(run), pointer_of(run)
        if code is not None and pointer is not None:
            self._look(code, pointer)

    def _look_again(self) -> None:
        if (run_id := self._question) is not None:
            run = self._instance.get_run_by_id(run_id)
            if run is not None:
                self._look_for(run)
        with self._lock:
            if self._question == run_id:  # or else another one has come meanwhile
                self._question = None
            absent = [(code, pointer) for code, (pointer, why) in self._known.items() if why]
        for code, pointer in absent:
            self._look(code, pointer)

    def _log(self) -> None:
        known = self.known()
        absent = [f"{code.location}: {why}" for code, why in known.items() if why]
        if here := [code.location for code, why in known.items() if not why]:
            logger.info("has the code of these code locations of recent runs: %s", ", ".join(sorted(here)))
        if absent:
            text = "does not have the code of these code locations of recent runs, and hands their work on: %s"
            logger.warning(text, "; ".join(sorted(absent)))

    def _look(self, code: Code, pointer: CodePointer) -> str:
        """Why the code cannot be loaded here, or nothing; for some seconds as it was."""
        with self._lock:
            known = self._here.get(code.mark)
            known = known if known is not None else self._absent.get(code.mark)
        if known is None:
            known = why_not_here(pointer)
            with self._lock:
                (self._absent if known else self._here).add(code.mark, known)
        with self._lock:
            before = self._known.pop(code, None)
            self._known[code] = pointer, known
            while len(self._known) > _MOST_KNOWN:
                del self._known[next(iter(self._known))]
        if before is None or before[1] != known:
            with suppress(RuntimeError):  # the worker has ended meanwhile
                self._on_news()
        return known
