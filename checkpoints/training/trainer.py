"""The Trainer for models with streams: learning rates by part, complete checkpoints, losses by text."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from parscale.checkpoints.finite_values import first_not_finite
from parscale.checkpoints.training.divergence import MEASURED, DivergedError
from parscale.checkpoints.training.packing import IGNORED
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.settings import LearningRates
from parscale.checkpoints.training.weight_files import has_streams, load_trained, save_trained, trains_streams_only
from parscale.compat.transformers import counted_as_adapted, require_trainer_methods
from parscale.format.staging import DISK_FULL, disk_error
from parscale.streams.naming import AGGREGATOR_PART, TRANSFORM_PART, part_of

BETAS = (0.9, 0.95)
RATE_OF = {TRANSFORM_PART: "streams", AGGREGATOR_PART: "aggregator", None: "backbone"}  # by the part of a parameter
BACKBONE, TEXT = "backbone", "eval"  # prefixes of measured losses: without streams, and with them


class OneDeviceArguments(TrainingArguments):
    """The Trainer's arguments for one device in each process.

    A process that sees several GPUs and was not started by a launcher uses one of them. The Trainer itself would split
    each batch over all GPUs with `nn.DataParallel`.
    """

    @property
    def n_gpu(self) -> int:
        """The number of GPUs that this process uses."""
        return min(1, int(super().n_gpu))


class StreamsTrainer(Trainer):
    """A Trainer whose checkpoints are complete or absent, and hold only the trained weights.

    Args:
        model: wrapped or plain, also with an adapter; parameters that are not trained are frozen.
        args: of the Trainer; the data has a fixed order, so seeds for it have no effect.
        run: the run that the checkpoints belong to.
        tokenizer: saved in each checkpoint.
        rates: the peak learning rates.
        weight_decay: of the matrices among the other parameters.
        keep: number of checkpoints to keep.
        texts: texts to measure on, by name.
        **kwargs: passed to the Trainer.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        rates: LearningRates,
        weight_decay: float,
        keep: int,
        texts: Mapping[str, Dataset[Any]],
        **kwargs: Any,
    ) -> None:
        self.run, self.tokenizer, self.rates, self.weight_decay, self.keep = run, tokenizer, rates, weight_decay, keep
        self._staging: Path | None = None
        require_trainer_methods(Trainer)
        streams_train = getattr(model, "is_quantized", False) and has_streams(model)
        with counted_as_adapted(model) if streams_train else contextlib.nullcontext():
            super().__init__(
                model,
                args,
                eval_dataset=dict(texts) or None,
                compute_metrics=_nats_per_token,
                preprocess_logits_for_metrics=_sums_by_row,
                **kwargs,
            )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    # -- data and optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data) if hasattr(data, "__len__") else None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with learning rates for streams, aggregator and the rest; only the rest's matrices decay."""
        if self.optimizer is not None:
            return self.optimizer
        trained: Any = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(trained))
        groups: dict[Any, dict[str, Any]] = {}
        for name, parameter in trained.named_parameters():
            if not parameter.requires_grad:
                continue
            part = RATE_OF[part_of(name)]
            decays = part == "backbone" and name in decaying
            mesh = getattr(parameter, "device_mesh", None)  # one kernel call supports one device mesh only
            settings = {
                "lr": getattr(self.rates, part),
                "weight_decay": self.weight_decay if decays else 0.0,
                "part": part,
            }
            group = groups.setdefault((LearningRates._fields.index(part), decays, mesh), settings | {"params": []})
            group["params"].append(parameter)
        ordered = [groups[key] for key in sorted(groups, key=lambda key: key[:2])]
        self.optimizer = torch.optim.AdamW(ordered, betas=BETAS)
        return self.optimizer

    # -- checkpoints

    def _get_output_dir(self, trial: object) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        self._require_finite_weights(step)
        self._staging = self.run.saving
        working = self.run.working() if self.is_world_process_zero() else contextlib.nullcontext()
        try:
            with self._explained(step), working, self._explained(step):
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    processes = self.accelerator.num_processes
                    self.run.publish(self._staging / f"checkpoint-{step}", step, keep=self.keep, processes=processes)
                self.accelerator.wait_for_everyone()
        finally:
            self._staging = None

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Explains an error while writing a checkpoint: its cause, the free space at that time, and how to resume."""
        try:
            yield
        except Exception as error:
            if not _is_about_writing(error):
                raise
            raise OSError(self._not_written(step, error)) from error

    def _require_finite_weights(self, step: int) -> None:
        """Checks, on all processes together, that a step has left all weights finite, before they are saved."""
        trained = ((name, p) for name, p in self.bare_model().named_parameters() if p.requires_grad)
        name = first_not_finite(trained)
        found = torch.tensor(float(name is not None), device=self.accelerator.device)
        if float(self.accelerator.reduce(found, reduction="sum")):
            where = "a parameter on another device" if name is None else name
            raise DivergedError(
                f"After step {step}, {where} has values that are not finite; start again with a smaller learning rate."
                f"{self.run.resume_hint()}"
            )

    def _not_written(self, step: int, error: Exception) -> str:
        whole = self.run.newest_checkpoint()
        last = "there is none before it" if whole is None else f"{whole} is complete"
        code = disk_error(error)
        reason = str(error).splitlines()[0] if code is None else os.strerror(code)
        remedy = "Free some space" if code is None or code in DISK_FULL else "Make it a folder that can be written"
        free = shutil.disk_usage(self.run.folder).free
        return (
            f"The checkpoint after {step} steps could not be written to {self.run.folder}, where {free:,} bytes are "
            f"free ({reason.rstrip('.')}); {last}. {remedy} and continue with --resume."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as the Trainer does; every process takes part if the model is sharded.

        If FSDP's checkpoints are sharded, only the last one also holds the model as a folder.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        is_last = self.state.global_step >= self.state.max_steps
        if self.is_fsdp_enabled and not is_last and not _saves_whole_models(self.accelerator):
            return
        state_dict = None
        if not trains_streams_only(self.bare_model()):
            state_dict = self.accelerator.get_state_dict(self.deepspeed if self.is_deepspeed_enabled else self.model)
        self._save(output_dir, state_dict)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder, writes = Path(str(output_dir or self.args.output_dir)), self.args.should_save
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer.save_pretrained(folder)
        save_trained(self.bare_model(), folder, state_dict, is_main_process=writes)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.bare_model(), Path(resume_from_checkpoint))

    def bare_model(self) -> Any:
        """The model without the wrappers of accelerate and torch.compile; an adapter stays."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def _saves_whole_models(accelerator: Any) -> bool:
    return "FULL_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)


def _sums_by_row(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Each row's summed loss in nats and its number of predicted tokens, `(rows, 2)`, from `(rows, S, V)` logits."""
    if isinstance(logits, tuple):  # experts put their auxiliary loss, a number, in front
        logits = next(part for part in logits if isinstance(part, torch.Tensor) and part.ndim == 3)
    targets = labels[:, 1:]  # (rows, S - 1)
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.double().sum(1), (targets != IGNORED).double().sum(1)], dim=1)


def _nats_per_token(prediction: EvalPrediction) -> dict[str, float]:
    sums = np.asarray(prediction.predictions).sum(axis=0)
    return {MEASURED.lstrip("_"): float(sums[0] / sums[1])}


def _is_about_writing(error: Exception) -> bool:
    """Whether an error comes from writing to disk and is not explained yet; libraries raise their own errors."""
    if disk_error(error) is not None:
        return True
    words = ("PytorchStreamWriter", "unexpected pos", "iostream error", "No space left", "write")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
