"""Saves a full checkpoint, or only the streams; see `parscale.loading` for the contents of the folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from parscale.compat.transformers import has_adapter
from parscale.config import (
    DEFAULT_SET,
    FIELDS,
    MADE_FROM,
    NUM_STREAMS,
    SET_NAME,
    SETS,
    VERSION,
    ParScaleConfig,
)
from parscale.distributed.offloading import fetched, fetched_state_dict, is_offloaded
from parscale.distributed.parallel import gathered_state_dict, is_main_process, is_sharded, together_at_the_end, whole
from parscale.format.architectures import class_in_checkpoints
from parscale.format.checks import backbone_facts
from parscale.format.folders import (
    BACKBONE,
    BACKBONE_PATH,
    CONFIG,
    FORMAT_VERSION,
    STREAMS_CONFIG,
    STREAMS_FILE,
    TYPE_SUFFIX,
    Checkpoint,
    read_json,
    set_names,
)
from parscale.format.repository import make_repository
from parscale.format.staging import final_path, staged
from parscale.streams.naming import is_copy, is_of_streams
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState
from parscale.version import __version__

REMOTE_CODE = Path(__file__).parents[1] / "modeling_parscale.py"
_PUSH_ARGUMENTS = ("push_to_hub", "repo_id", "private", "commit_message", "create_pr", "revision")


def save_full(model: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Writes a full checkpoint, as `parscale.methods.save_pretrained` describes.

    The backbone's own class writes the folder, with all features of its `save_pretrained`. An existing folder keeps its
    other files; an older checkpoint in it is replaced. On failure, the folder does not change.

    In a distributed run the first process writes. If the model's tensors are sharded over the processes, all of them
    call this together, and the folder holds full tensors; with an already gathered `state_dict`, the first process may
    call it alone.

    Args:
        model: a wrapped model.
        save_directory: the folder; created if it does not exist.
        **kwargs: `state_dict`, `max_shard_size`, `is_main_process`, `push_to_hub` and all other arguments of the
            class's own `save_pretrained`, except for `distributed_checkpoint`.
    """
    state: ParScaleState = model.parscale
    push = {key: kwargs.pop(key) for key in _PUSH_ARGUMENTS if key in kwargs} | {"token": kwargs.get("token")}
    if kwargs.get("distributed_checkpoint"):
        raise ValueError(
            "A model with streams is saved with full tensors: omit distributed_checkpoint=True (and pass a gathered "
            "state_dict=, or let the Trainer do it)."
        )
    if kwargs.get("state_dict") is None and is_offloaded(model) and getattr(model, "hf_device_map", None) is None:
        kwargs["state_dict"] = fetched_state_dict(model)  # transformers does so itself for a device_map
    together = kwargs.get("state_dict") is None and is_sharded(model)
    if kwargs.get("state_dict") is not None:
        kwargs["state_dict"] = dict(kwargs["state_dict"])
    elif state.active is not None:
        for released, holder in state.holders(state.active).items():
            _check_values(released, fetched(*holder))
    without_weights = kwargs.get("state_dict") == {}  # DeepSpeed writes them itself
    others = [] if without_weights else [streams for streams in state.sets.values() if streams is not state.active]
    further = {streams.name: _tensors(state, streams, kwargs.get("state_dict")) for streams in others}
    beside = None
    if has_adapter(model) and state.active is not None:
        beside = _tensors(state, state.active, kwargs.get("state_dict"))
    if together:
        kwargs["state_dict"] = gathered_state_dict(model)
    with together_at_the_end() if together else nullcontext():
        if kwargs.get("is_main_process", True) and is_main_process():
            _write_full(model, save_directory, further, beside, push, without_weights, kwargs)
            return
        # takes part in gathering; only the main process writes
        with tempfile.TemporaryDirectory() as nowhere, _under_released_names(state, kwargs.get("state_dict")):
            type(model).save_pretrained(model, nowhere, **kwargs)
        _correct_dtype(model)


