"""Training text: text files, folders, JSON Lines, and datasets of the Hugging Face Hub, as documents with a name."""

from __future__ import annotations

import gzip
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from parscale.checkpoints.reading import read_documents
from parscale.checkpoints.text import Document

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
TABLES = (".parquet", ".arrow")
LOOKED_AT = 8  # documents, of each source, before anything long begins
SHUFFLE_BUFFER = 10_000  # documents, of a dataset that is streamed
_DATASET = re.compile(r"(?P<name>\w[\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
_FILE_SUFFIXES = {".txt", ".md", ".py", ".json", ".csv", ".gz", ".zst", ".zip"}


@dataclass(frozen=True)
class Source:
    """What a user named as data: its name, and a function that opens it anew; each document has a name and a text."""

    name: str
    read: Callable[[], Iterator[Document]]

    def __iter__(self) -> Iterator[Document]:
        return self.read()


def open_source(name: str, *, text_column: str = "text", streaming: bool = False, seed: int = 0) -> Source:
    """Opens training text by its name; documents without a character that is no space are left out.

    Args:
        name: a text file, which is one document; a JSON Lines file (``.jsonl``, also with ``.gz``) or a table
            (``.parquet``, ``.arrow``), of which each row is one; a folder, of which every such file that is not hidden
            counts; or ``NAME`` or ``NAME:CONFIGURATION`` of a dataset on the Hugging Face Hub, its split ``train``.
        text_column: what holds the text in a row.
        streaming: read tables and datasets as they are needed, and not as a whole beforehand; a dataset's documents are
            then shuffled within a window of 10,000.
        seed: of that shuffling.

    Raises:
        ValueError: there is no such file or dataset, or a table cannot be read. What is wrong inside is found when it
            is read.
    """
    path = Path(name)
    if path.is_dir():
        return _folder(path, text_column, streaming)
    if path.exists():
        return Source(name, lambda: _file(path, text_column, streaming))
    match = _DATASET.fullmatch(name)
    suffix = path.suffix.lower()
    if match is None or suffix in _FILE_SUFFIXES or name.endswith((*JSON_LINES, *TABLES)):
        raise ValueError(
            f"{name} does not exist; give a text file, a folder, a .jsonl file, or the name of a dataset on the Hub."
        )
    rows = _dataset(name, match["name"], match["config"], streaming)
    if streaming:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return Source(name, lambda: _rows(name, rows, text_column))


def _folder(folder: Path, text_column: str, streaming: bool) -> Source:
    """Every file with text below a folder, in the order of their names."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    readable = [path for path in files if _is_text(path)]
    if not readable:
        raise ValueError(f"The folder {folder} holds no file with text ({len(files)} files were looked at).")
    if len(readable) < len(files):
        warnings.warn(f"{folder}: {len(files) - len(readable)} of {len(files)} files are not text.", stacklevel=3)
    return Source(
        str(folder),
        lambda: (document for path in readable for document in _file(path, text_column, streaming, may_be_empty=True)),
    )


def _is_text(path: Path) -> bool:
    """Whether a file is a table or begins with text in UTF-8."""
    if path.name.lower().endswith((*JSON_LINES, *TABLES)):
        return True
    with path.open("rb") as file:
        start = file.read(8192)
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # a character that the end cuts is no fault
            return False
    return b"\0" not in start


def _file(path: Path, text_column: str, streaming: bool, *, may_be_empty: bool = False) -> Iterator[Document]:
    lowered = path.name.lower()
    if path.stat().st_size == 0:
        if may_be_empty:
            return
        raise ValueError(f"{path} is empty; give a file with text.")
    if lowered.endswith(JSON_LINES):
        yield from _json_lines(path, text_column)
    elif lowered.endswith(TABLES):
        kind = path.suffix.lower()[1:]
        rows = _dataset(str(path), kind, None, streaming, data_files=str(path))
        yield from _rows(str(path), rows, text_column)
    else:
        documents = read_documents([path])
        if any("\0" in text for _, text in documents):
            raise ValueError(f"{path} is a binary file (it holds zero bytes); give a file with text.")
        written = [document for document in documents if document[1].strip()]
        if not written and not may_be_empty:
            raise ValueError(f"{path} holds nothing but white space; give a file with text.")
        yield from written


def _json_lines(path: Path, text_column: str) -> Iterator[Document]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(_lines(path, file), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}, is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{where}, is no JSON object but a {type(row).__name__}; write {{{text_column!r}: ...}}."
                )
            text = _text(where, row, text_column)
            if text.strip():
                yield f"{path}:{number}", text


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: byte {error.start} of a part cannot be read.") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}.") from error


def _rows(name: str, rows: Iterable[dict[str, Any]], text_column: str) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        text = _text(f"{name}, row {number}", row, text_column)
        if text.strip():
            yield f"{name}:{number}", text


def _text(where: str, row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(
            f"{where}, has no column {column!r}; it has: {', '.join(map(repr, row)) or 'none'}. "
            "Name the one that holds the text with --text-column."
        )
    if not isinstance(row[column], str):
        raise ValueError(f"{where}: column {column!r} is no text but a {type(row[column]).__name__}.")
    return str(row[column])


def _dataset(name: str, path: str, config: str | None, streaming: bool, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"Reading {name} needs the package datasets: pip install 'parscale[train]'.") from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, config, split="train", streaming=streaming, **options)
    except Exception as error:  # of many kinds: no such name, no network, a damaged table, no such configuration
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "cannot be read" if options else "is neither a file nor a folder here, nor a dataset that can be loaded"
        raise ValueError(f"{name} {kind}: {problem}") from error


def open_sources(
    names: Sequence[str], *, text_column: str = "text", streaming: bool = False, seed: int = 0
) -> list[Source]:
    """Several sources, each looked into, so that what is wrong is said before anything long begins.

    Raises:
        ValueError: one is missing, damaged or empty.
    """
    sources = [open_source(name, text_column=text_column, streaming=streaming, seed=seed) for name in names]
    for source in sources:
        if not list(islice(source, LOOKED_AT)):
            raise ValueError(f"{source.name} holds no text.")
    return sources
