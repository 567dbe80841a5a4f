"""torch: undocumented parts of its modules, tensors and compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from parscale.compat.names import missing, needed, needed_module

# -- modules


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Registers a parameter in a module, without changing it.

    `register_parameter` and assignment go through a method that accelerate and PEFT replace while they build on the
    meta device (`low_cpu_mem_usage`), where a parameter with values would lose them.
    """
    _own(module, "_parameters")[name] = parameter


def held_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """A module's own dictionary of buffers, to be saved and restored.

    `named_buffers` omits buffers that are `None`, and no documented method restores a module's buffers after a forward
    pass has registered more.
    """
    return _own(module, "_buffers")


def _own(module: nn.Module, name: str) -> Any:
    held = vars(module).get(name)
    if held is None:
        raise missing(nn.Module, name)
    return held


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def require_hooks(module: nn.Module) -> None:
    """Raises an error for a module without the dictionaries that `has_hooks` reads.

    That runs for each token and checks nothing, so a module is checked when it is made.

    Raises:
        IncompatibleVersionError: one is missing.
    """
    for name in _HOOKS:
        _own(module, name)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, so that a call does more than its `forward`.

    torch has methods to register and remove hooks, but none to list them. torch.compile traces this function. See
    `require_hooks` for a version without the names.
    """
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def tensor_hooks(tensor: torch.Tensor) -> list[Any]:
    """The hooks that `torch.Tensor.register_hook` has added to a tensor; torch has no other list of them."""
    needed(type(tensor), "_backward_hooks")  # of a tensor without hooks it is None
    return list((tensor._backward_hooks or {}).values())


_REPLICATE = "_replicate_for_data_parallel"


def replicate(module: Any) -> Any:
    """The replica of a module that `nn.DataParallel` makes for a device, by the method of the module's class."""
    replica = needed(type(module), _REPLICATE)(module)
    vars(replica).pop(_REPLICATE, None)  # belongs to the original module, see `watch_replicas`
    return replica


def watch_replicas(module: nn.Module, make: Callable[[], Any]) -> None:
    """Makes `nn.DataParallel` call `make` in place of the module's own method, for each of its devices.

    A replica is made in the caller's thread and runs in another one: only the caller's thread knows which context
    managers are active. DataParallel has no hook for it. `unwatch_replicas` undoes it.
    """
    needed(type(module), _REPLICATE)
    setattr(module, _REPLICATE, make)


def is_watched(module: nn.Module) -> bool:
    """Whether `watch_replicas` was called for a module."""
    return _REPLICATE in vars(module)


def unwatch_replicas(module: nn.Module) -> None:
    """Undoes `watch_replicas`."""
    vars(module).pop(_REPLICATE, None)


# -- tensors


def version_of(tensor: torch.Tensor) -> int:
    """The number of in-place writes to a tensor.

    The notes on autograd describe this counter ("in-place correctness checks"), but no documented name returns it.
    Without it, all values would have to be compared to see whether a forward pass wrote to a buffer.
    """
    return needed(tensor, "_version")


def fake_tensors() -> Any:
    """A context in which a model on the meta device runs on tensors without values, including those from outside.

    transformers has special cases for fake tensors, but reads the values of tensors on the meta device.
    """
    module = needed_module("torch._subclasses.fake_tensor")
    return needed(module, "FakeTensorMode")(allow_non_fake_inputs=True)


# -- the compiler


def mark_static(tensor: torch.Tensor) -> None:
    """Makes torch.compile specialize on this tensor's exact sizes; `torch.compiler` has no function for it."""
    needed(torch._dynamo, "mark_static")(tensor)
