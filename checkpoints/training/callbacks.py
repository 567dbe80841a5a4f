"""Callbacks of a run: its metrics and progress, and signals that stop it."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parscale.checkpoints.training.divergence import MEASURED
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.trainer import BACKBONE, TEXT, StreamsTrainer
from parscale.checkpoints.training.weight_files import has_streams

LINES = 10  # printed in a run without a terminal for a progress bar


class RunMonitor(TrainerCallback):
    """Writes `metrics.jsonl`, shows a progress bar or a few lines, and measures the backbone before the first step.

    Args:
        run: the run that the metrics belong to.
        tokens_per_step: number of tokens in a step.
        console: where progress is shown: as a bar on a terminal, otherwise as a line from time to time.
    """

    def __init__(self, run: Run, tokens_per_step: int, console: Console) -> None:
        self.run, self.tokens_per_step, self.console = run, tokens_per_step, console
        self.trainer: StreamsTrainer | None = None
        self.seconds, self.steps, self._started = 0.0, 0, 0.0
        self._last, self._rates = 0.0, dict[str, float]()
        self._bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Opens the progress bar; before a new run, measures the model without its streams.

        A checkpoint keeps how often the run saved and measured before; what is given now counts.
        """
        for name in ("save_steps", "eval_steps"):
            setattr(state, name, getattr(args, name))
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

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Notes the step's learning rates, and starts the clock."""
        groups = [] if optimizer is None else optimizer.param_groups
        self._rates = {group["part"]: float(group["lr"]) for group in groups}
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stops the clock, so that evaluation and saving are not counted."""
        self._last = time.perf_counter() - self._started
        self.seconds, self.steps = self.seconds + self._last, self.steps + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Writes one line for a step."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "loss": logs["loss"],
            "grad_norm": norm if (norm := logs.get("grad_norm")) is not None and math.isfinite(norm) else None,
            "learning_rates": self._rates,
            "tokens_per_second": round(self.tokens_per_step / self._last, 1),
        }
        self.run.add_metrics(line)
        text = f"loss {line['loss']:.4f}  {line['tokens']:,} tokens  {line['tokens_per_second']:,.0f}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=text)
        elif state.global_step % max(1, state.max_steps // LINES) == 0:
            with contextlib.suppress(OSError):  # the terminal may be closed
                self.console.print(f"step {state.global_step} of {state.max_steps}  {text}", highlight=False)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Writes one line for a text."""
        if not state.is_world_process_zero:
            return
        for key, value in (metrics or {}).items():
            prefix, _, rest = key.partition("_")
            if prefix in (BACKBONE, TEXT) and rest.endswith(MEASURED):
                line = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
                self.run.add_metrics(line | {"text": rest.removesuffix(MEASURED), f"{prefix}_loss": value})

    @property
    def tokens_per_second(self) -> float | None:
        """The mean over the steps of this process; None before the first step."""
        return round(self.steps * self.tokens_per_step / self.seconds, 1) if self.seconds else None

    def close(self) -> None:
        """Closes the progress bar, whatever ended the run."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal may be closed
                self._bar.stop()
            self._bar = None


class Interruption(TrainerCallback):
    """Stops a run on a signal: the first one after the current step, with a checkpoint; a second one immediately.

    A terminal that closes sends SIGHUP, often twice and with other signals, so SIGHUP never counts as a second signal.
    If it is ignored, as under `nohup`, it stays ignored. With several processes no signal counts as a second one:
    a scheduler and the launcher both signal each process, and the launcher kills those that take too long.
    """

    def __init__(self) -> None:
        self.asked = False
        self.trainer: StreamsTrainer | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Requests a checkpoint and the end, on all processes after the same step."""
        stop, accelerator = self.asked, self._accelerator_of_several()
        if accelerator is not None:
            if stop:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()  # a signal during this is heard after the next step
        if stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In this block SIGINT, SIGTERM and SIGHUP are handled, if it runs in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        hangup = getattr(signal, "SIGHUP", None)  # not on Windows

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked and number != hangup and self._accelerator_of_several() is None:
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

    def _accelerator_of_several(self) -> Accelerator | None:
        """The trainer's accelerator, if several processes train."""
        if self.trainer is None or self.trainer.accelerator.num_processes == 1:
            return None
        return self.trainer.accelerator
