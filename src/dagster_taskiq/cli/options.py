"""Options that several commands share."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import click

from dagster_taskiq._gc import no_collection_until_exit
from dagster_taskiq.cli.commands import only_what_was_asked

INTERRUPTED: Final = 130
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

Command = TypeVar("Command", bound=Callable[..., Any])


def quiet(command: Command) -> Command:
    """A command that says what it was asked, without warnings of libraries. All are, but those that run users' code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        only_what_was_asked()
        return command(*args, **options)

    run.is_quiet = True  # type: ignore[attr-defined]
    return cast("Command", run)


def soon_over(command: Command) -> Command:
    """A quiet command that answers within seconds.

    It does without garbage collection, which makes it a third quicker.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        no_collection_until_exit()
        return command(*args, **options)

    return quiet(cast("Command", run))


@contextmanager
def waiting(then: str) -> Iterator[None]:
    """While a command only waits for others. Ctrl-C ends it with exit code 130, and says what becomes of the rest."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(then, err=True)
        raise SystemExit(INTERRUPTED) from None


def config_option(command: Command) -> Command:
    """`-y/--config/--config-yaml FILE`, passed as `config_file`."""
    return click.option(
        "-y",
        "--config",
        "--config-yaml",
        "config_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="YAML with the executor's run configuration (execution: config: ...) or only its keys."
        " Without it: run_launcher in $DAGSTER_HOME/dagster.yaml.",
    )(command)


def log_format_option(command: Command) -> Command:
    """`--log-format FORMAT`, passed as `log_format`."""
    return click.option(
        "--log-format",
        type=click.Choice(("auto", "text", "json")),
        default="auto",
        show_default=True,
        help="JSON has one object per line, with run, step, task and worker. auto: JSON in a container of ECS.",
    )(command)


def log_level_option(command: Command) -> Command:
    """`-l/--log-level/--loglevel LEVEL`, passed as `log_level`."""
    return click.option(
        "-l",
        "--log-level",
        "--loglevel",
        "log_level",
        type=click.Choice(LOG_LEVELS, case_sensitive=False),
        default="INFO",
        show_default=True,
        help="How much is logged on stderr.",
    )(command)
