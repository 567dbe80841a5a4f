"""Rows of data files: JSON, JSON Lines, comma- and tab-separated values, and tables in Arrow and Parquet.

The suffix of the name determines the format, in any case, and before the suffix of a compression.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from parscale.checkpoints.texts.chats import COLUMNS, chat_of, holds_chat, is_chat, without_nulls
from parscale.checkpoints.texts.documents import Chat, Completion, Document, Example
from parscale.checkpoints.texts.files import (
    first_line,
    import_pyarrow,
    open_bytes,
    open_text,
    printable_path,
    read_text,
    suffix_of,
)
from parscale.checkpoints.texts.token_ids import require_text

Row = tuple[str, str, dict[str, Any]]  # its place, for error messages; the name of its document; its columns

JSON, JSON_LINES = ".json", (".jsonl", ".ndjson")
SEPARATED = {".csv": ",", ".tsv": "\t"}
TABLES = (".parquet", ".arrow")
ENDINGS = (JSON, *JSON_LINES, *SEPARATED, *TABLES)
_ARROW_FILE = b"ARROW1"  # the first bytes of an Arrow file, but not of an Arrow stream
_SPACE = re.compile(r"[ \t\r\n]*")
_MOST_NAMES, _LONGEST_NAME = 20, 60  # of columns, and characters of each, in an error
_LONGEST_CELL = 2**31 - 1  # characters; the default of the csv module is 131,072, which a document may exceed


def has_rows(path: Path) -> bool:
    """Whether a file, by its name, holds rows rather than plain text."""
    return suffix_of(path) in ENDINGS


def texts_of_rows(path: Path, column: str) -> Iterator[Document]:
    """The texts of a file's rows with their names, such as `"a.jsonl:3"`; empty ones, and null, are left out.

    Args:
        path: a file for which `has_rows` holds.
        column: the column that holds the text.

    Raises:
        ValueError: it is not a file, is damaged, or has a row without text in this column, or with a chat; raised when
            that row is read.
        OSError: it cannot be read.
    """
    for where, name, row in _rows(path, column):
        if _is_chat(row, column):
            raise ValueError(f"{where}, holds a chat, which only training reads; give rows of text.")
        text = text_of(where, row, column)
        if text.strip():
            yield name, text


def examples_of_rows(path: Path, column: str) -> Iterator[Example]:
    """As `texts_of_rows`, but a row without a text may hold a chat, as `example_of` says."""
    for where, name, row in _rows(path, column):
        example = example_of(where, row, column)
        if not isinstance(example, str) or example.strip():
            yield name, example


def example_of(where: str, row: object, column: str) -> str | Completion | Chat:
    """What is learned of a row: its text, or a chat in `messages`, or in `prompt` and `completion`.

    Args:
        where: what an error names.
        row: its columns; anything else is refused.
        column: what holds the text; a row with text in it is no chat.

    Returns:
        The text, `""` where there is null, or the chat.

    Raises:
        ValueError: there is neither, or it is damaged.
    """
    if _is_chat(row, column):
        return chat_of(where, row)
    try:
        return text_of(where, row, column)
    except ValueError as error:
        if not isinstance(row, dict) or column in row:
            raise
        raise ValueError(f"{error} A row of chats has messages, or prompt and completion.") from None


def _is_chat(row: object, column: str) -> TypeGuard[dict[str, Any]]:
    """Whether a row holds a chat in place of a text."""
    return isinstance(row, dict) and row.get(column) is None and (holds_chat if column in row else is_chat)(row)


def _rows(path: Path, column: str) -> Iterator[Row]:
    suffix = suffix_of(path)
    if suffix in TABLES:
        return _table(path, column)
    if suffix in SEPARATED:
        return _separated(path, SEPARATED[suffix], column)
    return _json(path, column) if suffix == JSON else _json_lines(path)


def text_of(where: str, row: object, column: str) -> str:
    """The text of one row.

    Args:
        where: the place of the row, for error messages.
        row: its columns; other types raise an error.
        column: the column that holds the text.

    Returns:
        The text; `""` where there is null, as tables have it in rows without a text.

    Raises:
        ValueError: there is no such column, or it does not hold text.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}, is not a JSON object but a {type(row).__name__}; write {{{column!r}: ...}}.")
    if column not in row:
        names = [repr(name)[:_LONGEST_NAME] for name in islice(row, _MOST_NAMES)] or ["none"]
        more = f" and {len(row) - _MOST_NAMES:,} more" if len(row) > _MOST_NAMES else ""
        raise ValueError(
            f"{where}, has no column {column!r}; it has: {', '.join(names)}{more}. "
            "Name the one that holds the text with --text-column."
        )
    if row[column] is None:
        return ""
    if not isinstance(row[column], str):
        raise ValueError(f"{where}: column {column!r} is not text but a {type(row[column]).__name__}.")
    return require_text(where, row[column])


