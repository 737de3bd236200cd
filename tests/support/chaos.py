"""A bad day for a fleet: real workers on real queues and a real database, and a seed that says what goes wrong when.

Odd seeds have two routes: a worker for each, and one for both. The same seed makes the same plan: which runs, which of
them are terminated and how, what is killed, frozen, cut, lost, sent twice. What comes of it depends on the machine's
own timing, so a seed that failed fails again often, not always.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from dagster import DagsterInstance, DagsterRunStatus

from dagster_taskiq.queue_names import DEFAULT_ROUTE, route_queue_url, sibling_queue
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import GRACE_SECONDS_TAG, QUEUE_TAG
from tests.support.monitoring import monitoring_daemon
from tests.support.moto import create_queues, sqs_client
from tests.support.platform import FINISHED, Platform, write_home
from tests.support.proxy import Fault, Rule, SqsProxy, sqs_proxy
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.waiting import wait_until

JOBS = Path(__file__).parent / "chaos_jobs.py"
SETTINGS: Mapping[str, Any] = {
    "wait_time_seconds": 1,
    "visibility_timeout_seconds": 8,
    "grace_seconds": 3,
    "status_poll_seconds": 1,
    "drain_seconds": 2,
    "stop_timeout_seconds": 8,
    "cancel_ttl": 15,
    "max_concurrent_runs": 3,
    "max_concurrent_steps": 4,
}
MONITORING: Mapping[str, Any] = {
    "enabled": True,
    "max_resume_run_attempts": 3,
    "poll_interval_seconds": 2,
    "start_timeout_seconds": 60,
}
JOB_NAMES = (
    "works_in_process",
    "works_in_process",
    "ignores_in_process",
    "computes_in_process",
    "spawns_in_process",
    "tries_again_in_process",
    "fails_in_process",
    "works_in_steps",
    "works_in_steps",
    "mixed_in_steps",
    "spawns_in_steps",
    "fails_in_steps",
)
ROUTED_JOB_NAMES = (*JOB_NAMES, "works_on_routes_in_steps", "mixed_on_routes_in_steps", "spawns_on_routes_in_steps")
ROUTE = "gpu"
MISCHIEF = {
    "kill worker": 4,
    "stop worker": 3,
    "freeze worker": 3,
    "kill child": 3,
    "freeze child": 2,
    "kill keeper": 1,
    "kill fork server": 1,
    "cut database": 2,
    "database away": 2,
    "black hole": 3,
    "purge": 1,
    "sqs away": 1,
    "sqs fault": 6,
}
SQS_FAULTS = (
    Fault.LOST,
    Fault.TWICE,
    Fault.LATE,
    Fault.AGAIN,
    Fault.SHUFFLE,
    Fault.RESET,
    Fault.ANSWER_LOST,
    Fault.ERROR,
    Fault.THROTTLE,
    Fault.SLOW,
)
WORKERS = 3
SERVES = ("default", ROUTE, f"{ROUTE},default")
"""What each worker serves where there are routes."""
EVERY_S = {"launch": 0.9, "mischief": 1.6}
TERMINATED = 1 / 3
FORCED = 0.15
"""Of the terminated: marked as canceled at once, as the UI's "force" does."""
EVERYWHERE = 1 / 3
"""Of the black holes: all workers are in it, not only one."""
LONGEST_HOLE_S = 20.0
LOST_AFTER_S = 75.0
"""Who waits longer than this after a day on which a queue was purged waits for what is gone: a person terminates it."""
DATABASE_VARIABLE = "DAGSTER_TASKIQ_TEST_CHAOS_DATABASE"
TWICE = 0.25
"""Of the terminated: somebody clicks again."""


@dataclass
class Launched:
    """One run, and what was asked of it. Times are seconds since the epoch."""

    run_id: str
    job: str
    marks: Path
    route: str = DEFAULT_ROUTE
    terminated: list[tuple[float, bool]] = field(default_factory=list)
    forced_at: float | None = None
    not_launched: str = ""


@dataclass(frozen=True)
class Deed:
    """What is done at a moment of the plan, in seconds from its beginning."""

    at: float
    what: str
    about: Mapping[str, Any] = field(default_factory=dict)


def has_routes(seed: int) -> bool:
    """Half of the seeds."""
    return seed % 2 == 1


