"""Groups of commands whose errors are one line, and commands that say nothing but what they were asked.

Knows click, warnings and one notice of Dagster; no command.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

_NO_FILE: Final = "No dagster instance configuration file"
_NO_DATABASE: Final = "Retrying failed database connection"


class Usage(click.UsageError):
    """What was wrong, and where to look: two lines, without the list of what there is."""

    def show(self, file: Any = None) -> None:
        """Print both lines on stderr."""
        click.echo(f"Error: {self.format_message()}", file=file, err=True)
        if self.ctx is not None:
            click.echo(f"Try '{self.ctx.command_path} {self.ctx.help_option_names[-1]}' for help.", file=file, err=True)


class OneLineErrors(click.Group):
    """A group of commands whose foreseeable errors are one line on stderr and exit code 1; 2 for wrong usage."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse what stands before the command."""
        with _short_usage():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a foreseeable error becomes a `ClickException`."""
        try:
            with _short_usage():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError):
            raise  # click knows what to do when a pipe was closed, as `head` does it
        except Exception as error:
            from dagster_taskiq.cli.explain import explain

            explanation = explain(error)
            if explanation is None:
                raise
            raise click.ClickException(explanation) from error


@contextmanager
def _short_usage() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        if type(error).show is not click.UsageError.show:  # a group without a command prints its whole help
            raise
        raise Usage(error.format_message(), error.ctx) from error


def only_what_was_asked() -> None:
    """For a command that answers and ends: no warnings of libraries, no notice of Dagster before the answer.

    Who wants warnings has `PYTHONWARNINGS` or `python -W`. A worker keeps them: they may be about users' code.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in ("", "dagster"):
        logger = logging.getLogger(name)
        for known in [one for one in logger.filters if isinstance(one, _Notices)]:
            logger.removeFilter(known)
        logger.addFilter(_Notices())


class _Notices:
    """Drops what Dagster logs at length and the answer, or the error, says in one line.

    It tries for a quarter of a minute to reach a database: a person should know why nothing happens meanwhile.
    """

    def __init__(self) -> None:
        self._has_said_so = False

    def filter(self, record: logging.LogRecord) -> bool:
        """False: the record is not shown."""
        if record.getMessage().startswith(_NO_DATABASE) and not self._has_said_so:
            self._has_said_so = True
            click.echo("Dagster's database does not answer; trying again", err=True)
        return not record.getMessage().startswith((_NO_DATABASE, _NO_FILE))
