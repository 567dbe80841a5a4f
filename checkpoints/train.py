"""Post-training of a checkpoint on text, from beginning to end: `train` is what `parscale train` calls.

The loop is the Hugging Face Trainer's, on one device or, under `torchrun` or `accelerate launch`, on many. The output
folder holds what :mod:`parscale.checkpoints.runs` says, and at the end a checkpoint of the kind that was trained.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from parscale import __version__
from parscale.checkpoints.card import TextLosses, TrainingFacts, model_card
from parscale.checkpoints.curve import plot_metrics
from parscale.checkpoints.data import Source, open_source, open_sources
from parscale.checkpoints.evaluate import checked_length
from parscale.checkpoints.opening import EVERYTHING, LORA, STREAMS, check_trainable, open_for_training
from parscale.checkpoints.packing import Blocks, Encoder, Shuffled, Streamed, keeps_documents_apart, pack, too_few
from parscale.checkpoints.reading import find_tokenizer, require_tokenizer
from parscale.checkpoints.runs import REPORT, Run
from parscale.checkpoints.trained import put_together
from parscale.checkpoints.trainer import BACKBONE, TEXT, Interruption, StreamsTrainer, Watch
from parscale.parallel import whole_shape
from parscale.writing import staged

STREAMS_RATE, BACKBONE_RATE, LORA_RATE = 1e-2, 3e-5, 2e-4
PLOT = "loss.png"


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after a step, with a checkpoint; the message names it."""


