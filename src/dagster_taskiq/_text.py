"""Texts for people: those that others have given us, made fit for databases, queues and screens; durations. A leaf."""

import re
from typing import Final

MAX_TEXT_LENGTH: Final = 1024
"""Characters of a reason, an author, or any other text for people."""
_UNFIT: Final = re.compile("[\x00\ud800-\udfff]")


def clean_text(text: str, longest: int | None = MAX_TEXT_LENGTH) -> str:
    """The text without what cannot be stored or shown, and not longer than `longest` characters, if that is given.

    PostgreSQL refuses NUL. Lone surrogates cannot be encoded as UTF-8; they come from bytes of an argument that are
    not UTF-8, and from JSON. Each becomes U+FFFD, the replacement character.
    """
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text[:longest])


def duration(seconds: float) -> str:
    """`0.168` as "168 ms", `75` as "1 min 15 s", `7400` as "2 h 3 min"."""
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    for unit, below, length, small in (("d", "h", 86_400, 3_600), ("h", "min", 3_600, 60), ("min", "s", 60, 1)):
        if whole >= length:
            rest = whole % length // small
            return f"{whole // length} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def printable(text: str) -> str:
    """With a space for each character that a terminal might obey instead of showing it; also for a line break."""
    return text if text.isprintable() else "".join(one if one.isprintable() else " " for one in text)


def one_line(text: str, at_most: int = 400) -> str:
    """Without line breaks, control characters and superfluous spaces, and not longer than that."""
    line = " ".join(printable(text).split())
    return line if len(line) <= at_most else line[: at_most - 1] + "…"
