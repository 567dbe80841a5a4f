"""The number of parameters of a model in memory, also if it is quantized; see `parscale.format.packed`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from parscale.compat.deepspeed import whole_shape
from parscale.format.packed import BESIDE, BLOCKS, PACKED, TWO_IN_A_BYTE


def parameter_sizes(model: nn.Module) -> dict[torch.Tensor, int]:
    """The number of parameters in each tensor of a model; a tensor that several modules share is counted once.

    Args:
        model: with full or sharded tensors, quantized or not.

    Returns:
        By tensor: the model's parameters, and the buffers that hold the weights of quantized layers.
    """
    sizes: dict[torch.Tensor, int] = {}
    for module in model.modules():
        for name, tensor in _own_tensors(module):
            if tensor not in sizes:
                size = _size(module, name, tensor)
                if size is not None:
                    sizes[tensor] = size
    return sizes


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if PACKED.search(name) or BLOCKS.search(name):
            yield name, buffer


def _size(module: Any, name: str, tensor: Any) -> int | None:
    """The number of parameters in one of a module's own tensors; `None` for other tensors, such as scales."""
    if type(tensor).__name__ == "Params4bit":
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            return math.prod(state.shape)
        return tensor.numel() * (tensor.element_size() * TWO_IN_A_BYTE if tensor.bnb_quantized else 1)
    if name == "W_q" and isinstance(getattr(module, "meta", None), Mapping) and "shape" in module.meta:
        return math.prod(module.meta["shape"])
    if BLOCKS.search(name) and tensor.dtype == torch.uint8:
        return tensor.numel() * TWO_IN_A_BYTE
    if PACKED.search(name) and not tensor.is_floating_point():
        shape = getattr(module, "weight_shape", None)
        if shape is not None:
            return math.prod(shape.tolist())
        features = [_feature(module, "in"), _feature(module, "out")]
        return math.prod(feature for feature in features if feature is not None) if all(features) else tensor.numel()
    quantized = any(PACKED.search(own) or BLOCKS.search(own) for own, _ in _own_tensors(module))
    return None if quantized and BESIDE.search(name) else math.prod(whole_shape(tensor))


def _feature(module: Any, side: str) -> int | None:
    return next((getattr(module, n) for n in (f"{side}_features", f"{side}features") if hasattr(module, n)), None)