def _write_full(
    model: Any,
    save_directory: str | os.PathLike[str],
    further: dict[str, dict[str, torch.Tensor]],
    beside: dict[str, torch.Tensor] | None,
    push: dict[str, Any],
    without_weights: bool,
    kwargs: dict[str, Any],
) -> None:
    """Writes the folder of `save_full`.

    Args:
        model: the wrapped model.
        save_directory: the folder.
        further: the tensors of the other sets.
        beside: the tensors of the active set, if there is one and the class writes only its adapters.
        push: what to do on the Hub.
        without_weights: other code writes the weights.
        kwargs: passed to the class's own `save_pretrained`.
    """
    state: ParScaleState = model.parscale
    stale = _StaleFiles(Path(save_directory), kwargs.get("variant"))
    writes_model = not without_weights and not has_adapter(model)
    last = (STREAMS_CONFIG, CONFIG)  # with an adapter, the first alone is written
    with staged(save_directory, last=last, replaces=lambda name: writes_model and stale(name)) as work:
        if beside is not None:
            _require_no_full_checkpoint(save_directory)
        with _under_released_names(state, kwargs.get("state_dict")):
            type(model).save_pretrained(model, work, **kwargs)
        _correct_dtype(model)
        if (work / CONFIG).exists():
            _mark(work / CONFIG, model)
            shutil.copy(REMOTE_CODE, work)
            for name, tensors in further.items():
                _write_streams(work / name, model, state.sets[name], tensors, "..")
        elif beside is not None:
            _write_streams(work, model, _active(state), beside, model.config.name_or_path or None)
        written = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    if push.get("push_to_hub"):
        _push(Path(save_directory), written, push)


def save_streams(
    model: Any, save_directory: str | os.PathLike[str], *, state_dict: MutableMapping[str, Any] | None = None
) -> None:
    """Writes the active set of streams, as `parscale.methods.save_streams` describes.

    An existing folder keeps its other files. On failure, the folder does not change. In a distributed run the first
    process writes; if the model is sharded over the processes, all of them call this together.

    Args:
        model: a wrapped model.
        save_directory: the folder; created if it does not exist.
        state_dict: that of the model, already gathered; then the first process may call this alone.
    """
    state: ParScaleState = model.parscale
    streams = _active(state)
    _require_no_full_checkpoint(save_directory)
    with together_at_the_end() if state_dict is None and is_sharded(model) else nullcontext():
        tensors = _tensors(state, streams, state_dict)
        if is_main_process():
            with staged(save_directory, last=STREAMS_CONFIG) as work:
                _require_no_full_checkpoint(save_directory)  # again: a save that was cut off is ended only now
                _write_streams(work, model, streams, tensors, model.config.name_or_path or None)


def _require_no_full_checkpoint(folder: str | os.PathLike[str]) -> None:
    config = Path(folder, CONFIG)
    if config.is_file() and NUM_STREAMS in read_json(config):
        raise ValueError(f"{folder} holds a full checkpoint: save the streams alone in another folder.")


@contextmanager
def _under_released_names(state: ParScaleState, state_dict: MutableMapping[str, Any] | None) -> Iterator[None]:
    """In this block the model's `state_dict()`, and `state_dict`, hold only the active set, by its released names.

    Other threads, which may be saving another set, have hooks of their own.
    """
    thread = threading.get_ident()

    def rename(model: object, state_dict: MutableMapping[str, Any], prefix: str = "", *args: Any) -> None:
        if prefix or threading.get_ident() != thread:
            return
        in_use = set() if state.active is None else set(state.names(state.active).values())
        for name in [name for name in state_dict if is_copy(name) and name not in in_use]:
            state_dict.pop(name)
        for streams in state.sets.values():
            if streams is not state.active:
                for name in state.names(streams).values():
                    state_dict.pop(name, None)
        if state.active is not None:
            holders = state.holders(state.active)
            for released, name in state.names(state.active).items():
                if name in state_dict:
                    value = state_dict.pop(name)
                    if isinstance(value, torch.Tensor) and value.is_meta:
                        # transformers would fetch it by its released name, which may be that of another set
                        value = fetched(*holders[released]).detach()
                    state_dict[released] = value

    with state.model.register_state_dict_post_hook(rename):
        if state_dict is not None:
            rename(state.model, state_dict)
        yield


def _correct_dtype(model: Any) -> None:
    """Gives the configuration the backbone's dtype: `save_pretrained` notes that of the first parameter, a prompt."""
    tensors = (tensor for name, tensor in model.named_parameters() if not is_of_streams(name))
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
    if dtype is not None:
        model.config.dtype = str(dtype).removeprefix("torch.")


