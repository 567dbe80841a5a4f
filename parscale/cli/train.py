"""`parscale train`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from parscale.cli.options import Checkpoint, Json, TextColumn, count
from parscale.cli.output import print_figures, print_json, quiet_libraries


def train(
    checkpoint: Checkpoint,
    data: Annotated[
        list[str],
        typer.Option(
            help="Text files, folders, files of rows (.json, .jsonl, .csv, .tsv, .parquet, .arrow), or datasets of the "
            "Hub, NAME or NAME:CONFIGURATION.",
            metavar="FILE_OR_DATASET...",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder of the run; new or empty, unless --resume is given.")],
    tokens: Annotated[
        int | None, typer.Option(parser=count, help="How many to train on, as 20000000 or 20M. Default: the data once.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a sequence. Default: 1024, or fewer if the model takes fewer.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step, over all devices.")] = 8,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Of these, how many a device takes at once. Default: its whole share.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="At its peak. Default: 3e-5, with --lora-rank 2e-4. With --freeze-backbone: of the streams."),
    ] = None,
    streams_learning_rate: Annotated[
        float | None, typer.Option(help="Of the streams, at its peak. Default: 1e-2; prompts 1e-3, low-rank 3e-3.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of the backbone's matrices.")] = 0.0,
    warmup: Annotated[float, typer.Option(help="The share of steps in which the learning rate rises.")] = 0.02,
    decay: Annotated[float, typer.Option(help="The share of steps at the end in which it falls to zero.")] = 0.2,
    freeze_backbone: Annotated[bool, typer.Option("--freeze-backbone", help="Train the streams alone.")] = False,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train an adapter of this rank and the streams, not the backbone itself.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Keep a frozen backbone in 'int8' (torchao) or 'nf4' (bitsandbytes).")
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on, as FILE or NAME=FILE; each is reported apart.", metavar="FILE..."),
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements. Default: a tenth.")] = None,
    eval_tokens: Annotated[int, typer.Option(help="How many of each text are measured, at most.")] = 50_000,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: a tenth.")] = None,
    keep_checkpoints: Annotated[int, typer.Option(help="How many checkpoints stay.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder from its last checkpoint.")
    ] = False,
    text_column: TextColumn = "text",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read data while training, not beforehand; needs --tokens.")
    ] = False,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16. Default: on GPUs that can.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for activations, more time.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    attn_implementation: Annotated[
        str | None, typer.Option(help="Such as sdpa, flash_attention_2 or flex_attention.")
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Trackers, such as tensorboard or trackio.", metavar="TRACKER...")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the result to this repository of the Hugging Face Hub.", metavar="NAME")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the text.")] = 0,
    json: Json = False,
) -> None:
    """Post-train a checkpoint on text; also under torchrun or accelerate launch, on many devices."""
    from parscale.checkpoints.training.train import Interrupted, TrainSettings
    from parscale.checkpoints.training.train import train as train_checkpoint

    quiet_libraries()
    settings = TrainSettings(
        data=data,
        eval_data=_named(eval_data or []),
        text_column=text_column,
        streaming=streaming,
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        streams_learning_rate=streams_learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        decay=decay,
        freeze_backbone=freeze_backbone,
        lora_rank=lora_rank,
        quantize=quantize,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        attn_implementation=attn_implementation,
        eval_every=eval_every,
        eval_tokens=eval_tokens,
        save_every=save_every,
        keep_checkpoints=keep_checkpoints,
        report_to=report_to or [],
        seed=seed,
    )
    command = shlex.join(["parscale", *sys.argv[1:]])
    try:
        report = train_checkpoint(checkpoint, output, settings, resume=resume, command=command, name=push_to_hub)
    except Interrupted as interruption:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"parscale: {interruption}", file=sys.stderr)
        raise
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if push_to_hub is not None:
        from parscale.checkpoints.training.model_card import push

        report = report | {"uploaded_to": push(output, push_to_hub)}
    if json:
        print_json(report)
    else:
        _print(report)


def _named(texts: list[str]) -> dict[str, str]:
    """`["code=a.txt", "b.txt"]` as `{"code": "a.txt", "b": "b.txt"}`."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            name, source = Path(text).stem or text, text
        name = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name)
        if name in named:
            raise ValueError(f"Two texts to measure on are called {name!r}; name them apart, as in NAME={source}.")
        named[name] = source
    return named


def _print(report: dict[str, Any]) -> None:
    if report["finished_before"]:
        print(f"The run in {report['output']} has finished before; nothing was left to do.")
    losses = {
        f"loss on {name}": ", ".join(f"{when} {value:.4f}" for when, value in found.items())
        for name, found in report["losses"].items()
    }
    shown = ("checkpoint", "output", "trains", "trained_parameters", "tokens", "tokens_per_second", "seconds")
    uploaded = {"uploaded_to": report["uploaded_to"]} if "uploaded_to" in report else {}
    print_figures({name: report[name] for name in shown} | losses | uploaded)
