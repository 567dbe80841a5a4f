"""The sizes of layers that streams can change, and the parameters that they add."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn


class Hidden(NamedTuple):
    """The final hidden states of a part of a model: H, their dtype and their device."""

    size: int
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass
class AttentionLayer:
    """An attention layer that can have a prefix, and the shapes of its keys and values.

    Attributes:
        module_name: its name in the model.
        module: the layer.
        key_heads: G.
        key_size: D of the keys.
        value_size: D of the values (it differs in MLA).
        dtype: of its keys.
        device: of its keys.
        mesh: under tensor parallelism, the `DeviceMesh` over which its key/value heads are split.
    """

    module_name: str
    module: Any
    key_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device
    mesh: Any = None

    @classmethod
    def of(cls, name: str, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> AttentionLayer:
        """The layer with the sizes of its keys `(R, G, K, D)` and values `(R, G, K, Dv)` in a pass."""
        return cls(name, module, key.shape[1], key.shape[-1], value.shape[-1], key.dtype, key.device)


@dataclasses.dataclass
class Linear:
    """A linear layer that runs on whole rows: its name in the model, the layer, and its sizes."""

    module_name: str
    module: nn.Module
    in_size: int
    out_size: int


@dataclasses.dataclass
class ParameterSpec:
    """One parameter of a set of streams: where it is registered, its name, shape, dtype and device.

    Attributes:
        module_name: the module's name in the model.
        module: the module.
        name: of the parameter in the module, as in a checkpoint; sets other than the default one add their own name.
        shape: P first.
        dtype: of the parameter.
        device: of the parameter.
    """

    module_name: str
    module: nn.Module
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def released_name(self) -> str:
        """Its name in a checkpoint."""
        return f"{self.module_name}.{self.name}" if self.module_name else self.name
