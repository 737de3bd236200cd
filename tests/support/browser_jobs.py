"""What the browser's tests serve: the bakery, a job that says how far it is, and one that waits, for backfills."""

import time

import dagster as dg

from dagster_taskiq.examples.bakery import definitions as bakery

FILE = "browser_jobs.py"
DAYS = [f"day-{number:02}" for number in range(20)]


@dg.op
def enter_for_ever(context: dg.OpExecutionContext) -> None:
    """Ten minutes of work, and a `finally`."""
    try:
        for number in range(1, 6001):
            time.sleep(0.1)
            if number % 5 == 0:
                context.log.info("entered %d receipts", number)
    finally:
        context.log.info("finally: database closed")


@dg.job(executor_def=dg.in_process_executor)
def enters() -> None:
    enter_for_ever()


@dg.op
def wait(context: dg.OpExecutionContext) -> None:
    """As long as nobody stops it, for ten minutes."""
    context.log.info("waiting")
    time.sleep(600)


@dg.job(partitions_def=dg.StaticPartitionsDefinition(DAYS), executor_def=dg.multiprocess_executor)
def waits() -> None:
    wait()


defs = dg.Definitions.merge(bakery.defs, dg.Definitions(jobs=[enters, waits]))
