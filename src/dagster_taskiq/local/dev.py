"""Everything on one machine: an embedded AWS endpoint, queues, a worker, Dagster's UI; started and stopped together.

Knows processes and ports; not which jobs run, not what is in `dagster.yaml`. The emulator's credentials are in the
address of its endpoint, so that those of the environment stay the user's.
"""

import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import yaml
from dagster import DagsterInstance

from dagster_taskiq._route_rules import rules_of
from dagster_taskiq.dagster_compat.instance import read_env_file
from dagster_taskiq.local.instance_config import FILE, InstanceConfig
from dagster_taskiq.local.process_manager import (
    LOOPBACK,
    ManagedProcess,
    ProcessManager,
    StartFailed,
    StopRequest,
    StopRequested,
    answers,
    free_port,
    stop_requests,
)
from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.settings import TOP_LEVEL_KEYS

REGION: Final = "us-east-1"
QUEUE: Final = "dagster-tasks"
ACCOUNT: Final = "123456789012"
EXAMPLES: Final = "dagster_taskiq.examples.bakery.definitions"
COMMAND_LINE: Final = (sys.executable, "-m", "dagster_taskiq.cli")
_SUPERSEDED: Final = "Function `dev_command` is superseded"
"""Dagster's warning that there is `dg dev` as well. That needs a package more, and a project that `dg` has made."""
_LOCAL_EXTRA: Final = "install it with: pip install 'dagster-taskiq[local]'"


