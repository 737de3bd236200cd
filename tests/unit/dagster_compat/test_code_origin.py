"""Is the code of a run here? Every kind of pointer that Dagster has, and every place where Python finds a module."""

import os
import sys
import zipfile
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRun, job
from dagster._core.code_pointer import (
    AutoloadDefsModuleCodePointer,
    CodePointer,
    CustomPointer,
    FileCodePointer,
    ModuleCodePointer,
    PackageCodePointer,
)
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin

from dagster_taskiq.dagster_compat.code_origin import describe_code, pointer_of, why_not_here

EXPLODES = "raise AssertionError('it was imported')\n"
"""What every module in here does when it is imported."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("alone.py", "shop/__init__.py", "shop/jobs.py", "shop/deep/__init__.py", "shared/part/jobs.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(EXPLODES)
    return tmp_path


def module_pointers(name: str, working_directory: Path | None) -> list[CodePointer]:
    directory = str(working_directory) if working_directory is not None else None
    return [
        ModuleCodePointer(name, "defs", directory),
        PackageCodePointer(name, "defs", directory),
        AutoloadDefsModuleCodePointer(module=name, working_directory=directory),
        CustomPointer(ModuleCodePointer(name, "make", directory), [], []),
    ]


@pytest.mark.parametrize("place", ["working directory", "sys.path"])
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("alone", None),
        ("shop", None),
        ("shop.jobs", None),
        ("shop.deep", None),
        ("shared.part.jobs", None),
        ("nowhere", "nowhere"),
        ("nowhere.jobs", "nowhere"),
        ("shop.nothing", "shop.nothing"),
        ("shop.deep.nothing.more", "shop.deep.nothing"),
        ("shared.other", "shared.other"),
        ("alone.inside", "alone.inside"),
    ],
)
def test_modules(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str | None, place: str) -> None:
    if place == "sys.path":
        monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    before = set(sys.modules)
    for pointer in module_pointers(name, folder if place == "working directory" else None):
        assert why_not_here(pointer) == (f"no module named {missing!r}" if missing else ""), pointer
        assert describe_code(pointer) == name
    assert not {module for module in set(sys.modules) - before if module.startswith(("alone", "shop", "shared"))}


def test_a_working_directory_that_is_not_here_is_named(folder: Path) -> None:
    gone = folder / "gone"
    for pointer in module_pointers("alone", gone):
        assert why_not_here(pointer) == f"no module named 'alone' (and no folder {gone})"


def test_the_modules_of_this_installation_are_here() -> None:
    for name in ("dagster", "dagster_taskiq.examples", "json.decoder", "sys"):
        assert why_not_here(ModuleCodePointer(name, "defs")) == "", name


def test_the_current_folder_does_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster takes it away before it imports."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert why_not_here(ModuleCodePointer("alone", "defs"))


def test_a_file(folder: Path) -> None:
    here, gone = str(folder / "alone.py"), str(folder / "gone" / "jobs.py")
    assert why_not_here(FileCodePointer(here, "defs")) == ""
    assert why_not_here(FileCodePointer(here, "defs", str(folder / "gone"))) == ""
    assert why_not_here(FileCodePointer(gone, "defs", str(folder))) == f"no file {gone}"
    assert describe_code(FileCodePointer(gone, "defs")) == gone
    if os.geteuid() != 0:
        (folder / "shop").chmod(0)
        assert "ermission" in why_not_here(FileCodePointer(str(folder / "shop" / "jobs.py"), "defs"))


def test_a_zip_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "code.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped/__init__.py", EXPLODES)
        file.writestr("zipped/jobs.py", EXPLODES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(archive)])
    assert why_not_here(ModuleCodePointer("zipped.jobs", "defs")) == ""
    assert why_not_here(ModuleCodePointer("zipped.nothing", "defs")) == "no module named 'zipped.nothing'"


def test_an_editable_installation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As setuptools makes one: a finder behind the others, which maps a name to its folder."""

    class Editable:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return PathFinder.find_spec(name, [str(folder)]) if name == "shop" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    assert why_not_here(ModuleCodePointer("shop.jobs", "defs")) == ""
    assert why_not_here(ModuleCodePointer("shop.nothing", "defs")) == "no module named 'shop.nothing'"
    assert why_not_here(ModuleCodePointer("alone", "defs"))


@pytest.mark.parametrize(
    "source",
    [
        "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n",
        "__import__('pkg_resources').declare_namespace(__name__)\n",
        "import sys; sys.modules[__name__ + '.made'] = sys\n",
    ],
)
def test_what_only_an_import_would_tell_counts_as_here(folder: Path, source: str) -> None:
    (folder / "shop" / "__init__.py").write_text(source + EXPLODES)
    assert why_not_here(ModuleCodePointer("shop.made", "defs", str(folder))) == ""
    assert why_not_here(ModuleCodePointer("shop.deep.made", "defs", str(folder))) == "", "nor what one above may make"


def test_a_finder_that_fails_does_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            raise RuntimeError(name)

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Broken])
    assert why_not_here(ModuleCodePointer("nowhere", "defs")) == ""


def test_a_pointer_of_another_kind_counts_as_here() -> None:
    class Other(CodePointer):
        def load_target(self) -> object:
            raise AssertionError

        def describe(self) -> str:
            return "elsewhere"

    assert why_not_here(Other()) == ""
    assert describe_code(Other()) == "elsewhere"


def test_a_folder_that_comes_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python remembers that there was none."""
    volume = tmp_path / "volume"
    monkeypatch.setattr(sys, "path", [*sys.path, str(volume)])
    pointer = ModuleCodePointer("late", "defs")
    assert why_not_here(pointer)
    volume.mkdir()
    (volume / "late.py").write_text(EXPLODES)
    assert why_not_here(pointer) == ""


@job
def nothing() -> None: ...


def test_where_a_run_says_that_its_code_is() -> None:
    pointer = ModuleCodePointer("shop", "defs")
    origin = JobPythonOrigin("nothing", RepositoryPythonOrigin("python", pointer))
    with DagsterInstance.ephemeral() as instance:
        assert pointer_of(instance.create_run_for_job(nothing, job_code_origin=origin)) == pointer
    assert pointer_of(DagsterRun(job_name="nothing")) is None
