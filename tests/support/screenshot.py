"""Make `docs/images/cancelled-run.png`: a run that was cancelled in the middle, in Dagster's UI. `make screenshot`.

Everything is real: `dagster-taskiq dev` with its example jobs, a run of one of them, and `dagster-taskiq run cancel`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.acceptance.operator.test_dev import dev
from tests.support.browser import Dagster, chromium
from tests.support.environment import clean_environment

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "cancelled-run.png"
LOCATION = "dagster_taskiq.examples.index_sources"
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
    run_id = dagster.launch(LOCATION, "index_sources")
    dagster.wait_for_event(run_id, lambda event: "indexed 400 of" in event.message, "the op is in the middle")
    command = [sys.executable, "-m", "dagster_taskiq.cli", "run", "cancel", run_id]
    subprocess.run([*command, "--reason", "wrong input file", "--requested-by", "ada"], env=environ, check=True)
    dagster.wait_for_status(run_id, "CANCELED")
    return run_id


def photograph(executable: str, address: str) -> None:
    """The page of the run, with the end of its log, when everything on it has been drawn."""
    with chromium(executable) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address)
        page.get_by_text("Canceled", exact=True).first.wait_for()
        page.get_by_text("process tree gone").first.wait_for()
        page.get_by_text("Succeeded (1)").wait_for()
        page.get_by_text("Hide navigation").click()
        before, now = b"", page.screenshot()
        while before != now:
            page.wait_for_timeout(1500)
            before, now = now, page.screenshot()
    PICTURE.write_bytes(now)


if __name__ == "__main__":
    sys.exit(main())