def plan_of(seed: int, seconds: float) -> list[Deed]:
    """The same for the same seed."""
    jobs, routes = (ROUTED_JOB_NAMES, (DEFAULT_ROUTE, ROUTE)) if has_routes(seed) else (JOB_NAMES, (DEFAULT_ROUTE,))
    chance = random.Random(seed)  # noqa: S311 - no secret
    deeds: list[Deed] = []
    at, number = 0.0, 0
    while at < seconds:
        about = {"job": chance.choice(jobs), "seconds": round(chance.uniform(0.2, 3.0), 2), "number": number}
        about["route"] = routes[number % len(routes)]
        deeds.append(Deed(at, "launch", about))
        if chance.random() < TERMINATED:
            delay = chance.choice((0.0, chance.uniform(0, 1), chance.uniform(0, 4), chance.uniform(2, 10)))
            force = chance.random() < FORCED
            deeds.append(Deed(at + delay, "force" if force else "terminate", {"number": number}))
            if chance.random() < TWICE:
                deeds.append(Deed(at + delay + chance.uniform(0.05, 3), "terminate", {"number": number}))
        number += 1
        at += chance.expovariate(1 / EVERY_S["launch"])
    at = 3.0
    while at < seconds:
        (what,) = chance.choices([*MISCHIEF], [*MISCHIEF.values()])
        about = {
            "which": chance.randrange(WORKERS),
            "nth": chance.randrange(8),
            "for_s": chance.choice((chance.uniform(0.2, 2), chance.uniform(1, 5), chance.uniform(4, 14))),
            "fault": chance.choice(SQS_FAULTS),
            "queue": chance.choice((None, "", "-steps", "-cancels", "-cancels")),
            "everywhere": chance.random() < EVERYWHERE,
            "share": round(chance.uniform(0.2, 0.7), 2),
        }
        about["route"] = routes[len(deeds) % len(routes)]
        deeds.append(Deed(at, what, about))
        at += chance.expovariate(1 / EVERY_S["mischief"])
    return sorted(deeds, key=lambda deed: deed.at)


class Fleet:
    """Workers that are started again whenever they end, as an ECS service does."""

    def __init__(self, home: Path, databases: Sequence[str], serves: Sequence[str]) -> None:
        """`databases`: each worker's way to the database, as a URL. `serves`: the routes of each."""
        self._home = home
        self._databases = databases
        self._serves = serves
        self._workers: list[subprocess.Popen[bytes] | None] = [None] * WORKERS
        self._lives = 0
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.exits: Counter[str] = Counter()
        self._keeping = threading.Thread(target=self._keep, name="fleet")
        self._keeping.start()

    @property
    def logs(self) -> list[Path]:
        return sorted(self._home.glob("worker-*.log"))

    def is_up(self) -> bool:
        """Whether each worker, in its present life, receives."""
        logs = [max(self._home.glob(f"worker-{which}-*.log"), default=None) for which in range(WORKERS)]
        return all(log is not None and b" ready" in log.read_bytes() for log in logs)

    def pid(self, which: int) -> int | None:
        with self._lock:
            worker = self._workers[which]
            return worker.pid if worker is not None and worker.poll() is None else None

    def children(self, which: int) -> list[psutil.Process]:
        """Fork server, keepers and children of one worker."""
        pid = self.pid(which)
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).children(recursive=True) if pid else []
        return []

    def _keep(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                for which, worker in enumerate(self._workers):
                    if worker is not None and worker.poll() is not None:
                        self.exits[str(worker.returncode)] += 1
                    if worker is None or worker.poll() is not None:
                        self._workers[which] = self._start(which)
            self._closing.wait(0.3)

    def _start(self, which: int) -> "subprocess.Popen[bytes]":
        self._lives += 1
        with (self._home / f"worker-{which}-{self._lives:03}.log").open("wb") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "dagster_taskiq.cli",
                    "worker",
                    "start",
                    "-n",
                    f"w{which}",
                    "-q",
                    self._serves[which],
                ],
                env=os.environ | {"DAGSTER_HOME": str(self._home), DATABASE_VARIABLE: self._databases[which]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self) -> list[int]:
        """Stop all, politely; their exit codes. Whoever does not obey is killed."""
        self._closing.set()
        self._keeping.join(30)
        codes = []
        workers = [worker for worker in self._workers if worker is not None]
        for worker in workers:
            worker.send_signal(signal.SIGCONT)
            worker.send_signal(signal.SIGTERM)
        for worker in workers:
            try:
                codes.append(worker.wait(40))
            except subprocess.TimeoutExpired:
                worker.kill()
                codes.append(worker.wait())
        return codes


