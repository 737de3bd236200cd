"""What the execution loop asks of whoever carries out steps. Knows Dagster's `StepHandler`."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.dagster_compat.execution import StepHandler, StepHandlerContext
from dagster_taskiq.settings import InterruptedSteps

NONE: Final[Mapping[str, int]] = {}


class TaskiqStepHandler(StepHandler):
    """What the loop asks of whoever carries out steps: as Dagster's `StepHandler`, but for many steps at a time."""

    @abstractmethod
    def open(self) -> None:
        """Begin to get ready for `launch_steps`, without waiting for it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what `open` and the others took."""

    @abstractmethod
    def launch_steps(
        self, contexts: Sequence[StepHandlerContext], interruptions: Mapping[str, int] = NONE
    ) -> Sequence[str]:
        """Send the steps. Returns the keys of those that could not be sent now, and should be tried again.

        `interruptions`: by step key, how often the present attempt was interrupted. Raises what makes the run fail.
        """

    @abstractmethod
    def route_of(self, instance: DagsterInstance, run: DagsterRun) -> str:
        """The route of a run, which its steps go to unless they have one of their own. Raises `SettingsError`."""

    @abstractmethod
    def check_routes(self, instance: DagsterInstance, routes: Sequence[str]) -> None:
        """Raises `UnknownRoute` for one of them that is known not to exist."""

    @abstractmethod
    def terminate_tasks(self, routes: Mapping[str, str]) -> None:
        """Ask for the steps with these task ids to be stopped, each on its route; never raises, may be called again."""

    @abstractmethod
    def workers_alive(self, instance: DagsterInstance, worker_ids: set[str]) -> set[str]:
        """Those that live, or may have living children."""

    @abstractmethod
    def unserved(self, instance: DagsterInstance, routes: set[str]) -> set[str]:
        """Those of the routes of which no worker that takes steps is alive."""

    @property
    @abstractmethod
    def interrupted_steps(self) -> InterruptedSteps:
        """What becomes of a step whose worker was stopped or has died, unless its tag says something else."""

    @property
    @abstractmethod
    def max_interruptions(self) -> int:
        """How often the run, or one attempt of a step, may be interrupted and go on elsewhere."""

    @abstractmethod
    def patience_s(self, run: DagsterRun) -> float:
        """How long to wait for steps that were cancelled."""
