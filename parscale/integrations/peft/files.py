"""Saves and loads the streams of an adapter with it, in files and in state dicts."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn

from parscale.distributed.parallel import is_sharded
from parscale.format.folders import HUB_ARGUMENTS, STREAMS_CONFIG, Checkpoint
from parscale.format.saving import save_streams
from parscale.format.stored_sets import load_into_active
from parscale.integrations.peft.copies import adapters_on
from parscale.integrations.peft.lifecycle import DEFAULT_ADAPTER, Method
from parscale.streams.naming import is_of_streams
from parscale.streams.state import find_state


def save_pretrained(
    original: Method,
    self: nn.Module,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Extends PEFT's method: also writes the active set of each adapter, as `save_streams` does."""
    adapters = adapters_on(find_state(self))
    if adapters is not None:
        state = adapters.state
        given = kwargs.get("state_dict")
        if given is None and not is_sharded(self):
            kwargs["state_dict"] = self.state_dict()
        if kwargs.get("state_dict") is not None:  # bias="all" would include the aggregator's
            kwargs["state_dict"] = {k: v for k, v in kwargs["state_dict"].items() if not is_of_streams(k)}
        if state.num_streams > 1 and (is_main_process or given is None):
            for name in [name for name in adapters.names if selected_adapters is None or name in selected_adapters]:
                folder = save_directory if name == DEFAULT_ADAPTER else os.path.join(save_directory, name)
                with adapters.using(name):
                    save_streams(state.model, folder, state_dict=_of_set(self, name, given))
    original(
        self, save_directory, safe_serialization, selected_adapters, save_embedding_layers, is_main_process, **kwargs
    )


def _of_set(model: nn.Module, adapter_name: str, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """The values of an adapter's streams in a `state_dict`, by their names without adapters."""
    state = find_state(model)
    if state_dict is None or state is None or state.active is None:
        return None
    own = state.names(state.active)
    return {own[released]: state_dict[name] for released, name in _stream_names(model, adapter_name).items()}


def load_adapter(
    original: Method,
    self: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Extends PEFT's method: also loads the streams that were saved with the adapter."""
    result = original(self, model_id, adapter_name, *args, **kwargs)
    _load_streams(self, model_id, adapter_name, kwargs)
    return result


def hotswap_adapter(original: Method, model: object, path: str, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Extends PEFT's function: also loads the new adapter's streams."""
    original(model, path, adapter_name, *args, **kwargs)
    _load_streams(model, path, adapter_name, kwargs)


def _load_streams(model: object, path: str | os.PathLike[str], adapter_name: str, options: dict[str, Any]) -> None:
    """Loads the streams that were saved with an adapter, if there are any, into the adapter's copies."""
    adapters = adapters_on(find_state(model))
    if adapters is None:
        if os.path.exists(os.path.join(path, options.get("subfolder") or "", STREAMS_CONFIG)):
            warnings.warn(
                f"{path} holds streams for its adapter, which this model without streams ignores: pass "
                "PeftModel.from_pretrained the model from parscale.load(folder, backbone=...).",
                stacklevel=4,
            )
        return
    checkpoint = Checkpoint(path, **{key: options.get(key) for key in HUB_ARGUMENTS})
    if checkpoint.file(STREAMS_CONFIG) is not None:
        with adapters.using(adapter_name):
            load_into_active(adapters.state.model, checkpoint)


def get_state_dict(
    original: Method,
    model: nn.Module,
    state_dict: dict[str, Any] | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    **kwargs: Any,
) -> dict[str, Any]:
    """Extends PEFT's function: adds the adapter's streams by their released names; accelerate saves it under FSDP."""
    found: dict[str, Any] = original(model, state_dict, adapter_name, **kwargs)
    names = _stream_names(model, adapter_name)
    if not names:
        return found
    values = model.state_dict() if state_dict is None else state_dict
    root, found = _root(model), {name: value for name, value in found.items() if not is_of_streams(name)}
    return found | {root + released: values[name] for released, name in names.items()}


def set_state_dict(
    original: Method,
    model: nn.Module,
    state_dict: dict[str, Any],
    adapter_name: str = DEFAULT_ADAPTER,
    **kwargs: Any,
) -> Any:
    """Extends PEFT's function: also sets the streams that are in the state dict."""
    root = _root(model)
    names = {root + released: name for released, name in _stream_names(model, adapter_name).items()}
    streams = {names[name]: value for name, value in state_dict.items() if name in names}
    result = original(
        model, {name: value for name, value in state_dict.items() if name not in names}, adapter_name, **kwargs
    )
    adapters = adapters_on(find_state(model))
    if adapters is not None and streams:
        with adapters.using(adapter_name):  # released names mean the copies in use
            model.load_state_dict(streams, strict=False)
    return result


def _stream_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The names of an adapter's streams in the `state_dict` of the model with adapters, by released name.

    They are found by the tensors themselves, since some adapters wrap the modules that hold them.
    """
    adapters = adapters_on(find_state(model))
    if adapters is None or adapters.state.active is None:
        return {}
    with adapters.using(adapter_name):
        tensors = adapters.state.tensors(adapters.state.active)
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    return {released: names[id(tensor)] for released, tensor in tensors.items()}


def _root(model: nn.Module) -> str:
    """The prefix that PEFT adds to the names of the model under the adapters."""
    base = find_state(model)
    found = {id(module): name for name, module in model.named_modules()}
    return "" if base is None or base.model is model else f"{found[id(base.model)]}."
