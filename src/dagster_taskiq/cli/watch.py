"""`--watch`: look again every few seconds, and show it in the same place, until Ctrl-C.

Knows the terminal and time; not what is looked at. What does not answer for a while is shown as a line, and it goes on.
"""

import gc
import json
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from dagster_taskiq.cli.output import console, is_terminal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")
DEFAULT_INTERVAL_S: Final = 2.0
_SHORTEST_INTERVAL_S: Final = 0.5
_LOOK_WITHIN_S: Final = 30.0
"""Longer than the bounds of the calls that a look consists of: it is for what has none."""
_TERMINATED: Final = 128 + signal.SIGTERM


def watch_options(command: Command) -> Command:
    """`--watch` and `--interval SECONDS`, passed as `every_s`: None without `--watch`."""

    def both(context: click.Context, _: click.Parameter, watch: bool) -> float | None:
        interval: float | None = context.params.pop("interval", None)
        if interval is not None and not watch:
            raise click.UsageError("--interval goes with --watch")
        return (interval or DEFAULT_INTERVAL_S) if watch else None

    interval = click.option(
        "--interval",
        type=click.FloatRange(min=_SHORTEST_INTERVAL_S),
        metavar="SECONDS",
        is_eager=True,
        help=f"With --watch: how often; default {DEFAULT_INTERVAL_S:g}, at least {_SHORTEST_INTERVAL_S:g}.",
    )
    watch = click.option(
        "-w",
        "--watch",
        "every_s",
        is_flag=True,
        callback=both,
        help="Show it again and again, until Ctrl-C. Needs a terminal; with --json, one line for each look.",
    )
    return watch(interval(command))


def show(
    look: Callable[[], T],
    draw: "Callable[[T], RenderableType]",
    to_json: Callable[[T], Any],
    *,
    as_json: bool,
    every_s: float | None,
) -> T | None:
    """Show what `look` finds, once, and return it; with `every_s` again and again until Ctrl-C, and return None.

    Watching ends the process with exit code 143 on SIGTERM. Raises what the first look raises: only what worked can
    be away for a while. Without a terminal, watching takes `as_json`, or else raises `UsageError`.
    """
    if every_s is None:
        found = look()
        click.echo(json.dumps(to_json(found), indent=2)) if as_json else console().print(draw(found))
        return found
    gc.enable()  # a command that is soon over does without; this one may run for days
    if as_json:
        _until_ctrl_c(_print_lines(look, to_json, every_s))
        return None
    terminal = console()
    if not is_terminal() or terminal.is_dumb_terminal:
        raise click.UsageError("--watch draws on a terminal, and this is none; with --json it writes one line per look")
    _until_ctrl_c(_draw(terminal, look, draw, every_s))
    return None


def _until_ctrl_c(work: Coroutine[Any, Any, None]) -> None:
    import asyncio

    async def until_a_signal() -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: this is a coroutine
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    disabled = logging.root.manager.disable
    logging.disable()  # what libraries log about an outage would be written across the screen
    try:
        asyncio.run(until_a_signal())
    except KeyboardInterrupt:
        return
    except asyncio.CancelledError:
        raise SystemExit(_TERMINATED) from None
    finally:
        logging.disable(disabled)


@dataclass(frozen=True, slots=True)
class _Look:
    """What was seen last, when, and what has gone wrong since."""

    found: Any
    at: float
    trouble: str | None = None


async def _looks(look: Callable[[], T], every_s: float) -> AsyncIterator[_Look]:
    """In a thread of its own, so that Ctrl-C does not wait for an answer that never comes."""
    import asyncio

    from dagster_taskiq._lane import Lane
    from dagster_taskiq.cli.explain import explain

    lane = Lane("watch", _LOOK_WITHIN_S)
    last = _Look(await lane.call(look), time.time())
    while True:
        yield last
        await asyncio.sleep(every_s)
        try:
            last = _Look(await lane.call(look), time.time())
        except Exception as error:  # noqa: BLE001 - whatever it is, the next look may succeed
            last = _Look(last.found, last.at, explain(error) or repr(error))


async def _print_lines(look: Callable[[], T], to_json: Callable[[T], Any], every_s: float) -> None:
    async for seen in _looks(look, every_s):
        if seen.trouble is None:
            click.echo(json.dumps(to_json(seen.found)))
        else:
            click.echo(seen.trouble, err=True)


async def _draw(
    terminal: "Console", look: Callable[[], T], draw: "Callable[[T], RenderableType]", every_s: float
) -> None:
    """On the alternate screen, as `watch` and `top` do. The last picture stays on the terminal."""
    from rich.live import Live

    picture: RenderableType | None = None
    try:
        looks = _looks(look, every_s)
        seen = await anext(looks)
        with Live(console=terminal, screen=True, auto_refresh=False) as live:
            while True:
                picture = draw(seen.found)
                live.update(_Frame(picture, seen, every_s), refresh=True)
                seen = await anext(looks)
    finally:
        if picture is not None:
            terminal.print(picture)


@dataclass(frozen=True, slots=True)
class _Frame:
    """A picture with a line about itself on top, and not higher than the terminal."""

    picture: "RenderableType"
    seen: _Look
    every_s: float

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.segment import Segment
        from rich.text import Text

        head = [Text(f"{_clock(self.seen.at)}, every {self.every_s:g} s; Ctrl-C ends", style="dim")]
        if self.seen.trouble is not None:
            head.append(Text(f"{_clock(time.time())}: no news. {self.seen.trouble}", style="yellow"))
        free = options.update(height=None)
        lines = [line for part in (*head, self.picture) for line in console.render_lines(part, free, pad=False)]
        height = options.height or console.height
        hidden = max(0, len(lines) - height)
        shown = lines[: height - 1] if hidden else lines
        for number, line in enumerate(shown):
            if number:
                yield Segment.line()
            yield from line
        if hidden:
            yield Segment.line()
            yield from console.render(Text(f"… and {hidden + 1} more lines", style="dim", end=""), free)


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(at))
