"""Several receivers of one message, on PostgreSQL and with real concurrency: exactly one starts it."""

import pytest
from tests.acceptance.conftest import open_platform
from tests.support.receivers import count_starts

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(180)]

ROUNDS = 25


@pytest.mark.parametrize("what", ["run", "step"])
def test_exactly_one_receiver_starts_it(endpoint: str, postgres: str, what: str) -> None:
    with open_platform(endpoint, extra={"storage": {"postgres": {"postgres_url": postgres}}}) as platform:
        started = count_starts(platform, what, ROUNDS)
        assert set(started) == {1}, started
