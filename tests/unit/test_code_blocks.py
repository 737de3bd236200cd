"""Every code block of every page is right: commands have these options, configuration is accepted, imports are there.

Whether they also do what the page says is proved by the tests in `FOLLOWED_BY`.
"""

import ast
import importlib
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Final, cast

import botocore.session
import click
import pytest
import yaml
from dagster._cli import create_dagster_cli
from dagster._config import validate_config
from dagster._core.instance.config import dagster_instance_config_schema
from tests.support.pages import PAGES, ROOT, Block, blocks, code_spans, commands

import dagster_taskiq
from dagster_taskiq.cli import main
from dagster_taskiq.executor import EXECUTOR_FIELDS
from dagster_taskiq.messages import read_cancel
from dagster_taskiq.settings import TOP_LEVEL_KEYS, Settings

FOLLOWED_BY: Final[Mapping[str, str]] = {
    "docs/cancel-from-anywhere.md": "tests/acceptance/operator/test_cancel_from_anywhere.py",
    "docs/deploy-on-ecs.md": "tests/acceptance/operator/test_deploy_page.py",
    "docs/installation.md": "tests/acceptance/installation/test_resolution.py",
    "docs/migrate-from-dagster-celery.md": "tests/unit/test_migration_page.py",
    "docs/operate.md": "tests/acceptance/operator/test_operate_page.py",
    "docs/own-project.md": "tests/acceptance/installation/test_own_project_page.py",
    "docs/plain-taskiq.md": "tests/contract/test_standing_cancels.py",
    "docs/run-explain.md": "tests/unit/story/test_stories.py",
    "README.md": "tests/acceptance/installation/test_resolution.py",
}
"""Pages to the test that does what they say, and names them."""
SHORT: Final[Mapping[str, str]] = {
    "CANCELLATION.md": "single requests, the like of which other pages have",
    "docs/first-run.md": "`dev` and `demo` have tests of their own, and so has what the README installs",
}
"""Pages with such commands that nobody follows, and why that is enough."""
SHELLS: Final = ("bash", "zsh", "fish")
SET_UP: Final = {"aws", "dagster", "pip"}
"""A page with these changes something outside, so a test follows it. Commands of ours have tests of their own."""
OUTPUT: Final = "text"
"""The language of what is shown, and not typed."""
NOT_OURS: Final = frozenset(
    ("awk", "break", "cat", "cd", "curl", "echo", "eval", "grep", "jq", "mkdir", "python3", "sleep", "source", "touch")
) | {"moto_server", "taskiq"}
PROCESSES: Final = ("dagster-taskiq fork server", "dagster-taskiq output collector")
HISTORY: Final = re.compile(r"CHANGELOG\.md|docs/decisions/")
"""What was, and may not be any more."""
BLOCKS: Final = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> "pytest.MarkDecorator":
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


@cache
def dagster_command_line() -> click.Command:
    return cast("click.Command", create_dagster_cli())  # type: ignore[no-untyped-call]


def parsed(command: click.Command, words: Iterable[str], *, whole: bool = True) -> None:
    """Read words as the command line would. Fails for unknown commands and options, and for missing ones if `whole`."""
    rest = list(words)
    context = click.Context(command, info_name=rest.pop(0))
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        assert found, f"{context.command_path} has no command {rest[0]!r}"
        command, context = found, click.Context(found, info_name=rest.pop(0), parent=context)
    parser = command.make_parser(context)
    try:
        given, left, _ = parser.parse_args(rest)
    except click.BadOptionUsage:
        assert not whole  # an option without its value
        return
    assert not [word for word in left if word], f"{context.command_path} takes no {left}"
    if whole and not isinstance(command, click.Group):
        missing = [one.name for one in command.params if one.required and given.get(str(one.name)) is None]
        assert not missing, f"{context.command_path} needs {missing}"


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [word for word in words[1:] if "=" not in word and word not in targets] == []


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for word in words for extra in re.findall(r"dagster-taskiq\[(.*?)\]", word)}
    assert {one for extra in named for one in extra.split(",")} <= set(extras)


