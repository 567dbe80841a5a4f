"""`parscale eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parscale.cli.options import DATA, Adaptive, Checkpoint, Device, Files, Json, Streams, TextColumn
from parscale.cli.output import for_tables, opened, print_figures, print_json, quiet_libraries, write_json
from parscale.format.staging import require_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[Files | None, DATA] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-eval, by name, pattern or YAML file; or our groups general, math, code, hallucination.",
            metavar="NAME...",
        ),
    ] = None,
    text_column: TextColumn = "text",
    streams: Streams = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="With --data: other checkpoints to hold this one against, or 'off' for its own plain backbone; at the "
            "beginnings and in the middles of the documents, with intervals.",
            metavar="CHECKPOINT...",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens the model sees at once. Default: its limit, with --data at most 1024."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or a task's questions, in a batch.")] = 8,
    adaptive: Adaptive = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="With --tasks: examples before each question. Default: as the task says.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="With --tasks: maximum questions of each, or a share below 1; for trial runs.")
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="With --tasks: a folder with your own task files, which can run code.", metavar="DIR"),
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code",
            help="With --tasks: run code that the model writes. Code in task files (!function) always runs.",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write all figures to this file, as JSON.", metavar="FILE")
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure loss (nats per token) and perplexity on text, or run lm-eval's tasks."""
    from parscale.checkpoints.texts.sources import read_documents

    quiet_libraries()
    of_tasks = {
        "--num-fewshot": num_fewshot is not None,
        "--limit": limit is not None,
        "--include-path": include_path is not None,
        "--confirm-run-unsafe-code": confirm_run_unsafe_code,
    }
    _check_options(data, tasks, against, adaptive, of_tasks=[name for name, given in of_tasks.items() if given])
    if output is not None:
        require_writable(output)
    documents = read_documents(data or [], text_column=text_column)
    model, tokenizer = opened(checkpoint, streams, device)

    if tasks:
        from parscale.checkpoints.evaluation.tasks import evaluate_tasks

        figures = evaluate_tasks(
            model,
            tokenizer,
            tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            sequence_length=sequence_length,
            include_path=include_path,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            adaptive=adaptive,
        )
        figures["parscale"] = {"checkpoint": checkpoint} | figures["parscale"]
    else:
        comparisons = {}
        if against:
            from parscale.checkpoints.checkpoint_comparison import compare_checkpoints
            from parscale.checkpoints.evaluation.text_loss import checked_length

            comparisons["comparisons"] = compare_checkpoints(
                (model, tokenizer, checkpoint),
                against,
                documents,
                sequence_length=checked_length(model, sequence_length),
                batch_size=batch_size,
                device=device,
            )
        measured = _measure(model, tokenizer, documents, checkpoint, streams, sequence_length, batch_size, adaptive)
        figures = measured | comparisons
    try:
        if json:
            print_json(figures)
        elif tasks:
            _print_scores(figures)
        else:
            _print_losses(figures)
    finally:  # also where nobody reads what is printed
        if output is not None:
            write_json(output, figures)


def _check_options(
    data: list[Path] | None,
    tasks: list[str] | None,
    against: list[str] | None,
    adaptive: float | None,
    *,
    of_tasks: list[str],
) -> None:
    """Raises an error for options that do not go together; `of_tasks` are those given that only --tasks takes."""
    if bool(data) == bool(tasks):
        raise ValueError("Give either --data FILE... or --tasks NAME..., not both. Try 'parscale eval --help'.")
    if data and of_tasks:
        raise ValueError(f"Only --tasks takes {' and '.join(of_tasks)}; leave it out. Try 'parscale eval --help'.")
    if against and (tasks or adaptive is not None):
        raise ValueError("--against compares losses on --data, with all streams; leave --tasks and --adaptive out.")


def _print_losses(figures: dict[str, Any]) -> None:
    shown = {"loss (nats per token)" if name == "loss" else name: value for name, value in figures.items()}
    shown.pop("parscale")
    comparisons = shown.pop("comparisons", [])
    print_figures(shown | {"documents": len(figures["documents"])})
    _print_comparisons(comparisons)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[tuple[str, str]],
    checkpoint: str,
    streams: str | None,
    sequence_length: int | None,
    batch_size: int,
    adaptive: float | None,
) -> dict[str, Any]:
    from parscale.checkpoints.evaluation.tasks import stamp
    from parscale.checkpoints.evaluation.text_loss import evaluate as evaluate_documents

    result = evaluate_documents(
        model,
        tokenizer,
        documents,
        sequence_length=sequence_length,
        batch_size=batch_size,
        adaptive=adaptive,
        progress=True,
    )
    return {
        "checkpoint": checkpoint,
        "streams": "off" if streams == "off" else getattr(model, "num_streams", 1),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "sequence_length": result.sequence_length,
        **_adapted(adaptive, result.mean_streams, model),
        "documents": [
            {"name": document.name, "loss": document.loss, "tokens": document.tokens} for document in result.documents
        ],
        "parscale": {"checkpoint": checkpoint} | stamp(model),
    }


def _print_comparisons(comparisons: list[dict[str, Any]]) -> None:
    from parscale.checkpoints.evaluation.paired_differences import table_of

    if comparisons:
        names = {entry[side] for entry in comparisons for side in ("arm", "baseline")}
        table = table_of(comparisons, {name: name for name in names})
        for_tables().print(table)


def _adapted(threshold: float | None, mean_streams: float | None, model: Any) -> dict[str, Any]:
    """The threshold, how many streams ran for a token on average, and the share of the tokens that got them all."""
    from parscale.checkpoints.evaluation.text_loss import shown_threshold

    if threshold is None or mean_streams is None:
        return {}
    share = (mean_streams - 1) / (model.num_streams - 1)
    return {"adaptive": shown_threshold(threshold), "mean_streams": mean_streams, "share_of_tokens": share}


def _print_scores(figures: dict[str, Any]) -> None:
    from rich.table import Table

    from parscale.checkpoints.evaluation.tasks import scores

    print_figures(figures["parscale"])
    typer.echo()
    table = Table("task", "metric", "filter", box=None, padding=(0, 2, 0, 0))
    for column in ("value", "standard error", "questions", "examples before each"):
        table.add_column(column, justify="right", no_wrap=True)
    for task, metric, answer_filter, value, error in scores(figures):
        asked = figures["n-samples"].get(task)  # a group has no entry
        questions = "" if asked is None else f"{asked['effective']:,} of {asked['original']:,}"
        standard_error = "-" if error is None else f"{error:.4f}"
        examples = str(figures["n-shot"].get(task, ""))
        table.add_row(task, metric, answer_filter, f"{value:.4f}", standard_error, questions, examples)
    for_tables().print(table)
