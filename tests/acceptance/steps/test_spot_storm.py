"""Workers are drained and killed all the time: every run succeeds, and no step runs twice at the same time."""

import pytest
from tests.acceptance.conftest import open_platform
from tests.support.storm import storm

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(480)]


def test_a_short_storm(endpoint: str) -> None:
    figures = storm(open_platform, endpoint, seed=1, seconds=8, runs=1)
    print(figures.line())
    assert not figures.wrong, figures.line()
    assert figures.interruptions + figures.resumes > 0, figures.line()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_a_storm(endpoint: str, seed: int) -> None:
    figures = storm(open_platform, endpoint, seed=seed, seconds=60)
    print(figures.line())
    assert not figures.wrong, figures.line()
    assert figures.interruptions > 0, figures.line()
