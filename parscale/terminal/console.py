"""Rich's console, for text that others wrote."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from parscale.terminal.text import raw_stream, shown


class Terminal(Console):
    """A console that shows text as it is: no markup, no names of emoji, no control characters.

    Args:
        stderr: write to standard error instead of standard output.
        **options: for `rich.console.Console`.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        plain = {"markup": False, "emoji": False, "highlight": False}
        stream = raw_stream(sys.stderr if stderr else sys.stdout)
        super().__init__(file=stream, stderr=stderr, **plain | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, of the text `parscale.terminal.text.shown`: columns are as wide as that."""
        return super().render_str(shown(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """As rich's, with the text of every piece `parscale.terminal.text.shown`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)
