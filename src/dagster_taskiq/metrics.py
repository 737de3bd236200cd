"""What is counted and measured, and where it goes: CloudWatch's embedded metric format on stdout, OpenTelemetry.

Knows the two libraries; not when anything happens. Nothing in here blocks or raises.
"""

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from dagster_taskiq.settings import MetricsTo

logger = logging.getLogger(__name__)

NAMESPACE: Final = "dagster-taskiq"


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that is measured. `name` is for CloudWatch; OpenTelemetry has `dagster_taskiq.` + `otel`."""

    name: str
    otel: str
    kind: Literal["counter", "histogram", "gauge"]
    description: str

    @property
    def unit(self) -> str:
        """The unit in CloudWatch."""
        return "Seconds" if self.name.startswith("Seconds") else "Count"


REQUESTED: Final = Metric("CancellationsRequested", "cancellations.requested", "counter", "by the launcher")
DELIVERED: Final = Metric(
    "CancellationsDelivered", "cancellations.delivered", "counter", "to a worker, by the first channel"
)
FINISHED: Final = Metric("CancellationsFinished", "cancellations.finished", "counter", "by the status of the run")
TIMED_OUT: Final = Metric("TimedOut", "timed_out", "counter", "runs and steps that took longer than they may")
TO_DELIVERED: Final = Metric("SecondsToDelivered", "cancellations.delivery", "histogram", "from requested to delivered")
TO_STOPPED: Final = Metric("SecondsToStopped", "cancellations.stop", "histogram", "from delivered to process tree gone")
TO_FINAL: Final = Metric("SecondsToFinal", "cancellations.duration", "histogram", "from delivered to the final status")
FORCED_KILLS: Final = Metric("ForcedKills", "forced_kills", "counter", "runs and steps that outlasted their grace")
CLEANUPS: Final = Metric("Cleanups", "cleanups", "counter", "cleanups that have ended, by outcome")
CLEANUP_ATTEMPTS: Final = Metric("CleanupAttempts", "cleanup.attempts", "counter", "of handlers, by outcome")
LEASES_LOST: Final = Metric("LeasesLost", "leases.lost", "counter", "messages that were no longer ours")
RUNNING: Final = Metric("WorkRunning", "work.running", "gauge", "runs and steps that are running, in each worker")
RUNS_WAITING: Final = Metric(
    "RunsWaiting", "runs.waiting", "gauge", "runs in Dagster's queue, or handed over and not at work yet; held: 0"
)
RUNS_HELD: Final = Metric("RunsHeld", "runs.held", "gauge", "the same, while the fleet is held; else 0")
OLDEST_WAITS: Final = Metric("SecondsOldestRunWaits", "runs.oldest", "gauge", "since the oldest of them was created")
RUN_SLOTS: Final = Metric("RunSlots", "runs.slots", "gauge", "runs that all living workers can work on at a time")
WAITED: Final = Metric("SecondsWaited", "work.waited", "histogram", "from sent to started")
ALL: Final = (
    REQUESTED,
    DELIVERED,
    FINISHED,
    TIMED_OUT,
    TO_DELIVERED,
    TO_STOPPED,
    TO_FINAL,
    FORCED_KILLS,
    CLEANUPS,
    CLEANUP_ATTEMPTS,
    LEASES_LOST,
    RUNNING,
    WAITED,
    RUNS_WAITING,
    RUNS_HELD,
    OLDEST_WAITS,
    RUN_SLOTS,
)


def _has_opentelemetry() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.sdk") is not None
    except ModuleNotFoundError:  # not even the API
        return False


class Sink(Protocol):
    """Where measurements go."""

    def put(self, values: Mapping[Metric, float], attributes: Mapping[str, str]) -> None:
        """Write several values that belong together."""


class Metrics:
    """What the rest of the package uses. Without sinks it does nothing."""

    def __init__(self, sinks: Sequence[Sink], queue: str) -> None:
        """`queue`: the name of the work queue, which distinguishes fleets."""
        self._sinks = sinks
        self._queue = queue

    @classmethod
    def chosen(cls, where: MetricsTo, queue: str, *, on_ecs: bool, stdout_is_a_log: bool) -> "Metrics":
        """`auto`: EMF on ECS, and OpenTelemetry where its SDK is installed.

        `stdout_is_a_log`: of a worker and of Dagster's daemon. What a command prints is for whoever has given it, so
        nobody else writes EMF.
        """
        sinks: list[Sink] = []
        if stdout_is_a_log and (where == "emf" or (where == "auto" and on_ecs)):
            sinks.append(EmbeddedMetrics())
        if where == "otel" or (where == "auto" and _has_opentelemetry()):
            sinks.append(OpenTelemetryMetrics())
        return cls(sinks, queue)

    def of_queue(self, queue: str) -> "Metrics":
        """The same for another fleet, by the name of its work queue."""
        return Metrics(self._sinks, queue)

    @property
    def wanted(self) -> bool:
        """Whether there is a sink."""
        return bool(self._sinks)

    def put(self, values: Mapping[Metric, float], **attributes: str) -> None:
        """Write values that belong together, with the attributes that distinguish them from others of the same name."""
        for sink in self._sinks:
            try:
                sink.put(values, {"Queue": self._queue, **attributes})
            except Exception:
                logger.exception("metrics could not be written")

    def count(self, metric: Metric, **attributes: str) -> None:
        """Count one more."""
        self.put({metric: 1}, **attributes)


class EmbeddedMetrics:
    """CloudWatch's embedded metric format: one line of JSON on stdout, from which CloudWatch Logs makes metrics.

    Each value is written by queue, and by queue and each attribute, because CloudWatch does not add them up.
    """

    def put(self, values: Mapping[Metric, float], attributes: Mapping[str, str]) -> None:
        """See `Sink`."""
        from aws_embedded_metrics.logger.metrics_context import MetricsContext
        from aws_embedded_metrics.sinks.stdout_sink import StdoutSink

        queue = {"Queue": attributes["Queue"]}
        sets = [queue, *({**queue, name: value} for name, value in attributes.items() if name != "Queue")]
        context = MetricsContext(namespace=NAMESPACE, dimensions=sets, default_dimensions={})
        context.should_use_default_dimensions = False
        for metric, value in values.items():
            context.put_metric(metric.name, value, metric.unit)
        StdoutSink().accept(context)
        sys.stdout.flush()


class OpenTelemetryMetrics:
    """Instruments of OpenTelemetry's global meter provider, which is configured outside of this package."""

    def __init__(self) -> None:
        from opentelemetry.metrics import get_meter

        from dagster_taskiq.version import __version__

        meter = get_meter("dagster_taskiq", __version__)
        self._instruments: dict[Metric, Any] = {}
        for metric in ALL:
            name, unit = f"dagster_taskiq.{metric.otel}", "s" if metric.unit == "Seconds" else "1"
            make: Any = getattr(meter, f"create_{metric.kind}")
            self._instruments[metric] = make(name, unit=unit, description=metric.description)

    def put(self, values: Mapping[Metric, float], attributes: Mapping[str, str]) -> None:
        """See `Sink`."""
        labels = {name.lower(): value for name, value in attributes.items()}
        for metric, value in values.items():
            instrument = self._instruments[metric]
            if metric.kind == "counter":
                instrument.add(value, labels)
            elif metric.kind == "histogram":
                instrument.record(value, labels)
            else:
                instrument.set(value, labels)


METADATA_VARIABLE: Final = "ECS_CONTAINER_METADATA_URI_V4"


def on_ecs(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in a container of ECS."""
    return METADATA_VARIABLE in environ
