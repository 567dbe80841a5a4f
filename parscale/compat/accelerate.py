"""accelerate: the hook that keeps a module's weights elsewhere while it does not run; what it prepares for training."""

from __future__ import annotations

from typing import Any

from torch import nn

from parscale.compat.patching import Extension, extend, when_imported

_HOOK = "_hf_hook"


def extend_prepare(extension: Extension) -> None:
    """Extends `Accelerator.prepare`, which nothing else is asked before a model trains on many devices.

    Importing accelerate takes long, so the method is extended only when other code imports it.

    Args:
        extension: for `prepare(accelerator, *objects, ...)`.
    """
    when_imported("accelerate.accelerator", lambda module: extend(module.Accelerator, "prepare", extension))


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
