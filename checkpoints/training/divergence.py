"""Stops runs whose losses, gradients or weights become NaN or infinite, before anything of them is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MEASURED = "_nats_per_token"  # the end of the name of a loss in the result of `Trainer.evaluate`
_FIRST = "the loss on this text is not finite before training: compute in float32 (--no-bf16), or check the text"


class DivergedError(ValueError):
    """A loss, a gradient or a weight is not finite."""


class StopWhenDiverged(TrainerCallback):
    """Stops a run at a loss or gradient norm that is not finite, before anything is saved after that step.

    Args:
        remedy: what to change.
        resume_hint: returns the end of the message: which checkpoint the run can continue from.
    """

    def __init__(self, remedy: str, resume_hint: Callable[[], str]) -> None:
        self.remedy, self.resume_hint = remedy, resume_hint
        self.scaled = False
        self._loss: float | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Checks a step. With scaled gradients in float16 a norm may be infinite: then that step is skipped."""
        if logs is None or "loss" not in logs:
            return
        self._require("loss", logs["loss"], state.global_step)
        if logs.get("grad_norm") is not None and not self.scaled:
            self._require("gradient norm", logs["grad_norm"], state.global_step)
        self._loss = logs["loss"]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Checks the measured losses."""
        for name, value in (metrics or {}).items():
            if name.endswith(MEASURED):
                text = name.removesuffix(MEASURED).partition("_")[2]
                self._require(f"loss on {text}" if text else "loss", value, state.global_step)

    def _require(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        before = "" if self._loss is None else f", and the loss before it was {self._loss:,.4g}"
        when = f"after step {step}{before}" if step else "before the first step"
        remedy = self.remedy if step > 1 or self._loss is not None else _FIRST
        raise DivergedError(f"The {what} is {value} {when}; {remedy}.{self.resume_hint()}")
