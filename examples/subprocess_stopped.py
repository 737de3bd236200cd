"""A subprocess that is asked to stop in its own way when the work is cancelled, and has time for it.

The worker would kill it with everything else that the work has started; but this one wants to finish its file first.

    dagster-taskiq dev -f examples/subprocess_stopped.py
"""

import signal
import subprocess
import sys

import dagster as dg

from dagster_taskiq import cancellation_token

CRAWLER = """
import pathlib, signal, sys, time
stopping = []
signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
with pathlib.Path(sys.argv[1]).open("w") as file:
    while not stopping:
        print(time.time(), file=file, flush=True)
        time.sleep(0.1)
    print("closed properly", file=file)
"""


class Crawl(dg.Config):
    file: str


@dg.op
def crawl(context: dg.OpExecutionContext, config: Crawl) -> None:
    """Run the crawler; when cancelled, ask it to stop and wait for it."""
    process = subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", CRAWLER, config.file], start_new_session=True
    )
    token = cancellation_token()
    token.on_cancelled(lambda: process.send_signal(signal.SIGINT))
    try:
        with token.shield("waiting for the crawler"):  # an interrupt would leave it alone
            code = process.wait()
        context.log.info("the crawler ended with exit code %d", code)
    finally:
        process.kill()  # whatever has come between
        process.wait()


@dg.job(executor_def=dg.in_process_executor)
def crawl_everything() -> None:
    """One crawl."""
    crawl()


defs = dg.Definitions(jobs=[crawl_everything])
