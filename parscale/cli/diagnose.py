"""`parscale diagnose`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from parscale.cli.options import DATA, Checkpoint, Device, Files, Json, Plot, Streams, TextColumn
from parscale.cli.output import opened, print_figures, print_json, quiet_libraries
from parscale.format.staging import require_plot_path


def diagnose(
    checkpoint: Checkpoint,
    data: Annotated[Files, DATA],
    text_column: TextColumn = "text",
    streams: Streams = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens the model sees at once. Default: 1024, or fewer if its limit is lower.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a batch; each has logits for every stream.")] = 1,
    share: Annotated[
        float | None,
        typer.Option(
            help="Of streams that share keys and values: propose a threshold for --adaptive at which this share of the "
            "tokens gets all streams, 0 to 1.",
            metavar="S",
        ),
    ] = None,
    plot: Plot = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Tell whether the streams differ: the loss of each alone, the correlation of their losses, their weights."""
    from parscale.checkpoints.evaluation.diagnosis import diagnose as diagnose_documents
    from parscale.checkpoints.evaluation.diagnosis import plot_diagnosis, sentences
    from parscale.checkpoints.texts.sources import read_documents

    quiet_libraries()
    if plot is not None:
        require_plot_path(plot)
    documents = read_documents(data, text_column=text_column)
    model, tokenizer = opened(checkpoint, streams, device)
    result = diagnose_documents(
        model, tokenizer, documents, sequence_length=sequence_length, batch_size=batch_size, share=share, progress=True
    )
    if plot is not None:
        plot_diagnosis(result, plot)
    if json:
        print_json({"checkpoint": checkpoint, **result.to_dict(), "sentences": sentences(result)})
        return
    print_figures(
        {
            "checkpoint": checkpoint,
            "streams": result.streams,
            "loss_of_each_stream": result.losses.tolist(),
            "loss_of_the_mixture": result.mixture_loss,
            "gain_over_the_best_stream": result.gain_over_best,
            "gain_over_stream_0": float(result.gains[-1]),
            "mean_correlation": result.mean_correlation,
            "mean_weights": result.mean_weights.tolist(),
            **({} if result.proposal is None else {"adaptive": result.proposal.threshold}),
            "tokens": result.tokens,
            "sequence_length": result.sequence_length,
        }
    )
    _print_gain_by_share(result.to_dict()["gain_by_share"])
    for sentence in sentences(result):
        typer.echo(sentence)
    typer.echo(
        "All this compares the streams with each other. Whether they gain anything is said by controls: parscale train "
        "--controls."
    )


def _print_gain_by_share(rows: list[dict[str, Any]]) -> None:
    """What is left of the gain over stream 0 if only the tokens about which it is least certain get all streams."""
    from rich.table import Table

    from parscale.terminal.console import Terminal

    table = Table(title="Streams on the least certain tokens only, stream 0 on the rest", title_justify="left")
    for column in ("tokens with streams", "gain over stream 0", "of the whole gain", "entropy above (nats)"):
        table.add_column(column, justify="right")
    for row in rows:
        kept = "-" if row["kept"] is None else f"{100 * row['kept']:.0f} %"
        table.add_row(f"{100 * row['tokens']:.0f} %", f"{row['gain']:+.4f}", kept, f"{row['entropy_above']:.3f}")
    Terminal().print(table)
