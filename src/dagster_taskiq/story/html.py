"""A story as one HTML page that needs nothing else: the picture, what it waits for, and the events of its log.

Texts come from others (reasons, names, errors): all are escaped, and the page runs no script.
"""

from collections.abc import Iterator
from html import escape
from typing import Final

from dagster_taskiq.story.model import Story, bar_label, said_of
from dagster_taskiq.story.svg import svg_of
from dagster_taskiq.story.text import clock, date_and_clock, duration, one_line

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE: Final = """
:root { color-scheme: light dark }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em }
svg { max-width: 100%; height: auto; border: 1px solid #8884 } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: 2px 8px; border-bottom: 1px solid #8884;
overflow-wrap: anywhere } th { white-space: nowrap } td:nth-child(-n+2), .log td:nth-child(3) { white-space: nowrap }
.bad { color: light-dark(#b3261e, #ff7b72) }
"""


def html_of(story: Story) -> str:
    """The whole page."""
    title = _text(f"run {story.run_id}: {story.status}")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{_text(story.job)}: {_text(story.status)}</h1>",
            f"<p>run {_text(story.run_id)}, told {date_and_clock(story.now)}</p>",
            *_waits(story),
            svg_of(story),
            *_steps(story),
            *_moments(story),
            "</body></html>",
            "",
        ]
    )


def _waits(story: Story) -> Iterator[str]:
    if story.waits:
        yield "<h2>It waits for</h2>"
    for wait in story.waits:
        since = f" (since {clock(wait.since)} UTC)" if wait.since is not None else ""
        until = f", until {clock(wait.until)} UTC" if wait.until is not None else ""
        yield f'<p class="bad"><strong>{_text(wait.what)}</strong>{since}{until}</p>'
        yield from _list(wait.advice)
    if story.advice:
        yield "<h2>What to do</h2>"
        yield from _list(story.advice)


def _list(items: tuple[str, ...]) -> Iterator[str]:
    yield "<ul>"
    yield from (f"<li>{_text(item)}</li>" for item in items)
    yield "</ul>"


def _steps(story: Story) -> Iterator[str]:
    """What does not fit into the picture: whole names, workers, errors."""
    noted = [bar for bar in story.bars if bar.note or bar.worker]
    if not noted:
        return
    yield "<h2>Where, and why</h2><table><tr><th>began</th><th>took</th><th>what</th><th>worker</th><th>why</th></tr>"
    for bar in noted:
        cells = (clock(bar.began), said_of(bar, story.now), bar_label(bar), bar.worker or "", bar.note)
        yield "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table>"


def _moments(story: Story) -> Iterator[str]:
    yield f"<h2>What its log says</h2><p>{story.events} events; these are about the run, and what went wrong.</p>"
    yield '<table class="log"><tr><th>UTC</th><th>after</th><th>what</th><th>step</th><th>text</th></tr>'
    for moment in story.moments:
        cells = (
            clock(moment.at),
            f"+{duration(moment.at - story.span[0])}",
            moment.what,
            moment.step_key or "",
            moment.text,
        )
        bad = ' class="bad"' if moment.bad else ""
        yield f"<tr{bad}>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table>"
    if story.hidden_moments:
        yield f"<p>{story.hidden_moments} in the middle are left out.</p>"


def _text(text: str) -> str:
    return escape(one_line(text, 2_000))
