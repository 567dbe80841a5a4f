"""The source of Python's standard library as text, with some files held out."""

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
# Test suites, which some distributions do not include. Installed packages; code pages, which are tables or near-copies.
TEST_FOLDERS = {"test", "tests", "idle_test"}
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "encodings", "__pycache__"}
# Generated files: the settings of the build, the copy of the language reference for `help`, a table of letters.
EXCLUDED_NAMES = ("config-*/*", "_sysconfigdata*", "_sysconfig_vars*", "pydoc_data/topics.py", "re/_casefix.py")


def standard_library_files(*, tests: bool = False) -> list[Path]:
    """The hand-written `.py` files of the running Python's standard library, sorted by their name within it.

    Args:
        tests: return its test suites instead; some distributions do not include them.
    """
    found: list[Path] = []
    for folder, inside, files in os.walk(_root()):
        inside[:] = [name for name in inside if name not in EXCLUDED_FOLDERS]  # installed packages are many
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted((path for path in found if _is_wanted(path, tests) and path.is_file()), key=_relative_name)


def is_held_out(relative_name: str) -> bool:
    """Whether a file, by its name such as `"json/decoder.py"`, belongs to the held-out 5 %.

    It depends on the name alone, so a file is on the same side in every version of Python.
    """
    digest = hashlib.sha256(relative_name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def standard_library_split(*, with_tests: bool = False) -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents, sorted by name; of equal texts only the first is kept.

    A document's name is the path of its file, relative to the standard library's folder.

    Args:
        with_tests: add the library's test suites, if they are installed, to the training documents. The held-out
            documents do not change.

    Returns:
        Both, as pairs of a name and a text.
    """
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[str] = set()
    tests = set(standard_library_files(tests=True)) if with_tests else set()
    for path in [*standard_library_files(), *sorted(tests)]:
        try:
            with tokenize.open(path) as file:  # follows a file's declared encoding
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # invalid on purpose, in a test suite
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
