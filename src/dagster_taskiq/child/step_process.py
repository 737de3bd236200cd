"""A step of Dagster's multiprocess executor below a child of ours: what has interrupted it, for the run's log.

Such a process is Dagster's, and nothing of this package runs in it otherwise: so this imports little, and asks the
child above only when the step was interrupted.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dagster_taskiq.dagster_compat.step_failures import tell_interrupts
from dagster_taskiq.dagster_compat.step_scope import StepCommand, tags_of, use_step_command, watch_steps

TIMEOUT_TAG = "dagster-taskiq/timeout_seconds"
"""As `storage.tags` has it, which imports more than a process should that has no such step."""

if TYPE_CHECKING:
    from dagster_taskiq.cancellation.model import Cancellation


class TellingStepCommand(StepCommand):
    """What the executor sends to the process of a step: Dagster's own, and beside it this module."""

    def execute(self) -> Iterator[Any]:
        """See Dagster's."""
        if not _has_joined():
            tell_interrupts(lambda _: what_has_stopped(_cancellation_of_run()))
            watch_steps(_JoinsForLimit())
        try:
            yield from super().execute()
        finally:
            if _has_joined():
                from dagster_taskiq.cancellation.current import current_process
                from dagster_taskiq.child.child_process import ChildProcess

                if isinstance(process := current_process(), ChildProcess):
                    process.finished()


class _JoinsForLimit:
    """Until the child above is joined: joins it for a step with a limit, so that the worker learns of it."""

    def began(self, context: Any) -> None:
        if tags_of(context, TIMEOUT_TAG):
            from dagster_taskiq.child.child_process import ChildProcess, join_worker

            process = join_worker()
            if isinstance(process, ChildProcess):
                process.began(context)

    def torn_off(self, context: Any) -> None:
        pass

    def reported(self, context: Any) -> None:
        pass

    def fails_alone(self, _: Any) -> bool:
        return False

    def ended(self, context: Any) -> None:
        pass


def _has_joined() -> bool:
    """Whether the code of the user has had it done, when it was imported. It may still do that later."""
    current = sys.modules.get("dagster_taskiq.cancellation.current")
    return current is not None and current.current_process() is not current.NO_WORKER


def tell_in_step_processes() -> None:
    """Have it so in the processes that this one will start for steps."""
    use_step_command(TellingStepCommand)


def what_has_stopped(cancellation: "Cancellation | None") -> str:
    """Of a step whose run is not known to be on."""
    from dagster_taskiq.cancellation.words import why_stopped

    return why_stopped(cancellation, "run terminated")


def _cancellation_of_run() -> "Cancellation | None":
    from dagster_taskiq.cancellation.current import NO_WORKER, current_process
    from dagster_taskiq.child.control_channel import invitation, join

    if (process := current_process()) is not NO_WORKER:
        return process.cancellation
    address = invitation()
    if address is None or (control := join(address)) is None:
        return None
    with suppress(OSError):
        control.wait_for_intent()
    control.close()
    return control.signal.cancellation