class BadDay:
    """Carries a plan out."""

    def __init__(
        self,
        platform: Platform,
        fleet: Fleet,
        sqs: SqsProxy,
        databases: Sequence[TcpProxy],
        say: Callable[[str], None],
    ) -> None:
        self._platform = platform
        self._fleet = fleet
        self._sqs = sqs
        self._databases = databases
        self._say = say
        self._people = ThreadPoolExecutor(8, thread_name_prefix="people")
        self._later = ThreadPoolExecutor(16, thread_name_prefix="later")
        self._launched: dict[int, Launched] = {}
        self._known = {number: threading.Event() for number in range(10_000)}
        self._over = threading.Event()
        self._given_up: set[str] = set()
        self.victims: set[int] = set()
        """Processes that were ended, or frozen, by us or because of us: what they did may be done again."""
        self.done: Counter[str] = Counter()
        self.table: Counter[str] = Counter()
        """Rows of the truth table of `terminate`: the status before, its worker, the answer."""

    @property
    def launched(self) -> list[Launched]:
        return list(self._launched.values())

    def carry_out(self, plan: list[Deed]) -> None:
        """Do everything, then let all faults end."""
        began = time.monotonic()
        for deed in plan:
            time.sleep(max(0.0, began + deed.at - time.monotonic()))
            if deed.what in ("launch", "terminate", "force"):
                self._people.submit(self._reported, getattr(self, deed.what), deed)
            else:
                self._later.submit(self._reported, self._mischief, deed)
        self._people.shutdown()
        self._over.set()
        self._later.shutdown()
        self._sqs.back()
        self._each_way(TcpProxy.back)

    def _reported(self, act: Callable[[Deed], None], deed: Deed) -> None:
        try:
            act(deed)
        except Exception as error:  # noqa: BLE001 - what was not done is told
            self._say(f"{deed}: {error!r}")
            self.done[f"NOT DONE: {deed.what}: {type(error).__name__}"] += 1

    def launch(self, deed: Deed) -> None:
        about = deed.about
        route = about["route"]
        tags = {GRACE_SECONDS_TAG: "2"} | ({QUEUE_TAG: route} if route != DEFAULT_ROUTE else {})
        run = self._platform.create(about["job"], tags, seconds=about["seconds"])
        launched = Launched(run.run_id, about["job"], Path(run.tags["marks"]), route)
        self._launched[about["number"]] = launched
        self._known[about["number"]].set()
        self.done["launch"] += 1
        try:
            self._platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - then the daemon, or the UI, reports the run as failed
            launched.not_launched = repr(error)
            self.done["launch failed"] += 1
            with suppress(Exception):  # unless `launch_run` could do so itself
                if self._platform.status(run.run_id) not in FINISHED:
                    self._platform.instance.report_run_failed(run, "could not be launched")

    def terminate(self, deed: Deed) -> None:
        launched = self._of(deed)
        before = self._row(launched)
        at = time.time()
        answer = self._platform.launcher.terminate(launched.run_id)
        launched.terminated.append((at, answer))
        self.table[f"{before} → {answer}"] += 1
        self.done["terminate"] += 1

    def force(self, deed: Deed) -> None:
        launched = self._of(deed)
        run = self._platform.run(launched.run_id)
        if run.status in (DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED):
            return
        launched.forced_at = time.time()
        self.table[f"{self._row(launched)}, marked by force"] += 1
        self._platform.instance.report_run_canceled(run, "marked by force")
        self.done["force"] += 1

    def give_up(self, run_ids: set[str]) -> None:
        """Terminate, once, what waits for a message that was purged."""
        for launched in self.launched:
            if launched.run_id in run_ids and launched.run_id not in self._given_up:
                self._given_up.add(launched.run_id)
                launched.terminated.append((time.time(), self._platform.launcher.terminate(launched.run_id)))
                self.done["terminated after a purge"] += 1

    def _of(self, deed: Deed) -> Launched:
        number = deed.about["number"]
        assert self._known[number].wait(60), "it was never launched"
        return self._launched[number]

    def _row(self, launched: Launched) -> str:
        instance = self._platform.instance
        owner = Claims(instance, Heartbeats.of_runs(instance, self._platform.launcher.settings)).owner(launched.run_id)
        whose = (
            "no worker"
            if owner is None
            else "worker in doubt"
            if owner.in_doubt
            else ("worker alive" if owner.alive else "worker dead")
        )
        return f"{self._platform.status(launched.run_id).value}, {whose}"

    def _mischief(self, deed: Deed) -> None:
        about, name = deed.about, deed.what
        if name in ("sqs fault", "sqs away", "purge"):
            self._trouble_with_sqs(name, about)
        elif name in ("cut database", "database away", "black hole"):
            self._trouble_with_the_database(name, about)
        elif not self._violence(name, about):
            return
        self.done[name] += 1

    def _trouble_with_sqs(self, name: str, about: Mapping[str, Any]) -> None:
        if name == "sqs fault":
            rule = Rule(about["fault"], about["queue"], share=about["share"], seconds=min(about["for_s"], 4.0))
            with self._sqs.having(rule):
                self._over.wait(about["for_s"])
        elif name == "sqs away":
            self._sqs.away()
            self._over.wait(about["for_s"])
            self._sqs.back()
        else:
            queue = sibling_queue(route_queue_url(self._platform.queue_url, about["route"]), about["queue"] or "")
            sqs_client(self._platform.endpoint_url).purge_queue(QueueUrl=queue)

    def _trouble_with_the_database(self, name: str, about: Mapping[str, Any]) -> None:
        if name == "cut database":
            self._each_way(TcpProxy.cut)
        elif name == "database away":
            self._each_way(TcpProxy.away)
            self._over.wait(min(about["for_s"], 8.0))
            self._each_way(TcpProxy.back)
        else:
            inside = self._databases if about["everywhere"] else [self._databases[about["which"]]]
            for database in inside:
                database.swallow()
            self._over.wait(min(about["for_s"] * 1.5, LONGEST_HOLE_S))
            for database in inside:
                database.heal()

    def _each_way(self, act: Callable[[TcpProxy], None]) -> None:
        for database in self._databases:
            act(database)

    def _violence(self, name: str, about: Mapping[str, Any]) -> bool:
        which = about["which"]
        pid, tree = self._fleet.pid(which), self._fleet.children(which)
        if pid is None:
            return False
        if name in ("kill worker", "stop worker", "freeze worker", "kill fork server"):
            target = pid if "fork" not in name else next((one.pid for one in tree), None)
            self.victims |= {one.pid for one in tree}
        else:
            leaders = [one for one in tree if _is_child(one)]
            if not leaders:
                return False
            leader = leaders[about["nth"] % len(leaders)]
            self.victims.add(leader.pid)
            target = leader.ppid() if name == "kill keeper" else leader.pid
        if target is None or target <= 1:
            return False
        self._signal(target, name, about["for_s"])
        return True

    def _signal(self, pid: int, name: str, for_s: float) -> None:
        kind = name.split()[0]
        with suppress(ProcessLookupError):
            if kind == "kill":
                os.kill(pid, signal.SIGKILL)
            elif kind == "stop":
                os.kill(pid, signal.SIGTERM)
            else:
                os.kill(pid, signal.SIGSTOP)
                self._over.wait(for_s)
                os.kill(pid, signal.SIGCONT)


