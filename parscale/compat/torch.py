"""torch: what its modules, tensors and compiler have no documented name for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from parscale.compat.names import missing, needed, needed_module

# -- modules


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Gives a module a parameter as it is.

    `register_parameter` and assignment go through a method that accelerate and PEFT replace while they build on the
    meta device (`low_cpu_mem_usage`), where a parameter with values would lose them.
    """
    _own(module, "_parameters")[name] = parameter


def take_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Takes a parameter out of a module, which `set_parameter` gives back; `None` if there is none.

    `delattr` would do; it is here beside its counterpart.
    """
    return _own(module, "_parameters").pop(name, None)


def held_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """A module's own dictionary of its buffers, to be read and put back.

    `named_buffers` leaves out buffers that are `None`, and no documented method makes a module's buffers those of
    before once a forward pass has registered further ones.
    """
    return _own(module, "_buffers")


def _own(module: nn.Module, name: str) -> Any:
    held = vars(module).get(name)
    if held is None:
        raise missing(module, name)
    return held


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is hooked to a module, so that calling it does more than its `forward`.

    torch has methods to register and remove hooks, and none to ask for them. torch.compile traces this function.
    """
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def tensor_hooks(tensor: torch.Tensor) -> list[Any]:
    """The hooks of `torch.Tensor.register_hook` on a tensor, which torch does not list otherwise."""
    return list((tensor._backward_hooks or {}).values())


_REPLICATE = "_replicate_for_data_parallel"


def replicate(module: Any) -> Any:
    """What `nn.DataParallel` makes of a module for one of its devices, by the method of the module's class."""
    replica = needed(type(module), _REPLICATE)(module)
    vars(replica).pop(_REPLICATE, None)  # of the module itself, see `watch_replicas`
    return replica


def watch_replicas(module: Any, make: Callable[[], Any]) -> None:
    """Lets `nn.DataParallel` call `make` in place of the module's own method, for each of its devices.

    A replica is made in the caller's thread and runs in another: only there is it known which block of the caller it
    belongs to. DataParallel has no hook for it. `unwatch_replicas` undoes it.
    """
    needed(type(module), _REPLICATE)
    setattr(module, _REPLICATE, make)


def unwatch_replicas(module: nn.Module) -> None:
    """Undoes `watch_replicas`."""
    vars(module).pop(_REPLICATE, None)


# -- tensors


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place.

    The notes on autograd describe this counter ("in-place correctness checks") and no documented name gives it.
    Comparing all numbers before and after is the other way to see whether a forward pass wrote to a buffer.
    """
    version: int = tensor._version
    return version


def fake_tensors() -> Any:
    """A context in which a model on the meta device runs on tensors without values, those from outside included.

    transformers takes other ways for fake tensors than for those of the meta device, which it asks for their values.
    """
    module = needed_module("torch._subclasses.fake_tensor")
    return needed(module, "FakeTensorMode")(allow_non_fake_inputs=True)


# -- the compiler


def mark_static(tensor: torch.Tensor) -> None:
    """Lets torch.compile make code for exactly this tensor's sizes; `torch.compiler` has no name for it."""
    needed(torch._dynamo, "mark_static")(tensor)
