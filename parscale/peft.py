"""Streams under PEFT: each adapter has streams of its own, which train, are saved and are switched off with it.

PEFT freezes, saves and switches what its adapters own, and asks the model nothing about the rest. So, where it is
installed, its public methods for that are extended, once, for models that parscale wrapped; what belongs to which
adapter is in :mod:`parscale.adapters`, and which methods go with streams in :mod:`parscale.peft_methods`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

from parscale.adapters import AdapterStreams
from parscale.folders import STREAMS_CONFIG, Checkpoint
from parscale.naming import part_of
from parscale.parallel import is_sharded
from parscale.patching import extend, extend_everywhere
from parscale.peft_methods import check_method, method_of
from parscale.streams import ParScaleState

DEFAULT_ADAPTER = "default"  # whose folder is the one that is given; the others' are inside
HUB = ("subfolder", "revision", "token", "cache_dir")
# Arguments of a forward pass that PEFT hands to its layers, with one entry for each row.
ROW_ARGUMENTS = ("adapter_names", "alora_offsets")
BASE = "__base__"  # PEFT's name for rows without an adapter

Method = Callable[..., Any]


def extend_peft() -> None:
    """Makes PEFT look after the streams of wrapped models, where it is installed."""
    if importlib.util.find_spec("peft") is None:
        return
    import peft
    from peft.tuners.tuners_utils import BaseTuner

    for cls in (peft.PeftModel, peft.PeftMixedModel):
        extend(cls, "__init__", _init)
        extend(cls, "add_adapter", _add_adapter)
        extend(cls, "set_adapter", _set_adapter)
        extend(cls, "delete_adapter", _delete_adapter)
        extend(cls, "disable_adapter", _disable_adapter)
    extend(peft.PeftModel, "save_pretrained", _save_pretrained)
    extend(peft.PeftModel, "load_adapter", _load_adapter)
    extend(peft.PeftModel, "get_prompt", _get_prompt)
    # Every task's forward and generate enter it, and only it sees what goes to the layers.
    extend(peft.PeftModel, "_enable_peft_forward_hooks", _with_rows)
    extend(peft.PolyModel, "_manage_pre_hooks", _with_tasks)
    extend(BaseTuner, "inject_adapter", _inject_adapter)  # transformers' own add_adapter comes here too
    extend(BaseTuner, "set_adapter", _set_adapter)
    extend(BaseTuner, "disable_adapter_layers", _disable_adapter_layers)
    extend(BaseTuner, "enable_adapter_layers", _enable_adapter_layers)
    extend(BaseTuner, "unload", _unload)
    extend(BaseTuner, "merge_and_unload", _merge_and_unload)
    extend_everywhere(peft, "prepare_model_for_kbit_training", _prepare_for_kbit_training)


def _state_of(model: Any) -> ParScaleState | None:
    """That of a wrapped model, also through the adapters around it."""
    state = getattr(model, "parscale", None)
    return state if isinstance(state, ParScaleState) else None


@contextlib.contextmanager
def _trainable_as_before(state: ParScaleState | None) -> Iterator[None]:
    trains = {} if state is None else state.trainability()
    yield
    for parameter, flag in trains.items():
        parameter.requires_grad_(flag)


# -- adapters come and go


def _init(
    init: Method,
    self: Any,
    model: Any,
    peft_config: Any,
    adapter_name: str = DEFAULT_ADAPTER,
    *args: Any,
    **kwargs: Any,
) -> None:
    state = _state_of(model)
    if state is not None:
        check_method(peft_config, _transforms(state))
    with _trainable_as_before(state):
        init(self, model, peft_config, adapter_name, *args, **kwargs)
    if state is not None:
        if state.adapters is None:
            state.adapters = AdapterStreams(state, adapter_name, peft_config)
        else:  # an earlier one on the same model
            state.adapters.add(adapter_name, peft_config)
            state.adapters.activate(adapter_name)


def _add_adapter(
    add_adapter: Method, self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any
) -> None:
    state = _state_of(self)
    if state is not None:
        check_method(peft_config, _transforms(state))
    with _trainable_as_before(state):
        add_adapter(self, adapter_name, peft_config, *args, **kwargs)
    if state is not None and state.adapters is not None:  # else under way in __init__
        state.adapters.add(adapter_name, peft_config)


def _transforms(state: ParScaleState) -> set[str]:
    return {streams.config.transform for streams in state.sets.values() if streams.num_streams > 1}


def _inject_adapter(inject_adapter: Method, self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    with _trainable_as_before(_state_of(model)):
        inject_adapter(self, model, *args, **kwargs)


def _set_adapter(set_adapter: Method, self: Any, adapter_name: Any, *args: Any, **kwargs: Any) -> None:
    set_adapter(self, adapter_name, *args, **kwargs)
    state = _state_of(self)
    if state is not None and state.adapters is not None:
        inference = args[0] if args else kwargs.get("inference_mode", False)
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        state.adapters.activate(names[0] if names else None, trains=not inference)


def _delete_adapter(delete_adapter: Method, self: Any, adapter_name: Any) -> None:
    delete_adapter(self, adapter_name)
    state = _state_of(self)
    if state is not None and state.adapters is not None:
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            state.adapters.remove(name)
        names = [name for name in self.active_adapters if name in self.peft_config]
        state.adapters.activate(names[0] if names else None)


def _unload(unload: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    model, state = unload(self, *args, **kwargs), _state_of(self)
    if state is not None and state.adapters is not None:
        state.adapters.keep(None)
    return model


def _merge_and_unload(merge_and_unload: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    model, state = merge_and_unload(self, *args, **kwargs), _state_of(self)
    if state is not None and state.adapters is not None:
        names = args[2] if len(args) > 2 else kwargs.get("adapter_names")
        state.adapters.keep(names[0] if names else state.adapters.active)
    return model


def _prepare_for_kbit_training(prepare: Method, model: Any, *args: Any, **kwargs: Any) -> Any:
    with _trainable_as_before(_state_of(model)):
        return prepare(model, *args, **kwargs)


# -- switched off


@contextlib.contextmanager
def _disable_adapter(disable_adapter: Method, self: Any) -> Iterator[None]:
    state = _state_of(self)
    adapters = None if state is None else state.adapters
    with contextlib.nullcontext() if adapters is None else adapters.as_before(), disable_adapter(self):
        yield


def _disable_adapter_layers(disable: Method, self: Any) -> None:
    disable(self)
    _set_disabled(self, True)


def _enable_adapter_layers(enable: Method, self: Any) -> None:
    enable(self)
    _set_disabled(self, False)


def _set_disabled(tuner: Any, disabled: bool) -> None:
    state = _state_of(tuner)
    if state is not None and state.adapters is not None:
        state.adapters.disabled = disabled


# -- saved and loaded


def _save_pretrained(
    save_pretrained: Method,
    self: Any,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """As PEFT's own; the active set of each adapter is written beside it, as ``save_streams`` writes it."""
    from parscale.saving import save_streams

    state = _state_of(self)
    if state is not None and state.adapters is not None:
        given = kwargs.get("state_dict")
        if given is None and not is_sharded(self):
            kwargs["state_dict"] = self.state_dict()
        if kwargs.get("state_dict") is not None:  # bias="all" would take the aggregator's
            kwargs["state_dict"] = {k: v for k, v in kwargs["state_dict"].items() if part_of(k) is None}
        if state.active is not None and state.active.num_streams > 1 and (is_main_process or given is None):
            for name in [
                name for name in state.adapters.names if selected_adapters is None or name in selected_adapters
            ]:
                folder = save_directory if name == DEFAULT_ADAPTER else os.path.join(save_directory, name)
                with state.adapters.using(name):
                    save_streams(state.model, folder, state_dict=_of_base_model(given))
    save_pretrained(
        self, save_directory, safe_serialization, selected_adapters, save_embedding_layers, is_main_process, **kwargs
    )


