"""Text that is at hand wherever Python is: its standard library's source, of which some files are held out."""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
import tokenize
from fnmatch import fnmatchcase
from pathlib import Path

from parscale.checkpoints.texts.documents import Document

HELD_OUT_PERCENT = 5
# Test suites, which some distributions leave out. Installed packages; code pages, which are tables or near-copies.
TEST_FOLDERS = {"test", "tests", "idle_test"}
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "encodings", "__pycache__"}
# Written by a program: the build's settings, the copy of the language reference that `help` shows, a table of letters.
EXCLUDED_NAMES = ("config-*/*", "_sysconfigdata*", "_sysconfig_vars*", "pydoc_data/topics.py", "re/_casefix.py")


def standard_library_files(*, tests: bool = False) -> list[Path]:
    """The hand-written `.py` files of the running Python's standard library, sorted by their name within it.

    Args:
        tests: its test suites instead of itself; some distributions leave them out.
    """
    found: list[Path] = []
    for folder, inside, files in os.walk(_root()):
        inside[:] = [name for name in inside if name not in EXCLUDED_FOLDERS]  # installed packages are many
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted((path for path in found if _is_wanted(path, tests) and path.is_file()), key=_relative_name)


def is_held_out(relative_name: str) -> bool:
    """Whether a file, by its name such as `"json/decoder.py"`, belongs to the held-out 5 %.

    Depends on the name alone, so that a file is on the same side in every version of Python.
    """
    digest = hashlib.sha256(relative_name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def standard_library_split(*, with_tests: bool = False) -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents, in the order of their names; of equal texts only the first is kept.

    A document's name is its file's, relative to the standard library's folder.

    Args:
        with_tests: the library's test suites, where they are installed, join the training documents. The held-out
            ones stay the same.

    Returns:
        Both, as pairs of a name and a text.
    """
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[str] = set()
    tests = set(standard_library_files(tests=True)) if with_tests else set()
    for path in [*standard_library_files(), *sorted(tests)]:
        try:
            with tokenize.open(path) as file:  # honours a file's declared encoding
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # broken on purpose, in a test suite
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            name = _relative_name(path)
            (held_out if is_held_out(name) and path not in tests else train).append((name, text))
    return train, held_out


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
