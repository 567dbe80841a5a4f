"""Checks that weights are finite: damaged or diverged models hold NaN or infinite values."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from parscale.distributed.parallel import local


def first_not_finite(parameters: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first parameter with NaN or infinite values; None if all are finite.

    If a parameter is sharded over devices, only this device's part counts. Quantized parameters are skipped.
    """
    for name, parameter in parameters:
        values = local(parameter.detach())
        is_plain = type(values) is torch.Tensor and not values.is_meta
        wide = is_plain and values.is_floating_point() and values.element_size() > 1
        if wide and not bool(torch.isfinite(values).all()):
            return name
    return None


def require_finite(model: torch.nn.Module, checkpoint: str) -> None:
    """Checks that all parameters of a model are finite, before it is trained.

    Raises:
        ValueError: a parameter has a value that is not finite.
    """
    if (name := first_not_finite(model.named_parameters())) is not None:
        raise ValueError(f"{name} of {checkpoint} holds values that are not finite: the checkpoint is damaged.")