def _of_base_model(state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """A model's tensors by their names in the model that the adapters are on."""
    if state_dict is None:
        return None
    return {name.removeprefix("base_model.").removeprefix("model."): value for name, value in state_dict.items()}


def _load_adapter(
    load_adapter: Method, self: Any, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """As PEFT's own; the streams that were saved beside the adapter become its own."""
    from parscale.loading import load_into_active

    result, state = load_adapter(self, model_id, adapter_name, *args, **kwargs), _state_of(self)
    if state is not None and state.adapters is not None:
        checkpoint = Checkpoint(model_id, **{key: kwargs.get(key) for key in HUB})
        if checkpoint.file(STREAMS_CONFIG) is not None:
            with state.adapters.using(adapter_name):
                load_into_active(state.model, checkpoint)
    return result


# -- rows


def _get_prompt(get_prompt: Method, self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
    """As PEFT's own; keys and values have a row for each of the P*B rows that run, embeddings for each of the B."""
    state = _state_of(self)
    if state is not None and state.active is not None and method_of(self.active_peft_config).fills_cache:
        batch_size = batch_size * state.active.num_streams
    return get_prompt(self, batch_size, *args, **kwargs)


@contextlib.contextmanager
def _with_rows(enable: Method, self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """As PEFT's own; its layers in the backbone get an entry for each of the P*B rows, stream-major."""
    state = _state_of(self)
    P = 1 if state is None or state.active is None else state.active.num_streams
    given = {name: kwargs[name] for name in ROW_ARGUMENTS if kwargs.get(name) is not None}
    if state is None or P == 1 or not given:
        with enable(self, *args, **kwargs):
            yield
        return
    repeated = {name: list(rows) * P for name, rows in given.items()}
    beams = kwargs.get("num_beams") or 1
    outside = {name: [row for row in rows for _ in range(beams)] for name, rows in given.items()}
    streams = _streams_of_rows(state, given.get("adapter_names"))
    with streams, enable(self, *args, **kwargs | repeated), _outside_backbone(state, self, outside):
        yield


@contextlib.contextmanager
def _with_tasks(manage: Method, self: Any, task_ids: Any) -> Iterator[None]:
    """As PEFT's own, of Poly: the same for the tasks of the rows, ``(B,)``."""
    state = _state_of(self)
    if task_ids is None or state is None or state.active is None:
        with manage(self, task_ids):
            yield
        return
    repeated = task_ids.repeat(state.active.num_streams)  # (P*B,)
    with manage(self, repeated), _outside_backbone(state, self, {"task_ids": task_ids}):
        yield


def _streams_of_rows(state: ParScaleState, rows: list[str] | None) -> contextlib.AbstractContextManager[None]:
    """The streams of the adapters that a batch's rows name.

    Raises:
        ValueError: the rows would need different ones.
    """
    adapters = state.adapters
    if rows is None or adapters is None or adapters.disabled:
        return contextlib.nullcontext()
    names = [None if row == BASE else row for row in dict.fromkeys(rows) if row == BASE or row in adapters.names]
    if not names:  # PEFT says so
        return contextlib.nullcontext()
    if not adapters.agree(names):
        raise ValueError(
            f"The adapters {', '.join(map(repr, dict.fromkeys(rows)))} have trained different streams, and all rows of "
            "a batch run with the same: run the rows of each adapter by themselves, after set_adapter."
        )
    return adapters.using(names[0])


@contextlib.contextmanager
def _outside_backbone(state: ParScaleState, model: Any, given: dict[str, Any]) -> Iterator[None]:
    """Layers outside of the backbone, which see B rows, get the entries as they were given."""
    inside = {module for part in state.parts for module in part.modules()}

    def as_given(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {name: rows for name, rows in given.items() if name in kwargs}

    outside = [module for module in model.modules() if hasattr(module, "base_layer") and module not in inside]
    hooks = [module.register_forward_pre_hook(as_given, with_kwargs=True) for module in outside]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
