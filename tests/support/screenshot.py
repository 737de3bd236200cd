"""Make `docs/images/cancelled-run.png`: a run that was cancelled in the middle, in Dagster's UI. `make screenshot`.

Everything is real: `dagster-taskiq dev` with its example jobs, a run of one of them, and `dagster-taskiq run cancel`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from tests.acceptance.operator.test_dev import dev
from tests.support.browser import Dagster, chromium
from tests.support.environment import clean_environment

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "cancelled-run.png"
MODULE = "dagster_taskiq.examples.bakery.definitions"
SHOWN = "logs=type:ENGINE_EVENT&levels=event|info"
"""Of the log: what the launcher and the worker have written."""


def main() -> int:
    executable = shutil.which("chromium")
    if executable is None:
        print("Chromium is missing: apt-get install chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "home"
        with dev(Path(temporary), "--dagster-home", str(home)) as running:
            dagster = Dagster(running.told(r"Dagster's UI: (\S+)"))
            dagster.be_known()
            run_id = cancelled_run(dagster, clean_environment(Path(temporary)) | {"DAGSTER_HOME": str(home)})
            photograph(executable, f"{dagster.address}/runs/{run_id}?{SHOWN}")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size // 1024} KiB")
    return 0


def cancelled_run(dagster: Dagster, environ: dict[str, str]) -> str:
    run_id = str(uuid.uuid4())
    day = json.dumps({"dagster/partition": "2025-01-07"})
    slowly = json.dumps({"ops": {"receipts": {"config": {"seconds": 60}}}})
    launch = [sys.executable, "-m", "dagster", "job", "launch"]
    launch += ["-m", MODULE, "-j", "day", "--tags", day, "--config-json", slowly, "--run-id", run_id]
    subprocess.run(launch, env=environ, check=True, stderr=subprocess.DEVNULL)
    dagster.wait_for_event(run_id, lambda event: "received 30 of" in event.message, "the op is in the middle")
    cancel = ["-m", "dagster_taskiq.cli", "run", "cancel", run_id, "--reason", "wrong day", "--requested-by", "ada"]
    subprocess.run([sys.executable, *cancel], env=environ, check=True)
    dagster.wait_for_status(run_id, "CANCELED")
    return run_id


def photograph(executable: str, address: str) -> None:
    """The page of the run, with the end of its log, when everything on it has been drawn."""
    with chromium(executable) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1180})
        page.goto(address)
        page.get_by_text("Canceled", exact=True).first.wait_for()
        page.get_by_text("cleanup finished").first.wait_for()
        page.get_by_text("Errored (1)").wait_for()
        page.get_by_text("Hide navigation").click()
        page.mouse.move(600, 5)
        before, now = b"", page.screenshot()
        while before != now:
            page.wait_for_timeout(1500)
            before, now = now, page.screenshot()
    PICTURE.write_bytes(now)


if __name__ == "__main__":
    sys.exit(main())
