"""JSON from untrusted files: parsing takes linear time and returns only valid JSON values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from parscale.terminal.text import escape_controls

_DEEPEST = 64  # levels; configurations have 4
_LONGEST_INTEGER = 20  # digits; 2**64 has 20
_SHOWN = 200  # characters of an untrusted value in an error
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: bytes, pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict) -> Any:
    """Parses a JSON text.

    Args:
        text: in UTF-8.
        pairs: makes an object from its names and values.

    Raises:
        ValueError: it is not JSON, is nested deeper than 64 levels, or holds an integer of more than 20 digits or a
            lone surrogate (half a character).
    """
    decoded = text.decode("utf-8")
    try:
        value = json.loads(decoded, parse_int=_integer, object_pairs_hook=pairs)
        if _SURROGATE.search(decoded):
            _check_text(value)
        _check_depth(value)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    return value


def brief(value: object) -> str:
    """An untrusted value for an error message: its first 200 characters, with control characters escaped."""
    text = escape_controls(str(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_TOO_DEEP = f"it is nested deeper than {_DEEPEST} levels"


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"it holds an integer of {len(digits)} digits, {digits[:_LONGEST_INTEGER]}...")
    return int(digits)


def _check_text(value: object) -> None:
    """Raises an error for lone surrogates, which cannot be written to a file or a terminal."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a character, \\u{ord(error.object[error.start]):04x}") from error


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        containers = [each for each in level if isinstance(each, dict | list)]
        if not containers:
            return
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(_TOO_DEEP)
