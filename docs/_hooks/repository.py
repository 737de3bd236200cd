"""Pages as they are in the repository become pages of the site. Knows mkdocs and the folders, not what pages say.

Links are written as GitHub reads them, relative to the file. In the site, one to another page stays a link to that
page; one to anything else (a module, a test, a template) leads to the repository.
"""

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = get_plugin_logger("repository")

ROOT: Final = Path(__file__).parents[2]
HOME: Final[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
ELSEWHERE: Final = {
    "README.md": "index.md",
    "CANCELLATION.md": "cancellation.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples/index.md",
    "examples/bakery/README.md": "examples/bakery.md",
}
"""Pages that are not in `docs/`, and what they are called in the site."""
_IN_SITE: Final = {site: path for path, site in ELSEWHERE.items()}
_REMOTE = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?https?:|<link\b[^>]*\bhref=[\"']?https?:")


def path_of(src_uri: str) -> str:
    """Where a page of the site is in the repository."""
    return _IN_SITE.get(src_uri, f"docs/{src_uri}")


def link_in_site(url: str, src_uri: str) -> str:
    """What a link on the page `src_uri` of the site becomes. One that leads nowhere stays, and mkdocs tells it."""
    parts = urlsplit(url)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
        return url
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path_of(src_uri)), parts.path))
    if not target.startswith("../") and (ROOT / target / "README.md").exists():
        target = f"{target}/README.md"
    if target in ELSEWHERE or (target.startswith("docs/") and target.endswith(".md")):
        page = ELSEWHERE.get(target) or target.removeprefix("docs/")
        found = posixpath.relpath(page, posixpath.dirname(src_uri) or ".")
    elif target.startswith("../") or not (ROOT / target).exists():
        return url
    elif target.startswith("docs/"):  # a picture
        found = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(src_uri) or ".")
    else:
        found = f"{HOME}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}"
    return f"{found}#{parts.fragment}" if parts.fragment else found


class _Links(Treeprocessor):
    """Rewrites the links of one page after another: `src_uri` is the one that is being rendered."""

    src_uri = ""

    def run(self, root: Element) -> None:
        for element in root.iter():
            for key in ("href", "src"):
                url = element.get(key)
                if url is not None and element.tag in {"a", "img"}:
                    element.set(key, link_in_site(url, self.src_uri))


class _LinksExtension(Extension):
    def __init__(self) -> None:
        super().__init__()
        self.links = _Links()

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the library's name
        # After inline markup has become elements, and before mkdocs makes links of pages (with 0) and checks them.
        md.treeprocessors.register(self.links, "repository links", 1)


_extension = _LinksExtension()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the rewriting of links, and the address of the repository to the footer."""
    config["markdown_extensions"].append(_extension)  # mkdocs hands it on to Markdown, as it is
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": HOME, "name": "The repository"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    for path, site in ELSEWHERE.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Remember which page comes next."""
    _extension.links.src_uri = page.file.src_uri
    return markdown


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Tell what a browser would load from another host."""
    for found in _REMOTE.findall(output):
        logger.warning("%s would be loaded from another host: %s", page.file.src_uri, found)
    return output
