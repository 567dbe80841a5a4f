"""Opens files that a user names as text: compressed or not, in the encoding that their first bytes indicate."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import importlib
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

# Byte-order marks, and the encodings that remove them. The mark of UTF-32 begins like that of UTF-16. As in
# scaling_laws/files.py: neither package imports the other.
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_FILES: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)


def _zstandard(path: Path, mode: str) -> Any:
    stream = import_pyarrow(path).input_stream(path.open(mode), compression="zstd")
    return io.BufferedReader(_Raw(stream))


class _Raw(io.RawIOBase):
    """Wraps a stream of pyarrow so that Python can buffer it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Closes both."""
        self.stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer with the remaining bytes, as far as they reach."""
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


_COMPRESSIONS: dict[str, tuple[str, Callable[[Path, str], Any]]] = {
    ".gz": ("gzip", gzip.open),
    ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open),
    ".zst": ("zstandard", _zstandard),
}


def printable_path(path: str | os.PathLike[str]) -> str:
    r"""A path, or text with paths, that can be printed: a byte 0xe9 that is not UTF-8 becomes `\udce9`."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def first_line(error: Exception) -> str:
    """The message of a library's error, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def import_pyarrow(path: Path, name: str = "pyarrow") -> Any:
    """The module of pyarrow with which a file is read.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"Reading {printable_path(path)} needs the package pyarrow: pip install 'parscale[train]'."
        ) from error


def suffix_of(path: Path) -> str:
    """The suffix that indicates a file's contents, in lower case, without a compression's: `".json"` of `a.JSON.gz`."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in _COMPRESSIONS else name.suffix


def require_file(path: Path) -> None:
    """Checks that a path is a regular file, before it is opened: a pipe would block.

    Raises:
        ValueError: it does not exist, or is a folder, a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        problem = "is a broken link" if path.is_symlink() else "does not exist"
    else:
        if stat.S_ISREG(mode):
            return
        problem = next((name for is_one, name in _NO_FILES if is_one(mode)), "is not a file")
    raise ValueError(f"{printable_path(path)} {problem}; give a text file.")


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, uncompressed if its name ends in `.gz`, `.bz2`, `.xz` or `.zst`.

    Raises:
        ValueError: it is not a file, or its compression is damaged; also raised later, while it is read in the block.
        OSError: it cannot be read.
    """
    require_file(path)
    compression, opener = _COMPRESSIONS.get(path.suffix.lower(), ("", open))
    try:
        with opener(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or not compression):
            raise
        raise ValueError(f"{printable_path(path)} is not a complete {compression} file: {error}.") from error


@contextlib.contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """A file as text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, which is removed.

    Args:
        path: the file's path, as in `open_bytes`.
        newline: as in `open`.

    Raises:
        ValueError: as in `open_bytes`, or it is not such text; also raised later, while it is read in the block.
        OSError: it cannot be read.
    """
    with open_bytes(path) as file:
        encoding = encoding_of(file.read(4))
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding, newline=newline) as text:
        try:
            yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"{printable_path(path)} is not text in {_label(encoding)}: {error.reason}.") from error


def read_text(path: Path) -> str:
    r"""The whole text of a file, with line breaks as `\n`; arguments and errors as in `open_text`."""
    with open_bytes(path) as file:
        contents = file.read()
    encoding = encoding_of(contents)
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable_path(path)} is not text in {_label(encoding)}: byte {error.start} cannot be read."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encoding_of(start: bytes) -> str:
    """The encoding that the first four bytes of a text indicate; UTF-8 without a byte-order mark."""
    return next((encoding for mark, encoding in _ENCODINGS if start.startswith(mark)), "utf-8")


def is_text(path: Path) -> bool:
    """Whether the first 8192 bytes of a file are text; errors as in `open_bytes`."""
    with open_bytes(path) as file:
        start = file.read(8192)
    decoder = codecs.getincrementaldecoder(encoding_of(start))()
    try:
        return "\0" not in decoder.decode(start)  # a character that is cut off at the end is no error
    except UnicodeDecodeError:
        return False


def _label(encoding: str) -> str:
    return encoding.removesuffix("-sig").upper()


@dataclass(frozen=True)
class FolderContents:
    """The contents of a folder, without hidden files.

    Attributes:
        files: everything except folders, sorted by name.
        folders: their real paths; the first is the folder itself.
        again: links to a folder that is already in `folders`.
    """

    files: list[Path]
    folders: list[Path]
    again: list[Path]


def list_folder(folder: Path) -> FolderContents:
    """Everything below a folder; links to folders are followed, and each folder is read once.

    Raises:
        OSError: a folder cannot be entered.
    """
    found = FolderContents([], [], [])
    seen: set[Path] = set()
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if not path.is_dir():
            found.files.append(path)
        elif (real := path.resolve()) in seen:
            found.again.append(path)
        else:
            seen.add(real)
            found.folders.append(real)
            names = sorted((name for name in os.listdir(path) if not name.startswith(".")), reverse=True)
            waiting += [path / name for name in names]
    return found
