"""The fleet on bad days. One short day every night; `make chaos` has more of them.

`DAGSTER_TASKIQ_TEST_CHAOS_SEEDS` (numbers) and `DAGSTER_TASKIQ_TEST_CHAOS_SECONDS` say which days, and how long.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
from tests.support.chaos import Aftermath, bad_day
from tests.support.invariants import broken

SEEDS = [int(seed) for seed in os.environ.get("DAGSTER_TASKIQ_TEST_CHAOS_SEEDS", "7").split()]
SECONDS = float(os.environ.get("DAGSTER_TASKIQ_TEST_CHAOS_SECONDS", "40"))

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.nightly,
    pytest.mark.postgres,
    pytest.mark.timeout(SECONDS + 480),
]


def report(after: Aftermath, seed: int) -> str:
    """What happened, how often; with the coverage of the tables."""
    statuses = Counter(after.platform.status(launched.run_id).value for launched in after.launched)
    parts: dict[str, Counter[str]] = {
        "runs": statuses,
        "deeds": after.done,
        "terminate": after.table,
        "preflight and events": after.decisions,
        "faults of SQS": after.faults,
    }
    lines = [f"chaos: seed {seed}, {SECONDS:g} s"]
    for title, counts in parts.items():
        lines += [f"  {title}", *(f"    {count:5}  {what}" for what, count in sorted(counts.items()))]
    return "\n".join(lines)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_goes_wrong(
    endpoint: str, postgres: str, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    with bad_day(endpoint, postgres, tmp_path, seed, SECONDS, said.append) as after:
        wrong = broken(after)
        text = report(after, seed)
        stories = "\n".join(
            line
            for launched in after.launched
            if any(launched.run_id in one for one in wrong)
            for line in (f"{launched}", *after.platform.story(launched.run_id))
        )
    with capsys.disabled():
        print(f"\n{text}\n")
    kept = Path(os.environ.get("DAGSTER_TASKIQ_TEST_CHAOS_REPORTS", ""))
    if kept.name:
        (kept / f"seed-{seed}.txt").write_text(f"{text}\n" + "\n".join(wrong) + f"\n{stories}\n")
    assert not wrong, "\n".join([f"seed {seed}:", *wrong, "", stories, *said])
    assert after.launched
