"""Rotary positions: a backbone's tables of sines and cosines, and embeddings with shifted positions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from parscale.streams.state import ParScaleState

RotaryTable = tuple[nn.Module, str]  # the module that holds the table, and the table's name in it


def rotary_tables(state: ParScaleState, size: int | None = None, part: nn.Module | None = None) -> list[RotaryTable]:
    """Tables `(N, D or less)` of sines and cosines that rotate keys (GPT-J, CodeGen, RoFormer).

    Args:
        state: the model's state.
        size: D; by default that of the attention layers.
        part: the module to look in; by default the backbone.

    Returns:
        The module and the name of each table.
    """
    if size is None:
        size = max((layer.key_size for layer in state.layers), default=0)
    found = []
    for module_name, module in (state.backbone if part is None else part).named_modules():
        for name, table in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)):
            if "position" in f"{module_name}.{name}" and _is_rotary(table, size):
                found.append((module, name))
    return found


def _is_rotary(table: torch.Tensor, size: int) -> bool:
    if table.ndim != 2 or table.requires_grad or not table.is_floating_point() or not 0 < table.shape[1] <= size:
        return False
    sines, cosines = table[0].chunk(2)  # of position 0
    return bool((sines == 0).all()) and bool((cosines == 1).all())


@contextlib.contextmanager
def tables_moved(tables: list[RotaryTable], by: int) -> Iterator[None]:
    """In this block, position i of a rotary table holds the values of position i - `by`."""
    own = [getattr(module, name) for module, name in tables]
    try:
        for (module, name), table in zip(tables, own, strict=True):
            sines, cosines = table[1 : by + 1].flip(0).chunk(2, dim=-1)  # of positions by..1
            moved = torch.cat([torch.cat([-sines, cosines], dim=-1), table[: table.shape[0] - by]])
            moved = nn.Parameter(moved, requires_grad=False) if isinstance(table, nn.Parameter) else moved
            setattr(module, name, moved)
        yield
    finally:
        for (module, name), table in zip(tables, own, strict=True):
            setattr(module, name, table)


@contextlib.contextmanager
def rotation_moved(backbone: nn.Module, by: int) -> Iterator[None]:
    """In this block, rotary embeddings see positions that are larger by `by` than those of the rest of the backbone."""

    def move(x: object) -> Any:
        return x + by if isinstance(x, torch.Tensor) and x.dtype in (torch.int32, torch.int64) else x

    def moved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}

    rotary = [module for module in backbone.modules() if "Rotary" in type(module).__name__]
    with contextlib.ExitStack() as hooks:
        for module in rotary:
            hooks.enter_context(module.register_forward_pre_hook(moved, with_kwargs=True))
        yield
