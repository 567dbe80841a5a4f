"""How commands print: figures as a table or as JSON, that a checkpoint is loading, and libraries kept quiet."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parscale.format.staging import staged_file

if TYPE_CHECKING:
    from parscale.terminal.console import Terminal


def print_json(figures: Mapping[str, Any]) -> None:
    """Prints one indented JSON object on standard output."""
    sys.stdout.write(_json(figures))


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes one indented JSON object to a file, completely or not at all; replaces an older file.

    Raises:
        ValueError: the path is a folder, not a regular file, or a broken link.
        OSError: the path cannot be written.
    """
    with staged_file(path) as beside:
        beside.write_text(_json(figures), encoding="utf-8")


def without_nan(figures: object) -> Any:
    """The same figures with None in place of NaN and infinities, which JSON does not support."""
    if isinstance(figures, Mapping):
        return {name: without_nan(value) for name, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [without_nan(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def _json(figures: Mapping[str, Any]) -> str:
    return json.dumps(without_nan(figures), indent=2, allow_nan=False) + "\n"


def print_figures(figures: Mapping[str, Any]) -> None:
    """Prints one aligned line for each figure; the lines of a nested mapping are indented under its name."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in figures.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            table.add_row(label, "")
            for inner_name, inner in value.items():
                table.add_row("  " + inner_name.replace("_", " "), _show(inner))
        else:
            table.add_row(label, _show(value))
    for_tables().print(table)


def for_tables() -> Terminal:
    """A console on standard output that cuts no line off, however narrow the terminal is."""
    from parscale.terminal.console import Terminal

    return Terminal(soft_wrap=True, width=1000)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows on a terminal's standard error that something is running."""
    from rich.text import Text

    from parscale.terminal.console import Terminal

    with Terminal(stderr=True).status(Text(what)):
        yield


def opened(checkpoint: str, streams: str | None, device: str | None) -> tuple[Any, Any]:
    """A checkpoint's model and its tokenizer; a terminal's standard error shows that they are loaded.

    Raises:
        ValueError: it has no tokenizer, or as in `open_checkpoint`.
    """
    from parscale.checkpoints.models import open_checkpoint, require_tokenizer

    with waiting(f"Loading {checkpoint}"):
        model, tokenizer = open_checkpoint(checkpoint, streams=streams, device=device)
    return model, require_tokenizer(tokenizer, checkpoint)


def quiet_libraries() -> None:
    """Silences the progress bars and hints of transformers and the Hub, which would mix with a command's output."""
    from transformers.utils import logging

    quiet_hub()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quiet_hub() -> None:
    """Silences the Hub's log lines about connection attempts; the final error reports that they failed."""
    from huggingface_hub.utils import logging

    logging.set_verbosity(CRITICAL)


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(item) for item in value) or "-"
    return str(value)
