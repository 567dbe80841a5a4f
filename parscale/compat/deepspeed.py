"""DeepSpeed ZeRO-3: how its parameters and models are told from others, without importing it.

DeepSpeed is imported by whoever uses it. Where it is not, nothing is partitioned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from parscale.compat.names import needed


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether a parameter is one of ZeRO-3's, whose own values are empty outside a module's forward pass."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of all of a parameter, of which a process may hold nothing."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_of_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed's engine runs a model: it puts dictionaries of its own class into the modules."""
    return type(vars(model).get("_parameters")).__name__ == "ZeROOrderedDict"


def gathered(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    """A context in which partitioned parameters are whole, to be read."""
    return needed(needed(sys.modules["deepspeed"], "zero"), "GatheredParameters")(list(parameters))
