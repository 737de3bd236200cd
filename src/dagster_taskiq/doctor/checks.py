"""What is wrong here, and how to fix it: checks with a verdict, a reason and a repair, for `dagster-taskiq doctor`.

Knows the configuration and Dagster's instance; `aws_checks` asks AWS. Changes nothing.
"""

import os
import platform
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import yaml
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq._lane import Lane
from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.dagster_compat.instance import open_instance
from dagster_taskiq.dagster_compat.storage import outages, with_causes
from dagster_taskiq.doctor.aws_checks import look_at_aws
from dagster_taskiq.doctor.database_checks import connection_bounds
from dagster_taskiq.doctor.finding import Finding, line, ok
from dagster_taskiq.doctor.permission_checks import routes_in
from dagster_taskiq.doctor.route_checks import known_routes, look_at_workers
from dagster_taskiq.errors import DriverMissing, SettingsError
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import ENABLE_CANCELLATION_VARIABLE, Settings
from dagster_taskiq.sqs.probe import QueueFacts
from dagster_taskiq.storage.code_locations import NEXT_STEP, who_has_it, without_a_worker
from dagster_taskiq.storage.fleet import RELEASE, read_hold
from dagster_taskiq.storage.routing import route_of_run
from dagster_taskiq.storage.waiting import serving_runs
from dagster_taskiq.storage.workers import ALIVE, DEAD, WorkerInfo, list_workers

_SKEW_S: Final = 5.0
_CORRECT_CONFIG: Final = "correct 'run_launcher: config:' in dagster.yaml; docs/reference/settings.md has all settings"
_SHORT_START_S: Final = 600
_TESTED_DAGSTER: Final = ("1.13.3", "1.14")
"""From, and before: the range in our metadata."""


async def examine(settings: Settings | None = None) -> AsyncIterator[Finding]:
    """All checks, in the order in which they depend on each other; checks that are not possible are left out.

    `settings`: when they do not come from the instance's run launcher. Never raises for what is wrong.
    """
    yield _versions()
    home = _home()
    yield home
    instance, found = _instance() if home.verdict != "error" else (None, None)
    if found is not None:
        yield found
    try:
        if instance is not None and settings is None:
            settings, found = _settings(instance)
            yield found
        if settings is None:
            return
        for finding in _of_settings(settings):
            yield finding
        queues: dict[tuple[str, str], QueueFacts] = {}
        database, routes = Lane("the database"), routes_in(settings)
        if instance is not None:
            routes = await database.call(lambda: known_routes(instance, settings))
        async for finding in look_at_aws(settings, routes, queues):
            yield finding
        if instance is not None:
            for finding in await database.call(lambda: list(_dagster(instance, settings, routes, queues))):
                yield finding
    finally:
        if instance is not None:
            instance.dispose()


# What is installed, and configured


def _versions() -> Finding:
    dagster, ours = version("dagster"), version("dagster-taskiq")
    here = f"dagster-taskiq {ours}, dagster {dagster}, taskiq {version('taskiq')}, Python {platform.python_version()}"
    if sys.platform != "linux":
        return Finding("versions", "error", f"{here} on {sys.platform}", "run workers on Linux; launchers run anywhere")
    if not is_tested(dagster):
        first, end = _TESTED_DAGSTER
        reason = f"{here}; this release is tested with Dagster from {first} on, before {end}"
        return Finding("versions", "warning", reason, f"pip install 'dagster>={first},<{end}'")
    return ok("versions", here)


def is_tested(dagster: str) -> bool:
    """Whether this version of Dagster is within the range that our metadata admits. Release candidates count as theirs.

    pip keeps to it when it installs both; not when somebody installs another Dagster afterwards.
    """
    first, end = _TESTED_DAGSTER
    return _numbers(first) <= _numbers(dagster) < _numbers(end)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _home() -> Finding:
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        repair = "export DAGSTER_HOME=/path/of/the/folder/with/dagster.yaml"
        return Finding("DAGSTER_HOME", "error", "it is not set", repair)
    if not Path(home).expanduser().is_absolute():
        repair = f"export DAGSTER_HOME={Path(home).absolute()}"
        return Finding("DAGSTER_HOME", "error", f"{home} is not an absolute path, and Dagster wants one", repair)
    file = Path(home) / "dagster.yaml"
    if not Path(home).is_dir():
        return Finding("DAGSTER_HOME", "error", f"{home} is no folder", f"mkdir -p {home}, and put dagster.yaml there")
    if not file.is_file():
        return Finding("DAGSTER_HOME", "error", f"there is no {file}", f"write {file}, as in the README under 'Set up'")
    try:
        yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = f"{file} cannot be read: {line(error)}"
        return Finding("DAGSTER_HOME", "error", reason, f"correct {file}: it must be valid YAML")
    return ok("DAGSTER_HOME", str(file))


