"""Which route a run goes to, and which one it has gone to; which route a step goes to.

Knows tags, the setting `routes`, and what Dagster's storage says of jobs and workers; no queues. docs/routes.md says it
for people.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq._route_rules import first_match
from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.dagster_compat.api import REPOSITORY_LABEL_TAG
from dagster_taskiq.dagster_compat.storage import outages
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.queue_names import DEFAULT_ROUTE, ROUTE_RULE, is_route
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import CELERY_QUEUE_TAG, OF_THE_JOB, QUEUE_TAG, ROUTE_TAG, own_tags

logger = logging.getLogger(__name__)

_JOBS: Final = 1_000
"""Jobs, each by its snapshot, whose tags are remembered."""
_IN_USE_FOR_S: Final = 30.0
_MOST_SERVED: Final = 100


def route_of_run(run: DagsterRun) -> str:
    """The route that the run has gone to: where its messages are, and its cancel messages have to go."""
    route = own_tags(run).get(ROUTE_TAG, DEFAULT_ROUTE)
    return route if is_route(route) else DEFAULT_ROUTE


def route_in_tags(tags: Mapping[str, str], whose: str) -> str | None:
    """The route that tags ask for; None: they do not. Raises `SettingsError` for what cannot be the name of one.

    `whose` tags they are, in words, for the error.
    """
    for tag in (QUEUE_TAG, CELERY_QUEUE_TAG):
        if tag in tags:
            if not is_route(tags[tag]):
                raise SettingsError(f"tag {tag} of {whose}: {tags[tag]!r} is not the name of a route: {ROUTE_RULE}")
            return tags[tag]
    return None


def code_location_of(run: DagsterRun) -> str | None:
    """The name of the code location that a run is of; None for one that was launched without any."""
    if run.remote_job_origin is not None:
        return run.remote_job_origin.location_name
    return run.tags.get(REPOSITORY_LABEL_TAG, "").partition("@")[2] or None


def served_routes(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The routes that a worker serves, by the facts in its heartbeat; older workers do not say it."""
    routes = facts.get("routes")
    if not isinstance(routes, list):
        return (DEFAULT_ROUTE,)
    return tuple(route for route in routes[:_MOST_SERVED] if is_route(route))


class Routing:
    """Decides for runs that are about to be put into a queue. Keep the object: it remembers jobs, and the fleet."""

    def __init__(self, instance: DagsterInstance, settings: Settings) -> None:
        """`settings`: those of the unnamed route."""
        self._instance = instance
        self._settings = settings
        self._job_tags: TTLCache[Mapping[str, str]] = TTLCache(at_most=_JOBS)
        self._in_use: TTLCache[bool] = TTLCache(at_most=1, ttl_s=_IN_USE_FOR_S)

    def route_for(self, run: DagsterRun) -> str:
        """Where the run is to go: its own tags, its job's, the first rule that matches, the unnamed route.

        Raises `SettingsError` when a tag asks for what cannot be a route, and what the database raises.
        """
        asked = route_in_tags(run.tags, "the run")
        if asked is not None:
            return asked
        of_job = self._tags_of_job(run)
        asked = route_in_tags(of_job, f"job {run.job_name}")
        if asked is not None:
            return asked
        location = code_location_of(run)
        return first_match(self._settings.routes, location, run.job_name, {**of_job, **run.tags}) or DEFAULT_ROUTE

    def tags_for(self, run: DagsterRun, route: str) -> Mapping[str, str]:
        """The tags that say that the run goes there; none for the unnamed route as long as nobody uses another one."""
        told = route != DEFAULT_ROUTE or ROUTE_TAG in own_tags(run) or self.are_in_use()
        return {ROUTE_TAG: route} if told else {}

    def with_tags_of_job(self, run: DagsterRun) -> DagsterRun:
        """The run, with those tags of its job that are for its runs; they are written where they are missing.

        Raises what the database raises. Writes nothing for a job without `run_tags`: Dagster has given them to the run.
        """
        missing = {tag: value for tag, value in self._tags_of_job(run).items() if tag in OF_THE_JOB - run.tags.keys()}
        if not missing:
            return run
        self._instance.add_run_tags(run.run_id, missing)
        return run.with_tags({**run.tags, **missing})

    def are_in_use(self) -> bool:
        """Whether this deployment has routes with names: a rule, or a living worker, names one.

        For some seconds it goes on with what it saw last. False when it cannot be read.
        """
        known = self._in_use.get("")
        if known is None:
            try:
                known = bool(self._settings.routes) or self._a_worker_serves_one()
            except Exception:  # whatever it is: it only decides about a tag that says nothing new
                logger.exception("the routes of the workers could not be read")
                return False
            self._in_use.add("", known)
        return known

    def _a_worker_serves_one(self) -> bool:
        living = Heartbeats.of_runs(self._instance, self._settings).living()
        return any(served_routes(beat.facts) != (DEFAULT_ROUTE,) for beat in living)

    def known_routes(self) -> tuple[str, ...]:
        """Routes that rules name, or workers of the last week have served. Raises what the database raises."""
        beats = Heartbeats.of_runs(self._instance, self._settings).last()
        served = (route for beat in beats for route in served_routes(beat.facts))
        return sorted_routes([DEFAULT_ROUTE, *served, *(rule.route for rule in self._settings.routes)])

    def _tags_of_job(self, run: DagsterRun) -> Mapping[str, str]:
        """Of a job that has `run_tags`: its own `tags`, which Dagster does not copy to its runs then."""
        snapshot_id = run.job_snapshot_id
        if snapshot_id is None:
            return {}
        known = self._job_tags.get(snapshot_id)
        if known is None:
            try:
                snapshot = self._instance.get_job_snapshot(snapshot_id)
            except outages():
                raise
            except Exception:  # a job of another version of Dagster, which this one cannot read
                logger.exception("the job of a run could not be read", extra={"run_id": run.run_id})
                snapshot = None
            known = dict(snapshot.tags) if snapshot is not None and snapshot.run_tags is not None else {}
            self._job_tags.add(snapshot_id, known)
        return known


def sorted_routes(routes: Iterable[str]) -> tuple[str, ...]:
    """Each once, by name, the unnamed one first."""
    return tuple(sorted(set(routes), key=lambda route: (route != DEFAULT_ROUTE, route)))
