"""Every setting, read once, checked once, frozen. The only module that reads the environment for settings.

Configuration wins over environment, environment over default. Knows neither Dagster nor SQS: `launcher`, `executor`
and `cli` pass a plain mapping.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from dagster_taskiq._route_rules import RouteRule, routes_of, rules_of
from dagster_taskiq._setting_rules import RULE, Name, Range, boolean_of, name_of, number_of, url_of
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.queue_names import DEFAULT_ROUTE, cancel_queue_url, route_queue_url, steps_queue_url

ENABLE_CANCELLATION_VARIABLE: Final = "DAGSTER_TASKIQ_ENABLE_CANCELLATION"
QUEUE_URL_VARIABLE: Final = "DAGSTER_TASKIQ_SQS_QUEUE_URL"
ENDPOINT_URL_VARIABLE: Final = "DAGSTER_TASKIQ_SQS_ENDPOINT_URL"
REGION_VARIABLES: Final = ("AWS_REGION", "AWS_DEFAULT_REGION")
ROUTE_VARIABLE: Final = "DAGSTER_TASKIQ_ROUTE"
ENVIRONMENT: Final[Mapping[str, tuple[str, ...]]] = {
    "queue_url": (QUEUE_URL_VARIABLE,),
    "region_name": REGION_VARIABLES,
    "endpoint_url": (ENDPOINT_URL_VARIABLE,),
    "enable_cancellation": (ENABLE_CANCELLATION_VARIABLE,),
    "serves": (ROUTE_VARIABLE,),
}
"""The variables of a setting: the first one that is set counts, if the configuration does not have the setting."""
TOP_LEVEL_KEYS: Final = ("queue_url", "region_name", "endpoint_url", "config_source")
_REGION_IN_HOST = re.compile(r"(?:^|\.)sqs\.([a-z0-9-]+)\.(?:amazonaws\.com|on\.aws|api\.aws|localhost)")
DEFAULT_DRAIN_S: Final = 15
_STOP_MARGIN_S: Final = 3.0
_HANDLERS_S: Final = 60.0
"""A handler has a minute unless it says otherwise."""
StartMethod = Literal["forkserver", "spawn"]
InterruptedSteps = Literal["fail", "retry"]
QueueTtlOutcome = Literal["canceled", "failure"]
SupersededRuns = Literal["all", "waiting"]
MetricsTo = Literal["auto", "emf", "otel", "off"]
# Bucket names: https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET: Final = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of launcher and worker. Durations are seconds."""

    queue_url: str
    """URL of the work queue, as `aws sqs get-queue-url` prints it; those of the steps queue and the cancel queue are
    derived from it."""
    region_name: str = field(metadata={RULE: Name(r"[a-z0-9-]{2,40}", "an AWS region such as 'us-east-1'")})
    """Region of the queues. Without it and its variables: the one in the host of `queue_url`."""
    endpoint_url: str | None = None
    """Another SQS endpoint than AWS's own: a VPC endpoint, an emulator. `http://key:secret@host` has its credentials
    in it."""

    enable_cancellation: bool = True
    """When off, *Terminate* writes that to the run's log and does nothing. It counts where `terminate` is called, in
    the webserver, as well as in workers."""
    cancel_children: bool = False
    """When a run was terminated: also cancel the runs that it launched. For one job or run: the tag
    `dagster-taskiq/cancel_children`."""
    is_fair_queue: bool = False
    """On a standard queue: send the job's name as message group, so that one backfill cannot delay all other jobs."""
    # SQS: wait time 0-20 s, batches of 1-10, visibility up to 12 h (AWS API reference, ReceiveMessage).
    wait_time_seconds: int = field(default=20, metadata={RULE: Range(0, 20, "seconds")})
    """Long polling: how long one receive may wait for a message."""
    max_number_of_messages: int = field(default=1, metadata={RULE: Range(1, 10, "messages")})
    """Work messages for each receive, at most. A worker never receives more than it has free slots for. More than one
    only helps when tasks are short."""
    visibility_timeout_seconds: int = field(default=30, metadata={RULE: Range(4, 43_200, "seconds")})
    """How long a message stays hidden without renewal: after a worker has died, the delay until another one gets its
    runs. It is renewed while a run is being worked on, so it does not limit how long runs take."""
    cancel_ttl: float = field(default=120, metadata={RULE: Range(10, 86_400, "seconds")})
    """A cancel message that no worker claims is deleted after this time."""
    grace_seconds: float = field(default=30, metadata={RULE: Range(0, 3_600, "seconds")})
    """Seconds between the interrupt and the kill. For one job or run: the tag `dagster-taskiq/grace_seconds`."""
    exit_patience_seconds: float = field(default=3_600, metadata={RULE: Range(0, 604_800, "seconds")})
    """After a run or step has succeeded or failed: how long it waits for threads of its process that still run. Python
    itself waits without a limit."""
    cancelled_exit_patience_seconds: float = field(default=5, metadata={RULE: Range(0, 3_600, "seconds")})
    """The same after it was cancelled, within the grace."""
    status_poll_seconds: float = field(default=5, metadata={RULE: Range(0.2, 300, "seconds")})
    """How often a worker reads the status of its runs in the database, the second channel of a cancellation."""
    drain_seconds: float = field(default=DEFAULT_DRAIN_S, metadata={RULE: Range(0, 86_400, "seconds")})
    """At shutdown: how long running work may continue before it is interrupted. The worker ends as soon as nothing
    runs; an idle one within a second."""
    stop_timeout_seconds: float = field(default=30, metadata={RULE: Range(2, 86_400, "seconds")})
    """The `stopTimeout` of the worker's container, after which ECS kills everything. The worker ends before."""
    max_concurrent_runs: int = field(default=4, metadata={RULE: Range(0, 1_000, "runs")})
    """Runs that one worker works on at a time (`worker start --max-runs`). 0, or `--steps-only`: it takes no runs."""
    max_concurrent_steps: int = field(default=4, metadata={RULE: Range(0, 1_000, "steps")})
    """Steps of `taskiq_executor` that one worker works on at a time, besides its runs (`worker start --max-steps`).
    0, or `--runs-only`: it takes no steps."""
    payload_bucket: str | None = field(default=None, metadata={RULE: Name(_BUCKET, "an S3 bucket")})
    """S3 bucket for what is too large for a message of SQS: what a step knows after thousands of outputs."""
    start_method: StartMethod = field(default="forkserver", metadata={RULE: ("forkserver", "spawn")})
    """How the process of a run or step starts: `forkserver` forks a warm process (milliseconds), `spawn` starts a new
    interpreter (a second)."""
    metrics: MetricsTo = field(default="auto", metadata={RULE: ("auto", "emf", "otel", "off")})
    """Where metrics go: `emf`, CloudWatch's embedded metric format on the stdout of workers and Dagster's daemon;
    `otel`, OpenTelemetry; `off`. `auto`: `emf` in a container of ECS, and `otel` where its SDK is installed."""
    routes: tuple[RouteRule, ...] = ()
    """Which runs go to which fleet: a list of rules, `{route: gpu, job: 'train_*'}`, of which the first that matches
    counts. A rule has one or more of `code_location`, `job` and `tag` (`team`, or `team=ml`), with `*` and `?` as in
    the names of files. A run's or job's tag `dagster-taskiq/queue` comes before them; who matches none goes to the
    unnamed route."""
    serves: tuple[str, ...] = (DEFAULT_ROUTE,)
    """The routes that a worker serves, in order of preference (`worker start -q gpu -q default`); `default` is the
    unnamed one."""
    interrupted_steps: InterruptedSteps = field(default="fail", metadata={RULE: ("fail", "retry")})
    """What becomes of a step of `taskiq_executor` whose worker was stopped or has died: `fail`, it fails, and its own
    retry policy counts; `retry`, another worker begins it again, which no policy counts. `fail` is the default because
    only you know whether a step may be begun twice. For one op: the tag `dagster-taskiq/interrupted_steps`."""
    max_interruptions: int = field(default=10, metadata={RULE: Range(0, 1_000, "interruptions")})
    """How often one run, or one attempt of a step, may be interrupted by the end of its worker and go on elsewhere."""
    queue_ttl_outcome: QueueTtlOutcome = field(default="canceled", metadata={RULE: ("canceled", "failure")})
    """How a run ends that has waited for longer than its tag `dagster-taskiq/queue_ttl_seconds` allows."""
    superseded_runs: SupersededRuns = field(default="all", metadata={RULE: ("all", "waiting")})
    """Which runs a newer one with the same tag `dagster-taskiq/supersede_key` cancels: `all` older ones, or only those
    that are `waiting`."""
    preload_modules: tuple[str, ...] = ()
    """Modules that the warm process imports before it forks: your code, and the libraries that it imports."""

    def of_route(self, route: str) -> "Settings":
        """These settings with the queues of that route; to be asked of those of the unnamed route."""
        return replace(self, queue_url=route_queue_url(self.queue_url, route))

    @property
    def steps_queue_url(self) -> str:
        """`name` has `name-steps`, `name.fifo` has `name-steps.fifo`."""
        return steps_queue_url(self.queue_url)

    @property
    def cancel_queue_url(self) -> str:
        """`name` has `name-cancels`, `name.fifo` has `name-cancels.fifo`."""
        return cancel_queue_url(self.queue_url)

    def steps_patience_s(self, grace_s: float) -> float:
        """How long a run that is being stopped waits for its steps: their grace, and the time until all of them know.

        A step whose cancel message is lost gets the cancellation from the status poller.
        """
        return grace_s + self.status_poll_seconds + _STOP_MARGIN_S

    def children_patience_s(self, grace_s: float) -> float:
        """How long a run that was stopped waits for the runs that it launched: as for steps, and for their handlers."""
        return self.steps_patience_s(grace_s) + _HANDLERS_S

    @property
    def heartbeat_every_s(self) -> float:
        """A sixth of the visibility timeout (5 s by default)."""
        return self.visibility_timeout_seconds / 6

    @property
    def dead_after_s(self) -> float:
        """Half the visibility timeout without a heartbeat: so a worker counts as dead before its messages come again.

        (They become visible three quarters of the visibility timeout after its death, at the earliest.)
        """
        return self.visibility_timeout_seconds / 2

    @property
    def hung_after_s(self) -> float:
        """A quarter of the visibility timeout: if the worker's event loop stops for so long, its children stop.

        Their grace is `dead_after_s`, so they are gone before its messages can come again, and before another worker
        takes over.
        """
        return self.visibility_timeout_seconds / 4

    @property
    def death_confirmed_after_s(self) -> float:
        """Two heartbeat intervals: a heartbeat must be old and unchanged for so long before its worker is dead.

        After an outage of the database, every worker has written again by then.
        """
        return 2 * self.heartbeat_every_s

    @property
    def given_up_after_s(self) -> float:
        """Ten visibility timeouts (five minutes by default): after that a worker's old heartbeat is enough.

        Before that, a run of a worker whose heartbeat is old is only taken over when its message comes again as well,
        because a worker that only the database does not answer renews its leases over SQS.
        """
        return 10 * self.visibility_timeout_seconds

    @property
    def cut_off_after_s(self) -> float:
        """Nine visibility timeouts: a worker that could not write its heartbeat for so long stops its children.

        Their grace is `dead_after_s` at most, so they are gone before `given_up_after_s`.
        """
        return 9 * self.visibility_timeout_seconds

    @property
    def lost_grace_s(self) -> float:
        """A twelfth of the visibility timeout: the grace when another worker may be about to begin with the same run.

        When neither SQS nor the database answers, others confirm the worker's death for longer than that.
        """
        return self.visibility_timeout_seconds / 12

    @property
    def step_lost_after_s(self) -> float:
        """The visibility timeout without a heartbeat: then a step of that worker is lost, and may be tried again.

        This is later than `dead_after_s`: a child that lost its worker is gone by then, so no step ever runs twice at
        the same time.
        """
        return self.visibility_timeout_seconds

    @property
    def reconcile_every_s(self) -> float:
        """Once a minute one of the workers looks for lost runs; more often if messages come again more quickly."""
        return min(60.0, 2.0 * self.visibility_timeout_seconds)

    @property
    def lost_after_s(self) -> float:
        """The visibility timeout, and the confirmation of a death: a message that still exists has come again by then.

        Counted from when the worker is known to be dead, which is later than its death.
        """
        return self.visibility_timeout_seconds + self.death_confirmed_after_s

    @property
    def shutdown_grace_s(self) -> float:
        """The grace during a shutdown: everything must have ended before the container is killed."""
        return max(0.0, min(self.grace_seconds, self.stop_timeout_seconds - self.drain_seconds - 2))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, environ: Mapping[str, str] | None = None, **overrides: object
    ) -> "Settings":
        """Read a configuration of the form `{queue_url, region_name, endpoint_url, config_source: {…}}`.

        `overrides` (command line) win over everything; those that are None are ignored. Raises `SettingsError`.
        """
        environ = os.environ if environ is None else environ
        config = {key: _resolved(key, value, environ) for key, value in config.items()}
        _refuse_unknown(config, TOP_LEVEL_KEYS, "configuration")
        source = config.get("config_source") or {}
        if not isinstance(source, Mapping):
            raise SettingsError("config_source must be a mapping of settings")
        _refuse_unknown(source, SOURCE_KEYS, "config_source")
        values = {key: _resolved(key, value, environ) for key, value in source.items() if value is not None}
        values |= {key: value for key, value in overrides.items() if value is not None}
        _from_environment(values, config, environ)
        return cls(**{key: checked(key, value) for key, value in values.items()})

    def overridden_by(self, config: Mapping[str, Any], **overrides: object) -> "Settings":
        """These settings, changed by a configuration of the same form. Raises `SettingsError`."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        base: dict[str, Any] = {key: own.pop(key) for key in TOP_LEVEL_KEYS if key in own}
        source = config.get("config_source") or {}
        if not isinstance(source, Mapping):
            raise SettingsError("config_source must be a mapping of settings")
        given = {key: value for key, value in config.items() if value is not None}
        own |= {key: value for key, value in source.items() if value is not None}
        own |= {key: value for key, value in overrides.items() if value is not None}
        return Settings.from_config({**base, **given, "config_source": own})

    def __post_init__(self) -> None:
        """Check settings against each other. Raises `SettingsError` that names both."""
        if self.drain_seconds >= self.stop_timeout_seconds:
            raise SettingsError(
                f"drain_seconds ({self.drain_seconds:g}) must be less than stop_timeout_seconds"
                f" ({self.stop_timeout_seconds:g}), or the container is killed while it drains;"
                " lower drain_seconds, or raise stop_timeout_seconds together with the container's stopTimeout"
            )
        if self.cancel_ttl <= self.status_poll_seconds:
            raise SettingsError(
                f"cancel_ttl ({self.cancel_ttl:g}) must be greater than status_poll_seconds"
                f" ({self.status_poll_seconds:g}): until then the cancel message is the faster channel"
            )
        if not self.max_concurrent_runs and not self.max_concurrent_steps:
            raise SettingsError(
                "max_concurrent_runs and max_concurrent_steps are both 0: a worker would do nothing; raise one of them"
            )

    def check_against_cancel_timeout(self, cancel_timeout_seconds: float) -> None:
        """Compare with the `cancel_timeout_seconds` of Dagster's run monitoring. Raises `SettingsError`.

        After that time Dagster marks the run CANCELED, also when its process is still running. So interrupt, grace and
        kill have to fit into it.
        """
        if 0 < cancel_timeout_seconds <= self.grace_seconds + self.status_poll_seconds:
            raise SettingsError(
                f"grace_seconds ({self.grace_seconds:g}) plus status_poll_seconds ({self.status_poll_seconds:g})"
                f" must be less than run_monitoring.cancel_timeout_seconds ({cancel_timeout_seconds:g}):"
                " lower the first or raise the last"
            )


SOURCE_KEYS: Final = tuple(
    one.name for one in fields(Settings) if one.name not in {"queue_url", "region_name", "endpoint_url"}
)
"""The keys of `config_source`."""
RULES: Final[Mapping[str, object]] = {one.name: one.metadata.get(RULE) for one in fields(Settings)}
"""The allowed values of each setting: a `Range`, a `Name`, a tuple of all of them, or None, where the type says it."""
_WHOLE: Final = {one.name for one in fields(Settings) if one.type is int}


def _resolved(key: str, value: Any, environ: Mapping[str, str]) -> Any:
    """The value, or that of the variable in `{env: NAME}`, as everywhere in Dagster's configuration."""
    if not (isinstance(value, Mapping) and set(value) == {"env"}):
        return value
    name = str(value["env"])
    if name not in environ:
        raise SettingsError(f"{key} comes from the variable {name}, which is not set")
    return environ[name]


