"""`python -m dagster_taskiq.cli`, for whoever has the interpreter but not the script."""

from dagster_taskiq.cli import main

main(prog_name="dagster-taskiq")
