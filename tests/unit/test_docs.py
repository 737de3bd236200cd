"""What the pages say of settings is what the settings are."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import dagster_taskiq
from dagster_taskiq import CancellationToken, CleanupContext
from dagster_taskiq.cancellation.state import MAX_STATE
from dagster_taskiq.op_api import DEFAULT_TIMEOUT_S
from dagster_taskiq.settings import SOURCE_KEYS, Settings
from dagster_taskiq.storage.engine_events import CANCELLATION_REQUESTED, TASK_ID_MISSING
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, GRACE_SECONDS_TAG, TASK_ID_TAG

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


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CANCELLATION.md",
        "CONTRIBUTING.md",
        "examples/README.md",
        "docs/cleanup.md",
        "docs/deploy-on-ecs.md",
        "docs/security.md",
    ],
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page}: {target}"