def _mark(path: Path, model: Any) -> None:
    """Turns the backbone's `config.json` into that of a full checkpoint."""
    state: ParScaleState = model.parscale
    config = read_json(path) | {"dtype": model.config.dtype}
    streams = state.active.config if state.active is not None else ParScaleConfig(num_streams=1)
    for field in (*FIELDS, SET_NAME, SETS):  # of the set that the model's configuration records, which may be another
        config.pop(field, None)
    config |= streams.to_fields() | {VERSION: __version__}
    if state.made_from is not None:
        config[MADE_FROM] = state.made_from
    name = None if state.active is None else state.active.name
    if name != DEFAULT_SET:
        config[SET_NAME] = name
    further = [other for other in state.sets if other != name]
    if further:
        config[SETS] = further
    if config["model_type"] == "qwen2":
        _add_released_fields(config)
    config["model_type"] += TYPE_SUFFIX
    architecture, readers = class_in_checkpoints(model)
    config["architectures"] = [architecture]
    readers = {"AutoConfig": "ParScaleModelConfig", **readers}
    config["auto_map"] = {auto: f"{REMOTE_CODE.stem}.{name}" for auto, name in readers.items()}
    _write_json(path, config)


def _add_released_fields(config: dict[str, Any]) -> None:
    """Adds the fields that the released Qwen2 code reads under the names of transformers 4."""
    rope = dict(config.get("rope_parameters") or {})
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    config["torch_dtype"] = config.get("dtype")


class _StaleFiles:
    """Tells which files of an older checkpoint in a folder must not stay with a new one."""

    def __init__(self, folder: Path, variant: str | None) -> None:
        infix = f".{variant}" if variant else ""
        weights = rf"model{re.escape(infix)}(-\d{{5}}-of-\d{{5}})?\.safetensors"
        self._pattern = re.compile(rf"{weights}|model\.safetensors\.index{re.escape(infix)}\.json")
        self._folder = folder

    @cached_property
    def _names(self) -> set[str]:
        """The files of further sets; read when `staged` asks, after it has ended a save that was cut off."""
        config = self._folder / CONFIG
        try:
            sets = set_names(Checkpoint(self._folder), read_json(config))[1] if config.is_file() else []
        except ValueError:  # the older files cannot be identified
            sets = []
        return {f"{name}/{file}" for name in sets for file in (STREAMS_FILE, STREAMS_CONFIG)}

    def __call__(self, name: str) -> bool:
        return name in self._names or self._pattern.fullmatch(name) is not None


def _write_streams(
    folder: Path, model: Any, streams: StreamSet, tensors: dict[str, torch.Tensor], backbone: str | None
) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / STREAMS_FILE, metadata={"format": "pt"})
    config = {
        "backbone_class": type(model).__name__.removeprefix("FSDP"),
        **backbone_facts(model.config),
        BACKBONE: backbone,
        "format_version": FORMAT_VERSION,
        "name": streams.name,
        "version": __version__,
        **streams.config.to_fields(),
    }
    if backbone is not None and os.path.isabs(backbone):
        config[BACKBONE_PATH] = os.path.relpath(os.path.realpath(backbone), final_path(folder))
    _write_json(folder / STREAMS_CONFIG, config)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _active(state: ParScaleState) -> StreamSet:
    if state.active is None:
        raise ValueError("No streams are active, so there is nothing to save: set_streams(name) first.")
    return state.active


def _tensors(
    state: ParScaleState, streams: StreamSet, state_dict: MutableMapping[str, Any] | None
) -> dict[str, torch.Tensor]:
    """A set's values by their released names, on the CPU; from `state_dict` if it has them."""
    names = state.names(streams)
    if state_dict is not None and all(name in state_dict for name in names.values()):
        values: dict[str, Any] = {released: state_dict[name] for released, name in names.items()}
    else:
        values = {released: fetched(*holder) for released, holder in state.holders(streams).items()}
    tensors = {}
    for name, value in values.items():
        _check_values(name, value)
        tensors[name] = whole(value).detach().cpu().contiguous()
    return tensors


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values to save: load or initialize it first.")


def _push(folder: Path, files: list[str], arguments: dict[str, Any]) -> None:
    """Uploads the files of a folder to the Hub, by the arguments of `save_pretrained`."""
    api = HfApi(token=arguments.get("token"))
    name = arguments.get("repo_id") or folder.resolve().name
    repo = make_repository(api, name, arguments.get("private"))
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        allow_patterns=files,
        commit_message=arguments.get("commit_message") or "Upload model",
        create_pr=arguments.get("create_pr"),
        revision=arguments.get("revision"),
    )
