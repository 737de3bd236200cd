"""What is known of a run besides its log: its worker, the other workers, the queues. Plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final

from dagster_taskiq.queue_names import DEFAULT_ROUTE

ALIVE: Final = "alive"
SILENT: Final = "silent"


@dataclass(frozen=True, slots=True)
class OwnerFacts:
    """The worker that has the run, by its claim and its heartbeat. `state` as in `worker list`."""

    worker_id: str
    state: str
    heard: float | None = None
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class StepOwner:
    """Who has an attempt of a step whose process is not known to be gone."""

    step_key: str
    worker_id: str
    state: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class PoolWait:
    """A step that waits for a slot of a concurrency pool."""

    step_key: str
    pool: str
    since: float
    limit: int | None
    held_by: tuple[str, ...] = ()
    """Runs, eight characters of each."""


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """A QUEUED run, as Dagster's daemon sees it."""

    ahead: int = 0
    """Runs that are taken first: a higher priority, or older."""
    priority: int = 0
    in_progress: int = 0
    limit: int | None = None
    """How many runs may be in progress; None: as many as want to."""
    limit_is_configured: bool = False
    limit_of_route: bool = False
    """`in_progress` and `limit` are of the run's route."""
    blocking: tuple[str, ...] = ()
    """Limits of tags and pools that hold it back, in words."""
    daemon_heard: float | None = None
    """Last heartbeat of the daemon that hands runs over; None: never."""


@dataclass(frozen=True, slots=True)
class Messages:
    """What SQS says of the work queue. `trouble`: it did not answer."""

    visible: int = 0
    in_flight: int = 0
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class RouteFacts:
    """The living workers of a route. `free_slots` and `free_step_slots` are those that no route has taken."""

    workers_alive: int = 0
    """That take runs."""
    slots: int = 0
    free_slots: int = 0
    step_slots: int = 0
    free_step_slots: int = 0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """All of it. Empty for a run that is over."""

    now: float
    run_id: str = "RUN_ID"
    """Which run it is, for the commands that are advised."""
    hold: str | None = None
    """The fleet is held, by whom and why: no run is begun."""
    owner: OwnerFacts | None = None
    route: str = DEFAULT_ROUTE
    """The run's."""
    routes: Mapping[str, RouteFacts] = field(default_factory=dict)
    """Of all routes that somebody serves."""
    workers_alive: int = 0
    """That serve this route and take runs."""
    slots: int = 0
    free_slots: int = 0
    step_slots: int = 0
    free_step_slots: int = 0
    steps: Sequence[StepOwner] = ()
    pools: Sequence[PoolWait] = ()
    queue: QueuePlace | None = None
    messages: Messages | None = None
    code: str | None = None
    """What it waits for because workers do not have its code, and which."""
    code_until: float | None = None
    """Until when, where its log says so: no living worker had it."""
    can_resume: bool = False
    visibility_timeout_s: float = 30.0
    status_poll_s: float = 5.0
    reconcile_every_s: float = 60.0
    start_timeout_s: float | None = None

    def of_route(self, route: str) -> "Surroundings":
        """For a run of that route: its workers, and their slots."""
        return replace(self, route=route, **asdict(self.routes.get(route, RouteFacts())))
