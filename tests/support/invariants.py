"""What has to be true after a bad day, whatever went wrong in it. One checker; it returns what is wrong, in words."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dagster import DagsterEvent, DagsterEventType, DagsterRunStatus

from dagster_taskiq.dagster_compat.api import RESUME_RUN_LOG_MESSAGE
from dagster_taskiq.process import procfs, shim
from dagster_taskiq.storage.engine_events import TASK_ID_KEY, WORKER_KEY, Stage
from dagster_taskiq.storage.event_log import parse_event
from tests.support.chaos import ROUTE, Aftermath, Launched

FINISHED = {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED}
TERMINAL = {DagsterEventType.RUN_SUCCESS, DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_CANCELED}
BROKEN = ("never retrieved", "Task was destroyed", "Unhandled exception", "coroutine ignored")


@dataclass
class Life:
    """One execution of one body, by its marks."""

    pid: int
    began: float
    last: float
    done: bool = False


def broken(after: Aftermath) -> list[str]:
    """Everything that is not as it has to be."""
    wrong: list[str] = []
    task_ids: set[str] = set()
    stages: Counter[Stage] = Counter()
    for launched in after.launched:
        events = [entry.dagster_event for entry in after.platform.instance.all_logs(launched.run_id)]
        notes = [note for event in events if event is not None and (note := parse_event(event)) is not None]
        task_ids |= {str(facts[TASK_ID_KEY]) for _, facts in notes if TASK_ID_KEY in facts}
        seen = {stage for stage, _ in notes}
        stages.update(stage for stage, _ in notes)
        kinds = [event.event_type for event in events if event is not None]
        successes = Counter(
            event.step_key
            for event in events
            if event is not None and event.event_type is DagsterEventType.STEP_SUCCESS
        )
        # Dagster's in-process executor begins anew when its run is resumed.
        anew = 0 if launched.job.endswith("_steps") else sum(_is_resumption(event) for event in events)
        found = [
            *_status(after, launched, kinds, seen),
            *_bodies(after, launched, anew),
            *_routes(after, launched, events),
            *(f"step {key} succeeded {count} times" for key, count in successes.items() if count > 1 + anew),
        ]
        wrong += [f"{launched.job} {launched.run_id}: {one}" for one in found]
    wrong += [f"process {one} is alive" for one in alive(task_ids)]
    wrong += [f"{log.name}: {line.strip()}" for log in after.logs for line in _broken_lines(log)]
    wrong += [f"a worker ended with exit code {code} when it was stopped" for code in after.exit_codes if code]
    after.decisions.update({f"event: {stage}": count for stage, count in stages.items()})
    return wrong


def _status(after: Aftermath, launched: Launched, kinds: list[DagsterEventType], stages: set[Stage]) -> Iterator[str]:
    status = after.platform.status(launched.run_id)
    if status not in FINISHED:
        yield f"is {status.value}"
    terminal = [index for index, kind in enumerate(kinds) if kind in TERMINAL]
    if DagsterEventType.RUN_CANCELED in kinds and status is not DagsterRunStatus.CANCELED:
        yield f"was CANCELED and is {status.value}"
    stopped = [index for index, kind in enumerate(kinds) if kind is DagsterEventType.RUN_CANCELING]
    asked = any(answer for _, answer in launched.terminated) or launched.forced_at is not None
    if asked and status is not DagsterRunStatus.CANCELED:
        before = bool(terminal) and (not stopped or terminal[0] < stopped[0])
        if not before and Stage.FINISHED_ALL_THE_SAME not in stages:
            yield f"was terminated and is {status.value}"
    if not asked and not launched.terminated and status is DagsterRunStatus.CANCELED:
        yield "is CANCELED, and nobody asked for it"


def _routes(after: Aftermath, launched: Launched, events: Sequence[DagsterEvent | None]) -> Iterator[str]:
    """Whoever has picked something up serves the route of it."""
    for event in events:
        note = parse_event(event) if event is not None else None
        if event is None or note is None or note[0] is not Stage.PICKED_UP:
            continue
        route = ROUTE if (event.step_key or "").startswith(f"{ROUTE}_") else launched.route
        name = str(note[1][WORKER_KEY]).partition("-")[0]
        if route not in after.serves[name]:
            yield f"{event.step_key or 'the run'} is of the route {route} and was picked up by {name}"


def _is_resumption(event: DagsterEvent | None) -> bool:
    said = event.message or "" if event is not None else ""
    return said == RESUME_RUN_LOG_MESSAGE or said.startswith("the run was interrupted")


def _bodies(after: Aftermath, launched: Launched, anew: int) -> Iterator[str]:
    for step_key, lives in _lives(launched.marks).items():
        done = [life for life in lives if life.done]
        unharmed = [life.pid for life in done[:-1] if life.pid not in after.victims]
        if len(unharmed) > anew:
            yield f"the body of {step_key} was completed {len(done)} times, also by {unharmed}, which nobody harmed"
        for earlier, later in itertools.pairwise(lives):
            if earlier.last > later.began:
                overlap = earlier.last - later.began
                yield f"the bodies of {step_key} in {earlier.pid} and {later.pid} overlap by {overlap:.2f} s"


def _lives(marks: Path) -> dict[str, list[Life]]:
    lives: dict[str, dict[str, Life]] = defaultdict(dict)
    for line in marks.read_text().splitlines() if marks.exists() else ():
        text, step_key, who, at = line.split()
        life = lives[step_key].setdefault(who, Life(int(who.partition("-")[0]), float(at), float(at)))
        life.last = float(at)
        life.done = life.done or text == "done"
    return {step_key: sorted(found.values(), key=lambda life: life.began) for step_key, found in lives.items()}


def alive(task_ids: set[str]) -> list[str]:
    """Processes that work under one of these tasks, in one look at the process table."""
    names = {shim.name_for(task_id) for task_id in task_ids}
    marks = {f"{shim.MARK_VARIABLE}={task_id}".encode() for task_id in task_ids}
    found = []
    for pid in procfs.processes():
        try:
            environment = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        except OSError:
            environment = set()
        name = procfs.command_of(pid)
        if name in names or environment & marks:
            found.append(f"{pid} ({name})")
    return found


def _broken_lines(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if any(sign in line for sign in BROKEN)]
