"""What the pages say of settings is what the settings are."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from tests.support.pages import PAGES, ROOT, anchors, links

import dagster_taskiq
from dagster_taskiq import CancellationToken, CleanupContext
from dagster_taskiq.cancellation.state import MAX_STATE
from dagster_taskiq.op_api import DEFAULT_TIMEOUT_S
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.engine_events import CANCELLATION_REQUESTED, TASK_ID_MISSING
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, GRACE_SECONDS_TAG, TASK_ID_TAG

PACKAGE = Path(dagster_taskiq.__file__).parent
README = (ROOT / "README.md").read_text()
CANCELLATION = (ROOT / "CANCELLATION.md").read_text()
DEFAULTS = {field.name: field.default for field in fields(Settings)}


def test_the_readme_has_settings_with_their_defaults() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE))
    assert len(rows) > 5
    assert rows == {key: "[]" if DEFAULTS[key] == () else str(DEFAULTS[key]).lower() for key in rows}


@pytest.mark.parametrize("text", [CANCELLATION_REQUESTED, TASK_ID_MISSING, TASK_ID_TAG, GRACE_SECONDS_TAG])
def test_the_guide_has_the_texts_that_people_search_for(text: str) -> None:
    assert text in CANCELLATION


def test_the_page_on_cleaning_up_says_what_is_there() -> None:
    text = (ROOT / "docs" / "cleanup.md").read_text()
    assert f"{MAX_STATE:,} characters" in text
    assert f"default {DEFAULT_TIMEOUT_S:g}" in text
    assert CANCEL_REASON_TAG in text
    told = set(re.findall(r"`(\w+)[`(]", text))
    assert {name for name in vars(CancellationToken) if not name.startswith("_")} <= told
    assert {field.name for field in fields(CleanupContext)} <= told | set(re.findall(r"`context\.(\w+)`", text))
    assert {name for name in dagster_taskiq.__all__ if issubclass_of_exception(name)} <= told | {"DagsterTaskiqError"}


def issubclass_of_exception(name: str) -> bool:
    thing = getattr(dagster_taskiq, name)
    return isinstance(thing, type) and issubclass(thing, BaseException)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere_on_github(page: str) -> None:
    """In the site: `make docs`."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        if path.startswith(("https:", "http:", "mailto:")):
            continue
        target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(str(target.relative_to(ROOT))), f"{page}: {link}"


def test_the_tests_that_the_guide_names_are_there() -> None:
    named = re.findall(r"\[(test_\w+)\]\((tests/[^)]+)\)", CANCELLATION)
    assert len(named) > 20
    assert [(name, path) for name, path in named if f"def {name}(" not in (ROOT / path).read_text()] == []


def column(page: str, index: int) -> list[str]:
    """What the tables of a page have in one column, without their headings."""
    lines = (ROOT / page).read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    headings = {number for number, row in enumerate(rows[1:]) if row[0].startswith("---")}
    return [row[index] for number, row in enumerate(rows) if number not in headings and not row[0].startswith("---")]


def test_the_table_of_rooms_has_every_room() -> None:
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    table = {cell.strip("`") for cell in column("CONTRIBUTING.md", 0)}
    assert table == rooms


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CANCELLATION.md", "docs/glossary.md"])
def test_the_pages_name_modules_that_are_there(page: str) -> None:
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    named = re.findall(r"`(?:src/dagster_taskiq/)?([a-z_]+(?:/[a-z_]+)*\.py)`", (ROOT / page).read_text())
    assert [name for name in named if name not in modules and not (ROOT / name).exists()] == []


def test_the_glossary_is_in_order() -> None:
    words = [word.lower() for word in column("docs/glossary.md", 0)]
    assert words == sorted(words)


def test_the_changelog_has_the_version() -> None:
    versions = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased"
    is_release = "dev" not in dagster_taskiq.__version__
    assert (dagster_taskiq.__version__ in versions) is is_release


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_name_tests_that_are_there(page: str) -> None:
    named = re.findall(r"`(tests/[a-z_/]+(?:\.py)?)`", (ROOT / page).read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_decision_is_in_the_list() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"^\d+\. \[.+\]\((.+)\)$", (folder / "README.md").read_text(), re.MULTILINE)
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))


def test_the_page_for_operators_has_every_alarm() -> None:
    text = (ROOT / "docs" / "operate.md").read_text()
    alarms = [
        name
        for template in sorted((ROOT / "infra").glob("*.yaml"))
        for name in re.findall(r"^  (\w+):\n    Type: AWS::CloudWatch::Alarm$", template.read_text(), re.MULTILINE)
    ]
    assert len(alarms) > 4
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    for alarm in alarms:
        told = re.findall(r"^\*\*(.+?)\.\*\*", sections[alarm], re.MULTILINE)
        assert told == ["Meaning", "First look", "Repair"], alarm
