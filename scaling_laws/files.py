"""Reads files that a user names: text in the Unicode encoding that its first bytes indicate, tables, and JSON."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

# Byte-order marks, and the encodings that remove them. The mark of UTF-32 begins like that of UTF-16.
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DELIMITERS = (",", ";", "\t")


def require_file(path: str | Path, wanted: str) -> None:
    """Raises `FileNotFoundError` if nothing exists, `ValueError` for a folder, a pipe, a device or a socket."""
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist; give {wanted}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise ValueError(f"{path} is {kind}, not a file; give {wanted}")


def read_text(path: str | Path, wanted: str) -> str:
    """The whole text of a file, in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, which is removed.

    Args:
        path: of the file.
        wanted: the expected file, for errors.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not a file (a pipe would block) or not text.
    """
    require_file(path, wanted)
    contents = Path(path).read_bytes()
    encoding = next((encoding for mark, encoding in _ENCODINGS if contents.startswith(mark)), "utf-8")
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is not a text file; give {wanted}")
    return text


def read_json(path: str | Path, wanted: str) -> Any:
    """The value in a JSON file; errors as in `read_text`, and `ValueError` for invalid or too deeply nested JSON."""
    text = read_text(path, wanted)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give {wanted}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; give {wanted}") from None


def read_table(path: str | Path, columns: Collection[str], meaning: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file with a header: the place of each, such as `"runs.csv, line 2"`, and its cells by column.

    Commas, semicolons or tabs separate the cells, as in the header, and a cell may be quoted. Blank lines and lines
    that start with `#` are skipped.

    Args:
        path: of the file.
        columns: required columns.
        meaning: their contents, for errors.

    Raises:
        FileNotFoundError: as in `read_text`.
        ValueError: as in `read_text`; or, with the line, the header lacks one of `columns` or names one twice, or a
            row has more or fewer cells than the header.
    """
    needed = ", ".join(columns)
    lines = [
        (f"{path}, line {number}", line)
        for number, line in enumerate(
            re.split(r"\r\n|\r|\n", read_text(path, f"a CSV file with the columns {needed}")), 1
        )
        if line.strip() and not line.startswith("#")
    ]
    if not lines:
        raise ValueError(f"{path} is empty; it needs a header with the columns {needed} and rows")
    where, first = lines[0]
    delimiter = next((one for one in _DELIMITERS if set(columns) <= set(_names(where, first, one))), ",")
    header = _names(where, first, delimiter)
    if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise ValueError(f"{where}: the header names {', '.join(twice)} twice; remove one of the columns")
    if missing := [name for name in columns if name not in header]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(header)}; name its columns {needed}{meaning}"
        )
    for where, line in lines[1:]:
        cells = _cells(where, line, delimiter)
        if len(cells) != len(header):
            problem = f"{header[len(cells)]} is 'empty': the line has" if len(cells) < len(header) else "the line has"
            raise ValueError(
                f"{where}: {problem} {len(cells)} cells, but the header has {len(header)} columns; write numbers "
                "without thousands separators and with a decimal point, or put a cell that holds a separator in quotes"
            )
        yield where, dict(zip(header, cells, strict=True))


def number(text: str, column: str, where: str) -> float:
    """A cell as a finite number; raises `ValueError` for other text.

    Commas are accepted where they can only separate thousands, as in `1,571,472,384` and `1,500.5`: in `1,571` the
    comma may be a decimal comma.
    """
    if re.fullmatch(r"[+-]?\d{1,3}((,\d{3}){2,}(\.\d*)?|(,\d{3})+\.\d*)", text.strip()):
        text = text.replace(",", "")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{where}: {column} is {text.strip() or 'empty'!r}; give a finite number with a decimal point and without "
            "thousands separators, or remove the row"
        )
    return value


def _names(where: str, line: str, delimiter: str) -> list[str]:
    return [name.strip() for name in _cells(where, line, delimiter)]


def _cells(where: str, line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(f"{where} cannot be read: {error}; a quoted cell must begin and end on one line") from None
