"""Streams of a model whose weights accelerate keeps elsewhere while nothing runs: on the CPU, or on a disk.

Its hooks fetch a module's parameters right before the module's ``forward`` and put the meta device's in their place
right after it. Two things follow for the parameters of streams, which are parameters of such modules:

- Offloaded after wrapping, they are offloaded with their module. What reads them before or after its ``forward`` (a
  prompt, a low-rank difference, a prefix that other layers borrow, saving) fetches them itself: :func:`parameter_of`.
- Made in a module that is offloaded already, they stay on its device and can train: :func:`keep`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from parscale.distributed.parallel import local

_HOOK = "_hf_hook"  # where accelerate keeps a module's hook, which has no other access


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module."""
    hook = module.__dict__.get(_HOOK)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module runs: where its parameters are, or are fetched to."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def fetched(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter of a module; its values where it is offloaded, on the device that the module runs on."""
    parameter: torch.Tensor = getattr(module, name)
    if not parameter.is_meta:
        return parameter
    for hook in _hooks(module):
        if getattr(hook, "offload", False):
            values: torch.Tensor = hook.weights_map[name]
            return values.to(hook.execution_device)
    return parameter


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of a model elsewhere while nothing runs."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in _hooks(module))


def fetched_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The ``state_dict`` of an offloaded model with the values of all its tensors, on the CPU."""
    values = {}
    for name in model.state_dict():
        path, _, leaf = name.rpartition(".")
        values[name] = fetched(model.get_submodule(path), leaf).detach().cpu()
    return values


def parameter_of(module: nn.Module, name: str) -> torch.Tensor:
    """What streams read: this device's part of a module's parameter, fetched where it is offloaded."""
    return local(fetched(module, name))


class _BesideStreams:
    """accelerate's hook of an offloaded module, from which some parameters are hidden.

    Args:
        hook: the hook.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.names: set[str] = set()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As the hook's own."""
        with self._hidden(module):
            return self.hook.pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """As the hook's own."""
        with self._hidden(module):
            return self.hook.post_forward(module, output)

    @contextlib.contextmanager
    def _hidden(self, module: nn.Module) -> Iterator[None]:
        own = {name: module._parameters.pop(name) for name in [*module._parameters] if name in self.names}
        try:
            yield
        finally:
            module._parameters.update(own)

    def __getattr__(self, name: str) -> Any:
        if name == "hook":  # before the state of an unpickled object is set
            raise AttributeError(name)
        return getattr(self.hook, name)


def keep(module: Any, name: str) -> None:
    """Leaves a new parameter where it is, in a module that is offloaded already."""
    if not any(getattr(hook, "offload", False) for hook in _hooks(module)):
        return
    if not isinstance(module._hf_hook, _BesideStreams):
        module._hf_hook = _BesideStreams(module._hf_hook)
    module._hf_hook.names.add(name)


def let_go(module: Any, name: str) -> None:
    """Undoes :func:`keep`."""
    hook = module.__dict__.get(_HOOK)
    if isinstance(hook, _BesideStreams):
        hook.names.discard(name)
        if not hook.names:
            module._hf_hook = hook.hook
