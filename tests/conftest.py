"""For all tests: the long ones first, so that two processes come to their end together; no test depends on speed."""

import hypothesis
import pytest

# A slow machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

LONG_FIRST = (
    "test_chaos",
    "localstack",
    "test_every_moment",
    "steps/test_workers",
    "steps/test_terminate",
    "test_parity",
    "test_faults",
    "test_hanging",
    "test_redelivery",
    "test_worker_list",
    "test_browser",
    "test_dev",
    "test_matrix",
    "test_waiting_in_the_queue",
    "test_demo",
    "acceptance",
    "contract",
)


def length(item: pytest.Item) -> int:
    return next((place for place, name in enumerate(LONG_FIRST) if name in item.nodeid), len(LONG_FIRST))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=length)