def _instance() -> tuple[DagsterInstance | None, Finding]:
    try:
        instance = open_instance()
    except Exception as error:  # noqa: BLE001 - any error is the answer
        settings_error = _settings_error(error)
        if settings_error is not None:  # with run monitoring Dagster loads the launcher at once
            return None, Finding("run launcher", "error", line(settings_error), _CORRECT_CONFIG)
        if isinstance(error, DriverMissing):
            reason, _, repair = str(error).partition("; ")
            return None, Finding("storage", "error", reason, repair)
        if isinstance(error, outages()) and not isinstance(error, OSError):
            return None, _no_database(error)
        repair = "correct dagster.yaml as the reason says"
        return None, Finding("instance", "error", f"Dagster cannot load it: {line(error)}", repair)
    try:
        instance.get_runs(limit=1)
    except Exception as error:  # noqa: BLE001 - as above
        return None, _no_database(error)
    storage = type(instance.run_storage).__name__
    if "sqlite" in storage.lower():
        return instance, Finding(
            "storage",
            "warning",
            "SQLite: right for one machine; workers on other machines would see another database",
            "set 'storage: postgres:' in dagster.yaml (pip install dagster-postgres)",
        )
    return instance, ok("storage", f"{storage} answers")


def _no_database(error: Exception) -> Finding:
    repair = "correct 'storage' in dagster.yaml, and check that the database is running: dagster instance info"
    return Finding("storage", "error", f"Dagster's database does not answer: {line(with_causes(error))}", repair)


def _settings(instance: DagsterInstance) -> tuple[Settings | None, Finding]:
    check = "run launcher"
    try:
        launcher = instance.run_launcher
    except Exception as error:  # noqa: BLE001 - as above
        reason = line(_settings_error(error) or error.__context__ or error)
        return None, Finding(check, "error", f"it cannot be loaded: {reason}", _CORRECT_CONFIG)
    if not isinstance(launcher, TaskiqRunLauncher):
        repair = "set in dagster.yaml: run_launcher: {module: dagster_taskiq.launcher, class: TaskiqRunLauncher, …}"
        return None, Finding(check, "error", f"it is {type(launcher).__name__}", repair)
    return launcher.settings, ok(check, f"TaskiqRunLauncher, queue {queue_name(launcher.settings.queue_url)}")


def _settings_error(error: BaseException | None) -> SettingsError | None:
    """The error of our launcher when Dagster tried to load it."""
    while error is not None and not isinstance(error, SettingsError):
        error = error.__cause__ or error.__context__
    return error


def _of_settings(settings: Settings) -> Iterator[Finding]:
    if settings.enable_cancellation:
        yield ok("cancellation", f"on; {settings.grace_seconds:g} s of grace")
    else:
        variable = os.environ.get(ENABLE_CANCELLATION_VARIABLE)
        repair = "set enable_cancellation: true in config_source"
        repair = f"unset {ENABLE_CANCELLATION_VARIABLE}, or {repair}" if variable else repair
        yield Finding("cancellation", "error", "it is switched off: Terminate does nothing", repair)
    host = urlsplit(settings.queue_url).hostname or ""
    if host.endswith("amazonaws.com") and f".{settings.region_name}." not in host:
        reason = f"region_name is {settings.region_name}, and the queue's address is {host}"
        yield Finding("region", "error", reason, "set region_name to the region in queue_url, or remove it")
    else:
        yield ok("region", settings.region_name)


# What is in Dagster's database


def _dagster(
    instance: DagsterInstance,
    settings: Settings,
    routes: Sequence[str],
    queues: Mapping[tuple[str, str], QueueFacts],
) -> Iterator[Finding]:
    yield _run_queue(instance)
    hold = read_hold(instance)
    if hold is not None:
        yield Finding("fleet", "warning", f"{hold.described()}; no run begins", RELEASE)
    if (bounds := connection_bounds(instance)) is not None:
        yield bounds
    yield from _monitoring(instance, settings)
    workers = list_workers(instance, settings, everybody=True)
    yield from look_at_workers(instance, settings, routes, workers, queues)
    yield from _lost(workers)
    yield from _code(instance, settings, workers)
    if hold is None:
        yield from _without_message(instance, settings, workers)
    yield _stuck(instance, settings)


def _run_queue(instance: DagsterInstance) -> Finding:
    check = "run coordinator"
    ours = "run_coordinator: {module: dagster_taskiq.coordinator, class: TaskiqRunCoordinator}"
    try:
        coordinator = instance.run_coordinator
        if not isinstance(coordinator, TaskiqRunCoordinator):
            reason = f"it is {type(coordinator).__name__}: more runs are handed over than workers have slots"
            reason += ", and Dagster's run page cannot terminate a run that waits in SQS"
            return Finding(check, "warning", reason, f"set in dagster.yaml: {ours}")
        coordinator.check()
    except Exception as error:  # noqa: BLE001 - any error is the answer
        reason = line(_settings_error(error) or error.__context__ or error)
        return Finding(check, "error", reason, f"correct dagster.yaml; the shortest is {ours}")
    return ok(check, f"TaskiqRunCoordinator; what has no slot waits in Dagster, but for {coordinator.look_ahead}")


