"""What the browser's tests serve: the example jobs, and one that only waits, with partitions for backfills."""

import time

import dagster as dg

from dagster_taskiq.examples.index_sources import count_sources, index_sources, stubborn_index

FILE = "browser_jobs.py"
DAYS = [f"day-{number:02}" for number in range(20)]


@dg.op
def wait(context: dg.OpExecutionContext) -> None:
    """As long as nobody stops it, for ten minutes."""
    context.log.info("waiting")
    time.sleep(600)


@dg.job(partitions_def=dg.StaticPartitionsDefinition(DAYS))
def waits() -> None:
    wait()


defs = dg.Definitions(jobs=[index_sources, stubborn_index, count_sources, waits])
