"""Everything that Dagster serves: `dagster-taskiq dev -m bakery.definitions`."""

import dagster as dg

from .assets import receipts, report, sales
from .automation import every_minute, inbox
from .files import Files
from .jobs import audit, bake, books, day

defs = dg.Definitions(
    assets=[receipts, sales, report],
    jobs=[day, books, audit, bake],
    schedules=[every_minute],
    sensors=[inbox],
    resources={"files": Files()},
    # The steps of a run in one process: they are small. `audit` has another executor.
    executor=dg.in_process_executor,
)
