"""The command line: argv → settings → what to run; exit codes. Knows neither SQS nor processes.

Everything heavy is imported by the command that needs it, so that `--help` is quick.
"""

import click

from dagster_taskiq.cli.commands import OneLineErrors
from dagster_taskiq.cli.demo import demo
from dagster_taskiq.cli.dev import dev
from dagster_taskiq.cli.doctor import doctor
from dagster_taskiq.cli.fleet import fleet
from dagster_taskiq.cli.infra import infra
from dagster_taskiq.cli.queue import queue
from dagster_taskiq.cli.run import run
from dagster_taskiq.cli.worker import worker
from dagster_taskiq.version import __version__


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="dagster-taskiq")
def main() -> None:
    """Dagster runs and steps over Taskiq on AWS SQS, with a Terminate that always works.

    \b
    Example, everything on this machine, no AWS needed:
      dagster-taskiq demo
    Example, a worker for the queue in $DAGSTER_HOME/dagster.yaml:
      dagster-taskiq worker start
    """


main.add_command(worker)
main.add_command(queue)
main.add_command(dev)
main.add_command(demo)
main.add_command(run)
main.add_command(fleet)
main.add_command(doctor)
main.add_command(infra)
