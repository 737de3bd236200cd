"""The worker's side of a cleanup: processes that run the handlers of a run, one after the other until all is done.

Knows children and what they say; the handlers are run in there, by `cleanup`.
"""

import asyncio
import logging
from typing import Any, Final

from dagster import DagsterRun

from dagster_taskiq import dagster_internals as core
from dagster_taskiq import events
from dagster_taskiq.cancellation import CancelKind, Cancellation
from dagster_taskiq.child import CLEANUP_TARGET
from dagster_taskiq.claims import write_note
from dagster_taskiq.cleanup import HARD_TIMEOUT_S, write_attempt
from dagster_taskiq.finalise import how_it_ended
from dagster_taskiq.metrics import CLEANUP_ATTEMPTS
from dagster_taskiq.process import ChildSpec
from dagster_taskiq.supervisor import Cancelled, ChildEnd, supervise
from dagster_taskiq.workplace import Piece, Workplace

logger = logging.getLogger(__name__)

_MOST_CRASHES: Final = 3
"""Of the process, outside of any handler: then it is no accident."""


class _Log:
    """See `supervisor.Observer`. The event log of the run tells of the handlers, not of their process."""

    def interrupting(self, pid: int, grace_s: float) -> None:
        logger.info("the worker stops; interrupting a cleanup", extra={"pid": pid, "grace_s": grace_s})

    def killing(self, pid: int, waited_s: float, shield: str | None) -> None:
        logger.warning("killing a cleanup", extra={"pid": pid, "waited_s": waited_s, "shield": shield})


async def clean_up(place: Workplace, run: DagsterRun, task_id: str) -> bool:
    """Run the outstanding cleanup handlers of a run whose work has stopped; what came of it is in the run's log.

    False: the worker stops, and it has to go on elsewhere. Raises `ChildStartFailed`. Must run inside `to_the_end`,
    as `supervise`.
    """
    place.at_work[task_id] = Piece(run.run_id)
    crashes = 0
    try:
        while True:
            end = await _one_process(place, run, task_id)
            if end is None:
                return False
            told = [message["cleaning"] for message in end.messages if "cleaning" in message]
            for outcome in (what["ended"] for what in told if "ended" in what):
                place.metrics.count(CLEANUP_ATTEMPTS, Outcome=outcome)
            said = next((message for message in end.messages if "cleaned" in message), None)
            if said is not None or end.interrupted_at is not None or end.abandoned:
                return said is not None and bool(said["cleaned"])
            if told and "ended" not in told[-1]:
                place.metrics.count(CLEANUP_ATTEMPTS, Outcome="lost")
                await asyncio.to_thread(_write_lost, place, run, told[-1], end)
                continue
            crashes += 1
            if crashes == _MOST_CRASHES:
                note = events.cleanup_ended([how_it_ended(end, "the process of the cleanup handlers")])
                await asyncio.to_thread(write_note, place.instance, run, note)
                return True
    finally:
        place.at_work.pop(task_id, None)


async def _one_process(place: Workplace, run: DagsterRun, task_id: str) -> ChildEnd | None:
    """None: the worker stops, and none was started."""
    stop = Cancellation(CancelKind.SHUTDOWN, "the worker is shutting down")
    stopping = Cancelled(lambda: stop if place.hurry.is_set() else None)
    if stopping:
        return None
    spec = ChildSpec(
        target=CLEANUP_TARGET,
        argument={
            "run_id": run.run_id,
            "worker_id": place.worker_id,
            "instance_ref": core.serialize_value(place.instance.get_ref()),
        },
        mark=task_id,
        grace_s=min(place.settings.shutdown_grace_s, place.settings.dead_after_s),
        hung_after_s=place.settings.hung_after_s,
    )

    async def note_the_shutdown() -> None:
        await place.hurry.wait()
        stopping.note()

    noting = asyncio.create_task(note_the_shutdown(), name=f"stop cleanup of {run.run_id}")
    try:
        return await supervise(place.processes, spec, stopping, _Log(), lambda: spec.grace_s)
    finally:
        noting.cancel()


def _write_lost(place: Workplace, run: DagsterRun, doing: dict[str, Any], end: ChildEnd) -> None:
    """The attempt that did not get to say how it ended."""
    seconds = end.gone_at - float(doing["at"])
    why = how_it_ended(end, "its process")
    if seconds >= float(doing["timeout_s"]) + HARD_TIMEOUT_S:
        why = f"it did not react to its timeout of {doing['timeout_s']:g} s, and its process was ended"
    note = events.cleanup(str(doing["handler"]), int(doing["attempt"]), seconds, why)
    write_attempt(place.instance, run, doing["of"], note, whole=bool(doing["whole"]))
