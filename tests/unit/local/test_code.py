"""What `dagster-taskiq dev` serves when nobody says it."""

from pathlib import Path

import pytest

from dagster_taskiq.local.dev import EXAMPLES, code_of
from dagster_taskiq.local.process_manager import StartFailed

BAKERY = Path(__file__).parents[3] / "examples" / "bakery"


@pytest.mark.parametrize(
    ("name", "text", "example"),
    [
        ("nothing", "", True),
        ("pyproject.toml", "[project]\nname = 'mine'\n", True),
        ("pyproject.toml", "[tool.ruff]\n", True),
        ("pyproject.toml", "[tool.dagster]\nmodule_name = 'mine'\n", False),
        ("pyproject.toml", "[tool.dg]\ndirectory_type = 'project'\n", False),
        ("workspace.yaml", "load_from: []\n", False),
    ],
)
def test_the_project_of_the_folder_or_else_the_example(tmp_path: Path, name: str, text: str, example: bool) -> None:
    (tmp_path / name).write_text(text)
    assert code_of(tmp_path) == (["-m", EXAMPLES] if example else [])


def test_the_bakery_is_a_project() -> None:
    assert code_of(BAKERY) == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool\n")
    with pytest.raises(StartFailed, match=r"pyproject.toml cannot be read: "):
        code_of(tmp_path)
