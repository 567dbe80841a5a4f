"""How commands print: figures as a table or as JSON, and libraries kept quiet."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any


def print_json(figures: Mapping[str, Any]) -> None:
    """One JSON object on standard output, indented."""
    json.dump(figures, sys.stdout, indent=2)
    sys.stdout.write("\n")


def require_writable(path: Path) -> None:
    """Check a file's path, before measuring what shall go into it.

    Raises:
        ValueError: it is a folder, or its folder does not exist.
        OSError: nothing can be written in its folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file to write.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to put {path.name} in; make it first.")
    with _beside(path) as beside:
        beside.touch()


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """One JSON object as a file, indented; it is there whole or not at all, and replaces an older one.

    Raises:
        OSError: it cannot be written.
    """
    with _beside(path) as beside:
        beside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path in the same folder, where nothing is left; errors name the path that was given."""
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield beside
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def print_figures(figures: Mapping[str, Any]) -> None:
    """One aligned line for each figure; a nested mapping's lines are indented beneath its name."""
    from rich.table import Table

    from parscale.console import Terminal

    table = Table.grid(padding=(0, 2))
    for name, value in figures.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            table.add_row(label, "")
            for inner_name, inner in value.items():
                table.add_row("  " + inner_name.replace("_", " "), _show(inner))
        else:
            table.add_row(label, _show(value))
    Terminal(soft_wrap=True).print(table)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal's standard error that something is under way."""
    from rich.text import Text

    from parscale.console import Terminal

    with Terminal(stderr=True).status(Text(what)):
        yield


def quiet_libraries() -> None:
    """Silence the progress bars and hints of transformers, and the Hub's, which mix with what a command prints."""
    from transformers.utils import logging

    quiet_hub()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quiet_hub() -> None:
    """Silence the Hugging Face Hub's lines about attempts to reach it; that they failed is said by the error."""
    from huggingface_hub.utils import logging

    logging.set_verbosity(CRITICAL)


def _show(value: Any) -> str:
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
