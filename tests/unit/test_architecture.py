"""Imports point down, and each foreign library has its fence."""

import ast
from pathlib import Path

import pytest

import dagster_taskiq

SOURCE = Path(dagster_taskiq.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

LAYERS = [
    {"cli", "dev", "demo", "examples"},
    {"doctor"},
    {"doctor_aws"},
    {"executor", "runs"},
    {"launcher", "core_execution_loop"},
    {"worker"},
    {"tasks", "step_tasks", "cancellable_receiver", "running", "cancel_listener", "preflight", "status_watch"},
    {"supervised_cleanup"},
    {"workplace", "chronicle", "finalise", "child"},
    {"sender", "roll_call", "late_events"},
    {"cancellable_broker"},
    {"cancel_queue", "sqs_queue", "cancellation_middleware"},
    {"task_cleanup"},
    {"cleanup"},
    {"cleanup_plan"},
    {"claims", "run_log"},
    {"testing", "current_token", "handlers"},
    {"op_token"},
    {"op_state"},
    {"database"},
    {"supervisor", "heartbeats", "lease", "crew", "patience", "recently"},
    {"aws_probe"},
    {"process", "sqs", "payload_bucket", "dagster_internals", "ecs", "health", "metrics"},
    {"keeper", "voice"},
    {"events", "token"},
    {
        "cancellation",
        "settlement",
        "messages",
        "settings",
        "tags",
        "errors",
        "version",
        "to_the_end",
        "procfs",
        "state",
        "findings",
        "log_context",
    },
]

FENCES = {
    "botocore": {"sqs", "payload_bucket", "aws_probe"},
    "aiobotocore": {"sqs", "payload_bucket"},
    "aioboto3": {"sqs", "payload_bucket", "aws_probe"},
    "aws_embedded_metrics": {"metrics"},
    "opentelemetry": {"metrics"},
    "pythonjsonlogger": {"cli"},
    "taskiq": {
        "cancellable_broker",
        "cancellable_receiver",
        "running",
        "tasks",
        "step_tasks",
        "sender",
        "cancellation_middleware",
        "worker",
    },
    "taskiq_aws": {"cancellable_broker"},
    "tenacity": {"patience"},
    "signal": {
        *("keeper", "process", "child", "supervisor", "worker", "crew", "dev", "demo", "cli"),
        *("cleanup", "dagster_internals"),
    },
}
MAY_READ_ENVIRONMENT = {"settings", "keeper", "op_token", "ecs", "doctor", "dev", "demo", "crew", "cli"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Modules imported when the module is run, those for type checkers excepted."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def layer(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    if path.parent == SOURCE and path.name == "__init__.py":
        return
    me = layer(name_of(path))
    for imported in imports(path):
        head, _, rest = imported.partition(".")
        if head == "dagster_taskiq" and rest and not rest.startswith("__"):
            name = rest.split(".")[0]
            if any(name in names for names in LAYERS):
                assert layer(name) >= me, f"{path.name} imports {imported}, which is above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_each_library_stays_behind_its_fence(path: Path) -> None:
    for imported in imports(path):
        allowed = FENCES.get(imported.split(".")[0])
        assert allowed is None or name_of(path) in allowed, f"{path.name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_dagsters_private_parts_are_imported_in_one_module(path: Path) -> None:
    private = [imported for imported in imports(path) if imported.startswith("dagster._")]
    assert not private or name_of(path) == "dagster_internals", private


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_settings_alone_read_the_environment(path: Path) -> None:
    reads = "os.environ" in path.read_text() or "getenv" in path.read_text()
    assert not reads or name_of(path) in MAY_READ_ENVIRONMENT


def test_the_keeper_needs_the_standard_library_only() -> None:
    import sys

    for module in ("keeper.py", "procfs.py"):
        foreign = {name for name in imports(SOURCE / module) if name.split(".")[0] not in sys.stdlib_module_names}
        assert foreign <= {"dagster_taskiq", "dagster_taskiq.procfs"}
