"""What a dataclass's docstring says of its fields: settings are described there, and read from there.

The command line's help, the tables of the documentation and the model cards all show these descriptions.
"""

from __future__ import annotations

import inspect
import re

_FIELD = re.compile(r"    (\w+): (.*)")
_LABEL_END = re.compile(r"[.;:](\s|$)")


def descriptions(cls: type) -> dict[str, str]:
    """Each field's description, from the docstring's section `Attributes`, on one line.

    Empty where Python has left docstrings out (`python -OO`).
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
    """Each field in a few words: its description up to the first full stop, colon or semicolon, without code marks."""
    return {name: plain(_LABEL_END.split(text)[0]) for name, text in descriptions(cls).items()}


def plain(text: str) -> str:
    """A description without the marks of code, for a terminal."""
    return text.replace("`", "")
