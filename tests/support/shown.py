"""What a person is to see at the end of the tests, whichever process of pytest has found it out."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_BEGAN = time.time()
TITLES = ("cancellations", "deadlines")


def show_at_the_end(config: pytest.Config, text: str, title: str = TITLES[0]) -> None:
    """Keep the text, instead of the one of an earlier session."""
    file = _file(config, title)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text + "\n")


def shown(config: pytest.Config) -> Iterator[tuple[str, str]]:
    """What this session has kept, with the titles."""
    for title in TITLES:
        file = _file(config, title)
        if file.exists() and file.stat().st_mtime >= _BEGAN:
            yield title, file.read_text()


def _file(config: pytest.Config, title: str) -> Path:
    return Path(config.rootpath, ".pytest_cache", f"{title}.md")
