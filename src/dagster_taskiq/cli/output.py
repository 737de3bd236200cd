"""Where a command's tables go: a terminal has a width, a pipe has none. Knows rich; not what is shown."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dagster_taskiq._text import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

_PIPE_WIDTH: Final = 2_000


def console() -> "Console":
    """Standard output. Into a pipe or a file each line is one whole row: nothing is cut or folded there.

    Colours are as `NO_COLOR` and `FORCE_COLOR` want them; neither of them gives a pipe a width.
    """
    from rich.console import Console

    return Console() if is_terminal() else Console(width=_PIPE_WIDTH)


@dataclass(frozen=True, slots=True)
class TableOrLines:
    """A table where it fits as it is; on a narrower terminal the same in lines, one thing below the other."""

    table: "Table"
    lines: Callable[[], Iterable[str]]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        needed = console.measure(self.table, options=options.update(max_width=_PIPE_WIDTH)).maximum
        if needed <= options.max_width:
            yield self.table
        else:
            yield from map(shown, self.lines())


def shown(text: str) -> "Text":
    """A text that may be anybody's, a tag or a name: a terminal shows all of it, and obeys nothing of it.

    As a plain string rich would take `[...]` for its own markup, and let escape sequences pass.
    """
    from rich.text import Text

    return Text(printable(text))


def say(line: str) -> None:
    """A line of text for people; on a terminal it is wrapped between words."""
    console().print(shown(line))


def is_terminal() -> bool:
    """Whether a person looks at standard output, whatever the environment says about colours."""
    return sys.stdout.isatty()


def age(seconds: float) -> str:
    """`7400` as `2 h`: in the largest unit with a value of 2 or more, else in seconds."""
    seconds = max(0.0, seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
