"""Streams of a model whose weights accelerate offloads, to the CPU or to a disk.

Its hooks fetch a module's parameters before the module's `forward` and replace them by meta tensors after it. Two
things follow for the parameters of streams, which are parameters of such modules:

- A model that is offloaded after wrapping offloads them with their module. Code that reads them before or after its
  `forward` (a prompt, a low-rank difference, a prefix that other layers use, saving) fetches them with `parameter_of`.
- In a module that is already offloaded, new parameters stay on its device and can be trained: `keep_on_device`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from parscale.compat.accelerate import execution_device_of, hook_of, offloading_hook, put_hook
from parscale.compat.torch import set_parameter
from parscale.distributed.parallel import local


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module runs: that of its parameters, or the one to which they are fetched."""
    device = execution_device_of(module)
    return next(module.parameters()).device if device is None else torch.device(device)


def fetched(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter of a module; if it is offloaded, its values on the device where the module runs."""
    parameter: torch.Tensor = getattr(module, name)
    if not parameter.is_meta:
        return parameter
    hook = offloading_hook(module)
    if hook is None:
        return parameter
    return hook.weights_map[name].to(hook.execution_device)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate offloads weights of a model."""
    return any(offloading_hook(module) is not None for module in model.modules())


def fetched_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The `state_dict` of an offloaded model, with the values of all its tensors, on the CPU."""
    values = {}
    for name in model.state_dict():
        path, _, leaf = name.rpartition(".")
        values[name] = fetched(model.get_submodule(path), leaf).detach().cpu()
    return values


def parameter_of(module: nn.Module, name: str) -> torch.Tensor:
    """This device's part of a module's parameter, fetched if it is offloaded."""
    return local(fetched(module, name))


class _BesideStreams:
    """accelerate's hook of an offloaded module, made to ignore some parameters.

    Args:
        hook: the hook.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.names: dict[str, None] = {}  # in their order in the module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Calls the hook's method."""
        with self._hidden(module):
            return self.hook.pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: object) -> Any:
        """Calls the hook's method."""
        with self._hidden(module):
            return self.hook.post_forward(module, output)

    @contextlib.contextmanager
    def _hidden(self, module: nn.Module) -> Iterator[None]:
        own = {name: held for name in self.names if (held := getattr(module, name, None)) is not None}
        for name in own:
            delattr(module, name)
        try:
            yield
        finally:
            for name, parameter in own.items():
                set_parameter(module, name, parameter)

    def __getattr__(self, name: str) -> Any:
        if name == "hook":  # during unpickling, before the attributes are set
            raise AttributeError(name)
        return getattr(self.hook, name)


def keep_on_device(module: nn.Module, name: str) -> None:
    """Keeps a new parameter on its device, in a module that is already offloaded."""
    if offloading_hook(module) is None:
        return
    hook = hook_of(module)
    if not isinstance(hook, _BesideStreams):
        hook = _BesideStreams(hook)
        put_hook(module, hook)
    hook.names[name] = None


def let_go(module: nn.Module, name: str) -> None:
    """Undoes `keep_on_device`."""
    hook = hook_of(module)
    if isinstance(hook, _BesideStreams):
        hook.names.pop(name, None)
        if not hook.names:
            put_hook(module, hook.hook)
