"""Temporary files that are deleted when the work is cancelled, also when it had to be killed.

`TemporaryDirectory` does that for a process that ends by itself. Of one that was killed only the token's state is
left, where the name of the folder was noted before it was made.

    dagster-taskiq dev -f examples/temporary_files.py
"""

import shutil
import tempfile
import time
import uuid
from pathlib import Path

import dagster as dg

from dagster_taskiq import CleanupContext, cancellation_token, on_cancel


class Sorting(dg.Config):
    chunks: int = 10_000
    folder: str = tempfile.gettempdir()


def delete_files(context: CleanupContext) -> None:
    """May be called twice, and on another host: then there is nothing to delete, which is no error."""
    if "folder" in context.state:
        shutil.rmtree(context.state["folder"], ignore_errors=True)


@dg.op
@on_cancel(delete_files)
def sort_outside_of_memory(config: Sorting) -> None:
    """Write chunk after chunk into files, to merge them in the end."""
    token = cancellation_token()
    folder = Path(config.folder) / f"chunks-{uuid.uuid4().hex}"
    token.state["folder"] = str(folder)
    folder.mkdir()
    for number in range(config.chunks):
        (folder / f"{number}").write_bytes(bytes(1024))
        time.sleep(0.01)
    shutil.rmtree(folder)


@dg.job(executor_def=dg.in_process_executor)
def sort_files() -> None:
    """One sort."""
    sort_outside_of_memory()


defs = dg.Definitions(jobs=[sort_files])
