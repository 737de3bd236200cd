"""All tasks of one worker, by id: from receipt until settled. A cancellation finds its task here, or not."""

from collections.abc import Callable, Iterator, Mapping

from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.tasks.predicates import TaskView
from dagster_taskiq.tasks.running_task import RunningTask

_REMEMBERED_S = 3_600


class RunningTasks(Mapping[str, RunningTask]):
    """Several receivers of one worker share this: a cancel does not name the queue of its task."""

    def __init__(self) -> None:
        self._tasks: dict[str, RunningTask] = {}
        self.finished: TTLCache[bool] = TTLCache(ttl_s=_REMEMBERED_S)
        """Task ids under which nobody will ever work again, for an hour."""

    def __getitem__(self, task_id: str) -> RunningTask:
        return self._tasks[task_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: RunningTask) -> None:
        """It was received."""
        self._tasks[task.task_id] = task

    def remove(self, task: RunningTask, *, comes_again: bool = False) -> bool:
        """It is settled; whether nobody will work under its id again. `comes_again`: its message is not deleted."""
        del self._tasks[task.task_id]
        finished = task.finished and not comes_again
        if finished:
            self.finished.add(task.task_id, True)
        return finished

    def cancel(self, task_id: str, cancellation: Cancellation) -> bool:
        """Cancel a task that runs here. False: it does not."""
        task = self._tasks.get(task_id)
        if task is not None:
            task.cancel(cancellation)
        return task is not None

    def cancel_all(self, cancellation_of: Callable[[TaskView], Cancellation | None]) -> dict[str, Cancellation]:
        """Cancel those that run here and for which there is a cancellation; returns these, by task id.

        Not those that somebody has cancelled already: each of them has its cancel message.
        """
        cancelled = {}
        for task in list(self._tasks.values()):
            if task.view is None or task.over or (task.cancellation and task.cancellation.kind >= CancelKind.REQUESTED):
                continue
            if (cancellation := cancellation_of(task.view)) is not None:
                task.cancel(cancellation)
                cancelled[task.task_id] = cancellation
        return cancelled
