"""Whether weights are numbers at all: what is damaged or has diverged holds infinite values, or none."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from parscale.distributed.parallel import local


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


def require_finite(model: torch.nn.Module, checkpoint: str) -> None:
    """Refuses a model that cannot be trained.

    Raises:
        ValueError: a parameter holds a value that is not finite.
    """
    if (name := first_not_finite(model.named_parameters())) is not None:
        raise ValueError(f"{name} of {checkpoint} holds values that are not finite: it is damaged, give another one.")
