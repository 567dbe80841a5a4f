"""accelerate: the hook that keeps a module's weights elsewhere while the module does not run."""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOK = "_hf_hook"


def hook_of(module: nn.Module) -> Any:
    """accelerate's hook of a module; `None` if it has none.

    accelerate has documented functions that add and remove hooks, but none that returns the hook of a module.
    """
    return vars(module).get(_HOOK)


def hooks_of(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module, as a list."""
    hook = hook_of(module)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def put_hook(module: nn.Module, hook: object) -> None:
    """Replaces accelerate's hook of a module.

    `add_hook_to_module` would run the hook's `init_hook` again, which moves weights.
    """
    setattr(module, _HOOK, hook)


def offloading_hook(module: nn.Module) -> Any:
    """The hook that fetches a module's weights before it runs; `None` if they are not offloaded."""
    return next((hook for hook in hooks_of(module) if getattr(hook, "offload", False)), None)


def execution_device_of(module: nn.Module) -> Any:
    """The device to which a module's weights are fetched; `None` if none of its hooks names one."""
    devices = (getattr(hook, "execution_device", None) for hook in hooks_of(module))
    return next((device for device in devices if device is not None), None)
