"""Which routes are in use, who serves them, and for which of them something waits in vain? The routes of `doctor`.

Knows heartbeats and Dagster's runs; `aws_checks` has asked AWS. Calls block on the database.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from dagster import DagsterInstance

from dagster_taskiq.doctor.finding import Finding, ok
from dagster_taskiq.doctor.permission_checks import routes_in
from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.probe import QueueFacts
from dagster_taskiq.storage.routing import sorted_routes
from dagster_taskiq.storage.waiting import WaitingRuns, routes_in_use, serving, waiting_by_route
from dagster_taskiq.storage.workers import ALIVE, WorkerInfo, list_workers

_START: Final = "dagster-taskiq worker start"


def known_routes(instance: DagsterInstance, settings: Settings) -> tuple[str, ...]:
    """Those that the settings name, that living workers serve, and that runs wait for; the unnamed one first."""
    in_use = routes_in_use(instance, settings, list_workers(instance, settings))
    return sorted_routes((*routes_in(settings), *in_use))


def look_at_workers(
    instance: DagsterInstance,
    settings: Settings,
    routes: Sequence[str],
    workers: Sequence[WorkerInfo],
    queues: Mapping[tuple[str, str], QueueFacts],
) -> Iterator[Finding]:
    """How many live, of which routes, and what waits for nobody. `queues`: by route and role."""
    alive = [worker for worker in workers if worker.state == ALIVE]
    if not alive:
        yield Finding("workers", "error", "none is alive: runs wait", _START)
    else:
        yield ok("workers", f"{len(alive)} alive{_by_route(settings, routes, workers)}")
    waiting = waiting_by_route(instance)
    for route in routes:
        if not alive and route == DEFAULT_ROUTE:
            continue  # has been said
        for role, what in (("work", "runs"), ("steps", "steps")):
            wait = _messages(queues.get((route, role)))
            if role == "work":
                wait = max(wait, waiting.get(route, WaitingRuns(0, 0.0)).count)
            slots = [worker.runs if role == "work" else worker.steps for worker in serving(workers, settings, route)]
            if wait and all(some == 0 for some in slots):
                yield _nobody(route, what, wait)


def _by_route(settings: Settings, routes: Sequence[str], workers: Sequence[WorkerInfo]) -> str:
    if {*routes} == {DEFAULT_ROUTE}:
        return ""
    counts = ", ".join(f"{route} {len(serving(workers, settings, route)) or 'none'}" for route in routes)
    return f"; by route: {counts}"


def _messages(queue: QueueFacts | None) -> int:
    return int(queue.attributes.get("ApproximateNumberOfMessages", 0)) if queue is not None else 0


def _nobody(route: str, what: str, wait: int) -> Finding:
    waiting = f"{wait} {what} wait" if wait != 1 else f"1 {what.removesuffix('s')} waits"
    if route == DEFAULT_ROUTE:
        repair = f"{_START} --{what}-only, or workers without an -only flag"
        return Finding("workers", "error", f"{waiting}, and no worker takes any", repair)
    reason = f"{waiting} for route {route}, and no living worker of it takes any"
    return Finding(f"workers of route {route}", "warning", reason, f"{_START} -q {route}")
