"""`parscale quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parscale.cli.options import Json
from parscale.cli.output import print_json, quiet_libraries


def quickstart(
    output: Annotated[Path, typer.Option(help="The folder to write, new or empty: models, figures and plot.")] = Path(
        "parscale-quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of random choices.")] = 0,
    json: Json = False,
) -> None:
    """Convert, post-train, compare and try a small model that comes with this package; offline, in a few minutes."""
    from parscale.checkpoints.quickstart.run import run_quickstart
    from parscale.terminal.console import Terminal

    quiet_libraries()
    report = run_quickstart(output, seed=seed, console=Terminal(stderr=json))
    if json:
        print_json(report)
