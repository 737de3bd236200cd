"""`python -m dagster_taskiq.cli`, when there is an interpreter but no script."""

from dagster_taskiq.cli import main

main(prog_name="dagster-taskiq")