class Playground:
    """An embedded AWS endpoint, its queues, and a DAGSTER_HOME whose runs go through them."""

    def __init__(
        self,
        config: InstanceConfig,
        manager: ProcessManager,
        environ: Mapping[str, str],
        *,
        quiet: bool = False,
        routes: Sequence[str] = (),
        **config_source: Any,
    ) -> None:
        """`environ`: what the children's environment begins with.

        `routes`: those that the worker serves beside the unnamed one, and those that the rules name.
        """
        self.home = config.folder
        self.changes: list[str] = []
        """What the user has to know of `dagster.yaml`, in words, if it is his own."""
        self._config = config
        self._manager = manager
        self._environ = environ
        self._quiet = quiet
        self._asked_routes = routes
        self._config_source = config_source
        self._endpoint = ""

    @property
    def queue_url(self) -> str:
        """URL of the work queue."""
        return f"http://{self._endpoint}/{ACCOUNT}/{QUEUE}"

    @property
    def endpoint_url(self) -> str:
        """URL of the emulator, with credentials that are valid only there."""
        return f"http://emulator:emulator@{self._endpoint}"

    @property
    def routes(self) -> list[str]:
        """The routes with queues and a worker here; the unnamed one alone, if nobody names others."""
        source = self._launcher().get("config_source") or {}
        ruled = [rule.route for rule in rules_of("routes", source.get("routes") or ())]
        return list(dict.fromkeys([DEFAULT_ROUTE, *ruled, *self._asked_routes]))

    def _launcher(self) -> Mapping[str, Any]:
        """Its configuration, as `dagster.yaml` has it."""
        document = yaml.safe_load((self.home / FILE).read_text("utf-8"))
        config: Mapping[str, Any] = document["run_launcher"]["config"]
        return config

    @property
    def environment(self) -> dict[str, str]:
        """For the children: where they find this DAGSTER_HOME; everything else is left as it is."""
        environ = self._environ
        no_proxy = ",".join(filter(None, [environ.get("NO_PROXY") or environ.get("no_proxy"), LOOPBACK]))
        return {
            **environ,
            "DAGSTER_HOME": str(self.home),
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "PYTHONUNBUFFERED": "1",
        }

    def start_aws(self) -> None:
        """Start the emulator; meanwhile write `dagster.yaml` and create the storage; then create the queues."""
        if find_spec("moto") is None or find_spec("flask") is None:
            raise StartFailed(f"the embedded AWS endpoint is missing; {_LOCAL_EXTRA}")
        port = free_port()
        self._endpoint = f"{LOOPBACK}:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(port)]
        self._manager.start("aws", command, self.environment, quiet=True)
        self._create_instance()
        self._manager.wait_until(lambda: answers(port, "/moto-api/"), within_s=30, what="the embedded AWS endpoint")
        self._create_queues()

    def _create_queues(self) -> None:
        # What `dagster.yaml` says, without it: a command that opens no instance is there a second earlier.
        queue = {key: value for key, value in self._launcher().items() if key in TOP_LEVEL_KEYS}
        done = subprocess.run(  # noqa: S603 - our own interpreter and our own arguments
            [*COMMAND_LINE, "queue", "create", "-y", "/dev/stdin", "--route", ",".join(self.routes)],
            input=yaml.safe_dump(queue),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            start_new_session=True,  # like all of them: only this process gets a Ctrl-C
        )
        if done.returncode != 0:
            raise StartFailed(f"the queues could not be created: {done.stderr.strip()}")

    def _create_instance(self) -> None:
        queue = {"queue_url": self.queue_url, "region_name": REGION, "endpoint_url": self.endpoint_url}
        self.changes = self._config.write(queue, self._config_source)
        # Create SQLite's tables now: if several processes tried it at the same time, one of them would fail.
        with DagsterInstance.from_config(str(self.home)):
            pass

    def start_worker(self) -> ManagedProcess:
        """Start a worker, without waiting until it is ready."""
        command = [*COMMAND_LINE, "worker", "start", "--log-level", "WARNING" if self._quiet else "INFO"]
        command += ["-q", ",".join(self.routes)]
        return self._manager.start("worker", command, self.environment, patience_s=15, quiet=self._quiet)

    def wait_for_worker(self, worker: ManagedProcess) -> None:
        """Wait until the worker prints that it is ready."""

        def ready() -> bool:
            return any(line.startswith("worker ") and " ready" in line for line in list(worker.last_lines))

        self._manager.wait_until(ready, within_s=60, what="a ready worker")

    def start_ui(self, code: Sequence[str], port: int | None) -> str:
        """Start `dagster dev`: webserver, daemon, the given code location. Returns the address once it answers."""
        if find_spec("dagster_webserver") is None:
            raise StartFailed(f"dagster-webserver is missing; {_LOCAL_EXTRA}")
        port = port or free_port()
        dagster = [sys.executable, "-W", f"ignore:{_SUPERSEDED}", "-m", "dagster"]
        command = [*dagster, "dev", "-h", LOOPBACK, "-p", str(port), *code]
        # SIGINT: on a SIGTERM `dagster dev` ends at once and does not stop its webserver and daemon.
        self._manager.start("dagster", command, self.environment, stop_signal=signal.SIGINT, patience_s=20)
        self._manager.wait_until(lambda: answers(port, "/server_info"), within_s=120, what="Dagster's webserver")
        return f"http://{LOOPBACK}:{port}"

    def kill_what_is_left(self) -> None:
        """Kill every process that still runs with our DAGSTER_HOME: some leave the session of their parent."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> dict[int, str]:
        """Every living process of this user whose environment has our DAGSTER_HOME: pid and command."""
        mark = f"DAGSTER_HOME={self.home}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):  # it ended meanwhile, or belongs to another user
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
        return found


@contextmanager
def playground(
    find: Callable[[Path], InstanceConfig],
    request: StopRequest,
    environ: Mapping[str, str],
    print_line: Callable[[str, str], None],
    *,
    quiet: bool = False,
    routes: Sequence[str] = (),
    **config: Any,
) -> Iterator[tuple[Playground, ProcessManager]]:
    """A playground. All its processes end with the block.

    `find`: its configuration, given a temporary folder, which is removed at the end. `routes`: as in `Playground`.
    Raises `StartFailed`.
    """
    with tempfile.TemporaryDirectory(prefix="dagster-taskiq-", ignore_cleanup_errors=True) as temporary:
        manager = ProcessManager(request, print_line)
        ground = Playground(find(Path(temporary)), manager, environ, quiet=quiet, routes=routes, **config)
        try:
            yield ground, manager
        finally:
            manager.stop()
            ground.kill_what_is_left()


def _take_env_file() -> None:
    """Take the variables of `.env` in the current folder into the environment, as `dagster dev` does."""
    found = read_env_file(Path.cwd())
    if "DAGSTER_HOME" in found:
        raise StartFailed(
            f"{Path.cwd() / '.env'} sets DAGSTER_HOME, and Dagster would not see what is added to it here;"
            " export it instead, or give --dagster-home"
        )
    os.environ.update(found)


def code_of(folder: Path) -> list[str]:
    """What `dagster dev` is told to serve when the user names nothing.

    Nothing, when the folder says it itself; else the examples. Raises `StartFailed` for a file that cannot be read.
    """
    if any((folder / name).exists() for name in ("workspace.yaml", "workspace.yml")):
        return []
    file = folder / "pyproject.toml"
    try:
        tools = tomllib.loads(file.read_text("utf-8")).get("tool", {}) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise StartFailed(f"{file} cannot be read: {error}") from error
    return [] if {"dagster", "dg"} & tools.keys() else ["-m", EXAMPLES]


def serve(
    code: Sequence[str] | None,
    *,
    home: Path | None,
    port: int | None,
    with_worker: bool,
    routes: Sequence[str] = (),
    print_line: Callable[[str, str], None],
) -> None:
    """`dagster-taskiq dev`: run everything until a signal comes. Raises `StartFailed` when a process ends before.

    `code`: arguments of `dagster dev` that say what is served; None: what `code_of` says of the current folder.
    `routes`: as in `Playground`.
    The environment of this process, `.env` in the current folder and the user's own `dagster.yaml` are everybody's.
    """
    _take_env_file()
    if code is None:
        code = code_of(Path.cwd())
        served = "the example, a bakery; -f and -m serve your own" if code else f"the project in {Path.cwd()}"
        print_line("dev", f"serving {served}")
    dagster_home = os.environ.get("DAGSTER_HOME")
    # Fast: a lost worker's messages come back after 10 s, and a Ctrl-C does not wait for running jobs.
    config: dict[str, Any] = {
        "wait_time_seconds": 2,
        "visibility_timeout_seconds": 10,
        "status_poll_seconds": 2,
        "drain_seconds": 0,
        "stop_timeout_seconds": 12,
    }
    with (
        stop_requests() as request,
        suppress(StopRequested),
        playground(
            lambda temporary: InstanceConfig.found(temporary, home, dagster_home, Path.cwd()),
            request,
            os.environ,
            print_line,
            routes=routes,
            **config,
        ) as (ground, manager),
    ):
        print_line("dev", "starting the embedded AWS endpoint")
        ground.start_aws()
        for change in ground.changes:
            print_line("dev", change)
        worker = ground.start_worker() if with_worker else None
        print_line("dev", "starting Dagster's webserver and daemon")
        address = ground.start_ui(code, port)
        if worker is not None:
            ground.wait_for_worker(worker)
        print_line("dev", f"another worker: DAGSTER_HOME={ground.home} dagster-taskiq worker start")
        print_line("dev", f"Dagster's UI: {address}   (Ctrl-C stops everything)")
        try:
            manager.stay()
        finally:
            print_line("dev", "stopping everything")
