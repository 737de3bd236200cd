"""The rooms of the house: which may import which, and which library stays behind which fence."""

import ast
import graphlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import dagster_taskiq

PACKAGE = "dagster_taskiq"
SOURCE = Path(dagster_taskiq.__file__).parent
MOST_LINES = 400

FLOOR = {
    "errors",
    "version",
    "queue_names",
    "messages",
    "settings",
    "_retry",
    "_route_rules",
    "_setting_rules",
    "_text",
    "_shield",
    "_ttl_cache",
    "_log_context",
    "_gc",
    "_lane",
    "_time_limit",
    "_attempt_limit",
    "_last_words",
}
"""What every room may import; among themselves they must not form a circle."""
DOMAIN = {"storage", "dagster_compat", "cancellation"}

MAY_IMPORT: Mapping[str, set[str]] = {
    "metrics": FLOOR,
    "cancellation": {"errors"},
    "dagster_compat": {"_retry", "_time_limit", "errors"},
    "process": {"_last_words", "cancellation.model", "cancellation.signal", "errors"},
    "sqs": FLOOR | {"cancellation.model"},
    "storage": FLOOR | {"dagster_compat", "cancellation"},
    "tasks": FLOOR | {"sqs", "cancellation", "process"},
    "cancellable_broker": FLOOR | {"tasks", "sqs", "cancellation"},
    "cancellable_receiver": FLOOR | {"cancellable_broker", "tasks", "sqs", "cancellation"},
    "cleanup": FLOOR | DOMAIN,
    "steps": FLOOR | DOMAIN,
    "core_execution_loop": FLOOR | DOMAIN | {"steps"},
    "child": FLOOR | DOMAIN | {"cleanup", "process.json_lines"},
    "op_api": FLOOR | {"cancellation", "dagster_compat", "child"},
    "testing": FLOOR | {"cancellation", "child"},
    "worker": FLOOR
    | DOMAIN
    | {"cancellable_broker", "cancellable_receiver", "tasks", "sqs", "process", "child", "cleanup", "metrics"},
    "termination": FLOOR | DOMAIN | {"cancellable_broker", "tasks", "metrics"},
    "route_queues": FLOOR | DOMAIN | {"cancellable_broker", "tasks"},
    "superseding": FLOOR | DOMAIN,
    "launcher": FLOOR
    | DOMAIN
    | {"cancellable_broker", "tasks", "metrics", "termination", "run_fence", "route_queues", "superseding"},
    "coordinator": FLOOR | DOMAIN | {"launcher", "metrics"},
    "executor": FLOOR
    | DOMAIN
    | {"launcher", "route_queues", "core_execution_loop", "steps", "cancellable_broker", "tasks", "sqs"},
    "runs": FLOOR | DOMAIN | {"launcher", "cleanup", "sqs"},
    "reexecution": FLOOR | DOMAIN | {"launcher", "runs"},
    "run_where": FLOOR,
    "run_query": FLOOR | DOMAIN | {"run_where"},
    "run_fence": FLOOR | DOMAIN | {"run_query"},
    "run_selection": FLOOR | DOMAIN | {"termination", "run_query"},
    "cancel_many": FLOOR | DOMAIN | {"launcher", "runs", "run_selection"},
    "cancel_fence": FLOOR | DOMAIN | {"cancel_many", "run_fence", "run_query", "run_selection", "runs"},
    "cancel_sources": FLOOR | DOMAIN | {"cancel_many", "run_query", "run_selection", "runs"},
    "doctor": FLOOR | DOMAIN | {"launcher", "coordinator", "sqs"},
    "story": FLOOR | DOMAIN | {"launcher", "coordinator", "run_query"},
    "examples": {""},
    "local": FLOOR | DOMAIN | {"examples", "sqs"},
    "cli": FLOOR
    | DOMAIN
    | {"cancel_many", "doctor", "local", "story", "runs", "worker", "sqs", "launcher", "metrics", "process"}
    | {"run_query", "run_selection", "cancel_sources", "cancel_fence", "reexecution"},
}
"""Room to rooms. `""` is the public interface, `dagster_taskiq` itself."""

FENCES: Mapping[str, set[str]] = {
    "botocore": {"sqs"},
    "aiobotocore": {"sqs"},
    "aioboto3": {"sqs"},
    "aws_embedded_metrics": {"metrics"},
    "opentelemetry": {"metrics"},
    "pythonjsonlogger": {"cli"},
    "simpleeval": {"run_where"},
    "taskiq": {"cancellable_broker", "cancellable_receiver", "tasks", "worker"},
    "taskiq_aws": {"cancellable_broker"},
    "tenacity": {"_retry"},
    "signal": {
        "process",
        "child",
        "cli",
        "_attempt_limit",
        "tasks.handler_child",
        "local",
        "worker.service",
        "dagster_compat.interrupts",
    },
    "dagster._": {"dagster_compat"},
    "taskiq.receiver.receiver": {"cancellable_receiver"},
}
"""Library to the rooms that may import it; the private parts of two of them have a fence of their own."""

MAY_READ_ENVIRONMENT = {
    "settings",
    "dagster_compat.instance",
    "metrics",
    "process.shim",
    "child.child_process",
    "child.control_channel",
    "child.step_limits",
    "worker.ecs",
    "doctor",
    "local",
    "cli",
}
STANDARD_LIBRARY_ONLY = (
    "_last_words",
    "process.shim",
    "process.procfs",
    "process.json_lines",
    "process.fork_server_main",
    "process.forked",
    "process.output_collector",
)


def module_of(path: Path) -> str:
    """`worker/service.py` as "worker.service"; a package by its name."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Modules and names that a module imports, wherever in it; those for type checkers only are among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(module: str) -> set[str]:
    """Modules of ours that a module of ours imports."""
    found = set()
    for name in imported(MODULES[module]):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            inner = ".".join(parts[1:])
            found.add(inner if inner in MODULES else ".".join(parts[1:-1]))
    return found


def is_in(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms if room or not module)


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_every_room_imports_only_what_is_below_it() -> None:
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if module
        for other in sorted(imported_modules(module))
        if room_of(other) != room_of(module) or not other
        if not is_in(other, MAY_IMPORT.get(room_of(module), FLOOR))
    ]
    assert wrong == []


def test_there_are_no_circles() -> None:
    whole = {module: imported_modules(module) - {""} for module in MODULES if module}
    rooms: dict[str, set[str]] = {}
    for module, others in whole.items():
        rooms.setdefault(room_of(module), set()).update(room_of(other) for other in others)
    for graph in (whole, {room: others - {room} for room, others in rooms.items()}):
        graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_each_library_stays_behind_its_fence() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imported(path)
        for library, rooms in FENCES.items()
        if name == library or name.startswith(library if library.endswith("_") else f"{library}.")
        if not is_in(module, rooms)
    ]
    assert wrong == []


def test_settings_alone_read_the_environment() -> None:
    readers = [
        module for module, path in MODULES.items() if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    assert [module for module in readers if not is_in(module, MAY_READ_ENVIRONMENT)] == []


def test_what_watches_over_children_needs_the_standard_library_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in STANDARD_LIBRARY_ONLY
        for name in imported(MODULES[module])
        if name.split(".")[0] not in sys.stdlib_module_names
        and not name.startswith((f"{PACKAGE}.process.", f"{PACKAGE}._last_words."))
    ]
    assert wrong == []


def test_no_module_outgrows_a_reader() -> None:
    sizes = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: size for module, size in sizes.items() if size > MOST_LINES} == {}