@dataclass(frozen=True)
class TrainSettings:
    """How to post-train a checkpoint.

    Attributes:
        data: training text; names as `parscale.checkpoints.data.open_source` takes them.
        eval_data: text to measure on, by the name that the metrics have it under.
        text_column: what holds the text in rows of JSON Lines, tables and datasets.
        streaming: read datasets while training, and not beforehand; needs `tokens`.
        tokens: how many to train on, rounded down to whole steps; by default the data once.
        sequence_length: tokens in a sequence; by default 1024, or as many as the model takes.
        batch_size: sequences in an optimizer step, over all devices.
        micro_batch_size: sequences that a device takes at once; by default its whole share of the batch.
        learning_rate: at its peak, of all that trains and is not of streams: by default 3e-5, of an adapter 2e-4. With
            a frozen backbone, of the streams.
        streams_learning_rate: of prefixes and aggregator, at its peak; by default 1e-2.
        weight_decay: of the backbone's matrices.
        warmup: the share of steps in which the learning rate rises; after it, it is constant.
        decay: the share of steps at the end in which it falls to zero.
        freeze_backbone: train the streams alone.
        lora_rank: train an adapter of this rank beside the streams in place of the backbone; merged into it at the end.
        quantize: keep the frozen backbone in `"int8"` (torchao) or `"nf4"` (bitsandbytes) while training.
        bf16: compute in bfloat16 under autocast, with float32 weights where they train; by default on GPUs that can.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile: run the model through `torch.compile`.
        attn_implementation: as in `from_pretrained`.
        eval_every: steps between measurements; by default a tenth of the run.
        eval_tokens: how many of each text are measured, at most.
        save_every: steps between checkpoints; by default a tenth of the run.
        keep_checkpoints: how many stay.
        report_to: trackers of the Trainer, such as `"tensorboard"` or `"trackio"`.
        seed: of the order of the text and of what else is drawn.

    Raises:
        ValueError: a number is out of range, or two settings exclude each other.
    """

    data: Sequence[str]
    eval_data: Mapping[str, str] = field(default_factory=dict)
    text_column: str = "text"
    streaming: bool = False
    tokens: int | None = None
    sequence_length: int | None = None
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    streams_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.02
    decay: float = 0.2
    freeze_backbone: bool = False
    lora_rank: int | None = None
    quantize: str | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    attn_implementation: str | None = None
    eval_every: int | None = None
    eval_tokens: int = 200_000
    save_every: int | None = None
    keep_checkpoints: int = 2
    report_to: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("There is no data to train on; name at least one file, folder or dataset.")
        for name in (
            "tokens",
            "batch_size",
            "micro_batch_size",
            "lora_rank",
            "eval_every",
            "eval_tokens",
            "save_every",
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("keep_checkpoints", self.keep_checkpoints, 1)
        _at_least("sequence_length", self.sequence_length, 2)
        for name in ("learning_rate", "streams_learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}, and must be a number of at least 0.")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ValueError(
                f"warmup is {self.warmup} and decay {self.decay}; they are shares of the run, and together at most 1."
            )
        if self.freeze_backbone and self.lora_rank is not None:
            raise ValueError(
                "freeze_backbone trains the streams alone, and lora_rank an adapter too; give one of them."
            )
        if self.quantize not in (None, "int8", "nf4"):
            raise ValueError(f"quantize is {self.quantize!r}, and must be 'int8' or 'nf4'.")
        if self.quantize is not None and self.trains == EVERYTHING:
            raise ValueError("A quantized backbone cannot train; give freeze_backbone or lora_rank with quantize.")
        if self.streaming and self.tokens is None:
            raise ValueError("Streamed data has no length; say with tokens how many to train on.")

    @property
    def trains(self) -> str:
        """`"streams"`, `"lora"` or `"everything"`."""
        return STREAMS if self.freeze_backbone else LORA if self.lora_rank is not None else EVERYTHING

    @property
    def rates(self) -> tuple[float, float]:
        """The peak learning rates of the streams' parameters and of all others."""
        of_streams = self.streams_learning_rate
        if of_streams is None:
            given = self.learning_rate if self.trains == STREAMS else None
            of_streams = STREAMS_RATE if given is None else given
        rest = self.learning_rate
        if rest is None:
            rest = LORA_RATE if self.trains == LORA else BACKBONE_RATE
        return of_streams, rest


def train(
    checkpoint: str,
    output: Path,
    settings: TrainSettings,
    *,
    resume: bool = False,
    command: str | None = None,
    name: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Post-trains a checkpoint and saves it, of the same kind and in the same dtypes, with its tokenizer.

    Args:
        checkpoint: a folder or a name on the Hugging Face Hub: a full checkpoint, streams only, or a plain model.
        output: the folder of the run, new or empty, or with `resume` that of a run which was stopped.
        settings: what on, how much and how.
        resume: go on from the newest checkpoint in `output` that is whole, with the same settings: on one device the
            result is the same to the last bit. Where there is none, the run starts; a finished one is left as it is.
        command: what the model card says it was made by.
        name: what the model card calls the result, such as its repository on the Hub; by default the folder's name.
        console: where progress is shown; by default standard error.

    Returns:
        The report, as in `training.json`; `"finished_before"` is true if there was nothing left to do.

    Raises:
        ValueError: the data, the checkpoint or the settings do not fit; nothing has been written then.
        OSError: something is missing or cannot be written; the last checkpoint stays whole.
        Interrupted: a signal ended the run, after a checkpoint.
    """
    console = console or Console(stderr=True)
    on_cpu = not torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"
    state = PartialState(cpu=on_cpu)
    run = Run(output)
    if state.is_main_process:
        run.check(resume=resume)
    state.wait_for_everyone()
    if resume and (report := run.report()) is not None:
        return report | {"finished_before": True}

    start = time.perf_counter()
    check_trainable(checkpoint, settings.trains)
    tokenizer = require_tokenizer(find_tokenizer(checkpoint), checkpoint)
    sources = open_sources(
        settings.data, text_column=settings.text_column, streaming=settings.streaming, seed=settings.seed
    )
    texts = {name: open_source(source, text_column=settings.text_column) for name, source in settings.eval_data.items()}
    set_seed(settings.seed)
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    model = open_for_training(
        checkpoint,
        trains=settings.trains,
        lora_rank=settings.lora_rank,
        quantize=settings.quantize,
        keep_dtype=bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        attn_implementation=settings.attn_implementation,
    )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = checked_length(model, settings.sequence_length)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        apart = keeps_documents_apart(model, vocabulary)
    if not apart:
        warnings.warn(
            f"{checkpoint} is a model in which documents that are packed into one sequence see each other.",
            stacklevel=2,
        )
    encode = Encoder(tokenizer, vocabulary)
    with console.status("Reading the data"):
        rows, steps, digest = _training_rows(sources, encode, length, settings)
        measured = {name: _measured_blocks(source, encode, length, settings) for name, source in texts.items()}
    micro = _micro_batch(settings, state.num_processes)

    described = _described(checkpoint, settings, bf16, length, steps, digest)
    if state.is_main_process:
        run.begin(described, resume=resume)
    state.wait_for_everyone()
    newest = run.newest_checkpoint() if resume else None
    state.wait_for_everyone()
    if state.is_main_process:
        run.keep_metrics(-1 if newest is None else int(newest.name.rpartition("-")[2]))
    tenth = max(1, steps // 10)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // (micro * state.num_processes),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(settings.decay * steps), "decay_type": "linear"},
        warmup_steps=round(settings.warmup * steps),
        max_grad_norm=1.0,
        bf16=bf16,
        torch_compile=settings.compile,
        use_cpu=on_cpu,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=settings.save_every or tenth,
        eval_strategy="steps" if measured else "no",
        eval_steps=settings.eval_every or tenth,
        eval_on_start=bool(measured) and newest is None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(settings.report_to) or "none",
        seed=settings.seed,
    )
    watch, interruption = Watch(run, settings.batch_size * length, console), Interruption()
    trainer = StreamsTrainer(
        model,
        arguments,
        run=run,
        tokenizer=tokenizer,
        rates=settings.rates,
        weight_decay=settings.weight_decay,
        keep=settings.keep_checkpoints,
        texts=measured,
        train_dataset=rows,
        callbacks=[watch, interruption],
    )
    watch.trainer = interruption.trainer = trainer
    try:
        with interruption.listening():
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"The disk of {output} is full. Make room there and go on with --resume; the last whole checkpoint is "
            f"{run.newest_checkpoint() or 'none, so that it will begin again'}."
        ) from error
    finally:
        watch.close()
    if trainer.state.global_step < steps:
        raise Interrupted(f"Stopped with {run.newest_checkpoint()}; --resume goes on from there.")
    sizes = [(math.prod(whole_shape(p)), p.requires_grad) for p in trainer.bare_model().parameters()]
    parameters, trained_parameters = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()  # with it, a model that is loaded is shared among all processes
    if state.is_main_process:
        report = described | {
            "output": str(output),
            "trained_parameters": trained_parameters,
            "parameters": parameters,
            "losses": losses_by_text(run.metrics()),
            "tokens_per_second": round(watch.steps * watch.tokens_per_step / watch.seconds, 1)
            if watch.seconds
            else None,
            "seconds": round(time.perf_counter() - start, 1),
            "versions": _versions(),
            "command": command,
            "name": name or output.resolve().name,
        }
        _finish(checkpoint, run, steps, tokenizer, report)
    trainer.accelerator.wait_for_everyone()
    finished = run.report()
    assert finished is not None
    return finished | {"finished_before": False}


def losses_by_text(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Each text's loss in nats per token, from a run's metrics: of the backbone, before the first step, at the end."""
    losses: dict[str, dict[str, float]] = {}
    for line in metrics:
        if "text" not in line:
            continue
        found = losses.setdefault(line["text"], {})
        if f"{BACKBONE}_loss" in line:
            found["backbone"] = line[f"{BACKBONE}_loss"]
        else:
            found.setdefault("before", line[f"{TEXT}_loss"])
            found["after"] = line[f"{TEXT}_loss"]
    return losses


def _training_rows(
    sources: Sequence[Source], encode: Encoder, length: int, settings: TrainSettings
) -> tuple[Shuffled | Streamed, int, str | None]:
    """What to train on, in how many steps, and a digest of it where it is known beforehand."""
    per_step = settings.batch_size * length
    if settings.streaming:
        assert settings.tokens is not None
        steps = _steps(settings.tokens, per_step, settings, length)
        return Streamed(list(sources), encode, length, steps * settings.batch_size), steps, None
    lengths: list[int] = []

    def encoded() -> Any:
        for ids in encode(document for source in sources for document in source):
            lengths.append(len(ids))
            yield ids

    blocks = Blocks(pack(encoded(), length), length)
    if not len(blocks):
        raise too_few(sum(lengths), length)
    tokens = len(blocks) * length if settings.tokens is None else settings.tokens
    steps = _steps(tokens, per_step, settings, length)
    return Shuffled(blocks, steps * settings.batch_size, settings.seed), steps, blocks.fingerprint()


def _steps(tokens: int, per_step: int, settings: TrainSettings, length: int) -> int:
    if tokens < per_step:
        raise ValueError(
            f"{tokens:,} tokens are fewer than the {per_step:,} of one step ({settings.batch_size} sequences of "
            f"{length:,} tokens); give more tokens, or a smaller batch or sequence."
        )
    return tokens // per_step


def _measured_blocks(source: Source, encode: Encoder, length: int, settings: TrainSettings) -> Blocks:
    padding = encode.tokenizer.eos_token_id or 0
    blocks: list[Any] = []
    for block in pack(encode(source), length, padding=padding):
        blocks.append(block)
        if len(blocks) * length >= settings.eval_tokens:
            break
    if not any((positions > 0).any() for _, positions in blocks):
        raise ValueError(f"{source.name} holds no document of two tokens, so no loss can be measured on it.")
    return Blocks(blocks, length)


def _micro_batch(settings: TrainSettings, processes: int) -> int:
    if settings.batch_size % processes:
        raise ValueError(
            f"batch_size is {settings.batch_size}, and must be a multiple of the {processes} processes, which share it."
        )
    share = settings.batch_size // processes
    micro = settings.micro_batch_size or share
    if share % micro:
        raise ValueError(f"micro_batch_size is {micro}, and must divide each process's {share} sequences of a batch.")
    return micro


def _described(
    checkpoint: str, settings: TrainSettings, bf16: bool, length: int, steps: int, digest: str | None
) -> dict[str, Any]:
    """What a run is started with, as far as its result depends on it."""
    of_streams, rest = settings.rates
    return {
        "checkpoint": checkpoint,
        "trains": settings.trains,
        "data": list(settings.data),
        "data_digest": digest,
        "text_column": settings.text_column,
        "eval_data": dict(settings.eval_data),
        "tokens": steps * settings.batch_size * length,
        "steps": steps,
        "sequence_length": length,
        "batch_size": settings.batch_size,
        "streams_learning_rate": of_streams,
        "learning_rate": rest,
        "weight_decay": settings.weight_decay,
        "warmup": settings.warmup,
        "decay": settings.decay,
        "lora_rank": settings.lora_rank,
        "quantize": settings.quantize,
        "bf16": bf16,
        "seed": settings.seed,
    }


def _finish(checkpoint: str, run: Run, steps: int, tokenizer: Any, report: dict[str, Any]) -> None:
    """Puts the trained checkpoint, its tokenizer, its card, the plot and the report into the run's folder."""
    put_together(checkpoint, run.checkpoint(steps), run.folder)
    tokenizer.save_pretrained(run.folder)
    with staged(run.folder, last=REPORT) as work:
        plot_metrics(run.metrics(), work / PLOT)
        facts = _facts(run.folder, report)
        if facts is not None:
            (work / "README.md").write_text(model_card(facts), encoding="utf-8")
        (work / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _facts(folder: Path, report: Mapping[str, Any]) -> TrainingFacts | None:
    """What the model card states, or None for a model without streams."""
    from parscale.checkpoints.describe import describe

    what = describe(str(folder))
    if what["num_streams"] == 1:
        return None
    rates = {"streams": report["streams_learning_rate"]}
    if report["trains"] != STREAMS:
        rates["adapter" if report["trains"] == LORA else "backbone"] = report["learning_rate"]
    backbone = what["backbone"]
    source = describe(report["checkpoint"])["backbone"]["name"]
    return TrainingFacts(
        checkpoint=report["name"],
        backbone_class=str(backbone["class"]),
        backbone=None if source == "in this folder" else source,
        num_streams=what["num_streams"],
        prefix_length=what["prefix_length"],
        smoothing=what["smoothing"],
        init=what["init"],
        trains=report["trains"],
        trained_parameters=report["trained_parameters"],
        parameters=report["parameters"],
        tokens=report["tokens"],
        sequence_length=report["sequence_length"],
        batch_size=report["batch_size"],
        learning_rates=rates,
        schedule=(
            f"it rises over {report['warmup']:.0%} of the steps, is constant, and falls to zero over the last "
            f"{report['decay']:.0%}"
        ),
        data=tuple(report["data"]),
        datasets=tuple(source.partition(":")[0] for source in report["data"] if not Path(source).exists()),
        command=report["command"] or "parscale.checkpoints.train.train(...)",
        losses={
            name: TextLosses(found.get("backbone"), found.get("before"), found.get("after"))
            for name, found in report["losses"].items()
        },
        versions=report["versions"],
        streams_only=what["kind"] == "streams only",
    )


def _versions() -> dict[str, str]:
    return {
        "parscale": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise ValueError(f"{name} is {value}, and must be at least {minimum}.")
