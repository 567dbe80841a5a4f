"""`parscale convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parscale.cli.options import Files, Json, Special, TextColumn, takes_settings
from parscale.cli.output import print_figures, print_json, quiet_libraries, waiting
from parscale.cli.recipes import Recipe
from parscale.config import LORA, ParScaleConfig


@takes_settings(
    ParScaleConfig,
    "config",
    num_streams=Special(required=True),
    seed=Special(option={"min": 0}),
)
def convert(
    source: Annotated[str, typer.Argument(help="The backbone: a folder, or a name on the Hugging Face Hub.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    config: ParScaleConfig,
    recipe: Recipe = None,
    calibration: Annotated[
        Files | None,
        typer.Option(help="Text that the streams start from: text files, or files of rows of text.", metavar="FILE..."),
    ] = None,
    text_column: TextColumn = "text",
    streams_only: Annotated[
        bool, typer.Option("--streams-only", help="Write the streams and the backbone's name, not its weights.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the full checkpoint: float32, bfloat16 or float16. Default: as the source is saved."),
    ] = None,
    json: Json = False,
) -> None:
    """Recycle a checkpoint: add P parallel streams to a model and save it."""
    from parscale.checkpoints.conversion.convert import convert as convert_checkpoint

    if config.transform != LORA and config.rank != ParScaleConfig.rank:
        raise ValueError(f"--rank is of --transform lora, and the transform is {config.transform}; omit one of them.")
    quiet_libraries()
    with waiting(f"Converting {source}"):
        report = convert_checkpoint(
            source,
            output,
            config,
            calibration_files=calibration or (),
            text_column=text_column,
            streams_only=streams_only,
            dtype=dtype,
        )
    (print_json if json else print_figures)(report)