def _json_lines(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{printable_path(path)}, line {number}"
                with _is_json(f"{where}, is"):
                    row = json.loads(line)
                yield where, f"{printable_path(path)}:{number}", row


def _json(path: Path, column: str) -> Iterator[Row]:
    """JSON Lines, a list of rows, one row, or an object that contains one list of rows, such as `{"data": [...]}`."""
    values = _json_values(path)
    if len(values) == 1 and isinstance(values[0], dict) and column not in values[0] and not is_chat(values[0]):
        lists = [value for value in values[0].values() if _is_list_of_rows(value)]
        values = lists if len(lists) == 1 else values
    rows = [row for value in values for row in (value if isinstance(value, list) else [value])]
    for number, row in enumerate(rows, 1):
        yield f"{printable_path(path)}, row {number}", f"{printable_path(path)}:{number}", row


def _json_values(path: Path) -> list[Any]:
    """The consecutive JSON values in a file."""
    text = read_text(path)
    values: list[Any] = []
    decoder = json.JSONDecoder()
    with _is_json(f"{printable_path(path)} is"):
        at = _after_space(text, 0)
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            values.append(value)
            at = _after_space(text, end)
    return values


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _is_list_of_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


@contextlib.contextmanager
def _is_json(what: str) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{what} not JSON that can be read: it is nested too deeply.") from error
    except ValueError as error:  # invalid JSON, or a number with thousands of digits
        raise ValueError(f"{what} not JSON: {error}.") from error


def _separated(path: Path, delimiter: str, column: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        try:
            for cells in reader:
                where = f"{printable_path(path)}, line {reader.line_num}"
                if not cells:  # a blank line
                    continue
                if not header:
                    header = [name.strip() for name in cells]
                    if header.count(column) > 1:
                        raise ValueError(f"{where}, has the column {column!r} twice; remove one of them.")
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"{where}, has {len(cells)} cells, but the header has {len(header)} columns; put a cell that "
                        "contains a separator in quotes."
                    )
                yield where, f"{printable_path(path)}:{reader.line_num}", dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{printable_path(path)}, line {reader.line_num}, cannot be read: {error}.") from error


def _table(path: Path, column: str) -> Iterator[Row]:
    with open_bytes(path) as file:
        rows = (row for batch in _batches(path, file, column) for row in batch)
        for number, row in enumerate(rows, 1):
            yield f"{printable_path(path)}, row {number}", f"{printable_path(path)}:{number}", row


def _batches(path: Path, file: BinaryIO, column: str) -> Iterator[list[dict[str, Any]]]:
    """A table's rows, some at a time: only this column and those of chats.

    If the table has none of these columns, all values of its rows are `None`.
    """
    pyarrow, parquet = (import_pyarrow(path, name) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        if suffix_of(path) == ".parquet":
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            batches = table.iter_batches(columns=_read(names, column) or names[:1])
        else:
            start = file.read(len(_ARROW_FILE))
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if start == _ARROW_FILE else pyarrow.ipc.open_stream(file)
            names = reader.schema.names
            batches = map(reader.get_batch, range(reader.num_record_batches)) if start == _ARROW_FILE else reader
        for batch in batches:
            if read := _read(names, column):
                batch = batch.select(read)
                batch.validate(full=True)  # without which offsets that are damaged end the process
                if column in read and not batch.column(column).null_count:  # no row's chat counts
                    batch = batch.select([column])
                yield [without_nulls(row) for row in batch.to_pylist()]
            else:
                yield [dict.fromkeys(names)] * batch.num_rows
    except Exception as error:  # pyarrow raises many types for damage, and Python another for text that is not UTF-8
        raise ValueError(f"{printable_path(path)} cannot be read: {first_line(error)}") from error


def _read(names: list[str], column: str) -> list[str]:
    """Which of a table's columns are read."""
    of_chats = [name for name in names if name in COLUMNS and name != column]
    return [*([column] if column in names else []), *(of_chats if is_chat(dict.fromkeys(names)) else [])]
