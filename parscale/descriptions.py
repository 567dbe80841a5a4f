"""Reads the descriptions of a dataclass's fields from its docstring.

The command line's help, the tables in the documentation and the model cards show these descriptions.
"""

from __future__ import annotations

import inspect
import re

_FIELD = re.compile(r"    (\w+): (.*)")
_LABEL_END = re.compile(r"[.;:](\s|$)")


def descriptions(cls: type) -> dict[str, str]:
    """The description of each field, from the docstring's section `Attributes`, on one line.

    Empty if Python has removed docstrings (`python -OO`).
    """
    found: dict[str, str] = {}
    name = None
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    for line in section.splitlines():
        if not line.strip():
            break
        if match := _FIELD.fullmatch(line):
            name = match[1]
            found[name] = match[2]
        elif name is not None:
            found[name] += f" {line.strip()}"
    return found


def labels(cls: type) -> dict[str, str]:
    """A short label for each field: its description up to the first stop, colon or semicolon, without backticks."""
    return {name: plain(_LABEL_END.split(text)[0]) for name, text in descriptions(cls).items()}


def plain(text: str) -> str:
    """A description without backticks, for a terminal."""
    return text.replace("`", "")
