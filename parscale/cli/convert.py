"""`parscale convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parscale.cli.options import Files, Json, Seed, TextColumn
from parscale.cli.output import print_figures, print_json, quiet_libraries, waiting


def convert(
    source: Annotated[str, typer.Argument(help="The backbone: a folder, or a name on the Hugging Face Hub.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    num_streams: Annotated[int, typer.Option(help="P, the number of parallel streams.")],
    prefix_length: Annotated[int, typer.Option(help="T, tokens of the prefix or the prompt.")] = 48,
    smoothing: Annotated[float, typer.Option(help="The share of the weights that is spread evenly, 0 to 1.")] = 0.1,
    init: Annotated[
        str | None, typer.Option(help="How streams start: 'documents' or 'context', from text, or 'random'.")
    ] = None,
    calibration: Annotated[
        Files | None,
        typer.Option(
            help="Text that the streams start from: text files, or files of rows, as for train.", metavar="FILE..."
        ),
    ] = None,
    text_column: TextColumn = "text",
    streams_only: Annotated[
        bool, typer.Option("--streams-only", help="Write the streams and the backbone's name, not its weights.")
    ] = False,
    transform: Annotated[str, typer.Option(help="What makes streams differ: 'prefix', 'prompt' or 'lora'.")] = "prefix",
    rank: Annotated[int, typer.Option(help="Of the transform 'lora'.")] = 8,
    seed: Seed = None,
    json: Json = False,
) -> None:
    """Recycle a checkpoint: give a model P parallel streams and save it."""
    from parscale.checkpoints.conversion.convert import convert as convert_checkpoint
    from parscale.config import ParScaleConfig

    quiet_libraries()
    config = ParScaleConfig(
        num_streams=num_streams,
        prefix_length=prefix_length,
        smoothing=smoothing,
        init=init,
        seed=seed,
        transform=transform,
        rank=rank,
    )
    with waiting(f"Converting {source}"):
        report = convert_checkpoint(
            source,
            output,
            config,
            calibration_files=calibration or (),
            text_column=text_column,
            streams_only=streams_only,
        )
    (print_json if json else print_figures)(report)
