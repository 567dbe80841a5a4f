"""Text that a user names, as documents: files of text or of rows, folders, and datasets on the Hugging Face Hub."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from parscale.checkpoints.texts.chats import without_nulls
from parscale.checkpoints.texts.documents import Document, Example, Named, Source
from parscale.checkpoints.texts.files import (
    first_line,
    is_text,
    list_folder,
    printable_path,
    read_text,
    require_file,
    suffix_of,
)
from parscale.checkpoints.texts.order import FILES_AT_ONCE, SHUFFLE_BUFFER, in_turn, shuffled
from parscale.checkpoints.texts.rows import JSON, SEPARATED, example_of, examples_of_rows, has_rows, texts_of_rows

MAYBE_ROWS = (JSON, *SEPARATED)  # in a folder these may be other files, such as settings
LOOKED_AT = 8  # number of documents of each source to check before any long work
_DATASET = re.compile(r"(?P<name>\w[\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
_FILE_SUFFIXES = {".txt", ".md", ".py", ".gz", ".bz2", ".xz", ".zst", ".zip"}


def open_source(name: str, *, text_column: str = "text", streaming: bool = False, seed: int = 0) -> Source:
    """Opens training text by name; documents that contain only white space, and rows whose text is null, are skipped.

    Text is in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. Files may be compressed (`.gz`, `.bz2`,
    `.xz`, `.zst`). The suffix of a file's name determines its format:

    - `.jsonl`, `.ndjson`: JSON Lines; each row is a document
    - `.json`: the same, or a list of rows, or an object that holds one such list
    - `.csv`, `.tsv`: a header, then rows; each row is a document
    - `.parquet`, `.arrow`: a table; each row is a document
    - any other suffix: text, which is one document

    A row that has no text may hold a chat in place of it: `messages`, or `prompt` and `completion`.

    Args:
        name: a file; a folder, whose files of these kinds are read unless hidden, also through links to folders; or
            `NAME` or `NAME:CONFIGURATION` of a dataset on the Hugging Face Hub, whose split `train` is read.
        text_column: the column that holds the text. In a folder, `.json`, `.csv` and `.tsv` files without it are
            skipped, with a warning; to train on such a file as plain text, rename it to `.txt`.
        streaming: shuffle, as it is read: a folder's files, of which eight are then read at once, in turn, and all
            documents within a window of 10,000 and of 2^28 characters, which are kept in memory. A dataset is read when
            needed, not completely beforehand.
        seed: of that shuffle.

    Returns:
        The documents, read again each time that they are iterated over.

    Raises:
        ValueError: the name is empty, the file or dataset does not exist, or it is a pipe, a device or a socket. Errors
            in the contents are raised when they are read.
        OSError: a folder cannot be entered.
    """
    if not name:  # which as a path would be the current folder
        raise ValueError("A text has an empty name; give a text file, a folder, or the name of a dataset on the Hub.")
    path = Path(name)
    order = seed if streaming else None
    if path.is_dir():
        return _folder(path, text_column, order)
    if path.exists() or path.is_symlink():
        require_file(path)
        return _of_files(printable_path(path), [path], text_column, order)
    match = _DATASET.fullmatch(name)
    if match is None or path.suffix.lower() in _FILE_SUFFIXES or has_rows(path):
        raise ValueError(
            f"{printable_path(name)} does not exist; give a text file, a folder, a .jsonl file, or the name of a "
            "dataset on the Hub."
        )
    rows = _dataset(name, match["name"], match["config"], streaming)
    in_order = rows
    if streaming:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return Source(
        name,
        lambda: _rows(name, rows, text_column),
        match["name"],
        lambda count: islice(_rows(name, in_order, text_column), count),
    )


def read_documents(files: Sequence[Path], *, text_column: str = "text") -> list[Document]:
    """Reads files to evaluate on or to start from: a text file is one document; each row of a file of rows is one.

    Args:
        files: as in `open_source`, but no folders.
        text_column: the column that holds the text.

    Returns:
        Pairs of a name and a text.

    Raises:
        ValueError: a file does not exist, is a folder or not a file, its contents do not match its suffix or are
            binary, or a row holds a chat, which only training reads.
        OSError: it cannot be opened.
    """
    documents: list[Document] = []
    for path in files:
        require_file(path)
        if has_rows(path):
            documents += texts_of_rows(path, text_column)
        else:
            documents.append((printable_path(path), _text_in(path)))
    return documents


def refuse_output_in_data(output: Path, data: Sequence[Named]) -> None:
    """Raises an error for an output folder inside the data: a resumed run would read its own files.

    Args:
        output: the output folder of the run; it need not exist.
        data: names of data, and sources, which are not in a folder.

    Raises:
        ValueError: the output is inside a folder of data, also through a link.
        OSError: a folder cannot be entered.
    """
    real_output = output.resolve()
    for name in (each for each in data if not isinstance(each, Source) and os.path.isdir(each)):
        for folder in list_folder(Path(name)).folders:
            if real_output.is_relative_to(folder) and not _is_hidden(real_output.relative_to(folder)):
                raise ValueError(
                    f"The output {printable_path(output)} is inside {printable_path(name)}, which is read as data, so "
                    "that its own files would be read too; give an output folder elsewhere."
                )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _folder(folder: Path, text_column: str, seed: int | None) -> Source:
    """Reads every file with text below a folder, sorted by name or shuffled; warns about skipped files."""
    found = list_folder(folder)
    readable, other, useless, caches = [], [], [], []
    for path in found.files:
        if path.match("cache-*.arrow") and (path.parent / "state.json").is_file():
            caches.append(printable_path(path))
        elif not path.is_file() or not (has_rows(path) or is_text(path)):
            other.append(printable_path(path))
        elif suffix_of(path) in MAYBE_ROWS and (problem := _problem(path, text_column)):
            useless.append(problem)
        else:
            readable.append(path)
    count = len(found.files)
    if not readable:
        why = "".join(f" {problem}" for problem in useless[:1])
        raise ValueError(
            f"The folder {printable_path(folder)} holds no file with text ({count} files were looked at).{why}"
        )
    for what, names in (
        (f"of {count} files are not text", other),
        (f"of {count} files are what datasets keeps of its own work, as of map", caches),
        (f"of {count} files have no rows that can be read", useless),
        ("links lead to a folder that is already read", [printable_path(path) for path in found.again]),
    ):
        if names:
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            warnings.warn(
                f"{printable_path(folder)}: {len(names)} {what}, and are skipped: {'; '.join(names[:3])}{more}.",
                stacklevel=3,
            )
    return _of_files(printable_path(folder), readable, text_column, seed, may_be_empty=True)


def _of_files(
    name: str, paths: list[Path], text_column: str, seed: int | None, *, may_be_empty: bool = False
) -> Source:
    """One source of files, which are mixed and shuffled if there is a seed."""

    def read(order: int | None) -> Iterator[Example]:
        return _files(paths, text_column, order, may_be_empty=may_be_empty)

    return Source(name, lambda: read(seed), begin=lambda count: islice(read(None), count))


def _problem(path: Path, text_column: str) -> str | None:
    """What is wrong with a file's first row; None if nothing is."""
    try:
        next(examples_of_rows(path, text_column), None)
    except ValueError as error:
        return str(error).rstrip(".")
    return None


