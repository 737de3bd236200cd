"""The command line: argv → settings → what to run; exit codes. Knows neither SQS nor processes.

Everything heavy is imported by the command that needs it, so that `--help` is quick.
"""

from typing import Any

import click

from dagster_taskiq.cli.demo import demo
from dagster_taskiq.cli.dev import dev
from dagster_taskiq.cli.doctor import doctor
from dagster_taskiq.cli.infra import infra
from dagster_taskiq.cli.queue import queue
from dagster_taskiq.cli.run import run
from dagster_taskiq.cli.worker import worker
from dagster_taskiq.version import __version__


class OneLineErrors(click.Group):
    """A group of commands whose foreseeable errors are one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a foreseeable error becomes a `ClickException`."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError):
            raise
        except Exception as error:
            from dagster_taskiq.cli.explain import explain

            explanation = explain(error)
            if explanation is None:
                raise
            raise click.ClickException(explanation) from error


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
main.add_command(doctor)
main.add_command(infra)
