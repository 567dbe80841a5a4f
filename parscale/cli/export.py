"""`parscale export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from parscale.cli.options import Checkpoint, Json, Streams
from parscale.cli.output import print_figures, print_json, quiet_libraries, waiting


def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    format: Annotated[Literal["onnx"], typer.Option(help="For ONNX Runtime and ONNX Runtime GenAI.")],
    dtype: Annotated[
        Literal["float32", "float16", "int8", "int4"],
        typer.Option(help="Of the weights; int8 and int4 quantize those of products in blocks of 32."),
    ] = "float32",
    streams: Streams = None,
    json: Json = False,
) -> None:
    """Write a model for a runtime that knows nothing of streams: a decoder with its cache."""
    from parscale.export.onnx import export_onnx

    quiet_libraries()
    with waiting(f"Exporting {checkpoint}"):
        report = export_onnx(checkpoint, output, dtype=dtype, streams=streams)
    (print_json if json else print_figures)(report)
