"""What a person is to see at the end of the tests, whichever process of pytest has found it out."""

import time
from pathlib import Path

import pytest

_BEGAN = time.time()


def show_at_the_end(config: pytest.Config, text: str) -> None:
    """Keep the text, instead of the one of an earlier session."""
    file = _file(config)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text + "\n")


def shown(config: pytest.Config) -> str:
    """What this session has kept; empty if it is nothing."""
    file = _file(config)
    return file.read_text() if file.exists() and file.stat().st_mtime >= _BEGAN else ""


def _file(config: pytest.Config) -> Path:
    return Path(config.rootpath, ".pytest_cache", "cancellations.md")