def check_aws(words: list[str]) -> None:
    """Whether there is such an operation, with these options, by AWS's own model of it."""
    _, service, operation, *rest = words
    options = {word[2:] for word in rest if word.startswith("--")} - {"query", "output", "region"}
    if (service, operation) == ("cloudformation", "deploy"):
        assert options <= {"stack-name", "template-file", "capabilities", "parameter-overrides"}
        return
    if operation == "wait":
        waiters = botocore.session.Session().get_waiter_model(service).waiter_names
        assert "".join(part.capitalize() for part in rest[0].split("-")) in waiters
        return
    model = botocore.session.Session().get_service_model(service)
    shape = model.operation_model("".join(part.capitalize() for part in operation.split("-"))).input_shape
    known = {re.sub(r"(?<!^)(?=[A-Z])", "-", member).lower() for member in (shape.members if shape else ())}
    assert options <= known
    for body in re.findall(r"--message-body (\{.*\})", " ".join(words)):
        read_cancel(body)


PROGRAMS: Final[Mapping[str, Callable[[list[str]], None]]] = {
    "dagster-taskiq": lambda words: parsed(main, words),
    "dagster": lambda words: parsed(dagster_command_line(), words),
    "make": check_make,
    "pip": check_pip,
    "aws": check_aws,
}


@of(*SHELLS)
def test_commands_are_there_and_have_these_options(block: Block) -> None:
    for words in commands(block.text):
        program = words[0]
        if program in PROGRAMS:
            PROGRAMS[program](words)
        else:
            is_file = (ROOT / program).exists() or program.startswith(".venv/")
            assert program in NOT_OURS or is_file, f"{block}: say here how {program} is checked"


@pytest.mark.parametrize("page", [page for page in PAGES if not HISTORY.match(page)])
def test_commands_in_the_text_are_there_and_have_these_options(page: str) -> None:
    for span in code_spans(page):
        if span.startswith("dagster-taskiq ") and span not in PROCESSES and "COMMAND" not in span:
            (words,) = commands(span)
            parsed(main, words, whole=False)


@of("python")
def test_python_compiles_and_has_the_names_that_it_imports(block: Block) -> None:
    tree = compile(block.text, str(block), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in dagster_taskiq.__all__:
            named = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(getattr(dagster_taskiq, node.func.id)).bind(*node.args, **named)


def check_configuration(config: Mapping[str, Any]) -> None:
    variables = dict.fromkeys(re.findall(r"'env': '(\w+)'", str(config)), "1")
    config = {key: value for key, value in config.items() if value != {"env": "DAGSTER_TASKIQ_SQS_QUEUE_URL"}}
    Settings.from_config({"queue_url": "https://sqs.us-east-1.amazonaws.com/1/q", **config}, environ=variables)


@of("yaml")
def test_configuration_is_accepted(block: Block) -> None:
    config = yaml.safe_load(block.text)
    if block.title.startswith("before"):  # what somebody has who comes from another system
        return
    if "execution" in config:
        given = config["execution"]["config"]
        ours = {key: value for key, value in given.items() if key not in EXECUTOR_FIELDS or key in TOP_LEVEL_KEYS}
        check_configuration(ours)
        return
    result = validate_config(dagster_instance_config_schema(), config)
    assert result.success, result.errors
    for part in ("run_launcher", "run_coordinator"):
        if part in config:
            ours = getattr(importlib.import_module(config[part]["module"]), config[part]["class"])
            if part == "run_launcher":
                check_configuration(config[part]["config"])
            else:
                ours.from_config_value(None, config[part].get("config") or {})


@of("toml")
def test_toml_is_toml(block: Block) -> None:
    tomllib.loads(block.text)


@of("json")
def test_json_is_json_and_a_cancel_message_is_one(block: Block) -> None:
    for line in block.text.splitlines() if block.text.startswith("{") else [block.text]:
        if {"task_id", "group", "task_name", "predicate"} & set(json.loads(line)):
            read_cancel(line.replace("…", "t-1"))


def test_every_block_says_what_it_is() -> None:
    known = {*SHELLS, "python", "yaml", "json", "toml", OUTPUT, "docker", "javascript", "go"}
    assert [f"{block}: {block.language!r}" for block in BLOCKS if block.language not in known] == []


def is_to_be_followed(block: Block) -> bool:
    is_set_up = block.language in SHELLS and SET_UP & {words[0] for words in commands(block.text)}
    return bool(is_set_up) or block.language in {"docker", "javascript", "go"}


def test_every_page_that_sets_something_up_is_followed_by_a_test() -> None:
    pages = {block.page for block in BLOCKS if is_to_be_followed(block)}
    assert sorted(pages - set(FOLLOWED_BY) - set(SHORT)) == [], "name the test that does what the page says"
    for page, test in FOLLOWED_BY.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text(), f"{test} does not name {page}"
