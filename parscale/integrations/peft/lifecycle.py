"""Switches the streams when adapters are added, activated, disabled and removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from parscale.compat.patching import replaced
from parscale.integrations.peft.copies import AdapterStreams, adapters_on, modules_with_streams
from parscale.integrations.peft.methods import AdapterConfig, check_copied_modules, check_method
from parscale.streams.state import ParScaleState, find_state

DEFAULT_ADAPTER = "default"

Method = Callable[..., Any]


@contextlib.contextmanager
def _trainable_as_before(state: ParScaleState | None) -> Iterator[None]:
    trains, adapters = {} if state is None else state.trainability(), adapters_on(state)
    rested = None if adapters is None else adapters.rested
    try:
        yield
    finally:
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
        if adapters is not None:
            adapters.rested = rested


def init(
    original: Method,
    self: Any,
    model: object,
    peft_config: AdapterConfig,
    adapter_name: str = DEFAULT_ADAPTER,
    *args: Any,
    **kwargs: Any,
) -> None:
    """A model's first adapter gets the model's streams, frozen in inference mode."""
    state = find_state(model)
    if state is not None:
        _check(state, peft_config)
    with _trainable_as_before(state):
        original(self, model, peft_config, adapter_name, *args, **kwargs)
    if state is not None:
        if "forward" in self.base_model.__dict__:  # the model's forward, without its hooks (ADAPTION_PROMPT)
            self.base_model.forward = state.model.__call__
        adapters = adapters_on(state)
        if adapters is None:
            state.adapters = adapters = AdapterStreams(state, adapter_name, peft_config)
        else:  # an earlier adapter on the same model
            adapters.add(adapter_name, peft_config)
        adapters.activate(adapter_name, trains=not peft_config.inference_mode)


def add_adapter(
    original: Method, self: nn.Module, adapter_name: str, peft_config: AdapterConfig, *args: Any, **kwargs: Any
) -> None:
    """Another adapter starts from the streams in use."""
    state = find_state(self)
    if state is not None:
        _check(state, peft_config)
    with _trainable_as_before(state):
        original(self, adapter_name, peft_config, *args, **kwargs)
    adapters = adapters_on(state)
    if adapters is not None:  # None inside __init__
        adapters.add(adapter_name, peft_config)


def _check(state: ParScaleState, peft_config: AdapterConfig) -> None:
    transforms = {streams.config.transform for streams in state.sets.values() if streams.num_streams > 1}
    check_method(peft_config, transforms, modules_with_streams(state))


def inject_adapter(original: Method, self: Any, model: object, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Also for layers that transformers' own `add_adapter` and mixtures of adapters insert."""
    state = find_state(model)
    if state is not None and any(streams.num_streams > 1 for streams in state.sets.values()):
        check_copied_modules(self.peft_config[adapter_name], modules_with_streams(state))
    with _trainable_as_before(state):
        original(self, model, adapter_name, *args, **kwargs)
    adapters = adapters_on(state)
    if adapters is not None:  # a mixture of other adapters, by add_weighted_adapter
        adapters.add(adapter_name, self.peft_config[adapter_name])


def set_adapter(original: Method, self: nn.Module, adapter_name: Any, *args: Any, **kwargs: Any) -> None:
    """Activates the streams of the chosen adapter; of several, those of the first one."""
    original(self, adapter_name, *args, **kwargs)
    adapters = adapters_on(find_state(self))
    if adapters is not None:
        inference = args[0] if args else kwargs.get("inference_mode", False)
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        adapters.activate(names[0] if names else None, trains=not inference)


def delete_adapter(original: Method, self: Any, adapter_name: Any) -> None:
    """Removes the adapter's streams with it."""
    original(self, adapter_name)
    adapters = adapters_on(find_state(self))
    if adapters is not None:
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            adapters.remove(name)
        names = [name for name in self.active_adapters if name in self.peft_config]
        if (active := names[0] if names else None) != adapters.active:
            adapters.activate(active)


def unload(original: Method, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Restores the streams as they were before the first adapter."""
    model, adapters = original(self, *args, **kwargs), adapters_on(find_state(self))
    if adapters is not None:
        adapters.merge_into_sets(None)
    return model


def merge_and_unload(original: Method, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Keeps the streams of the merged adapter."""
    model, adapters = original(self, *args, **kwargs), adapters_on(find_state(self))
    if adapters is not None:
        names = args[2] if len(args) > 2 else kwargs.get("adapter_names")
        adapters.merge_into_sets(names[0] if names else adapters.active)
    return model


def prepare_for_kbit_training(original: Method, model: object, *args: Any, **kwargs: Any) -> Any:
    """Freezes only the backbone."""
    with _trainable_as_before(find_state(model)):
        return original(model, *args, **kwargs)


@contextlib.contextmanager
def disable_adapter(original: Method, self: Any) -> Iterator[None]:
    """In this block the streams are those before the first adapter."""
    adapters = adapters_on(find_state(self))
    before = contextlib.nullcontext() if adapters is None else replaced(adapters, "disabled", True)
    with before, original(self):
        if adapters is not None and "forward" in self.__dict__:  # the model's forward, without its hooks
            self.forward = self.base_model.__call__
        yield


def forward(original: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces PEFT's method, which in older versions calls the model's `forward` without the model's hooks."""
    return original(self, *args, **kwargs) if find_state(self) is None else self.model(*args, **kwargs)


def disable_adapter_layers(original: Method, self: nn.Module) -> None:
    """Switches to the streams before the first adapter."""
    original(self)
    _set_disabled(self, True)


def enable_adapter_layers(original: Method, self: nn.Module) -> None:
    """Switches to the streams of the active adapter."""
    original(self)
    _set_disabled(self, False)


def _set_disabled(tuner: object, disabled: bool) -> None:
    adapters = adapters_on(find_state(tuner))
    if adapters is not None:
        adapters.disabled = disabled
