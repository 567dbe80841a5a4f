"""Runs whose numbers are no numbers any more: they stop, and nothing of them is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import TrainerCallback

from parscale.distributed.parallel import local

MEASURED = "_nats_per_token"  # the end of a loss's name in what `Trainer.evaluate` returns
_FIRST = "the model gives no finite loss on this text as it is: compute in float32 (--no-bf16), or look at the text"


class DivergedError(ValueError):
    """A loss, a gradient or a weight is not finite."""


class StopWhenDiverged(TrainerCallback):
    """Ends a run at a loss or a gradient norm that is not finite, before anything is saved after that step.

    Args:
        remedy: what to change.
        kept: says what is there to go on from.
    """

    def __init__(self, remedy: str, kept: Callable[[], str]) -> None:
        self.remedy, self.kept = remedy, kept
        self.scaled = False
        self._loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Looks at a step. With scaled gradients of float16 a norm may be infinite: that step is left out then."""
        if "loss" not in logs:
            return
        self._require("loss", logs["loss"], state.global_step)
        if logs.get("grad_norm") is not None and not self.scaled:
            self._require("gradient norm", logs["grad_norm"], state.global_step)
        self._loss = logs["loss"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Looks at what was measured."""
        for name, value in metrics.items():
            if name.endswith(MEASURED):
                text = name.removesuffix(MEASURED).partition("_")[2]
                self._require(f"loss on {text}" if text else "loss", value, state.global_step)

    def _require(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        before = "" if self._loss is None else f", and the loss before it was {self._loss:,.4g}"
        when = f"after step {step}{before}" if step else "before the first step"
        remedy = self.remedy if step > 1 or self._loss is not None else _FIRST
        raise DivergedError(f"The {what} is {value} {when}; {remedy}.{self.kept()}")


def first_not_finite(parameters: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first parameter that holds an infinite value or none at all; None where there is none.

    Of a parameter that is spread over devices, this one's part counts. Quantized ones are left out.
    """
    for name, parameter in parameters:
        values = local(parameter.detach())
        is_plain = type(values) is torch.Tensor and not values.is_meta
        wide = is_plain and values.is_floating_point() and values.element_size() > 1
        if wide and not bool(torch.isfinite(values).all()):
            return name
    return None


def require_finite(model: Any, checkpoint: str) -> None:
    """Refuses a model that cannot be trained.

    Raises:
        ValueError: a parameter holds a value that is not finite.
    """
    if (name := first_not_finite(model.named_parameters())) is not None:
        raise ValueError(f"{name} of {checkpoint} holds values that are not finite: it is damaged, give another one.")
