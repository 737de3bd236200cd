"""Texts that others have given us, made fit for databases, queues and screens. A leaf."""

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
