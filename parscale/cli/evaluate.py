"""`parscale eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from parscale.cli.options import Checkpoint, Device, Files, Json, Streams
from parscale.cli.output import print_figures, print_json, quiet_libraries, waiting


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[Files, typer.Option(help="Text files, each one document.", metavar="FILE...")],
    streams: Streams = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens the model sees at once. Default: 1024, or fewer if it takes fewer.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a batch.")] = 8,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure loss (nats per token) and perplexity on text."""
    from parscale.checkpoints.evaluate import evaluate as evaluate_documents
    from parscale.checkpoints.reading import open_checkpoint, read_documents, require_tokenizer

    quiet_libraries()
    documents = read_documents(data)
    with waiting(f"Loading {checkpoint}"):
        model, tokenizer = open_checkpoint(checkpoint, streams=streams, device=device)
    tokenizer = require_tokenizer(tokenizer, checkpoint)
    result = evaluate_documents(
        model, tokenizer, documents, sequence_length=sequence_length, batch_size=batch_size, progress=True
    )
    figures = {
        "checkpoint": checkpoint,
        "streams": "off" if streams == "off" else getattr(model, "num_streams", 1),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "sequence_length": result.sequence_length,
        "documents": [
            {"name": document.name, "loss": document.loss, "tokens": document.tokens} for document in result.documents
        ],
    }
    if json:
        print_json(figures)
    else:
        figures = {"loss (nats per token)" if name == "loss" else name: value for name, value in figures.items()}
        print_figures(figures | {"documents": len(result.documents)})
