"""Post-training of a checkpoint on text, from start to end: `train` is the function behind `parscale train`.

The loop is that of the Hugging Face Trainer, on one device or, under `torchrun` or `accelerate launch`, on many. The
output folder is described in `parscale.checkpoints.training.run_folder`; at the end it holds a checkpoint of the same
kind as the one that was trained.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from parscale.checkpoints.evaluation.text_loss import checked_length
from parscale.checkpoints.finite_values import require_finite
from parscale.checkpoints.texts.files import printable_path
from parscale.checkpoints.texts.sources import refuse_output_in_data
from parscale.checkpoints.texts.token_ids import vocabulary_of
from parscale.checkpoints.training.callbacks import Interruption, RunMonitor
from parscale.checkpoints.training.digests import checkpoint_digest
from parscale.checkpoints.training.divergence import DivergedError, StopWhenDiverged
from parscale.checkpoints.training.model_loading import check_trainable, open_for_training
from parscale.checkpoints.training.new_model import NewModel
from parscale.checkpoints.training.nodes import require_same_data, require_shared_folder
from parscale.checkpoints.training.packing import Encoder, Streamed, keeps_documents_apart
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.run_result import finish, losses_by_text
from parscale.checkpoints.training.run_settings import (
    reported_settings,
    settings_known_after_reading,
    settings_known_before_reading,
    tokenizer_of,
)
from parscale.checkpoints.training.settings import LearningRates, TrainSettings
from parscale.checkpoints.training.trackers import check_trackers
from parscale.checkpoints.training.trainer import OneDeviceArguments, StreamsTrainer
from parscale.checkpoints.training.training_data import Sources, TrainingData
from parscale.checkpoints.training.weight_files import is_adapted
from parscale.checkpoints.versions import versions
from parscale.compat.transformers import attn_implementation, forget_deepspeed, is_flash
from parscale.format.counting import parameter_sizes
from parscale.streams.state import active_streams
from parscale.terminal.console import Terminal

MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"  # how a launcher says it
REMEDY = "start again in another folder with a smaller --learning-rate or --streams-learning-rate, or a longer --warmup"


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run after a step, with a checkpoint; the message names it."""


