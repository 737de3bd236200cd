"""A story on a terminal, with rich. What it says does not depend on colours; it fits into 60 columns."""

from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.text import Text

from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.story.model import Bar, BarKind, Outcome, Story, bar_label, described_hidden, fewer_moments, said_of
from dagster_taskiq.story.scale import Scale
from dagster_taskiq.story.text import clock, date_and_clock, duration

_MOST_MOMENTS: Final = 40
_STYLES: Final = {
    Outcome.SUCCEEDED: "green",
    Outcome.DONE: "",
    Outcome.GOING_ON: "cyan",
    Outcome.FAILED: "bold red",
    Outcome.KILLED: "bold red",
    Outcome.LOST: "bold red",
    Outcome.CANCELLED: "yellow",
    Outcome.INTERRUPTED: "yellow",
    Outcome.RETRIED: "magenta",
    Outcome.SKIPPED: "dim",
}
_STATUS_STYLES: Final = {"SUCCESS": "green", "FAILURE": "bold red", "CANCELED": "yellow", "CANCELING": "yellow"}
_TO_ASCII: Final = str.maketrans({"█": "#", "▒": "%", "░": ".", "│": "|", "…": "~", "→": ">", "▶": ">"})
_LONGEST_LABEL: Final = 30


def print_story(story: Story, console: Console) -> None:
    """Print all of it."""
    printer = _Printer(story, console)
    printer.head()
    printer.waits()
    printer.gantt()
    printer.moments()


class _Printer:
    def __init__(self, story: Story, console: Console) -> None:
        self._story = story
        self._console = console
        self._plain = not console.encoding.lower().startswith("utf")

    def _print(self, text: Text, indent: int = 0) -> None:
        """Wrapped between words, without spaces at the end, and without signs that a terminal obeys."""
        text.plain = "".join(sign if sign.isprintable() else " " for sign in text.plain)
        if self._plain:
            plain = text.plain.translate(_TO_ASCII).encode(self._console.encoding, "replace")
            text = Text(plain.decode(self._console.encoding))
        for part in text.wrap(self._console, max(20, self._console.width - indent)):
            part.rstrip()
            self._console.print(Text(" " * indent).append_text(part), highlight=False, no_wrap=True, crop=False)

    def _heading(self, text: str) -> None:
        self._console.print()
        self._print(Text(text, style="bold"))

    def head(self) -> None:
        story = self._story
        end = story.ended if story.ended is not None else story.now
        took = f"{'took' if story.ended is not None else 'for'} {duration(end - story.created)}"
        line = Text(f"run {story.run_id}", style="bold")
        self._print(line)
        status = Text(story.status, style=_STATUS_STYLES.get(story.status, "cyan"))
        route = f", route {story.route}" if story.route != DEFAULT_ROUTE else ""
        self._print(Text.assemble(status, f"  {story.job}{route}, created {date_and_clock(story.created)}, {took}"))
        for sentence in story.summary:
            self._print(Text(sentence))

    def waits(self) -> None:
        story = self._story
        if story.waits:
            self._heading("It waits for")
        for wait in story.waits:
            since = f" (since {clock(wait.since)} UTC, {duration(story.now - wait.since)})" if wait.since else ""
            until = ""
            if wait.until is not None:
                left = wait.until - story.now
                until = f", until {clock(wait.until)} UTC, {duration(left)} from now" if left > 0 else ", overdue"
            self._print(Text(f"{wait.what}{since}{until}", style="bold yellow"), 2)
            for advice in wait.advice:
                self._print(Text(f"→ {advice}"), 4)
        if story.advice:
            self._heading("What to do")
            for advice in story.advice:
                self._print(Text(f"→ {advice}"), 2)

    def gantt(self) -> None:
        story = self._story
        if not story.bars:
            return
        texts = [said_of(bar, story.now) for bar in story.bars]
        room = self._console.width
        right = min(max(map(len, texts)), 24)
        left = min(max(len(bar_label(bar)) for bar in story.bars), _LONGEST_LABEL, room // 3)
        width = max(10, room - left - right - 2)
        scale = Scale(*story.span, width=width)
        self._heading("When")
        self._print(Text(" " * (left + 1) + _axis(scale, width)))
        for bar, text in zip(story.bars, texts, strict=True):
            label = _cut(bar_label(bar), left)
            row = Text(f"{label:{left}} ")
            row.append_text(_drawn(bar, scale, width, story))
            row.append(f" {_cut(text, right)}", style=_STYLES[bar.outcome])
            self._print(row)
        marks = " ".join(f"│ {mark.label} +{duration(mark.at - story.span[0])}" for mark in story.marks)
        if marks:
            self._print(Text(f"{'':{left}} {marks}", style="dim"))
        if hidden := described_hidden(story.hidden_steps):
            self._print(Text(hidden))

    def moments(self) -> None:
        story = self._story
        if not story.moments:
            return
        first, left_out, last = fewer_moments(story.moments, _MOST_MOMENTS)
        self._heading(f"What its log says ({story.events} events)")
        for moment in first:
            self._moment(moment.at, moment.what, moment.text, moment.step_key, bad=moment.bad)
        if left_out or story.hidden_moments:
            self._print(Text(f"… and {left_out + story.hidden_moments} more"))
        for moment in last:
            self._moment(moment.at, moment.what, moment.text, moment.step_key, bad=moment.bad)

    def _moment(self, at: float, what: str, text: str, step_key: str | None, *, bad: bool) -> None:
        since = at - self._story.span[0]
        head = f"{clock(at)} {'+' + duration(since):>12}  "
        about = f"{step_key}: " if step_key else ""
        line = f"{about}{text}" if text else what
        line = f"{what}: {line}" if text and what.isupper() else line
        if self._console.width >= len(head) + 40:
            for number, part in enumerate(_wrapped(line, self._console.width - len(head))):
                self._print(Text((head if not number else " " * len(head)) + part, style="red" if bad else ""))
        else:
            self._print(Text(head.rstrip(), style="dim"))
            self._print(Text(line, style="red" if bad else ""), 2)


def _wrapped(text: str, width: int) -> Iterator[str]:
    import textwrap

    yield from textwrap.wrap(text, width) or [""]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(1, width - 1)]}…"


def _drawn(bar: Bar, scale: Scale, width: int, story: Story) -> Text:
    """Waiting ░, going on ▒, at work █; a mark │ where nothing else is."""
    cells = [" "] * width
    for mark in story.marks:
        cells[min(width - 1, int(scale.place(mark.at)))] = "│"

    def fill(first: float, last: float, glyph: str) -> None:
        start = min(width - 1, int(scale.place(first)))
        for column in range(start, max(start + 1, min(width, round(scale.place(last))))):
            cells[column] = glyph

    if bar.waited_since is not None and bar.waited_since < bar.began:
        fill(bar.waited_since, bar.began, "░")
    end = story.now if bar.ended is None else bar.ended
    if end > bar.began or bar.waited_since is None:
        glyph = "░" if bar.kind is BarKind.WAIT else "▒" if bar.outcome is Outcome.GOING_ON else "█"
        fill(bar.began, end, glyph)
        if bar.outcome is Outcome.GOING_ON:
            cells[-1] = "▶"
    return Text("".join(cells), style=_STYLES[bar.outcome])


def _axis(scale: Scale, width: int) -> str:
    """Labels of round durations, as many as fit without touching."""
    line = ""
    for place, label in scale.ticks(max(2, width // 12)):
        column = int(place)
        if column >= len(line) + (1 if line else 0) and column + len(label) <= width:
            line = line.ljust(column) + label
    return line
