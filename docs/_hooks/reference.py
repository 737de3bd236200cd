"""What the reference says is read from the code while the site is built. Knows the code, not where pages are.

`<!-- generated: NAME -->` on a page is replaced by what the function of that name returns, as Markdown.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Final

import click
import griffe

import dagster_taskiq
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.cli import main
from dagster_taskiq.metrics import ALL as METRICS
from dagster_taskiq.settings import ENVIRONMENT, RULES, SOURCE_KEYS, Settings
from dagster_taskiq.storage import cleanup_events, engine_events, step_events
from dagster_taskiq.storage import tags as tags_module

_MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_SOURCE: Final = griffe.load(
    "dagster_taskiq", search_paths=[Path(dagster_taskiq.__file__).parents[1]], resolve_aliases=False
)


def _text(path: str) -> str:
    """The docstring of a module, class, function or attribute."""
    docstring = _SOURCE[path].docstring
    if docstring is None:
        raise LookupError(f"dagster_taskiq.{path} has no docstring, and the reference needs one")
    return str(docstring.value)


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    cells = (" | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in cells)


def _default(one: "Field[Any]") -> str:
    if one.default is MISSING:
        return "required"
    if one.default is None:
        return "none"
    if one.default == ():
        return "`[]`"
    return f"`{str(one.default).lower()}`" if isinstance(one.default, bool) else f"`{one.default}`"


def _allowed(one: "Field[Any]") -> str:
    rule = RULES[one.name]
    if isinstance(rule, tuple):
        return ", ".join(f"`{value}`" for value in rule)
    return str(rule) if rule else {bool: "`true`, `false`", tuple[str, ...]: "list of names"}.get(one.type, "URL")  # type: ignore[arg-type]


def _settings(keys: Iterable[str]) -> str:
    known = {one.name: one for one in fields(Settings)}
    parts = []
    for one in map(known.__getitem__, keys):
        facts = {"default": _default(one), "allowed": _allowed(one)}
        if variables := ENVIRONMENT.get(one.name):
            facts["environment"] = ", ".join(f"`{name}`" for name in variables)
        told = " · ".join(f"{name}: {value}" for name, value in facts.items())
        parts.append(f"### `{one.name}`\n\n{told}\n\n{_text(f'settings.Settings.{one.name}')}")
    return "\n\n".join(parts)


def settings_of_the_queue() -> str:
    """The keys beside `config_source`."""
    return _settings(one.name for one in fields(Settings) if one.name not in SOURCE_KEYS)


def settings_of_the_source() -> str:
    """The keys in `config_source`."""
    return _settings(SOURCE_KEYS)


def tags() -> str:
    """Each tag, who sets it, and what for."""
    names = [name for name in vars(tags_module) if name.endswith("_TAG")]
    return _table(
        ("tag", "meaning"),
        ((f"`{getattr(tags_module, name)}`", _text(f"storage.tags.{name}")) for name in names),
    )


_EXAMPLES: Final[dict[str, object]] = {
    "after_s": 0.111,
    "at": 0.0,
    "attempt": 1,
    "by": "ada",
    "children_not_final.why": "its worker w-2 is dead",
    "error": "TimeoutError: the bucket did not answer",
    "finished": ("load",),
    "handler": "abort_upload",
    "identity": "OpDefinition upload #1",
    "instead": "set dagster/priority on the run",
    "killed_processes": ("sleep 600 (pid 12083)",),
    "most": 10,
    "names": ("abort_upload",),
    "number": 1,
    "older": 3,
    "parent_run_id": "3e4a5f60",
    "patience_s": 38.0,
    "pid": 12081,
    "queue": "dagster-tasks",
    "reason": "wrong input file",
    "reasons": ("abort_upload: TimeoutError: the bucket did not answer",),
    "released.why": "the worker stops",
    "requested_by": "ada",
    "run_interrupted.why": "worker w-9b9eb8ea, which had it, is gone",
    "run_ids": ("b8159656-…",),
    "seconds": 1.2,
    "shield": "commit",
    "status_poll_s": 5.0,
    "stays": ("Thread-1 (poll)",),
    "step_interrupted.why": "worker w-9b9eb8ea stops (a signal)",
    "step_lost.why": "its process was killed by SIGKILL",
    "steps": ("load", "report"),
    "tags": ("dagster-celery/run_priority=9 of the run",),
    "task_id": "4f8a…",
    "to_run": ("report",),
    "until": 1_790_000_000.0,
    "waited_s": 30.0,
    "waiting_for_code.why": "no living worker can load code location 'ml': w-0c2e91aa: no module named 'ml'; …",
    "what": "FAILURE was written over CANCELED",
    "where": "host ip-10-0-1-7, pid 11870",
    "why": "no worker is alive",
    "worker_id": "w-9b9eb8ea",
}
"""What the events of the reference are about, by the name of a parameter, alone or after that of its function."""
_CANCELLATION: Final = Cancellation(
    CancelKind.REQUESTED,
    reason="wrong input file",
    requested_by="ada",
    requested_at=0.0,
    received_at=0.01,
    channel=CancelChannel.CANCEL_QUEUE,
)


def _example(function: str, name: str, annotation: Any) -> object:
    """A value for a parameter of the function that makes an event."""
    if isinstance(annotation, types.UnionType):
        return _example(function, name, next(kind for kind in typing.get_args(annotation) if kind is not type(None)))
    if annotation is Cancellation:
        return _CANCELLATION
    simple = {str: f"[{name}]", int: 1, float: 30.0, bool: True}
    found = _EXAMPLES.get(f"{function}.{name}", _EXAMPLES.get(name))
    if annotation in simple:
        return found if isinstance(found, annotation) else simple[annotation]
    return found if isinstance(found, tuple) else (f"[{name}]",)


def _events() -> Iterator[tuple[str, engine_events.EngineEvent]]:
    """Each function that makes an event, by the name of its docstring, and an event that it made."""
    for module in (engine_events, step_events, cleanup_events):
        for name, function in vars(module).items():
            types_of = typing.get_type_hints(function) if inspect.isfunction(function) else {}
            if name.startswith("_") or types_of.pop("return", None) is not engine_events.EngineEvent:
                continue
            if engine_events.EngineEvent not in types_of.values():
                given = inspect.signature(function).parameters.values()
                needed = [one.name for one in given if one.default is one.empty]
                made = function(**{one: _example(name, one, types_of[one]) for one in needed})
                yield f"storage.{module.__name__.rpartition('.')[2]}.{name}", made


def events() -> str:
    """Each stage with its events: when it is written, an example of its text, the keys of its metadata."""
    parts: dict[str, list[str]] = {}
    for name, event in _events():
        when = re.sub(r"\s*`\w+`: .*", "", _text(name), flags=re.DOTALL)  # not the arguments
        facts = ", ".join(f"`{key}`" for key in event.facts)
        parts.setdefault(event.stage.value, []).append(
            f"{when}\n\n> {event.message}" + (f"\n\nMetadata: {facts}" if facts else "")
        )
    return "\n\n".join(f"## `{stage}`\n\n" + "\n\n".join(texts) for stage, texts in parts.items())


def metrics() -> str:
    """Each metric, by its name in CloudWatch and OpenTelemetry."""
    return _table(
        ("CloudWatch", "OpenTelemetry", "kind", "unit", "what"),
        (
            (f"`{one.name}`", f"`dagster_taskiq.{one.otel}`", one.kind, one.unit.lower(), one.description)
            for one in METRICS
        ),
    )


def _help(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """What `--help` says of a command and of those in it."""
    settings = {**command.context_settings, "max_content_width": 80, "terminal_width": 80}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield f"{'##' if parent is None else '###'} `{context.command_path}`\n\n```text\n{command.get_help(context)}\n```"
    if isinstance(command, click.Group):
        for one in command.list_commands(context):
            found = command.get_command(context, one)
            if found is not None and not found.hidden:
                yield from _help(found, one, context)


def command_line() -> str:
    """Every command with its help, as a terminal of 80 columns has it."""
    return "\n\n".join(_help(main, "dagster-taskiq"))


def _kind(name: str) -> str:
    thing = getattr(dagster_taskiq, name)
    if not inspect.isclass(thing):
        return "Functions"
    return "Exceptions" if issubclass(thing, BaseException) else "Classes"


def api() -> str:
    """Every public name with its docstring, by mkdocstrings."""
    names = [name for name in dagster_taskiq.__all__ if not name.startswith("_")]
    parts = []
    for kind in ("Functions", "Classes", "Exceptions"):
        parts.append(f"## {kind}")
        parts += [f"::: dagster_taskiq.{name}" for name in names if _kind(name) == kind]
    return "\n\n".join(parts)


GENERATED: Final[dict[str, Callable[[], str]]] = {
    function.__name__: function
    for function in (settings_of_the_queue, settings_of_the_source, tags, events, metrics, command_line, api)
}


def with_generated(markdown: str) -> str:
    """The page with what is generated. Raises `KeyError` for an unknown name."""
    return _MARKER.sub(lambda found: GENERATED[found[1]](), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook of mkdocs."""
    return with_generated(markdown)
