"""Rich's console for untrusted text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from parscale.terminal.text import escape_controls, raw_stream


class Terminal(Console):
    """A console that shows text literally: no markup, no emoji codes, no control characters.

    Args:
        stderr: write to standard error instead of standard output.
        **options: passed to `rich.console.Console`.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        plain = {"markup": False, "emoji": False, "highlight": False}
        stream = raw_stream(sys.stderr if stderr else sys.stdout)
        super().__init__(file=stream, stderr=stderr, **plain | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders the text after `parscale.terminal.text.escape_controls`, so that columns have the right width."""
        return super().render_str(escape_controls(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Renders every piece of text after `parscale.terminal.text.escape_controls`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_controls(segment.text), segment.style)
