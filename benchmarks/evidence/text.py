"""The text of the study: Python source by document, split by the hash of each document's name, and measuring windows.

The text is the standard library's source and that of packages that `constraints.txt` pins, so that another machine with
the same versions has the same bytes; rows hold a digest of them.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PACKAGES = ("matplotlib", "mpmath", "networkx", "nltk", "numpy", "pandas", "pygments", "scipy", "sklearn", "sympy")
END_OF_TEXT = 0  # a byte that no document holds
TUNING_PERCENT, TEST_PERCENT = 5, 15
WINDOW = 256
TUNING_WINDOWS, TEST_WINDOWS = 4, 8  # of the middle, at most, in each document
TUNING_DOCUMENTS = 150  # at most; the first by hash
_EXCLUDED = {"site-packages", "__pycache__", "idle_test", "tests", "test", "testing", "encodings", "_vendor"}
_LARGEST_FILE = 1 << 18  # larger ones are tables that a program wrote


class Windows(NamedTuple):
    """What is measured of some documents."""

    ids: NDArray[np.uint8]
    """Beginnings first, then middles; (W, 256)."""
    document: NDArray[np.int64]
    """Of each window; (W,)."""
    is_middle: NDArray[np.bool_]
    """(W,)"""


class Text(NamedTuple):
    """Training text, documents one after another, and what is measured."""

    train: NDArray[np.uint8]
    tuning: Windows
    test: Windows
    digest: str
    """Of all documents with their names."""


class Document(NamedTuple):
    """One file. Documents sort by a number that their names give, as good as a draw."""

    number: int
    name: str
    contents: bytes


class Sides(NamedTuple):
    """All documents, by what they are for, in the order of their packages and names."""

    train: list[Document]
    tuning: list[Document]
    test: list[Document]
    digest: str


@functools.cache
def read_sides() -> Sides:
    """All documents; of equal ones the first."""
    sides = Sides([], [], [], "")
    digest, seen = hashlib.sha256(), set()
    for name, contents in _documents():
        of_contents = hashlib.sha256(contents).digest()
        if of_contents in seen:
            continue
        seen.add(of_contents)
        digest.update(name.encode() + of_contents)
        number, percent = divmod(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"), 100)
        held_out = sides.tuning if percent < TUNING_PERCENT else sides.test
        side = sides.train if percent >= TUNING_PERCENT + TEST_PERCENT else held_out
        side.append(Document(number, name, contents))
    return sides._replace(digest=digest.hexdigest()[:16])


@functools.cache
def read_text() -> Text:
    """All text of the study, as bytes."""
    sides = read_sides()
    train = b"".join(document.contents + bytes([END_OF_TEXT]) for document in sides.train)
    tuning, test = (
        sorted(document for document in side if len(document.contents) >= 2 * WINDOW)
        for side in (sides.tuning, sides.test)
    )
    return Text(
        np.frombuffer(train, dtype=np.uint8),
        _windows(tuning[:TUNING_DOCUMENTS], TUNING_WINDOWS),
        _windows(test, TEST_WINDOWS),
        sides.digest,
    )


def _documents() -> Iterator[tuple[str, bytes]]:
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"the package {package} is not installed; install what constraints.txt pins: make setup")
        roots[package] = Path(spec.submodule_search_locations[0])
    for label, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if not _EXCLUDED.isdisjoint(relative.parts[:-1]) or not 0 < path.stat().st_size <= _LARGEST_FILE:
                continue
            contents = path.read_bytes()
            if bytes([END_OF_TEXT]) not in contents:
                yield f"{label}/{relative.as_posix()}", contents


def _windows(documents: list[Document], most: int) -> Windows:
    beginnings, middles, owners = [], [], []
    for index, document in enumerate(documents):
        ids = np.frombuffer(document.contents, dtype=np.uint8)
        beginnings.append(np.concatenate(([END_OF_TEXT], ids[: WINDOW - 1])))
        count = min(most, len(ids) // WINDOW - 1)
        for start in np.linspace(WINDOW, len(ids) - WINDOW, count).astype(int):
            middles.append(ids[start : start + WINDOW])
            owners.append(index)
    return Windows(
        np.stack(beginnings + middles).astype(np.uint8),
        np.concatenate((np.arange(len(documents)), owners)).astype(np.int64),
        np.arange(len(beginnings) + len(middles)) >= len(beginnings),
    )
