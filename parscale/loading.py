"""Loading: `parscale.load`, and the loader behind `AutoModelForCausalLM` for full checkpoints.

A full checkpoint is a folder in the backbone's own format, with the active set of streams among its tensors. For Qwen2
it has the format of the released `ParScale/*` checkpoints:

- `config.json`: the backbone's, with `model_type: <backbone>_parscale`, `parscale_n` (P), `parscale_n_tokens` (T),
  `parscale_attn_smooth` (without it, 0.01), `parscale_version` (of this package), `parscale_backbone` (the backbone's
  name, if it came from the Hub), and, with more than one set, `parscale_name` and `parscale_sets`;
- `model.safetensors` or shards: the backbone's tensors, `<attention>.prefix_k` and `.prefix_v` of `(P, G, T, D)` (or
  the tensors of another transform, which `parscale_transform` then names), and
  `<backbone>.aggregate_layer.{0,2}.{weight,bias}`;
- `modeling_parscale.py`: for `trust_remote_code=True`;
- a streams-only folder for each other set, by its name.

A streams-only checkpoint is `streams.safetensors` with those tensors and `parscale_config.json` with P, T, the
smoothing, the backbone's name and the values that show whether another backbone fits. A backbone in a folder has two
paths in it: the absolute one, and `backbone_path`, relative to the checkpoint, which is used if nothing is at the
first.

Adapters that PEFT saved in the same folder are loaded by PEFT: `PeftModel.from_pretrained(load(folder), folder)`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from parscale.compat.transformers import tensor_parallel
from parscale.config import MADE_FROM, NUM_STREAMS
from parscale.distributed.processes import number_of_processes
from parscale.format.architectures import class_named, config_class, register_backbone
from parscale.format.checks import check_fit, check_streams
from parscale.format.folders import (
    CONFIG,
    FULL,
    HUB_ARGUMENTS,
    TYPE_SUFFIX,
    Checkpoint,
    backbone_location,
    hub_name,
    set_name,
    set_names,
    stream_config,
)
from parscale.format.models import FAULTS, load_backbone, load_plain_model, read_config
from parscale.format.pretrained import warn_of_adapter, warn_of_licences
from parscale.format.stored_sets import read_streams, values_in
from parscale.format.values import check_values, configuration_of
from parscale.hooks.adding import add
from parscale.kernels.dispatch import Impl, check_impl
from parscale.streams.choosing import set_streams
from parscale.streams.naming import part_of
from parscale.wrapping import attach, detach


@torch.inference_mode(False)  # loaded tensors can be trained
def load(
    path_or_repo: str | os.PathLike[str],
    *,
    backbone: str | os.PathLike[str] | PreTrainedModel | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    kernels: Impl = "auto",
    tp_plan: str | Mapping[str, str] | None = None,
    distributed_config: Any = None,
) -> Any:
    """Loads a checkpoint with streams: a full one, such as a released `ParScale/*` one, or streams only.

    The set that was active when it was saved is active; other sets of a full checkpoint are loaded inactive. No code
    from the checkpoint runs, and no pickle is read. An adapter in the folder is not applied, and a warning says so.
    To quantize the backbone of a full checkpoint, give `quantization_config` to `AutoModelForCausalLM.from_pretrained`.

    Args:
        path_or_repo: a folder, or the name of a repository on the Hugging Face Hub.
        backbone: for streams only, in place of the backbone that they name: a folder, a name on the Hub, or a model,
            which is wrapped in place; its head may be another one, or none. Streams in the backbone's folder are
            ignored.
        dtype: a `torch.dtype` or its name; by default the one that `config.json` names, without one that of the saved
            tensors.
        device_map: as in `from_pretrained`.
        attn_implementation: as in `from_pretrained`.
        revision: of the repository: a branch, a tag or a commit.
        token: for private repositories on the Hub, also that of a backbone which streams name; by default the one of
            `hf auth login` or `HF_TOKEN`.
        kernels: as in `parscale.wrap`.
        tp_plan: splits each layer over all processes that `torchrun` started: `"auto"` for the plan of transformers for
            the backbone, or a plan in that form. With one process, nothing is split.
        distributed_config: as in `from_pretrained`, in place of `tp_plan`; for tensor parallelism only.

    Returns:
        The wrapped model, of the backbone's own class, in eval mode.

    Raises:
        ValueError: it is not a ParScale checkpoint, is damaged, or does not fit the backbone.
        OSError: a folder or a file does not exist (`FileNotFoundError`) or cannot be read.
    """
    check_impl(kernels, "kernels")
    checkpoint = Checkpoint(path_or_repo, revision=revision, token=token)
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    if isinstance(device_map, Mapping) and not device_map:
        raise ValueError('device_map names no module, got {}: leave it out, or give a device for all, as {"": "cpu"}.')
    if tp_plan is not None and distributed_config is not None:
        raise ValueError("distributed_config has its own tp_plan: give only one of them.")
    options["distributed_config"] = distributed_config if tp_plan is None else _tensor_parallel(tp_plan)
    options = {key: value for key, value in options.items() if value is not None}
    if checkpoint.kind_with_streams() == FULL:
        if backbone is not None:
            raise ValueError(f"{checkpoint} has its own backbone: omit backbone=, which is for streams only.")
        model = _load_full(checkpoint, _full_config(checkpoint), **options)
    else:
        model = _load_streams(checkpoint, backbone, options)
    model.parscale.kernels = kernels
    return model


def _tensor_parallel(tp_plan: str | Mapping[str, str]) -> Any:
    if not isinstance(tp_plan, Mapping) and tp_plan != "auto":
        raise ValueError(f"tp_plan must be 'auto' or a dictionary of names and styles, got {tp_plan!r}.")
    plan = dict(tp_plan) if isinstance(tp_plan, Mapping) else None
    return tensor_parallel(number_of_processes(), plan)


@torch.inference_mode(False)  # loaded tensors can be trained
def load_full(path_or_repo: str | os.PathLike[str], config: PreTrainedConfig, *model_args: Any, **kwargs: Any) -> Any:
    """Loads a full checkpoint, with the arguments of `from_pretrained`.

    Args:
        path_or_repo: a folder, or the name of a repository on the Hugging Face Hub.
        config: its configuration, from `AutoConfig`.
        *model_args: passed to the backbone's class.
        **kwargs: passed to the backbone's `from_pretrained`.

    Raises:
        ValueError: the checkpoint is damaged, or `use_safetensors=False`.
        OSError: a folder or a file does not exist or cannot be read.
    """
    checkpoint = Checkpoint(path_or_repo, **{key: kwargs.get(key) for key in HUB_ARGUMENTS})
    return _load_full(checkpoint, config, *model_args, **kwargs)


def _full_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    fields = checkpoint.read_json(CONFIG)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{CONFIG} of {checkpoint} has no model_type: it is damaged.")
    config_class(model_type.removesuffix(TYPE_SUFFIX))  # raises an error if transformers does not have it
    register_backbone(model_type.removesuffix(TYPE_SUFFIX))
    return read_config(checkpoint, fields, checkpoint.weights())


def _load_full(checkpoint: Checkpoint, config: PreTrainedConfig, *model_args: Any, **kwargs: Any) -> Any:
    streams = stream_config(checkpoint, vars(config))
    name, further = set_names(checkpoint, vars(config))
    tensors = checkpoint.weights(kwargs.get("variant"))
    stored = {key: tensor for key, tensor in tensors.items() if part_of(key)}
    check_streams(checkpoint, streams, stored)
    check_values(checkpoint, vars(config), tensors)
    sets = {other: read_streams(checkpoint.inside(other)) for other in further}
    with_info = kwargs.pop("output_loading_info", False)
    warn_of_adapter(checkpoint)
    if checkpoint.folder is None:
        warn_of_licences(checkpoint.name)
    model, info = load_backbone(checkpoint, config, tensors, *model_args, **kwargs)
    with configuration_of(checkpoint, (*FAULTS, TypeError)):
        state = attach(model)
    state.made_from = hub_name(vars(config).get(MADE_FROM))
    if name is not None:
        add(state, name, streams, tensors=values_in(model, streams, stored))
    for other, (_, other_config, other_tensors) in sets.items():
        add(state, other, other_config, tensors=values_in(model, other_config, other_tensors))
    set_streams(model, name)
    return (model, info) if with_info else model


def _load_streams(checkpoint: Checkpoint, backbone: object, options: dict[str, Any]) -> Any:
    fields, streams, stored = read_streams(checkpoint)
    name = set_name(checkpoint, fields)
    warn_of_adapter(checkpoint)
    if isinstance(backbone, PreTrainedModel):
        if options:
            raise ValueError(f"backbone is a loaded model: omit {', '.join(options)}.")
        check_fit(checkpoint, fields, backbone.config)
        model = backbone
    elif backbone is None or isinstance(backbone, str | os.PathLike):
        model = _named_backbone(checkpoint, fields, backbone, options)
    else:
        raise ValueError(f"backbone must be a folder, a name on the Hub or a model, got {type(backbone).__name__}.")
    state = attach(model)
    try:
        add(state, name, streams, tensors=values_in(model, streams, stored))
    except BaseException:
        detach(state)
        raise
    set_streams(model, name)
    return model.eval()


def _named_backbone(
    checkpoint: Checkpoint, fields: Mapping[str, Any], given: str | os.PathLike[str] | None, options: dict[str, Any]
) -> Any:
    """Loads the backbone that was given by name or that the streams name, without any streams of its own."""
    name = os.fspath(given) if given is not None else backbone_location(checkpoint, fields)
    if not name:
        raise ValueError(f"{checkpoint} does not name its backbone: pass backbone=, a folder or a model.")
    try:
        base = Checkpoint(name, token=checkpoint.hub.get("token"))
        config = read_config(base, base.read_json(CONFIG), base.weights())
    except ValueError as error:
        raise ValueError(f"The backbone {name} of {checkpoint} cannot be read: {error}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"The backbone {name} of {checkpoint} cannot be read; pass backbone=, a folder or a model. ({error})"
        ) from error
    check_fit(checkpoint, fields, config)
    if NUM_STREAMS in vars(config):
        return load_backbone(base, config, base.weights(), **options)[0]
    cls = class_named(fields.get("backbone_class"))
    return load_plain_model(base, AutoModelForCausalLM if cls is None else cls, **options)[0]
