"""Is the code of a run here? Found out without importing anything of it.

Knows Dagster's code pointers and Python's finders. What only an import would tell counts as being here: then that says
what is wrong, in the run's own process. Blocks on the file system.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Final

from dagster import DagsterRun
from dagster._core.code_pointer import (
    AutoloadDefsModuleCodePointer,
    CodePointer,
    CustomPointer,
    FileCodePointer,
    ModuleCodePointer,
    PackageCodePointer,
)

__all__ = ["CodePointer", "describe_code", "pointer_of", "why_not_here"]

_CAN_LOAD: Final = ""
_MAKES_ITS_OWN_MODULES: Final = ("__path__", "__getattr__", "sys.modules", "declare_namespace")
"""A package with one of these words in it may have modules that no finder finds."""


def pointer_of(run: DagsterRun) -> CodePointer | None:
    """Where the code of a run is to be loaded from; None: the run does not say it."""
    origin = run.job_code_origin
    return origin.repository_origin.code_pointer if origin is not None else None


def describe_code(pointer: CodePointer) -> str:
    """The module or the file that a pointer names; for one of an unknown kind, what it says of itself."""
    if isinstance(pointer, CustomPointer):
        pointer = pointer.reconstructor_pointer
    if isinstance(pointer, FileCodePointer):
        return pointer.python_file
    if isinstance(pointer, ModuleCodePointer | PackageCodePointer | AutoloadDefsModuleCodePointer):
        return pointer.module
    return pointer.describe()


def why_not_here(pointer: CodePointer) -> str:
    """Why a child of this process could not load the code: "no module named 'ml'"; empty when it could, or may.

    Asks the finders of this process, whose children have its `sys.path`. Nothing of the code is imported.
    """
    if isinstance(pointer, CustomPointer):
        pointer = pointer.reconstructor_pointer
    if isinstance(pointer, FileCodePointer):
        return _why_no_file(pointer.python_file)
    if isinstance(pointer, ModuleCodePointer | PackageCodePointer | AutoloadDefsModuleCodePointer):
        return _why_no_module(pointer.module, pointer.working_directory)
    return _CAN_LOAD


def _why_no_file(path: str) -> str:
    try:
        Path(path).stat()
    except FileNotFoundError:
        return f"no file {path}"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return _CAN_LOAD


def _why_no_module(name: str, working_directory: str | None) -> str:
    try:
        why = _look_for_module(name, working_directory)
        if why != _CAN_LOAD:
            importlib.invalidate_caches()  # a folder that was not there may be by now
            why = _look_for_module(name, working_directory)
    except Exception:  # noqa: BLE001 - whatever a finder raises: the import will say what is wrong
        return _CAN_LOAD
    if why and working_directory is not None and not Path(working_directory).is_dir():
        return f"{why} (and no folder {working_directory})"
    return why


def _look_for_module(name: str, working_directory: str | None) -> str:
    top, *inner = name.split(".")
    spec, found = _find_top(top, working_directory), top
    packages: list[ModuleSpec] = []
    for part in inner:
        if spec is None:
            break
        packages.append(spec)
        places = spec.submodule_search_locations
        found = f"{found}.{part}"
        spec = PathFinder.find_spec(found, list(places)) if places is not None else None
        # All of these are imported before it.
        if spec is None and any(map(_may_have_more, packages)):
            return _CAN_LOAD
    return _CAN_LOAD if spec is not None else f"no module named {found!r}"


def _find_top(name: str, working_directory: str | None) -> ModuleSpec | None:
    """As an import finds it: `PathFinder` comes first, then what editable installations have put behind it."""
    # Dagster takes the first entry away, which is the folder of the program, or the current one.
    path: Sequence[str] = [*([working_directory] if working_directory else []), *(one for one in sys.path if one)]
    return PathFinder.find_spec(name, path) or _find_elsewhere(name)


def _find_elsewhere(name: str) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if finder is not PathFinder and (spec := finder.find_spec(name, None)) is not None:
            return spec
    return None


def _may_have_more(package: ModuleSpec) -> bool:
    """Whether a package, or a module, may have modules that are in none of its folders: what its source says."""
    if package.origin is None or package.loader is None:
        return False  # a namespace package has nothing but its folders
    get_source: Any = getattr(package.loader, "get_source", None)
    source = get_source(package.name) if get_source is not None else None
    return source is None or any(word in source for word in _MAKES_ITS_OWN_MODULES)
