"""The code blocks of our pages, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
"""Every page of the repository, relative to it."""
_SEPARATORS: Final = set("();|&")
_KEYWORDS: Final = {"do", "then", "else", "if", "while", "until", "export", "!", "{", "}"}


@dataclass(frozen=True)
class Block:
    """A fenced block. `line`: of its first fence. `title`: the file or the terminal that it belongs to."""

    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page, of these languages if any are given."""
    found = []
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type == "fence" and token.map:
            language, _, rest = token.info.partition(" ")
            title = re.search('title="(.*)"', rest)
            found.append(Block(page, token.map[0] + 1, language, title[1] if title else "", token.content))
    return [block for block in found if not languages or block.language in languages]


def code_spans(page: str) -> Iterator[str]:
    """What is set as code within the text of a page."""
    for token in MarkdownIt().enable("table").parse((ROOT / page).read_text()):
        yield from (child.content for child in token.children or () if child.type == "code_inline")


def links(page: str) -> Iterator[str]:
    """Where the links and pictures of a page lead to, as they are written."""
    for token in MarkdownIt().enable("table").parse((ROOT / page).read_text()):
        for child in token.children or ():
            found = child.attrs.get("href", child.attrs.get("src"))
            if found is not None:
                yield str(found)


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    headings = [after.children or () for token, after in pairwise(tokens) if token.type == "heading_open"]
    texts = ["".join(child.content for child in children) for children in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def commands(script: str) -> Iterator[list[str]]:
    """Each command of a script of the shell, as words, also those in pipes, loops and `$(…)`; without redirections."""
    script = re.sub(r"<<-?\s*(['\"]?)(\w+)\1(.*?)\n.*?^\2$", r"\3", script, flags=re.MULTILINE | re.DOTALL)
    script = script.replace("\\\n", " ")
    for inner in re.findall(r"\$\(([^()]*)\)", script):
        yield from commands(inner)
    script = re.sub(r"\$\([^()]*\)", "…", script)
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= _SEPARATORS:
                yield from _command(words)
                words = []
            else:
                words.append(word)


def _command(words: list[str]) -> Iterator[list[str]]:
    while words and (words[0] in _KEYWORDS or re.match(r"\w+=", words[0])):
        words = words[1:]
    redirected = {at for at, word in enumerate(words) if set(word) <= set("<>&") for at in (at, at + 1)}
    words = [word for at, word in enumerate(words) if at not in redirected]
    if words and words[0] not in {"for", "done", "fi"}:
        yield words
