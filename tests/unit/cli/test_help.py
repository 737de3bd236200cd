"""Every command explains itself, on a narrow terminal, at once; and what is mistyped is said in two lines."""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dagster_taskiq.cli import main
from dagster_taskiq.cli.commands import only_what_was_asked

NAME = "dagster-taskiq"
WIDTH = 80


def tree(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from tree(below, *path, name)


COMMANDS = dict(tree(main))


def helps(*path: str, width: int = WIDTH) -> str:
    said = CliRunner().invoke(main, [*path, "--help"], prog_name=NAME, terminal_width=width)
    assert said.exit_code == 0, said.output
    return said.output


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    command, text = COMMANDS[path], helps(*path)
    assert text.startswith(f"Usage: {' '.join([NAME, *path])} ")
    assert "Example" in text
    assert f"{NAME} " in text.split("Example", 1)[1], "an example begins with the command"
    assert [line for line in text.splitlines() if len(line) > WIDTH] == [], (
        "an option, or a paragraph that is not wrapped"
    )
    listed = text.partition("\nCommands:\n")[2].splitlines()
    assert [line for line in listed if line.endswith("...")] == [], "the list of commands cuts it: give it a short_help"
    assert [one.name for one in command.params if isinstance(one, click.Option) and not one.help] == []


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_what_can_be_wrapped_is_wrapped_on_a_narrow_terminal(path: tuple[str, ...]) -> None:
    """Examples stay as they are, to be copied."""
    prose = [line for line in helps(*path, width=60).splitlines() if len(line) > 60]
    whole = helps(*path, width=500).splitlines()
    assert [line for line in prose if line not in whole] == []


def test_help_is_quick_because_it_imports_next_to_nothing() -> None:
    """Modules are counted, because time is the machine's. `import dagster` alone is more than eight hundred."""
    code = (
        "import json, sys; from dagster_taskiq.cli import main\n"
        "for command in json.loads(sys.argv[1]): main([*command, '--help'], standalone_mode=False)\n"
        "heavy = {'dagster', 'botocore', 'aioboto3', 'taskiq', 'rich', 'asyncio', 'sqlalchemy', 'yaml'}\n"
        "print(json.dumps([sorted(heavy & set(sys.modules)), len(sys.modules)]))"
    )
    asked = [sys.executable, "-c", code, json.dumps(list(COMMANDS))]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    heavy, count = json.loads(said.splitlines()[-1])
    assert heavy == []
    assert count < 250


@pytest.mark.parametrize(
    ("given", "said", "at"),
    [
        (["runn"], "No such command 'runn'", ""),
        (["run", "explan"], "No such command 'explan'", " run"),
        (["--nope"], "No such option", ""),
        (["worker", "start", "--max-runs", "two"], "'two' is not a valid integer", " worker start"),
        (["run", "explain"], "Missing argument 'RUN_ID'", " run explain"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_where_to_look(given: list[str], said: str, at: str) -> None:
    ended = CliRunner().invoke(main, given, prog_name=NAME)
    assert ended.exit_code == 2
    first, second = ended.stderr.splitlines()
    assert first.startswith("Error: ")
    assert said in first
    assert second == f"Try '{NAME}{at} --help' for help."


def test_all_commands_are_quiet_but_those_that_run_users_code() -> None:
    loud = {
        path for path, command in COMMANDS.items() if command.callback and not hasattr(command.callback, "is_quiet")
    }
    leaves = {path for path, command in COMMANDS.items() if not isinstance(command, click.Group)}
    assert loud & leaves == {("worker", "start"), ("worker", "health"), ("dev",), ("demo",), ("infra",)}


@pytest.fixture
def filters_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(), logging.getLogger("dagster")]
    before = [list(logger.filters) for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters[:] = filters


@pytest.mark.usefixtures("filters_as_before")
def test_a_command_says_nothing_of_libraries(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    only_what_was_asked()
    only_what_was_asked()
    with warnings.catch_warnings(record=True) as warned:
        warnings.warn("will be removed in 2.0", DeprecationWarning, stacklevel=1)
    assert warned == []
    logging.getLogger("dagster").warning("No dagster instance configuration file (dagster.yaml) found at /x.")
    logging.getLogger("dagster").warning("something else")
    for _ in range(5):
        logging.getLogger().warning("Retrying failed database connection: (psycopg2.OperationalError) …")
    assert caplog.messages == ["something else"]
    assert capsys.readouterr().err == "Dagster's database does not answer; trying again\n"


@pytest.mark.usefixtures("filters_as_before")
def test_who_asks_for_warnings_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        only_what_was_asked()
        warnings.warn("will be removed in 2.0", DeprecationWarning, stacklevel=1)
    assert len(warned) == 1


def test_a_home_without_its_file_is_one_line(tmp_path: Path) -> None:
    """As a person sees it, with all that Dagster and other libraries have to say."""
    asked = [sys.executable, "-m", "dagster_taskiq.cli", "worker", "list"]
    done = subprocess.run(asked, env={"DAGSTER_HOME": str(tmp_path)}, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith(f"Error: there is no {tmp_path}/dagster.yaml: is DAGSTER_HOME the right folder?")
