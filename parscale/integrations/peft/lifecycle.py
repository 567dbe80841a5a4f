"""Adapters come, become the active one, are switched off and go, and the streams with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from parscale.integrations.peft.copies import AdapterStreams, adapters_on
from parscale.integrations.peft.methods import check_method
from parscale.streams.state import ParScaleState

DEFAULT_ADAPTER = "default"

Method = Callable[..., Any]


def state_of(model: Any) -> ParScaleState | None:
    """That of a wrapped model, also through the adapters around it."""
    state = getattr(model, "parscale", None)
    return state if isinstance(state, ParScaleState) else None


@contextlib.contextmanager
def _trainable_as_before(state: ParScaleState | None) -> Iterator[None]:
    trains = {} if state is None else state.trainability()
    try:
        yield
    finally:
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)


def init(
    init: Method,
    self: Any,
    model: Any,
    peft_config: Any,
    adapter_name: str = DEFAULT_ADAPTER,
    *args: Any,
    **kwargs: Any,
) -> None:
    """A model's first adapter, which gets the model's streams."""
    state = state_of(model)
    if state is not None:
        check_method(peft_config, _transforms(state))
    with _trainable_as_before(state):
        init(self, model, peft_config, adapter_name, *args, **kwargs)
    if state is not None:
        if "forward" in self.base_model.__dict__:  # that of the model, past the hooks on it (ADAPTION_PROMPT)
            self.base_model.forward = state.model.__call__
        adapters = adapters_on(state)
        if adapters is None:
            state.adapters = AdapterStreams(state, adapter_name, peft_config)
        else:  # an earlier one on the same model
            adapters.add(adapter_name, peft_config)
            adapters.activate(adapter_name)


def add_adapter(add_adapter: Method, self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """A further adapter, which starts with the streams in use."""
    state = state_of(self)
    if state is not None:
        check_method(peft_config, _transforms(state))
    with _trainable_as_before(state):
        add_adapter(self, adapter_name, peft_config, *args, **kwargs)
    adapters = adapters_on(state)
    if adapters is not None:  # else under way in __init__
        adapters.add(adapter_name, peft_config)


def _transforms(state: ParScaleState) -> set[str]:
    return {streams.config.transform for streams in state.sets.values() if streams.num_streams > 1}


def inject_adapter(inject_adapter: Method, self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """An adapter's layers, also those that transformers' own `add_adapter` and mixtures of adapters ask for."""
    state = state_of(model)
    with _trainable_as_before(state):
        inject_adapter(self, model, adapter_name, *args, **kwargs)
    adapters = adapters_on(state)
    if adapters is not None:  # a mixture of others, by add_weighted_adapter
        adapters.add(adapter_name, self.peft_config[adapter_name])


def set_adapter(set_adapter: Method, self: Any, adapter_name: Any, *args: Any, **kwargs: Any) -> None:
    """The adapter that is chosen runs and trains with its streams; of several, the first one's."""
    set_adapter(self, adapter_name, *args, **kwargs)
    adapters = adapters_on(state_of(self))
    if adapters is not None:
        inference = args[0] if args else kwargs.get("inference_mode", False)
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        adapters.activate(names[0] if names else None, trains=not inference)


def delete_adapter(delete_adapter: Method, self: Any, adapter_name: Any) -> None:
    """The adapter's streams go with it."""
    delete_adapter(self, adapter_name)
    adapters = adapters_on(state_of(self))
    if adapters is not None:
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            adapters.remove(name)
        names = [name for name in self.active_adapters if name in self.peft_config]
        adapters.activate(names[0] if names else None)


def unload(unload: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Without its adapters, the model has the streams of before."""
    model, adapters = unload(self, *args, **kwargs), adapters_on(state_of(self))
    if adapters is not None:
        adapters.keep(None)
    return model


def merge_and_unload(merge_and_unload: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    """With its adapter merged, the model keeps the adapter's streams."""
    model, adapters = merge_and_unload(self, *args, **kwargs), adapters_on(state_of(self))
    if adapters is not None:
        names = args[2] if len(args) > 2 else kwargs.get("adapter_names")
        adapters.keep(names[0] if names else adapters.active)
    return model


def prepare_for_kbit_training(prepare: Method, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Freezes the backbone only."""
    with _trainable_as_before(state_of(model)):
        return prepare(model, *args, **kwargs)


@contextlib.contextmanager
def disable_adapter(disable_adapter: Method, self: Any) -> Iterator[None]:
    """In this block the streams are those of before the first adapter."""
    adapters = adapters_on(state_of(self))
    with contextlib.nullcontext() if adapters is None else adapters.as_before(), disable_adapter(self):
        if adapters is not None and "forward" in self.__dict__:  # that of the model, past the hooks on it
            self.forward = self.base_model.__call__
        yield


def forward(forward: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    """As PEFT's own, of which older versions call the model's `forward`, past the hooks on the model."""
    return forward(self, *args, **kwargs) if state_of(self) is None else self.model(*args, **kwargs)


def disable_adapter_layers(disable: Method, self: Any) -> None:
    """From here on the streams are those of before the first adapter."""
    disable(self)
    _set_disabled(self, True)


def enable_adapter_layers(enable: Method, self: Any) -> None:
    """From here on the streams are those of the active adapter."""
    enable(self)
    _set_disabled(self, False)


def _set_disabled(tuner: Any, disabled: bool) -> None:
    adapters = adapters_on(state_of(tuner))
    if adapters is not None:
        adapters.disabled = disabled
