"""What an import brings with it: seconds, for who starts a worker or asks a question."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

AWS = {"aioboto3", "aiobotocore", "aiohttp", "boto3", "botocore"}
DATABASE = {"alembic", "sqlalchemy"}
QUEUE = {"taskiq", "taskiq_aws"}
REST = {"dagster._cli.api", "dagster._daemon.monitoring", "opentelemetry", "aws_embedded_metrics", "rich"}
HEAVY = AWS | DATABASE | QUEUE | REST
ABSENT = {
    "dagster_taskiq": {"dagster", "asyncio", "click"} | HEAVY,
    "dagster_taskiq.process.fork_server_main": {"dagster", "asyncio", "click"} | HEAVY,
    "dagster_taskiq.cli": {"dagster"} | HEAVY,
    "dagster_taskiq.sqs.admin": {"dagster"} | HEAVY,
    "dagster_taskiq.launcher": HEAVY,
    "dagster_taskiq.executor": HEAVY,
    "dagster_taskiq.child.main": HEAVY,
    "dagster_taskiq.runs": HEAVY,
    "dagster_taskiq.doctor.checks": HEAVY,
    "dagster_taskiq.storage.workers": HEAVY,
    "dagster_taskiq.worker.service": {"aioboto3", "boto3"} | DATABASE | REST,
}
"""Modules in the order in which one interpreter imports them, and what is not to be there afterwards."""

PROGRAM = """
import importlib, json, os, sys
descriptors = len(os.listdir("/proc/self/fd"))
found = {}
for module, absent in json.loads(sys.argv[1]).items():
    importlib.import_module(module)
    found[module] = sorted(set(absent) & set(sys.modules))
threads = len(os.listdir("/proc/self/task"))
print(json.dumps([found, threads, len(os.listdir("/proc/self/fd")) - descriptors]))
"""


def test_what_is_heavy_is_imported_where_it_is_used() -> None:
    """And no import starts a thread or opens a descriptor, so that a process that has imported all can be forked."""
    asked = json.dumps({module: sorted(absent) for module, absent in ABSENT.items()})
    said = subprocess.run([sys.executable, "-c", PROGRAM, asked], capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == [{module: [] for module in ABSENT}, 1, 0]