def _files(paths: list[Path], text_column: str, seed: int | None, *, may_be_empty: bool = False) -> Iterator[Example]:
    """Reads one file after another, or with a seed in another order."""
    if seed is None:
        return (document for path in paths for document in _file(path, text_column, may_be_empty=may_be_empty))
    draw = random.Random(seed)
    order = draw.sample(paths, len(paths))
    files = (_file(path, text_column, may_be_empty=may_be_empty) for path in order)
    return shuffled(in_turn(files, FILES_AT_ONCE), draw)


def _file(path: Path, text_column: str, *, may_be_empty: bool = False) -> Iterator[Example]:
    require_file(path)
    if path.stat().st_size == 0:
        if may_be_empty:
            return
        raise ValueError(f"{printable_path(path)} is empty; give a file with text.")
    if has_rows(path):
        yield from examples_of_rows(path, text_column)
        return
    text = _text_in(path)
    if text.strip():
        yield printable_path(path), text
    elif not may_be_empty:
        raise ValueError(f"{printable_path(path)} holds nothing but white space; give a file with text.")


def _text_in(path: Path) -> str:
    text = read_text(path)
    if "\0" in text:
        raise ValueError(f"{printable_path(path)} is a binary file (it holds zero bytes); give a file with text.")
    return text


def _rows(name: str, rows: Iterable[dict[str, Any]], text_column: str) -> Iterator[Example]:
    for number, row in enumerate(_read(name, rows), 1):
        example = example_of(f"{name}, row {number}", without_nulls(row), text_column)
        if not isinstance(example, str) or example.strip():
            yield f"{name}:{number}", example


def _read(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except OSError:
        raise
    except Exception as error:  # of many types for a streamed dataset: a damaged file, another column type
        raise ValueError(f"{name} cannot be read: {first_line(error)}") from error


def _dataset(name: str, path: str, config: str | None, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"Reading {name} needs the package datasets: pip install 'parscale[train]'.") from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, config, split="train", streaming=streaming)
    except Exception as error:  # of many types: unknown name, no network, unknown configuration
        raise ValueError(
            f"{name} is neither a file nor a folder here, nor a dataset that can be loaded: {first_line(error)}"
        ) from error


def open_sources(
    data: Sequence[Named], *, text_column: str = "text", streaming: bool = False, seed: int = 0
) -> list[Source]:
    """Opens several sources and checks the beginning of each, so that errors are reported before any long work.

    With `streaming` files that are given by name become one source, in the place of the first: so a bounded number is
    open, and one window holds documents of all.

    Args:
        data: names as in `open_source`, and sources, which are used unchanged.
        text_column: as in `open_source`.
        streaming: likewise.
        seed: likewise.

    Raises:
        ValueError: a source is missing, damaged or empty.
    """
    sources = [
        each
        if isinstance(each, Source)
        else open_source(os.fspath(each), text_column=text_column, streaming=streaming, seed=seed)
        for each in data
    ]
    for source in sources:
        if not list(source.beginning(LOOKED_AT)):
            raise ValueError(f"{source.name} has no text.")
    return _with_files_joined(data, sources, text_column, seed) if streaming else sources


def _with_files_joined(data: Sequence[Named], sources: list[Source], text_column: str, seed: int) -> list[Source]:
    """The sources, with those that are files shuffled as one, in the place of the first."""
    files = {
        place: Path(each) for place, each in enumerate(data) if not isinstance(each, Source) and os.path.isfile(each)
    }
    if len(files) < 2:
        return sources
    parts = [sources[place] for place in files]
    joined = Source(
        f"{len(files)} files",
        lambda: _files([*files.values()], text_column, seed),
        begin=lambda count: chain.from_iterable(part.beginning(count) for part in parts),
    )
    first, *others = files
    return [joined if place == first else source for place, source in enumerate(sources) if place not in others]
