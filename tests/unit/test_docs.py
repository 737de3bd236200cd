"""What the pages say of settings is what the settings are."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from dagster_taskiq.events import CANCELLATION_REQUESTED, TASK_ID_MISSING
from dagster_taskiq.settings import SOURCE_KEYS, Settings
from dagster_taskiq.tags import GRACE_SECONDS_TAG, TASK_ID_TAG

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CANCELLATION = (ROOT / "CANCELLATION.md").read_text()
DEFAULTS = {field.name: field.default for field in fields(Settings)}


@pytest.mark.parametrize("key", SOURCE_KEYS)
def test_the_readme_has_every_setting_with_its_default(key: str) -> None:
    row = re.search(rf"^\| `{key}` \| `(.*?)` \|", README, re.MULTILINE)
    assert row, f"no row for {key}"
    default = DEFAULTS[key]
    assert row[1] == ("[]" if default == () else str(default).lower())


def test_the_readme_has_no_setting_that_is_not_there() -> None:
    rows = set(re.findall(r"^\| `([a-z_]+)` \|", README, re.MULTILINE))
    assert rows == {field.name for field in fields(Settings)}


@pytest.mark.parametrize("text", [CANCELLATION_REQUESTED, TASK_ID_MISSING, TASK_ID_TAG, GRACE_SECONDS_TAG])
def test_the_guide_has_the_texts_that_people_search_for(text: str) -> None:
    assert text in CANCELLATION


@pytest.mark.parametrize("page", ["README.md", "CANCELLATION.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page}: {target}"
