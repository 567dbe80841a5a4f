"""Real text for a sweep, as bytes: Python source on this machine, or a dataset by name.

A token is a byte of UTF-8, so sweeps do not differ by their tokenizer; each document ends with a zero byte.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VOCABULARY_SIZE = 256
END_OF_TEXT = 0
HELD_OUT_PERCENT = 5
SOURCES = ("stdlib", "packages")
_EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "idle_test", "tests", "test", "encodings"}
_LARGEST_FILE = 1 << 20  # larger files are generated tables


class Corpus(NamedTuple):
    """Consecutive documents, as bytes."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]


def read_corpus(source: str = "stdlib") -> Corpus:
    """Text to train on and text to evaluate on; a document is on the same side in every sweep.

    Of equal documents only the first is kept.

    Args:
        source: `"stdlib"`, the source of Python's standard library (some 10 MB); `"packages"`, the same and the source
            of every installed package (hundreds of MB with PyTorch); any other name is a dataset of the `datasets`
            package, whose column `text` or `content` is read.

    Raises:
        ValueError: a dataset cannot be read, or has no such column.
    """
    documents = python_files(source) if source in SOURCES else _data_set(source)
    sides: dict[bool, list[bytes]] = {False: [], True: []}
    seen: set[bytes] = set()
    for name, text in documents:
        digest = hashlib.sha256(text).digest()
        if digest in seen or not text.strip():
            continue
        seen.add(digest)
        sides[_is_held_out(name)].append(text + bytes([END_OF_TEXT]))
    train, held_out = (np.frombuffer(b"".join(sides[side]), dtype=np.uint8) for side in (False, True))
    if not train.size or not held_out.size:
        raise ValueError(f"{source} has too little text to hold some of it out; give a larger source")
    return Corpus(train, held_out)


def python_files(source: str) -> Iterator[tuple[str, bytes]]:
    """Name and contents of Python source files, sorted by name.

    They are those of the standard library, and for `"packages"` also those of installed packages. Test suites and files
    that are not UTF-8 are skipped.
    """
    roots = [("stdlib", Path(sysconfig.get_path("stdlib")))]
    if source == "packages":
        installed = dict.fromkeys(Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))
        roots += [("site-packages", path) for path in installed]
    for label, root in roots:
        for path in _python_paths(root):
            if not 0 < path.stat().st_size <= _LARGEST_FILE:
                continue
            text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
            if _is_text(text):
                yield f"{label}/{path.relative_to(root).as_posix()}", text


def _python_paths(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in _EXCLUDED]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def blocks(text: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """The text cut into `(n, length)`; an incomplete last block is dropped."""
    count = text.size // length
    return text[: count * length].reshape(count, length)


def _data_set(name: str) -> Iterable[tuple[str, bytes]]:
    place = os.path.abspath(name)
    if os.path.exists(place) and glob.escape(place) != place:  # the package datasets would read a pattern
        raise ValueError(f"{place} contains one of the characters *, ? and [, which are wildcards; rename it")
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the package raises many types, also for an unknown name
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise ValueError(
            f"no text source {name!r}: give {', '.join(SOURCES)} or the name of a dataset that can be read ({reason})"
        ) from error
    for index, row in enumerate(rows):
        text = row.get("text", row.get("content"))
        if not isinstance(text, str):
            raise ValueError(f"the dataset {name!r} has no column text or content; it has {', '.join(map(str, row))}")
        try:
            yield f"{name}/{index}", text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the dataset {name!r} holds half a character, {text[error.start]!a}, in row {index + 1}; correct it"
            ) from error


def _is_text(text: bytes) -> bool:
    try:
        return "\0" not in text.decode()
    except UnicodeDecodeError:
        return False


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT
