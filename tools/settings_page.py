"""Writes `docs/settings.md`: every setting of a set of streams and of training, as its class describes it.

.venv/bin/python tools/settings_page.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from parscale import ParScaleConfig
from parscale.checkpoints import TrainSettings
from parscale.descriptions import descriptions

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
SECTIONS = (
    (
        ParScaleConfig,
        "A set of streams",
        "Arguments of `wrap` and `add_streams`, fields of `ParScaleConfig`, options of `parscale convert` "
        "(`--num-streams`, which it requires, ...).",
    ),
    (
        TrainSettings,
        "Training",
        "Fields of `parscale.checkpoints.TrainSettings`, options of `parscale train` (`--batch-size`, ...). Documents "
        "in memory are given as a `parscale.checkpoints.Source`.",
    ),
)


def page() -> str:
    """The page as Markdown."""
    parts = ["# Settings", "Written by `tools/settings_page.py` from the classes that are named below."]
    for cls, title, text in SECTIONS:
        said = descriptions(cls)
        rows = [f"| `{field.name}` | {_default(field)} | {said[field.name]} |" for field in dataclasses.fields(cls)]
        parts += [f"## {title}", text, "\n".join(["| name | default | |", "|---|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _default(field: dataclasses.Field[object]) -> str:
    """As code; a dash where it depends on something, which the description says, or where there is none."""
    unset = (None, dataclasses.MISSING, ())
    return "-" if field.default in unset else f"`{field.default!r}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