def _refuse_unknown(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in given:
        if key in known:
            continue
        every_key = (*TOP_LEVEL_KEYS, *SOURCE_KEYS)
        close = difflib.get_close_matches(str(key), known, 1) or difflib.get_close_matches(str(key), every_key, 1)
        if not close:
            hint = f"known are: {', '.join(known)}"
        elif close[0] in known:
            hint = f"did you mean {close[0]!r}?"
        else:
            hint = f"{close[0]!r} belongs {'into config_source' if close[0] in SOURCE_KEYS else 'beside config_source'}"
        raise SettingsError(f"unknown key {key!r} in the {where}; {hint}")


def _from_environment(values: dict[str, Any], config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    def given(key: str) -> Any:
        variables = (environ[name] for name in ENVIRONMENT[key] if environ.get(name))
        return values.get(key) or config.get(key) or next(variables, None)

    queue_url = given("queue_url")
    if not queue_url:
        raise SettingsError(f"no queue: set queue_url in the configuration, or the variable {QUEUE_URL_VARIABLE}")
    values["queue_url"] = url_of("queue_url", queue_url)
    values["endpoint_url"] = given("endpoint_url")
    region = given("region_name")
    if not region and isinstance(queue_url, str):
        match = _REGION_IN_HOST.search(urlsplit(queue_url).hostname or "")
        region = match[1] if match else None
    if not region:
        raise SettingsError("no region: set region_name in the configuration, or the variable AWS_REGION")
    values["region_name"] = region
    for key in ("enable_cancellation", "serves"):
        if key not in values and (found := given(key)):
            values[key] = found


def _modules_of(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise SettingsError(f"{key} must be a list of module names")
    return tuple(value)


_PARSERS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "enable_cancellation": boolean_of,
    "cancel_children": boolean_of,
    "is_fair_queue": boolean_of,
    "queue_url": url_of,
    "endpoint_url": url_of,
    "routes": rules_of,
    "serves": routes_of,
    "preload_modules": _modules_of,
}
"""Of the settings without a rule."""


def checked(key: str, value: Any) -> Any:
    """The value of one setting in its type. Raises `SettingsError` when it has another type, or is out of range."""
    rule = RULES.get(key)
    if isinstance(rule, Range):
        return number_of(key, value, rule, whole=key in _WHOLE)
    if isinstance(rule, Name):
        return name_of(key, value, rule)
    if isinstance(rule, tuple):
        if value not in rule:
            raise SettingsError(f"{key} must be {' or '.join(map(repr, rule))}, not {value!r}")
        return value
    if key in _PARSERS:
        return _PARSERS[key](key, value)
    raise SettingsError(f"unknown setting {key!r}")
