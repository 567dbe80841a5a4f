"""Untrusted text on a terminal: names in files, errors of libraries, text that a model generates.

Such text can hold control sequences (escape sequences, carriage returns) and marks that reverse its order.
`escape_controls` escapes them: in the command line every stream is an `EscapingStream`, and tables, status lines and
progress bars come from `parscale.terminal.console.Terminal`.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters except tab and newline; line and paragraph separators; direction marks; zero-width characters
# without meaning of their own; lone surrogates; tags. Joiners stay: scripts and emoji need them.
_NOT_SHOWN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_LINES_APART = re.compile(r"(\n|\x1b\[A)*")  # how a progress bar finds its line among others
_LINE_ANEW = re.compile(r"(\r?)([^\r]*)(\r?)")


def escape_controls(text: str) -> str:
    r"""Text in which each character that a terminal does not display is an escape, such as `\x1b`."""
    return _NOT_SHOWN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class EscapingStream:
    """Writes the result of `escape_controls` to a stream; otherwise behaves like the stream.

    A carriage return at either end of a text stays: the progress bars of libraries restart their line with it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def write(self, text: str) -> int:
        """Writes text; returns its length."""
        if _LINES_APART.fullmatch(text):
            self.raw.write(text)
        elif anew := _LINE_ANEW.fullmatch(text):
            self.raw.write(anew[1] + escape_controls(anew[2]) + anew[3])
        else:
            self.raw.write(escape_controls(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes several texts."""
        for line in lines:
            self.write(line)


def raw_stream(stream: TextIO) -> TextIO:
    """The stream itself, without `EscapingStream`."""
    return stream.raw if isinstance(stream, EscapingStream) else stream


@contextmanager
def escaping_streams() -> Iterator[None]:
    """In this block standard output and standard error escape what is written to them."""
    output, errors = sys.stdout, sys.stderr
    if isinstance(output, io.TextIOWrapper):  # as standard error does by itself, where an encoding lacks a character
        output.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = EscapingStream(output), EscapingStream(errors)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = output, errors
