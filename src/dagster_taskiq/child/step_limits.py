"""How long the step that is at work may take: told to the worker, which keeps the time, and heard from it.

Knows the limits in the tags of steps and the control channel; not what an interrupt is. The time is kept outside,
because code that keeps the interpreter lock would stop every clock in here.
"""

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from dagster_taskiq.cancellation.handlers import handlers_of
from dagster_taskiq.cancellation.signal import PartSignal
from dagster_taskiq.child.control_channel import ControlChannel
from dagster_taskiq.child.stays import what_stays
from dagster_taskiq.dagster_compat.step_scope import tags_of
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.storage.tags import TIMEOUT_TAG
from dagster_taskiq.storage.time_limits import TimeLimit, seconds_from_tag

MARK_VARIABLE: Final = "DAGSTER_TASKIQ_STEP"
"""In the environment of what a step with a limit starts: by it that is found when the step has timed out."""
_LOOK_EVERY_S: Final = 0.02
_number: Final = itertools.count(1)


@dataclass(slots=True)
class StepLimit:
    """One attempt of a step, and how long it may take."""

    name: str
    """Unique among all processes of a run."""
    run_id: str
    step_key: str
    signal: PartSignal
    """Set when it has taken longer, and when the whole process is cancelled."""
    interrupted: bool = False
    """Whether the op was interrupted because of it. Once is enough."""

    @property
    def is_due(self) -> bool:
        """Whether it has taken longer, and the op is still to be interrupted."""
        return self.signal.own is not None and not self.interrupted


class StepLimits:
    """Of the steps of this process, one after the other."""

    def __init__(self, control: ControlChannel, begin: Callable[[StepLimit], None], end: Callable[[], None]) -> None:
        """`begin` and `end` are called when a step with a limit does: from one to the other it may be interrupted."""
        self._control = control
        self._begin = begin
        self._end = end
        self._limit: StepLimit | None = None
        self._is_open = False
        self._late: str | None = None
        """The last one that has timed out."""

    @property
    def signal(self) -> PartSignal | None:
        """That of the step at work, if it has a limit."""
        return self._limit.signal if self._limit is not None and self._is_open else None

    @property
    def why_failed(self) -> str | None:
        """Why the step at work was interrupted, if it was because of its limit, and the process is not cancelled."""
        limit = self._limit
        if limit is None or not limit.interrupted or limit.signal.own is None or self._control.signal.is_set:
            return None
        return limit.signal.own.reason

    def began(self, context: Any) -> None:
        """An attempt begins. Of an op that executes another job in its process, the outermost limit counts."""
        if self._is_open or (length := _limit_of(context)) is None:
            return
        limit = StepLimit(f"{os.getpid()}-{next(_number)}", context.run_id, context.step.key, self._control.part())
        self._limit, self._is_open = limit, True
        self._control.parts[limit.name] = limit.signal
        os.environ[MARK_VARIABLE] = limit.name
        self._begin(limit)
        self._control.send(
            step_limit={
                "mark": f"{MARK_VARIABLE}={limit.name}",
                "name": limit.name,
                "pid": os.getpid(),
                "run_id": limit.run_id,
                "step_key": limit.step_key,
                "seconds": length.seconds,
                "reason": length.exceeded("step"),
                "handlers": bool(handlers_of(context.op_def)),
            }
        )

    def torn_off(self, context: Any) -> None:
        """The op has been left. If because of its limit: wait until its cleanup handlers have run, elsewhere."""
        limit = self._limit
        if limit is None or not self._is_of(context) or not limit.interrupted or self._control.signal.is_set:
            return
        self._late = limit.name
        self._control.send(step_stopped=limit.name)
        self._wait_for_cleanup(limit.name)

    def why_gone(self, pid: int) -> str | None:
        """Why a process of a step, below this one, is gone, if that had timed out; when its handlers have run."""
        self._control.listen()
        if pid not in self._control.late:
            return None
        name, reason = self._control.late[pid]
        self._wait_for_cleanup(name)
        return f"{reason}; its process {pid} did not react to the interrupt, and was killed"

    def _wait_for_cleanup(self, name: str) -> None:
        """Unless this process is cancelled meanwhile, or its worker is gone."""
        while name not in self._control.cleaned and not self._control.signal.is_set:
            time.sleep(_LOOK_EVERY_S)
            self._control.listen()

    def reported(self, context: Any) -> None:
        """It is written how it has ended: from now on nothing of it takes too long."""
        if self._limit is not None and self._is_open and self._is_of(context):
            self._is_open = False
            self._control.parts.pop(self._limit.name, None)
            os.environ.pop(MARK_VARIABLE, None)
            self._control.send(step_over=self._limit.name)
            self._end()

    def ended(self, context: Any) -> None:
        """Its hooks have run, or it was torn off."""
        self.reported(context)
        if self._is_of(context):
            self._limit = None

    def finished(self) -> None:
        """The process is about to end, and was there for this step alone. Its exit waits for what the op has left."""
        if self._late is not None and what_stays():
            self._control.send(step_finished=self._late)

    def forget(self) -> None:
        """In a fork of the process: the step is not this one's."""
        self._limit, self._is_open = None, False

    def _is_of(self, context: Any) -> bool:
        limit = self._limit
        return limit is not None and (limit.run_id, limit.step_key) == (context.run_id, context.step.key)


def _limit_of(context: Any) -> TimeLimit | None:
    """The shortest of its limits; None: it has none that is valid, and the run's log says so, once."""
    found = []
    for value in tags_of(context, TIMEOUT_TAG):
        try:
            found.append(TimeLimit(seconds_from_tag(value), TIMEOUT_TAG))
        except SettingsError as error:
            if context.previous_attempt_count == 0:
                context.log.warning(f"Without effect: the tag {TIMEOUT_TAG} {error}")  # noqa: G004 - Dagster's, as it is
    return min(found, key=lambda limit: limit.seconds, default=None)
