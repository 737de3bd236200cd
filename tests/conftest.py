"""For all tests. The long ones come first, so that all processes come to their end together."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.support.localstack import is_installed, localstack_server
from tests.support.moto import moto_server
from tests.support.shown import shown

REQUIRE_ALL_VARIABLE = "DAGSTER_TASKIQ_TEST_REQUIRE_ALL"

# A slow machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The URL of the emulator that all tests of this process share; each has queues of its own."""
    with moto_server() as url:
        yield url


@pytest.fixture(scope="session")
def localstack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the other one, whose tests are in the group `localstack`, so that one process has it."""
    if is_installed():
        with localstack_server(tmp_path_factory.mktemp("localstack")) as url:
            yield url
    elif os.environ.get(REQUIRE_ALL_VARIABLE):
        pytest.fail(f"LocalStack is not installed, and {REQUIRE_ALL_VARIABLE} is set; run: make emulator")
    else:
        pytest.skip("LocalStack is not installed; run: make emulator")


def place(item: pytest.Item) -> tuple[bool, bool, bool]:
    """Marked as long; in a group, whose tests cannot be spread; with processes of its own."""
    marks = ("long", "xdist_group", "acceptance")
    return tuple(item.get_closest_marker(mark) is None for mark in marks)  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, text in shown(config):
        terminalreporter.section(title)
        terminalreporter.write(text)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)
