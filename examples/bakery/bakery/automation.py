"""What launches runs by itself: both are off until somebody turns them on."""

from collections.abc import Iterator

import dagster as dg

from .assets import DAYS
from .files import Files
from .jobs import audit, books

# Every minute, so that you see it tick. A real bakery would do with "0 6 * * *".
every_minute = dg.ScheduleDefinition("every_minute", job=audit, cron_schedule="* * * * *")


@dg.sensor(job=books, minimum_interval_seconds=10)
def inbox(files: Files) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """A file in the inbox has a day entered again, together with what is in it. A changed file counts as a new one."""
    days = set(DAYS.get_partition_keys())
    found = [file for file in sorted(files.inbox().glob("*.csv")) if file.stem in days]
    for file in found:
        yield dg.RunRequest(run_key=f"{file.name}@{file.stat().st_mtime_ns}", partition_key=file.stem)
    if not found:
        yield dg.SkipReason(f"nothing there; try: echo 'Market,pretzel,10,1100' > {files.inbox()}/2025-01-07.csv")
