"""For all tests. The long ones come first, so that all processes come to their end together."""

from collections.abc import Iterator

import hypothesis
import pytest

from tests.support.moto import moto_server
from tests.support.shown import shown

# A slow machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The URL of the emulator that all tests of this process share; each has queues of its own."""
    with moto_server() as url:
        yield url


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
