"""What the site makes of our pages and of our code. (That no link of it leads nowhere: `make docs`.)"""

import re

import pytest
from docs._hooks.reference import GENERATED, events
from docs._hooks.repository import HOME, link_in_site
from tests.support.pages import PAGES, ROOT

from dagster_taskiq.settings import ENVIRONMENT, Settings
from dagster_taskiq.storage.engine_events import Stage


def test_each_part_that_is_generated_is_on_one_page() -> None:
    texts = [(ROOT / page).read_text() for page in PAGES]
    named = [name for text in texts for name in re.findall(r"^<!-- generated: (\w+) -->$", text, re.MULTILINE)]
    assert sorted(named) == sorted(GENERATED)


def test_the_reference_has_every_stage_of_an_event() -> None:
    assert set(re.findall(r"^## `(.+)`$", events(), re.MULTILINE)) == set(Stage)


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_has_no_gap(name: str) -> None:
    text = GENERATED[name]()
    assert "None" not in text
    assert not re.search(r"\| +\|", text), "an empty cell"


@pytest.mark.parametrize(
    ("key", "variable"), [(key, variable) for key, variables in ENVIRONMENT.items() for variable in variables]
)
def test_a_setting_comes_from_the_variable_that_the_reference_names(key: str, variable: str) -> None:
    values = {"queue_url": "https://example.com/q", "region_name": "eu-west-9", "endpoint_url": "http://127.0.0.1:1"}
    values["serves"] = "gpu,default"
    others = {name: values[name] for name in ("queue_url", "region_name") if name != key}
    settings = Settings.from_config(others, environ={variable: values.get(key, "false")})
    expected = {**values, "enable_cancellation": False, "serves": ("gpu", "default")}
    assert getattr(settings, key) == expected[key]


@pytest.mark.parametrize(
    ("src_uri", "link", "becomes"),
    [
        ("index.md", "CANCELLATION.md#steps", "cancellation.md#steps"),
        ("index.md", "docs/operate.md", "operate.md"),
        ("cleanup.md", "../CANCELLATION.md#threads", "cancellation.md#threads"),
        ("decisions/001-a-shim-per-child.md", "../glossary.md", "../glossary.md"),
        ("decisions/README.md", "../../README.md", "../index.md"),
        ("examples/bakery.md", "../../docs/cleanup.md", "../cleanup.md"),
        ("cleanup.md", "decisions", "decisions/README.md"),
        ("cleanup.md", "../src/dagster_taskiq/op_api.py", f"{HOME}/blob/main/src/dagster_taskiq/op_api.py"),
        ("index.md", "infra", f"{HOME}/tree/main/infra"),
        ("cleanup.md", "images/path.svg", "images/path.svg"),
        ("index.md", "docs/images/path.svg", "images/path.svg"),
        ("index.md", "https://example.com/a.md", "https://example.com/a.md"),
        ("index.md", "#limits", "#limits"),
        ("index.md", "src/nowhere.py", "src/nowhere.py"),
    ],
)
def test_a_link_leads_to_the_page_or_to_the_repository(src_uri: str, link: str, becomes: str) -> None:
    assert link_in_site(link, src_uri) == becomes
