"""Chooses the implementation of an operation: one rule for all of them, without importing Triton."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, Literal, ParamSpec, get_args

import torch

from parscale.kernels.compat import functorch_transforms_are_active

Impl = Literal["auto", "fused", "reference"]
IMPLS = get_args(Impl)
Options = ParamSpec("Options")
Operation = Callable[Concatenate[torch.Tensor, Options], torch.Tensor]


def triton_is_installed() -> bool:
    """Whether `import triton` would find a module."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # something prevents the import
        return False


TRITON = triton_is_installed()


def check_impl(impl: Impl, name: str = "impl") -> Impl:
    """Returns a valid `impl`; `name` is the name of the argument, for the error message.

    Raises:
        ValueError: `impl` is not valid.
    """
    if impl not in IMPLS:
        raise ValueError(f"{name} must be 'auto', 'fused' or 'reference', got {impl!r}.")
    return impl


def runs_fused(impl: Impl, x: torch.Tensor, find_obstacle: Callable[[], str | None]) -> bool:
    """Whether the Triton kernels take these tensors.

    Args:
        impl: `"reference"` never; `"auto"` for tensors on a CUDA or ROCm device, if Triton is installed, nothing is
            in the way and no transform of `torch.func` is active; `"fused"` always, or an error.
        x: one of the operation's tensors; they share a device.
        find_obstacle: says why the kernels cannot take these arguments, if they cannot; asked where they might run.

    Raises:
        ValueError: `impl` is unknown, or `"fused"` cannot run; the message says why.
    """
    if impl == "auto":
        return TRITON and x.is_cuda and not functorch_transforms_are_active() and find_obstacle() is None
    if check_impl(impl) == "reference":
        return False
    obstacle = find_obstacle() if TRITON else "Triton is not installed"
    if obstacle is None and not x.is_cuda and not _interpreted():
        obstacle = f"the tensors are on {x.device}, but the kernels need a CUDA or ROCm device"
    if obstacle is not None:
        raise ValueError(
            f"impl='fused' cannot run here: {obstacle}. Use impl='auto' or impl='reference'; for a wrapped model, "
            "kernels='auto' or kernels='reference' in place of kernels='fused'."
        )
    return True


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of `x`; torch raises an error for a device without autocast."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block without autocast for the device of `x`, so that a kernel's products have the dtypes it chooses."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()


def runs_without_autocast(operation: Operation[Options]) -> Operation[Options]:
    """Makes an operation run without autocast for the device of its first tensor, in the dtypes that it chooses."""

    @functools.wraps(operation)
    def run(x: torch.Tensor, /, *args: Options.args, **options: Options.kwargs) -> torch.Tensor:
        if not autocasts(x):  # in every layer for every token: no block where it would do nothing
            return operation(x, *args, **options)
        with torch.autocast(x.device.type, enabled=False):
            return operation(x, *args, **options)

    return run


def wants_gradients(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _interpreted() -> bool:
    from parscale.kernels.launch import INTERPRETED

    return INTERPRETED


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an operation on this tensor runs: its own, or that of autocast."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
