"""`docs/promises.md` has every sentence that the cancellation guide promises, with tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CANCELLATION.md").read_text()
PAGE = (ROOT / "docs" / "promises.md").read_text()
SECTIONS = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
PROMISING = {"Overview", "What `terminate` Does", "How It Works", "Steps"}


class Promise(NamedTuple):
    section: str
    words: str
    tests: tuple[str, ...]


def normal(text: str) -> str:
    """Without line breaks and links."""
    return " ".join(re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text).split())


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    (found,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def units(text: str) -> list[str]:
    """Paragraphs, items of lists and rows of tables (with arrows between the cells); no code, no headings of tables."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\|.*\n\| *---.*\n", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^(?=\||\d+\. )", "\n", text, flags=re.MULTILINE)
    found = [normal(re.sub(r"^\d+\. ", "", block.strip())) for block in re.split(r"\n\s*\n", text)]
    return [" → ".join(filter(None, cells(unit))) if unit.startswith("|") else unit for unit in found if unit]


def promises() -> list[Promise]:
    found = []
    for title in SECTIONS:
        rows = [cells(line) for line in section(PAGE, title).splitlines() if line.startswith("| ")][2:]
        found += [Promise(title, normal(words), tuple(re.findall(r"`([^`]+)`", tests))) for words, tests in rows]
    return found


PROMISES = promises()


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text()) if (ROOT / path).is_file() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.words[:60])
def test_a_promise_stands_in_the_guide_and_has_tests(promise: Promise) -> None:
    assert any(promise.words in unit for unit in units(section(GUIDE, promise.section))), "it reads otherwise there"
    assert promise.tests, "nothing proves it"
    for test in promise.tests:
        path, _, name = test.partition("::")
        assert name.startswith("test_"), test
        assert name in names_in(path), f"there is no {test}"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_sentence_of_the_guide_has_a_row(title: str) -> None:
    quoted = sorted((promise.words for promise in PROMISES if promise.section == title), key=len, reverse=True)
    for unit in units(section(GUIDE, title)):
        rest = unit
        for words in quoted:
            rest = rest.replace(words, "")
        assert not re.search(r"\w", rest), f"in {title}, without a row: {rest!r}"


def test_the_sections_that_promise_are_all_there() -> None:
    assert set(SECTIONS) >= PROMISING
