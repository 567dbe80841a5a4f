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
        "Arguments of `wrap` and `add_streams`, fields of `ParScaleConfig`, and options of\n"
        "[`parscale convert`](reference/commands.md#parscale-convert), there as `--num-streams` (required) and so on.\n"
        "`wrap` and `add_streams` also take `calibration`, and `wrap` takes `kernels`:\n"
        "[`wrap`](reference/parscale.md).",
    ),
    (
        TrainSettings,
        "Training",
        "Fields of `parscale.checkpoints.TrainSettings`, and options of\n"
        "[`parscale train`](reference/commands.md#parscale-train), there as `--batch-size` and so on. In Python,\n"
        "documents in memory are given as a `parscale.checkpoints.Source`. Options of the command alone, such as\n"
        "`--resume`, `--controls`, `--recipe` and `--from-config`, are [in its\n"
        "reference](reference/commands.md#parscale-train).",
    ),
)


def page() -> str:
    """The page as Markdown."""
    parts = [
        "# Settings",
        'Each name with its default; "-": none, or one that the description gives. Written by\n'
        "`tools/settings_page.py` from the docstrings of the classes that are named below.",
    ]
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
