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
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
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
    logging.getLogger("dagster").addFilter(_is_no_notice)


def _is_no_notice(record: logging.LogRecord) -> bool:
    """Without a `dagster.yaml` Dagster says so in three lines; the error afterwards says it in one."""
    return not record.getMessage().startswith(_NO_FILE)
