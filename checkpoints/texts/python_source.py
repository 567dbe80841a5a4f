"""Python source on this machine as text, with some files held out: the standard library's and installed packages'."""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

from parscale.checkpoints.texts.documents import Document

HELD_OUT_PERCENT = 5
# Test suites, which some distributions do not include. Installed packages; code pages, which are tables or near-copies.
TEST_FOLDERS = {"test", "tests", "idle_test"}
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "encodings", "__pycache__"}
# Generated files: the settings of the build, the copy of the language reference for `help`, a table of letters.
EXCLUDED_NAMES = ("config-*/*", "_sysconfigdata*", "_sysconfig_vars*", "pydoc_data/topics.py", "re/_casefix.py")
LARGEST_FILE = 1 << 18  # bytes; larger files of packages are tables that a program wrote


def standard_library_files(*, tests: bool = False) -> list[Path]:
    """The hand-written `.py` files of the running Python's standard library, sorted by their name within it.

    Args:
        tests: return its test suites instead; some distributions do not include them.
    """
    return sorted((path for path in _source_files(_root()) if _is_wanted(path, tests)), key=_relative_name)


def is_held_out(relative_name: str) -> bool:
    """Whether a file, by its name such as `"json/decoder.py"`, belongs to the held-out 5 %.

    It depends on the name alone, so a file is on the same side in every version of Python.
    """
    return _percent(relative_name) < HELD_OUT_PERCENT


def standard_library_split(*, with_tests: bool = False) -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents, sorted by name; of equal texts only the first is kept.

    A document's name is the path of its file, relative to the standard library's folder.

    Args:
        with_tests: add the library's test suites, if they are installed, to the training documents. The held-out
            documents do not change.

    Returns:
        Both, as pairs of a name and a text.
    """
    tests = set(standard_library_files(tests=True)) if with_tests else set()
    named = [(_relative_name(path), path) for path in [*standard_library_files(), *sorted(tests)]]
    return _split((name, path, is_held_out(name) and path not in tests) for name, path in named)


def package_source_split(packages: Sequence[str]) -> tuple[list[Document], list[Document]]:
    """The source of installed packages: training and held-out documents; of equal texts only the first is kept.

    Test suites are left out, and files of more than 256 KiB. A document's name is that of its package and the path of
    its file within it, such as `"scipy/linalg/_basic.py"`.

    Args:
        packages: names to import, such as `"scipy"`; the documents are in this order, those of a package by name.

    Returns:
        Both, as pairs of a name and a text.

    Raises:
        ValueError: a package is not installed.
    """
    files: list[tuple[str, Path, bool]] = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"There is no installed package {package} with source; install it, or name another.")
        root = Path(spec.submodule_search_locations[0])
        named = {f"{package}/{path.relative_to(root).as_posix()}": path for path in _source_files(root)}
        files += [
            (name, path, _is_held_out_of_package(name))
            for name, path in sorted(named.items())
            if not TEST_FOLDERS & set(name.split("/")[1:-1]) and path.stat().st_size <= LARGEST_FILE
        ]
    return _split(files)


def _is_held_out_of_package(name: str) -> bool:
    """Whether a package's file is held out: others than those by which learning rates for such text were chosen."""
    return _percent(name) >= 100 - HELD_OUT_PERCENT


def _percent(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100


def _split(files: Iterable[tuple[str, Path, bool]]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents from names, paths, and whether each is held out."""
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[str] = set()
    for name, path, held in files:
        try:
            with tokenize.open(path) as file:  # follows a file's declared encoding
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # invalid on purpose, in a test suite
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            (held_out if held else train).append((name, text))
    return train, held_out


def _source_files(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in EXCLUDED_FOLDERS]  # installed packages are many
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return [path for path in found if path.is_file()]


@functools.cache
def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _relative_name(path: Path) -> str:
    return path.relative_to(_root()).as_posix()


def _is_wanted(path: Path, tests: bool) -> bool:
    name = _relative_name(path)
    folders = set(name.split("/")[:-1])
    if folders & EXCLUDED_FOLDERS or bool(folders & TEST_FOLDERS) is not tests:
        return False
    return not any(fnmatchcase(name, pattern) for pattern in EXCLUDED_NAMES)