def _is_child(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.name().startswith("dagster-") and os.getsid(process.pid) == process.pid
    return False


@dataclass
class Aftermath:
    """All that is left to look at."""

    platform: Platform
    launched: list[Launched]
    victims: set[int]
    exit_codes: list[int]
    logs: list[Path]
    done: Counter[str]
    table: Counter[str]
    decisions: Counter[str]
    faults: Counter[str]
    serves: Mapping[str, Sequence[str]]
    """The routes of each worker, by its name."""


_DECISION = re.compile(r": (run|step)( \S+ of run)? \S+: (?P<action>[^=]*?) run_id=\S+ task_id=\S+ why=(?P<why>.*)$")


def decisions_in(logs: list[Path]) -> Counter[str]:
    """Rows of the admit_run table, as the workers' logs tell them."""
    found: Counter[str] = Counter()
    for log in logs:
        for line in log.read_text(errors="replace").splitlines():
            if match := _DECISION.search(line):
                why = re.sub(r"worker \S+?(?=,|$| )", "worker …", match["why"])
                found[f"{match[1]}: {match['action'].split(';')[0]} ({why})"] += 1
    return found


@contextmanager
def bad_day(
    endpoint: str, postgres: str, home: Path, seed: int, seconds: float, say: Callable[[str], None]
) -> Iterator[Aftermath]:
    """Live through it; what is left can be looked at until the end of the block."""
    url = urllib.parse.urlsplit(postgres)
    with ExitStack() as stack:
        address = url.hostname or "127.0.0.1", url.port or 5432
        databases = [stack.enter_context(tcp_proxy(*address)) for _ in range(WORKERS)]
        sqs = stack.enter_context(sqs_proxy(endpoint, seed))
        ways = [f"{url.scheme}://{url.username}@{one.host}:{one.port}{url.path}" for one in databases]
        queue_url = create_queues(sqs.url, f"chaos-{seed}-{home.name[-8:].lower().replace('_', '-')}")
        # Half of the seeds with run monitoring, so that runs are resumed.
        extra = {"run_monitoring": MONITORING} if seed % 2 else {}
        for name, database_url in (("direct", postgres), ("dagster", {"env": DATABASE_VARIABLE})):
            storage = {"storage": {"postgres": {"postgres_url": database_url}}}
            write_home(home, queue_url, sqs.url, source=SETTINGS, extra={**extra, **storage})
            if name == "direct":
                (home / "dagster.yaml").rename(home / "direct.yaml")
        instance = stack.enter_context(DagsterInstance.from_config(str(home), "direct.yaml"))
        platform = Platform(home, queue_url, endpoint, instance, JOBS)
        if extra:
            stack.enter_context(monitoring_daemon(platform, {DATABASE_VARIABLE: postgres}))
        serves = SERVES if has_routes(seed) else (DEFAULT_ROUTE,) * WORKERS
        if has_routes(seed):
            platform.create_route(ROUTE)
        fleet = Fleet(home, ways, serves)
        day = BadDay(platform, fleet, sqs, databases, say)
        codes: list[int] = []
        try:
            wait_until(fleet.is_up, "the fleet is up", within=90)
            day.carry_out(plan_of(seed, seconds))
            _wait_for_the_end(platform, day, sqs, ("", f"-{ROUTE}") if has_routes(seed) else ("",))
            # One that is stopped before it can handle signals ends as any program does.
            wait_until(fleet.is_up, "every worker is up again", within=90)
        finally:
            codes = fleet.close()
        faults = Counter({f"{fault.name} {action}": count for (fault, action, _), count in sqs.done.items()})
        yield Aftermath(
            platform,
            day.launched,
            day.victims,
            codes,
            fleet.logs,
            day.done,
            day.table,
            decisions_in(fleet.logs),
            faults,
            {f"w{which}": routes.split(",") for which, routes in enumerate(serves)},
        )


def _wait_for_the_end(platform: Platform, day: BadDay, sqs: SqsProxy, routes: Sequence[str]) -> None:
    began = time.monotonic()

    def unfinished() -> list[tuple[str, str, str]]:
        runs = [platform.run(one.run_id) for one in day.launched]
        left = [(run.run_id, run.job_name, run.status.value) for run in runs if run.status not in FINISHED]
        if left and day.done["purge"] and time.monotonic() - began > LOST_AFTER_S:
            day.give_up({run_id for run_id, _, _ in left})
        return left

    def stories() -> object:
        return [(one, platform.story(one[0])[-25:]) for one in unfinished()[:3]]

    wait_until(lambda: not unfinished(), "every run is over", within=240, every=0.5, seen=stories)
    wait_until(lambda: not sqs.on_their_way(), "no message is late any more", within=30)
    bounds = (("", 60), ("-steps", 60), ("-cancels", SETTINGS["cancel_ttl"] + 45))
    for suffix, bound in ((f"{route}{kind}", bound) for kind, bound in bounds for route in routes):
        wait_until(
            lambda suffix=suffix: platform.waiting(suffix) == 0,  # type: ignore[misc]
            f"no message is left in the queue{suffix or ' of runs'}",
            within=bound,
            every=0.5,
        )
