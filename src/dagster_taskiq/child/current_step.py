"""Which step is at work in this process, for whoever asks: its op, its threads, resources, hooks and I/O managers.

Knows Dagster's steps and threads; not what is asked for them.
"""

import threading
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakSet

from dagster import DagsterInstance

from dagster_taskiq.dagster_compat.definitions import current_op

NO_STEP: Final = "no step is at work here"
OLDER: Final = "this thread was there before the step began, and may be another step's"


@dataclass(frozen=True, slots=True)
class StepOfRun:
    """One step of one run, and the instance that has it."""

    instance: DagsterInstance = field(compare=False)
    run_id: str
    step_key: str


@dataclass(frozen=True, slots=True)
class _Begun:
    step: StepOfRun
    older: WeakSet[threading.Thread] = field(compare=False)
    """The other threads that were there at its beginning."""


class CurrentStep:
    """Answers by what the loop over the steps has reported, not by who asked last."""

    def __init__(self, of_process: StepOfRun | None = None) -> None:
        """`of_process`: the only step that this process was made for."""
        self._of_process = of_process
        self._begun: tuple[_Begun, ...] = ()
        """The innermost last: an op may execute another job in its process."""

    def is_made_for(self, instance: DagsterInstance, run_id: str, step_key: str) -> None:
        """This process has that one step."""
        self._of_process = StepOfRun(instance, run_id, step_key)

    def began(self, instance: DagsterInstance, run_id: str, step_key: str) -> None:
        """A step begins, in the thread that calls this."""
        here = threading.current_thread()
        older = WeakSet(thread for thread in threading.enumerate() if thread is not here)
        self._begun = (*self._but(run_id), _Begun(StepOfRun(instance, run_id, step_key), older))

    def ended(self, instance: DagsterInstance, run_id: str, step_key: str) -> None:
        """Its hooks have run, or it was torn off."""
        self._begun = self._but(run_id)

    def _but(self, run_id: str) -> tuple[_Begun, ...]:
        return tuple(begun for begun in self._begun if begun.step.run_id != run_id)

    def asked(self) -> StepOfRun | str:
        """The step of whoever calls this; or why it is not known."""
        context = current_op()
        if context is not None:  # also in a thread that was started with the op's context
            key = context.get_step_execution_context().step.key
            return StepOfRun(context.instance, context.run_id, key)
        begun = self._begun[-1] if self._begun else None
        if begun is None or begun.step == self._of_process:
            return self._of_process or NO_STEP
        here = threading.current_thread()
        # Of a thread that Python has not started it is not known how old it is.
        if here in begun.older or isinstance(here, threading._DummyThread):  # noqa: SLF001
            return OLDER
        return begun.step
