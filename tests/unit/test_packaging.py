"""What our own metadata says about the versions of others, against what those say themselves."""

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
WHOLE = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = WHOLE["project"], WHOLE["tool"]
INSTALLED_BY_USERS = [
    *PROJECT["dependencies"],
    *(one for name in ("otel", "local", "postgres") for one in PROJECT["optional-dependencies"][name]),
]
TESTED = "constraints.txt"
FLOOR = "constraints-floor.txt"


def requirement(distribution: str, name: str, extra: str = "") -> Requirement:
    """The one that an installed distribution has for `name`."""
    found = [Requirement(text) for text in requires(distribution) or ()]
    (one,) = [one for one in found if one.name == name and (not one.marker or one.marker.evaluate({"extra": extra}))]
    return one


def pinned(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, _, version in (line.partition("==") for line in lines)}


def ours(name: str) -> SpecifierSet:
    (one,) = [one for one in map(Requirement, PROJECT["dependencies"]) if one.name == name]
    return one.specifier


@pytest.mark.parametrize(("name", "extra"), [("boto3", "boto3"), ("botocore", "")])
def test_our_range_of_boto3_is_the_one_that_aioboto3_implies(name: str, extra: str) -> None:
    aiobotocore = requirement("aioboto3", "aiobotocore")
    assert [one.operator for one in aiobotocore.specifier] == ["=="], (
        "aioboto3 is looser now: do we still need our range?"
    )
    assert aiobotocore.extras == {"boto3"}
    assert ours(name) == requirement("aiobotocore", name, extra).specifier


def test_the_floor_is_the_oldest_version_of_everything_that_we_name() -> None:
    oldest: dict[str, SpecifierSet] = {}
    for one in map(Requirement, INSTALLED_BY_USERS):
        for part in one.specifier:
            if part.operator == ">=":
                oldest[str(canonicalize_name(one.name))] = SpecifierSet(f"=={part.version}")
    floor = pinned(FLOOR)
    assert set(floor) == set(oldest)
    assert [name for name, version in floor.items() if not oldest[name].contains(version)] == []


@pytest.mark.parametrize("file", [TESTED, FLOOR])
def test_the_readme_names_the_versions_of_dagster_that_were_tested(file: str) -> None:
    row = re.search(r"^\| Dagster \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert row
    assert pinned(file)["dagster"] in re.findall(r"\d+\.\d+\.\d+", row[1])


def test_the_repository_has_one_address() -> None:
    home = PROJECT["urls"]["Homepage"]
    assert [url for url in PROJECT["urls"].values() if not url.startswith(home)] == []
    pictures, links = TOOLS["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    assert pictures["replacement"].endswith(f"({home}/raw/main/")
    assert links["replacement"] == f"]({home}/blob/main/"
