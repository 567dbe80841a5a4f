"""Looks up names of other libraries, and makes the error message if the installed version lacks one."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from parscale.errors import IncompatibleVersionError


def needed(owner: object, name: str) -> Any:
    """`owner.name`, of a module or a class.

    torch.compile traces this function inside forward passes, so it neither caches nor catches exceptions.

    Raises:
        IncompatibleVersionError: the installed version has no such name.
    """
    value = getattr(owner, name, None)
    if value is None:
        raise missing(owner, name)
    return value


def needed_module(name: str) -> ModuleType:
    """Imports a module of a library.

    Raises:
        ModuleNotFoundError: the library is not installed.
        IncompatibleVersionError: the installed version has no such module.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        library = name.partition(".")[0]
        if not is_installed(library) or error.name is None or not name.startswith(error.name):
            raise
        raise _incompatible(library, name) from error


def is_installed(library: str) -> bool:
    """Whether `import library` would find a module."""
    return importlib.util.find_spec(library) is not None


def missing(owner: object, name: str) -> IncompatibleVersionError:
    """The error for a name that a module or a class lacks."""
    if isinstance(owner, ModuleType):
        path = owner.__name__
    else:
        cls = owner if isinstance(owner, type) else type(owner)
        path = f"{cls.__module__}.{cls.__qualname__}"
    return _incompatible(path.partition(".")[0], f"{path}.{name}")


def _incompatible(library: str, path: str) -> IncompatibleVersionError:
    version = str(getattr(sys.modules.get(library), "__version__", None) or importlib.metadata.version(library))
    return IncompatibleVersionError(
        f"parscale needs {path}, which the installed {library} {version} does not have: {_remedy(library, version)}."
    )


def _remedy(library: str, version: str) -> str:
    """What to install: a version that parscale allows, or an older one if the installed version is allowed."""
    wanted = _requirement(library)
    if wanted is None:
        return f"install another version of {library}, or a newer parscale"
    if wanted.specifier.contains(version, prereleases=True):
        older = wanted.specifier & SpecifierSet(f"<{Version(version).public}")
        return f"pip install '{library}{older}', or a newer parscale"
    return f"pip install '{library}{wanted.specifier}'"


def _requirement(library: str) -> Requirement | None:
    """The requirement for a library in parscale's own metadata."""
    try:
        lines = importlib.metadata.requires("parscale") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        lines = []
    found = [Requirement(line) for line in lines]
    return next((each for each in found if each.name.replace("-", "_") == library and each.specifier), None)
