"""DeepSpeed ZeRO-3: recognizes its parameters and models, without importing it.

The user's code imports DeepSpeed. If it has not, nothing is partitioned.
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
    """Whether a parameter is partitioned by ZeRO-3: its own values are then empty outside a module's forward pass."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The full shape of a parameter, of which a process may hold nothing."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_of_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed's engine runs a model: it puts dictionaries of its own class into the modules."""
    return type(vars(model).get("_parameters")).__name__ == "ZeROOrderedDict"


def gathered(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    """A context in which partitioned parameters are gathered for reading."""
    return needed(needed(sys.modules["deepspeed"], "zero"), "GatheredParameters")(list(parameters))
