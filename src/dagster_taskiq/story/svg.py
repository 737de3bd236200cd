"""A story as an SVG picture that stands by itself, in light and dark. Texts come from others: all are escaped."""

from collections.abc import Iterator
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from dagster_taskiq.story.model import Bar, BarKind, Outcome, Story, bar_label, described_hidden, said_of
from dagster_taskiq.story.scale import Scale
from dagster_taskiq.story.text import date_and_clock, duration, one_line

WIDTH: Final = 1000
_MARGIN: Final = 16
_CHARACTER: Final = 7.3
"""Of the monospaced font in 12 px; a little more than fonts need, so that nothing is cut off."""
_ROW: Final = 22
_LABEL_CHARACTERS: Final = 32
_LEFT: Final = _MARGIN + _LABEL_CHARACTERS * _CHARACTER
_RIGHT_CHARACTERS: Final = 24
_CHART: Final = WIDTH - _MARGIN - _RIGHT_CHARACTERS * _CHARACTER - _LEFT
_LINE_CHARACTERS: Final = int((WIDTH - 2 * _MARGIN) / _CHARACTER)
_SUMMARY_LINES: Final = 14
_CLASSES: Final = {outcome: outcome.name.lower() for outcome in Outcome}
_STYLE: Final = """
.page { fill: #ffffff } text { font: 12px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1f2328 }
.title { font-size: 15px; font-weight: bold } .soft { fill: #59636e } .grid { stroke: #d1d9e0 } .bad { fill: #b3261e }
.mark { stroke: #b3261e; stroke-dasharray: 4 3 } .waited { fill: #c4ccd4 } .done { fill: #8c96a0 }
.going_on { fill: #2f81f7 } .succeeded { fill: #2da44e } .failed, .killed, .lost { fill: #cf222e }
.cancelled, .interrupted { fill: #d4a72c } .retried { fill: #8250df } .skipped { fill: #c4ccd4 }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } text { fill: #e6edf3 } .soft { fill: #9198a1 } .grid { stroke: #30363d } .bad { fill: #ff7b72 }
.mark { stroke: #ff7b72 } .waited { fill: #484f58 } .done { fill: #6e7681 } .skipped { fill: #484f58 }
.failed, .killed, .lost { fill: #f85149 } .succeeded { fill: #3fb950 }
}
"""


def svg_of(story: Story) -> str:
    """One `<svg>` element with everything in it."""
    lines = list(_head(story))
    top = _MARGIN + 22 + len(lines) * 18 + 12
    marks_at = top + 4
    axis_at = marks_at + _mark_rows(story) * 15 + 14
    first_row = axis_at + 10
    bottom = first_row + len(story.bars) * _ROW
    hidden = described_hidden(story.hidden_steps)
    height = bottom + (_ROW if hidden else 0) + _MARGIN
    scale = Scale(*story.span, width=_CHART)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}"'
        f' height="{height:.0f}" role="img" aria-label={quoteattr(_clean(f"run {story.run_id}: {story.status}"))}>',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height:.0f}"/>',
        _text(_MARGIN, _MARGIN + 12, f"run {story.run_id}: {story.status}", "title", 110),
        *(_text(_MARGIN, _MARGIN + 34 + number * 18, line, name) for number, (line, name) in enumerate(lines)),
        *_axis(scale, axis_at, bottom),
        *_marks(story, scale, marks_at, bottom),
    ]
    for number, bar in enumerate(story.bars):
        parts += _row(bar, scale, first_row + number * _ROW, story.now)
    if hidden:
        parts.append(_text(_MARGIN, bottom + 15, hidden, "soft"))
    return "\n".join([*parts, "</svg>", ""])


def _head(story: Story) -> Iterator[tuple[str, str]]:
    end = story.ended if story.ended is not None else story.now
    yield f"{story.job}, created {date_and_clock(story.created)}, {duration(end - story.created)}", "soft"
    lines = [(sentence, "") for sentence in story.summary] + [(f"Waits: {wait.what}", "bad") for wait in story.waits]
    for sentence, name in lines[:_SUMMARY_LINES]:
        for part in _wrapped(_clean(sentence)):
            yield part, name


def _wrapped(text: str) -> list[str]:
    import textwrap

    found = textwrap.wrap(text, _LINE_CHARACTERS)
    return [*found[:2], f"{found[2][: _LINE_CHARACTERS - 1]}…"] if len(found) > 2 else found


def _axis(scale: Scale, top: float, bottom: float) -> Iterator[str]:
    free_from = 0.0
    for place, label in scale.ticks(8):
        x, half = _LEFT + place, len(label) * _CHARACTER / 2
        yield f'<line class="grid" x1="{x:.1f}" y1="{top + 4:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"/>'
        if x - half > free_from:
            free_from = x + half
            yield _text(x, top, label, "soft", anchor="middle")


def _mark_rows(story: Story) -> int:
    return min(len(story.marks), 3)


def _marks(story: Story, scale: Scale, top: float, bottom: float) -> Iterator[str]:
    """A line through all rows. Their labels are on up to three lines, so that neighbours do not cover each other."""
    for number, mark in enumerate(story.marks):
        x, y = _LEFT + scale.place(mark.at), top + number % 3 * 15
        label = f"{mark.label} +{duration(mark.at - story.span[0])}"
        is_right = x + len(label) * _CHARACTER + 4 > WIDTH - _MARGIN
        yield f'<line class="mark" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"/>'
        yield _text(x - 4 if is_right else x + 4, y + 4, label, "bad", anchor="end" if is_right else "start")


def _row(bar: Bar, scale: Scale, top: float, now: float) -> Iterator[str]:
    label = bar_label(bar)
    said = said_of(bar, now)
    whole = " ".join(filter(None, (f"{label}:", said, bar.worker, bar.note)))
    yield f"<g><title>{_escaped(whole)}</title>"
    yield _text(_MARGIN, top + 15, label, "", _LABEL_CHARACTERS - 1)
    if bar.waited_since is not None and bar.waited_since < bar.began:
        yield _rectangle(scale, bar.waited_since, bar.began, top, "waited")
    end = now if bar.ended is None else bar.ended
    if end > bar.began or bar.waited_since is None:
        name = "waited" if bar.kind is BarKind.WAIT else _CLASSES[bar.outcome]
        yield _rectangle(scale, bar.began, end, top, name)
    name = "bad" if bar.outcome in (Outcome.FAILED, Outcome.KILLED, Outcome.LOST) else ""
    yield _text(_LEFT + _CHART + 8, top + 15, said, name, _RIGHT_CHARACTERS - 1)
    yield "</g>"


def _rectangle(scale: Scale, began: float, ended: float, top: float, name: str) -> str:
    x = _LEFT + scale.place(began)
    width = max(2.0, scale.place(ended) - scale.place(began))
    x = min(x, _LEFT + _CHART - width)
    return f'<rect class="{name}" x="{x:.1f}" y="{top + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2"/>'


def _text(x: float, y: float, text: str, name: str, most: int | None = None, *, anchor: str = "start") -> str:
    text = _clean(text)
    text = text if most is None or len(text) <= most else f"{text[: most - 1]}…"
    where = f' text-anchor="{anchor}"' if anchor != "start" else ""
    named = f' class="{name}"' if name else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}{where}>{escape(text)}</text>'


def _escaped(text: str) -> str:
    return escape(_clean(text))


def _clean(text: str) -> str:
    """What may be in XML."""
    return one_line(text, 2_000)