def train(
    checkpoint: str | NewModel,
    output: Path,
    settings: TrainSettings,
    *,
    resume: bool = False,
    command: str | None = None,
    name: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Post-trains a checkpoint and saves it, as the same kind and in the same dtypes, with its tokenizer.

    Args:
        checkpoint: a folder or a name on the Hugging Face Hub: a full checkpoint, streams only, or a plain model; or a
            model that does not exist yet.
        output: the folder of the run, new or empty, or with `resume` that of a run which was stopped.
        settings: what on, how much and how.
        resume: go on from the newest checkpoint in `output` that is whole, with the same settings: on one device the
            result is the same to the last bit. Where there is none, the run starts; a finished one is left as it is,
            whatever is measured.
        command: what the model card says it was made by.
        name: what the model card calls the result, such as its repository on the Hub; by default the folder's name.
        console: where progress is shown; by default standard error.

    Returns:
        The report, as in `training.json`; `"finished_before"` is true if the run had already finished.

    Raises:
        ValueError: the data, the checkpoint or the settings do not fit, or the processes have no common output folder
            or data; nothing has been written.
        DivergedError: a loss, a gradient or a weight is not finite; the last checkpoint stays complete.
        OSError: something is missing or cannot be written, or another process is running the run; the last checkpoint
            stays complete.
        Interrupted: a signal ended the run, after a checkpoint.
    """
    run = Run(Path(output))
    try:
        return _train_locked(run, checkpoint, settings, resume, command, name, console or Terminal(stderr=True))
    finally:
        run.release()


def _train_locked(
    run: Run,
    checkpoint: str | NewModel,
    settings: TrainSettings,
    resume: bool,
    command: str | None,
    name: str | None,
    console: Console,
) -> dict[str, Any]:
    """Does the work of `train`; the run's folder stays locked by this process until it is released."""
    state = PartialState(cpu=_on_cpu())
    if state.is_main_process:
        run.check(resume=resume)
    state.wait_for_everyone()
    require_shared_folder(run.folder, state)
    if resume and (before := run.report()) is not None:
        run.require_same(settings_known_before_reading(checkpoint, settings, before), partly=True)
        if state.is_main_process:
            with console.status("Reading the data"):
                run.require_same(settings_known_after_reading(checkpoint, settings, before), partly=True)
        return before | {"finished_before": True}

    start = time.perf_counter()
    trained = _train_to_last_step(run, checkpoint, settings, state, console, resume=resume)
    if state.is_main_process:
        gc.collect()  # the model and its optimizer, which refer to each other
        torch.cuda.empty_cache()
        _write_result(run, checkpoint, trained, command=command, name=name, start=start)
    state.wait_for_everyone()
    report = run.report()
    assert report is not None
    return report | {"finished_before": False}


@dataclass(frozen=True)
class _Trained:
    """What is left of a run's steps, beside its last checkpoint."""

    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    micro: int
    sharded: bool  # whether one device may be too small for the model
    figures: dict[str, Any]


def _train_to_last_step(
    run: Run,
    checkpoint: str | NewModel,
    settings: TrainSettings,
    state: PartialState,
    console: Console,
    *,
    resume: bool,
) -> _Trained:
    """Trains to the last step; the model and its optimizer live no longer than this call."""
    prepared = _prepare(run, checkpoint, settings, state, console)
    newest = _begin(run, prepared.run_settings, state, resume=resume)
    monitor, interruption = RunMonitor(run, settings.batch_size * prepared.length, console), Interruption()
    trainer = _make_trainer(run, settings, prepared, state, newest, [monitor, interruption])
    monitor.trainer = interruption.trainer = trainer
    _run_steps(trainer, run, newest, monitor, interruption)

    sizes = parameter_sizes(trainer.bare_model())
    trainer.accelerator.wait_for_everyone()
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    forget_deepspeed()  # with it, a model that is loaded is shared among all processes
    figures = {
        "trained_parameters": sum(size for tensor, size in sizes.items() if tensor.requires_grad),
        "parameters": sum(sizes.values()),
        "tokens_per_second": monitor.tokens_per_second,
    }
    return _Trained(prepared.tokenizer, prepared.data, prepared.micro, sharded, prepared.run_settings | figures)


def _write_result(
    run: Run,
    checkpoint: str | NewModel,
    trained: _Trained,
    *,
    command: str | None,
    name: str | None,
    start: float,
) -> None:
    """Puts the trained checkpoint and the report into the run's folder."""
    figures, data = trained.figures, trained.data
    report = figures | {
        "output": str(run.folder),
        "losses": losses_by_text(run.metrics()),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
        "command": None if command is None else printable_path(command),
        "name": name or run.folder.resolve().name,
        "datasets": data.datasets,
    }
    _require_unchanged(checkpoint, figures)
    texts = data.held_out
    if trained.sharded and texts:
        warnings.warn(
            "The model was trained in parts, and one device may be too small for it; compare it with the untouched "
            f"backbone by: parscale eval {run.folder} --data ... --against off",
            stacklevel=2,
        )
        texts = {}
    elif not isinstance(checkpoint, NewModel):
        for text in (name for name in data.measured if name not in texts):
            warnings.warn(
                f"The trained model is not compared with the untouched backbone on {text}, which holds no text for it: "
                "chats are measured while training only.",
                stacklevel=2,
            )
    with _explained(run):
        finish(checkpoint, run, data.steps, trained.tokenizer, report, texts, trained.micro)


@dataclass(frozen=True)
class _Prepared:
    """The state of a run before its first step: everything is read and checked, nothing is written yet."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    length: int  # of a sequence, in tokens
    micro: int  # sequences on a device at once
    rates: LearningRates
    bf16: bool
    run_settings: dict[str, Any]


def _prepare(
    run: Run, checkpoint: str | NewModel, settings: TrainSettings, state: PartialState, console: Console
) -> _Prepared:
    bf16 = _bf16(settings)
    check_trackers(settings.report_to)
    check_trainable(checkpoint, settings.trains)
    tokenizer = tokenizer_of(checkpoint)
    refuse_output_in_data(run.folder, [*settings.data, *settings.eval_data.values()])
    sources = Sources(settings)
    sources.check_chats(tokenizer)
    set_seed(settings.seed)
    micro = _micro_batch(settings, state.num_processes)
    model = _model(checkpoint, settings, bf16, micro)
    length = checked_length(model, settings.sequence_length)
    with console.status("Reading the data"):
        data = sources.packed(Encoder(tokenizer, vocabulary_of(model)), length)
    measured = {name: blocks.fingerprint() for name, blocks in data.measured.items()}
    texts = {"training data": data.digest} | {f"eval data {name}": digest for name, digest in measured.items()}
    require_same_data(texts, state)
    devices = torch.cuda.device_count()
    if devices > 1 and state.num_processes == 1:
        warnings.warn(
            f"{devices} GPUs are available, but only one is used; to use all of them, run "
            f"torchrun --nproc-per-node {devices} -m parscale train ...",
            stacklevel=4,
        )

    new = checkpoint if isinstance(checkpoint, NewModel) else None
    active = active_streams(model)
    rates = settings.rates("prefix" if active is None else active.config.transform, new=new is not None)
    run_settings = reported_settings(str(checkpoint), settings, rates, bf16, length, data.steps) | {
        "checkpoint_digest": checkpoint_digest(checkpoint) if state.is_main_process else None,
        "data_digest": data.digest,
        "eval_digests": measured,
        **({} if new is None else {"new_model": new.described()}),
    }
    return _Prepared(model, tokenizer, data, length, micro, rates, bf16, run_settings)


def _make_trainer(
    run: Run,
    settings: TrainSettings,
    prepared: _Prepared,
    state: PartialState,
    newest: Path | None,
    callbacks: list[TrainerCallback],
) -> StreamsTrainer:
    data, micro = prepared.data, prepared.micro
    divergence = StopWhenDiverged(REMEDY, run.resume_hint)
    arguments = OneDeviceArguments(
        output_dir=str(run.folder),
        bf16=prepared.bf16,
        use_cpu=_on_cpu(),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // (micro * state.num_processes),
        eval_strategy="steps" if data.measured else "no",
        eval_on_start=bool(data.measured) and newest is None,
        **_arguments(settings, data.steps),
    )
    if arguments.mixed_precision == "bf16" and not prepared.bf16:  # the launcher's, in place of what was given
        arguments.mixed_precision = "no"
    trainer = StreamsTrainer(
        prepared.model,
        arguments,
        run=run,
        tokenizer=prepared.tokenizer,
        rates=prepared.rates,
        weight_decay=settings.weight_decay,
        keep=settings.keep_checkpoints,
        texts=data.measured,
        train_dataset=data.rows,
        callbacks=[divergence, *callbacks],
    )
    divergence.scaled = getattr(trainer.accelerator, "scaler", None) is not None
    return trainer


def _on_cpu() -> bool:
    return not torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"


def _require_unchanged(checkpoint: str | NewModel, figures: Mapping[str, Any]) -> None:
    if checkpoint_digest(checkpoint) != figures["checkpoint_digest"]:
        raise ValueError(
            f"{checkpoint} has changed during the run, so the result would mix two checkpoints; restore the old one, "
            "and continue with --resume."
        )


def _bf16(settings: TrainSettings) -> bool:
    """Whether to compute in bfloat16: as given, or as the launcher says, or where a GPU supports it."""
    if settings.bf16 is not None:
        return settings.bf16
    launcher = os.environ.get(MIXED_PRECISION, "no")
    return launcher == "bf16" or (launcher == "no" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())


def _model(checkpoint: str | NewModel, settings: TrainSettings, bf16: bool, micro: int) -> Any:
    """The model, ready to train; warns if it mixes documents that are packed together.

    Raises:
        ValueError: it keeps them apart in one row only, and more are trained at once, or flash-attention would compute
            in float32.
    """
    model = open_for_training(
        checkpoint,
        trains=settings.trains,
        lora_rank=settings.lora_rank,
        quantize=settings.quantize,
        keep_dtype=bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        attn_implementation=settings.attn_implementation,
    )
    require_finite(model, str(checkpoint))
    attention = attn_implementation(model.config)
    if is_flash(attention) and not bf16 and os.environ.get(MIXED_PRECISION) != "fp16":
        raise ValueError(
            f"{attention} computes in half precision, and this run in float32; give --bf16, or --attn-implementation "
            "sdpa."
        )
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        apart = keeps_documents_apart(model, vocabulary_of(model), rows=min(micro, 2))
        in_one_row = not apart and micro > 1 and keeps_documents_apart(model, vocabulary_of(model))
    if in_one_row:
        raise ValueError(
            f"{checkpoint} keeps documents that are packed together apart only where one sequence runs at once, as "
            "models with flash-attention do; give --micro-batch-size 1, or --attn-implementation sdpa."
        )
    if not apart:
        warnings.warn(
            f"{checkpoint} lets documents that are packed into one sequence see each other.",
            stacklevel=3,
        )
    return model


def _begin(run: Run, run_settings: dict[str, Any], state: PartialState, *, resume: bool) -> Path | None:
    """Prepares the run's folder on one process, for all; returns the checkpoint to resume from, if there is one."""
    found: list[Path | None] = [None]
    if state.is_main_process:
        run.begin(run_settings, resume=resume)
        newest = run.newest_checkpoint() if resume else None  # reads all files
        run.keep_metrics(-1 if newest is None else int(newest.name.rpartition("-")[2]))
        found = [newest]
    broadcast_object_list(found)
    return found[0]


def _arguments(settings: TrainSettings, steps: int) -> dict[str, Any]:
    """The arguments of the Trainer that depend only on the settings and the number of steps."""
    tenth = max(1, steps // 10)
    return {
        "max_steps": steps,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": round(settings.decay * steps), "decay_type": "linear"},
        "warmup_steps": round(settings.warmup * steps),
        "max_grad_norm": 1.0,
        "torch_compile": settings.compile,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": settings.save_every or tenth,
        "eval_steps": settings.eval_every or tenth,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": list(settings.report_to) or "none",
        "seed": settings.seed,
    }


def _run_steps(
    trainer: StreamsTrainer, run: Run, newest: Path | None, monitor: RunMonitor, interruption: Interruption
) -> None:
    """Trains to the last step, or raises the reason for stopping."""
    try:
        with interruption.listening(), _explained(run):
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    except ValueError as error:
        if isinstance(error, DivergedError) or not isinstance(trainer.train_dataset, Streamed):
            raise
        last = None if is_adapted(trainer.bare_model()) else run.newest_checkpoint()
        start = "" if last is None else f", from {last}"
        raise ValueError(
            f"{str(error).rstrip('.')}. With the same data --resume goes on; after a correction, start in a new "
            f"folder{start}."
        ) from error
    finally:
        monitor.close()
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"Stopped with {run.newest_checkpoint()}; --resume continues from there.")


@contextlib.contextmanager
def _explained(run: Run) -> Iterator[None]:
    """In this block an error of a full disk says how to resume the run."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"The disk of {run.folder} is full. Free some space and continue with --resume; the last complete "
            f"checkpoint is {run.newest_checkpoint() or 'none, so the run will start again'}."
        ) from error


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
