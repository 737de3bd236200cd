"""What is launched: a day's assets, an audit whose steps run on any worker, and an oven that does not listen."""

import subprocess
import sys
import time
from collections.abc import Iterator

import dagster as dg

from dagster_taskiq import taskiq_executor

from .assets import DAYS, read, receipts, report, sales, takings
from .files import Files
from .tills import SHOPS

day = dg.define_asset_job("day", [receipts, sales, report], description="One day, from the tills.")
books = dg.define_asset_job("books", [sales, report], description="Enter one day once more.")


@dg.op(out=dg.DynamicOut(str))
def shops() -> Iterator[dg.DynamicOutput[str]]:
    """Each shop is counted in a step of its own."""
    for shop in SHOPS:
        yield dg.DynamicOutput(shop, mapping_key=shop.lower().replace(" ", "_"))


class Counting(dg.Config):
    """How thorough."""

    seconds: float = 5
    """For one shop."""


@dg.op
def count(context: dg.OpExecutionContext, config: Counting, files: Files, shop: str) -> int:
    """The receipts of one shop that are in a file, and not in the books; of all days that are in the books."""
    missing = 0
    for name in DAYS.get_partition_keys():
        time.sleep(config.seconds / len(DAYS.get_partition_keys()))
        if files.books(name).exists():
            received = sum(receipt[0] == shop for receipt in read(files.receipts(name)))
            entered = {row[0]: row[1] for row in takings(files.books(name))}.get(shop, 0)
            missing += max(0, received - entered)
    context.log.info("%s: %d receipts are missing", shop, missing)
    return missing


@dg.op
def sign(context: dg.OpExecutionContext, missing: list[int]) -> None:
    """Nothing may be missing."""
    if any(missing):
        raise dg.Failure(f"{sum(missing)} receipts are missing in the books")
    context.log.info("the books are complete")


@dg.job(executor_def=taskiq_executor)
def audit() -> None:
    """Compare receipts and books: the steps are tasks of their own, for whichever worker has a slot."""
    sign(shops().map(count).collect())


OVEN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("hot", flush=True)
time.sleep(float(sys.argv[1]))
"""


class Baking(dg.Config):
    """How long it bakes when nobody kills it."""

    seconds: float = 3600


@dg.op
def bake_stubbornly(context: dg.OpExecutionContext, config: Baking) -> None:
    """Go on whatever happens, and so does the subprocess: the kind of code that only a kill ends."""
    with subprocess.Popen(  # noqa: S603 - our own interpreter and script
        [sys.executable, "-c", OVEN, str(config.seconds)], stdout=subprocess.PIPE
    ) as oven:
        if oven.stdout is not None:
            oven.stdout.readline()
        end = time.monotonic() + config.seconds
        announced = False
        while time.monotonic() < end:
            try:
                if not announced:
                    context.log.info("baking stubbornly, in an oven with pid %d", oven.pid)
                    announced = True
                time.sleep(0.05)
            except BaseException as error:  # noqa: BLE001 - the bad habit that this job is there to show
                context.log.warning("ignored: %s", type(error).__name__)


@dg.job(executor_def=dg.in_process_executor)
def bake() -> None:
    """Ignores its interrupt, and so does its oven; ends only when it is killed."""
    bake_stubbornly()
