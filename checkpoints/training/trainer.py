"""The Trainer for models with streams: two learning rates, exact resumption, losses by text, metrics in a file."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from parscale.checkpoints.training.divergence import MEASURED, DivergedError, first_not_finite
from parscale.checkpoints.training.packing import IGNORED
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.trained_weights import has_streams, load_trained, save_trained, trains_streams_only
from parscale.compat.transformers import counted_as_adapted, require_trainer_methods
from parscale.format.staging import FULL, disk_error
from parscale.streams.naming import part_of

BETAS = (0.9, 0.95)
LINES = 10  # of a run, where there is no terminal for a bar
BACKBONE, TEXT = "backbone", "eval"  # prefixes of what is measured: without streams, and with them


class OneDeviceArguments(TrainingArguments):
    """The Trainer's arguments for one device in each process.

    A process that sees several GPUs and was not started by a launcher uses one of them. The Trainer itself would
    give each GPU a batch, and copy the model to them with `nn.DataParallel`.
    """

    @property
    def n_gpu(self) -> int:
        """How many GPUs this process uses."""
        return min(1, int(super().n_gpu))


class StreamsTrainer(Trainer):
    """A Trainer whose checkpoints are whole or not there, and hold what trains and no more.

    Args:
        model: wrapped or plain, also with an adapter on it; what does not train is frozen.
        args: of the Trainer; the data comes in its own order, so that seeds for it have no effect.
        run: where checkpoints go.
        tokenizer: saved in each checkpoint.
        rates: the peak learning rate of the streams' parameters and that of all others.
        weight_decay: of the others' matrices.
        keep: how many checkpoints stay.
        texts: what to measure on, by name.
        **kwargs: for the Trainer.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        rates: tuple[float, float],
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
        """AdamW with a learning rate for the streams and one for the rest; decay on the rest's matrices only."""
        if self.optimizer is not None:
            return self.optimizer
        trained: Any = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(trained))
        groups: dict[Any, dict[str, Any]] = {}
        for name, parameter in trained.named_parameters():
            if not parameter.requires_grad:
                continue
            of_streams = part_of(name) is not None
            decays = not of_streams and name in decaying
            mesh = getattr(parameter, "device_mesh", None)  # one kernel call cannot take parameters of several
            settings = {
                "lr": self.rates[0 if of_streams else 1],
                "weight_decay": self.weight_decay if decays else 0.0,
                "of_streams": of_streams,
            }
            group = groups.setdefault((not of_streams, decays, mesh), settings | {"params": []})
            group["params"].append(parameter)
        ordered = [groups[key] for key in sorted(groups, key=lambda key: key[:2])]
        self.optimizer = torch.optim.AdamW(ordered, betas=BETAS)
        return self.optimizer

    # -- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
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
        """Says that a checkpoint could not be written, why, and how to go on; free space counts while it lies there."""
        try:
            yield
        except Exception as error:
            if not _is_about_writing(error):
                raise
            raise OSError(self._not_written(step, error)) from error

    def _require_finite_weights(self, step: int) -> None:
        """Refuses to save a step that has made a weight infinite, on all processes together."""
        trained = ((name, p) for name, p in self.bare_model().named_parameters() if p.requires_grad)
        name = first_not_finite(trained)
        found = torch.tensor(float(name is not None), device=self.accelerator.device)
        if float(self.accelerator.reduce(found, reduction="sum")):
            where = "a part of the model on another device" if name is None else name
            raise DivergedError(
                f"After step {step}, {where} holds values that are not finite; start anew with a smaller learning rate."
                f"{self.run.kept()}"
            )

    def _not_written(self, step: int, error: Exception) -> str:
        whole = self.run.newest_checkpoint()
        last = "there is none before it" if whole is None else f"{whole} is whole"
        code = disk_error(error)
        reason = str(error).splitlines()[0] if code is None else os.strerror(code)
        remedy = "Make room on the disk" if code is None or code in FULL else "Make it a folder that can be written"
        free = shutil.disk_usage(self.run.folder).free
        return (
            f"The checkpoint after {step} steps could not be written to {self.run.folder}, where {free:,} bytes are "
            f"free ({reason.rstrip('.')}); {last}. {remedy} and go on with --resume."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; every process takes part where the model is in parts.

        Where FSDP's checkpoints are sharded, only the last one holds the model as a folder too.
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
        """The model without what accelerate and the compiler put around it; an adapter stays."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


class Watch(TrainerCallback):
    """Writes `metrics.jsonl`, shows a progress bar or a few lines, and measures the backbone before the first step.

    Args:
        run: where the metrics go.
        tokens_per_step: of a step.
        console: where the bar is shown, if it is a terminal; if not, a line now and then.
    """

    def __init__(self, run: Run, tokens_per_step: int, console: Console) -> None:
        self.run, self.tokens_per_step, self.console = run, tokens_per_step, console
        self.trainer: StreamsTrainer | None = None
        self.seconds, self.steps, self._started = 0.0, 0, 0.0
        self._last = 0.0
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar; a new run is first measured without its streams."""
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()
        trainer = self.trainer
        if trainer is None or not trainer.eval_dataset or state.global_step:
            return
        model = trainer.bare_model()
        if has_streams(model):
            with model.use_streams(None):
                trainer.evaluate(metric_key_prefix=BACKBONE)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock: measuring and saving do not count."""
        self._last = time.perf_counter() - self._started
        self.seconds, self.steps = self.seconds + self._last, self.steps + 1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """One line for a step."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        groups = optimizer.param_groups
        factor = logs["learning_rate"] / groups[0]["initial_lr"] if groups[0]["initial_lr"] else 0.0
        rates = {"streams" if group["of_streams"] else "backbone": factor * group["initial_lr"] for group in groups}
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "loss": logs["loss"],
            "grad_norm": norm if (norm := logs.get("grad_norm")) is not None and math.isfinite(norm) else None,
            "learning_rates": rates,
            "tokens_per_second": round(self.tokens_per_step / self._last, 1) if self._last else None,
        }
        self.run.add_metrics(line)
        text = f"loss {line['loss']:.4f}  {line['tokens']:,} tokens  {line['tokens_per_second']:,.0f}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=text)
        elif state.global_step % max(1, state.max_steps // LINES) == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self.console.print(f"step {state.global_step} of {state.max_steps}  {text}", highlight=False)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """One line for a text."""
        if not state.is_world_process_zero:
            return
        for key, value in metrics.items():
            prefix, _, rest = key.partition("_")
            if prefix in (BACKBONE, TEXT) and rest.endswith(MEASURED):
                line = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
                self.run.add_metrics(line | {"text": rest.removesuffix(MEASURED), f"{prefix}_loss": value})

    @property
    def tokens_per_second(self) -> float | None:
        """The mean over the steps of this process; None if there was none."""
        return round(self.steps * self.tokens_per_step / self.seconds, 1) if self.seconds else None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Closes the bar, also after an error."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._bar.stop()
            self._bar = None


class Interruption(TrainerCallback):
    """A signal to stop ends the run after the step under way, with a checkpoint; a second one ends it at once.

    A terminal that closes sends SIGHUP, often twice and beside others: it never counts as a second signal. Where it is
    ignored, as under `nohup`, it stays so.
    """

    def __init__(self) -> None:
        self.asked = False
        self.trainer: StreamsTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint and for the end, on all processes after the same step."""
        accelerator = self.trainer.accelerator if self.trainer is not None else None
        if accelerator is not None and accelerator.num_processes > 1:
            if self.asked:
                accelerator.set_trigger()
            self.asked = accelerator.check_trigger()
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In this block SIGINT, SIGTERM and SIGHUP are heard, if it runs in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        hangup = getattr(signal, "SIGHUP", None)  # which Windows lacks

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked and number != hangup:
                raise KeyboardInterrupt
            self.asked = True

        heard = [signal.SIGINT, signal.SIGTERM]
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            heard.append(hangup)
        before = {number: signal.signal(number, ask) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _saves_whole_models(accelerator: Any) -> bool:
    return "FULL_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)


def _sums_by_row(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Each row's summed loss in nats and the number of tokens predicted, `(rows, 2)`, from logits `(rows, S, V)`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]  # (rows, S - 1)
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.double().sum(1), (targets != IGNORED).double().sum(1)], dim=1)


def _nats_per_token(prediction: EvalPrediction) -> dict[str, float]:
    sums = np.asarray(prediction.predictions).sum(axis=0)
    return {MEASURED.lstrip("_"): float(sums[0] / sums[1])}


def _is_about_writing(error: Exception) -> bool:
    """Whether an error came from a disk and is not explained yet; libraries raise errors of their own for it."""
    if disk_error(error) is not None:
        return True
    words = ("PytorchStreamWriter", "unexpected pos", "iostream error", "No space left", "write")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