def _monitoring(instance: DagsterInstance, settings: Settings) -> Iterator[Finding]:
    check = "run monitoring"
    if not instance.run_monitoring_enabled:
        reason = "it is off: a run whose worker dies is noticed when its message comes again, and then fails"
        yield Finding(check, "warning", reason, "set 'run_monitoring: {enabled: true, max_resume_run_attempts: 3}'")
        return
    wrong = False
    try:
        settings.check_against_cancel_timeout(instance.run_monitoring_cancel_timeout_seconds)
    except SettingsError as error:
        wrong = True
        lowest = settings.grace_seconds + settings.status_poll_seconds + 30
        yield Finding(check, "error", line(error), f"set 'run_monitoring: {{cancel_timeout_seconds: {lowest:.0f}}}'")
    start = instance.run_monitoring_start_timeout_seconds
    if 0 < start < _SHORT_START_S:
        wrong = True
        reason = f"start_timeout_seconds is {start}: Dagster fails a run that waits longer for a worker"
        yield Finding(check, "warning", reason, "set 'run_monitoring: {start_timeout_seconds: 3600}'")
    if not wrong:
        yield ok(check, f"on; {instance.run_monitoring_max_resume_run_attempts} attempts to resume")


def _lost(workers: Sequence[WorkerInfo]) -> Iterator[Finding]:
    lost = [worker for worker in workers if worker.state == DEAD and worker.work]
    if lost:
        names = ", ".join(worker.worker_id for worker in lost)
        reason = f"dead, and their work has not ended: {names}; another worker gets it after the visibility timeout"
        unfinished = [work for worker in lost for work in worker.work if work.status in ("STARTED", "CANCELING")]
        if unfinished:
            repair = "dagster-taskiq worker list --all; start a worker if none is alive"
            yield Finding("lost work", "warning", reason, repair)
    alive = [worker for worker in workers if worker.state == ALIVE]
    ahead = [worker.worker_id for worker in alive if worker.heard - time.time() > _SKEW_S]
    if ahead:
        reason = f"the clocks of these workers are ahead of this one: {', '.join(ahead)}"
        yield Finding("clock of workers", "warning", reason, "start a time service there: timedatectl set-ntp true")


def _code(instance: DagsterInstance, settings: Settings, workers: Sequence[WorkerInfo]) -> Iterator[Finding]:
    check = "code locations"
    missing = without_a_worker(instance, settings)
    for reason in missing:
        yield Finding(check, "warning", reason.removesuffix(f"; {NEXT_STEP}"), NEXT_STEP)
    known = who_has_it({worker.worker_id: worker.code for worker in workers if worker.state == ALIVE})
    if known and not missing:
        yield ok(check, "; ".join(known))


def _without_message(instance: DagsterInstance, settings: Settings, workers: Sequence[WorkerInfo]) -> Iterator[Finding]:
    """Runs that were handed over and that nobody takes, although somebody could: they count as in progress for ever."""
    patience_s = 2 * settings.visibility_timeout_seconds + settings.wait_time_seconds
    late = _longer_than(instance, DagsterRunStatus.STARTING, patience_s)
    found = [run.run_id for run in late if _has_a_slot(serving_runs(workers, settings, route_of_run(run)))]
    if found:
        reason = f"STARTING for more than {patience_s:.0f} s, and a worker has a free slot: {_some(found)}"
        reason += "; if the queue is empty, their messages are gone (purged, expired?)"
        repair = "terminate them; with 'run_monitoring: {enabled: true}' Dagster fails them after start_timeout_seconds"
        yield Finding("waiting runs", "warning", reason, repair)


def _has_a_slot(workers: Sequence[WorkerInfo]) -> bool:
    busy = sum(work.step_key is None for worker in workers for work in worker.work)
    return sum(worker.runs or 0 for worker in workers) > busy


def _longer_than(instance: DagsterInstance, status: DagsterRunStatus, patience_s: float) -> list[DagsterRun]:
    """Runs that have had that status for so long, a hundred at most."""
    records = instance.get_run_records(RunsFilter(statuses=[status]), limit=100)
    now = time.time()
    return [one.dagster_run for one in records if now - one.update_timestamp.timestamp() > patience_s]


def _some(run_ids: Sequence[str]) -> str:
    return ", ".join(run_ids[:5]) + (" …" if len(run_ids) > 5 else "")


def _stuck(instance: DagsterInstance, settings: Settings) -> Finding:
    patience_s = settings.grace_seconds + settings.status_poll_seconds + 2 * settings.visibility_timeout_seconds
    stuck = [run.run_id for run in _longer_than(instance, DagsterRunStatus.CANCELING, patience_s)]
    if not stuck:
        return ok("cancellations", "none takes too long")
    reason = f"CANCELING for more than {patience_s:.0f} s: {_some(stuck)}"
    repair = "dagster-taskiq run explain RUN_ID says what it waits for; dagster-taskiq worker list: one has to be alive"
    return Finding("cancellations", "warning", reason, repair)
