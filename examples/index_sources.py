"""The example jobs, for `dagster dev -f examples/index_sources.py`; they are kept in the package."""

from dagster_taskiq.examples.index_sources import defs as defs
