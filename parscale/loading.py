"""Loading: ``parscale.load``, and what ``AutoModelForCausalLM`` does with a full checkpoint.

A full checkpoint is a folder of the backbone's own format with the active set of streams among its tensors. For Qwen2
it is the format of the released ``ParScale/*`` checkpoints:

- ``config.json``: the backbone's, with ``model_type: <backbone>_parscale``, ``parscale_n`` (P), ``parscale_n_tokens``
  (T), ``parscale_attn_smooth`` (without it, 0.01), and, with more than one set, ``parscale_name`` and
  ``parscale_sets``;
- ``model.safetensors`` or shards: ``<attention>.prefix_k`` and ``.prefix_v`` of ``(P, G, T, D)`` (or what another
  transform has, which ``parscale_transform`` then names), and ``<backbone>.aggregate_layer.{0,2}.{weight,bias}``,
  beside the backbone's tensors;
- ``modeling_parscale.py``: for ``trust_remote_code=True``;
- a streams-only folder for each further set, by its name.

A streams-only checkpoint is ``streams.safetensors`` with those tensors and ``parscale_config.json`` with P, T, the
smoothing, the backbone's name and what is needed to see whether another one fits. Of a backbone in a folder it has two
paths: the absolute one, and ``backbone_path``, as seen from the checkpoint, which counts once nothing is at the first.

Adapters that PEFT saved beside either kind are left to PEFT: ``PeftModel.from_pretrained(load(folder), folder)``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from parscale.auto import (
    backbone_class,
    backbone_config,
    class_named,
    class_read_by,
    config_class,
    register_backbone,
)
from parscale.compat.transformers import loading_reports, stored_name, tensor_parallel
from parscale.config import FIELDS, NUM_STREAMS, ParScaleConfig
from parscale.format.checks import check_fit, check_size, check_streams, differences
from parscale.format.folders import (
    BACKBONE_PATH,
    CONFIG,
    FULL,
    HUB_ARGUMENTS,
    STREAMS_CONFIG,
    TYPE_SUFFIX,
    Checkpoint,
    backbone_place,
    numbers,
    set_name,
    set_names,
)
from parscale.format.headers import StoredTensor
from parscale.format.pretrained import read_pretrained, warn_of_adapter
from parscale.format.saving import FORMAT_VERSION
from parscale.format.untrusted import brief
from parscale.format.values import check_values, configuration_of
from parscale.kernels.dispatch import Impl, check_impl
from parscale.streams.choosing import set_streams
from parscale.streams.naming import part_of
from parscale.streams.state import DEFAULT, ParScaleState, StreamSet
from parscale.wrapping import add, attach, detach, fill

_STREAMS_FIELDS = {
    *("backbone_class", "backbone_hidden_size", "backbone_model_type", "backbone_num_layers", BACKBONE_PATH),
    *("base_model_name_or_path", "format_version", "name", "version"),
    *FIELDS,
}
# What a field of the wrong type makes transformers raise when it looks at it.
_FAULTS = (ArithmeticError, AttributeError, LookupError)
# How transformers says that the tensors are not those that it expects.
_REPORTS = "ignore_mismatched_sizes|conversion of the weights|in loading state_dict"


@torch.inference_mode(False)  # what is loaded can train
def load(
    path_or_repo: str | os.PathLike[str],
    *,
    backbone: Any = None,
    dtype: Any = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    kernels: Impl = "auto",
    tp_plan: str | Mapping[str, str] | None = None,
    distributed_config: Any = None,
) -> Any:
    """Reads a checkpoint with streams: a full one, also a released ``ParScale/*`` one, or streams only.

    The set that was active when it was saved is active; further sets of a full checkpoint come back inactive. No code
    from the checkpoint runs, and nothing is unpickled. An adapter in the folder is not applied, and a warning says so.

    Args:
        path_or_repo: a folder, or the name of a repository on the Hugging Face Hub.
        backbone: for streams only, in place of the backbone that they name: a folder, a name on the Hub, or a model,
            which is wrapped in place. Streams of its own that a folder has are left out.
        dtype: as saved unless given: a ``torch.dtype`` or its name.
        device_map: as in ``from_pretrained``.
        attn_implementation: as in ``from_pretrained``.
        revision: of the repository: a branch, a tag or a commit.
        kernels: as in :func:`parscale.wrap`.
        tp_plan: splits each layer over all processes that ``torchrun`` started: ``"auto"`` by the plan that
            transformers has for the backbone, or a plan of that form. With one process, nothing is split.
        distributed_config: as in ``from_pretrained``, in place of ``tp_plan``; for tensor parallelism only.

    Returns:
        The wrapped model, of the backbone's own class, in eval mode.

    Raises:
        ValueError: it is not a ParScale checkpoint, is damaged, or does not fit the backbone.
        OSError: a folder or a file is not there (``FileNotFoundError``) or cannot be read.
    """
    check_impl(kernels, "kernels")
    checkpoint = Checkpoint(path_or_repo, revision=revision)
    options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    if tp_plan is not None and distributed_config is not None:
        raise ValueError("distributed_config has a tp_plan of its own: give one of the two.")
    options["distributed_config"] = distributed_config if tp_plan is None else _tensor_parallel(tp_plan)
    options = {key: value for key, value in options.items() if value is not None}
    if checkpoint.kind() == FULL:
        if backbone is not None:
            raise ValueError(f"{checkpoint} has a backbone of its own: leave out backbone=, which is for streams only.")
        model = _load_full(checkpoint, _full_config(checkpoint), **options)
    else:
        model = _load_streams(checkpoint, backbone, options)
    model.parscale.kernels = kernels
    return model


def _tensor_parallel(tp_plan: str | Mapping[str, str]) -> Any:
    if not isinstance(tp_plan, Mapping) and tp_plan != "auto":
        raise ValueError(f"tp_plan is 'auto' or a dictionary of names and styles, got {tp_plan!r}.")
    plan = dict(tp_plan) if isinstance(tp_plan, Mapping) else None
    return tensor_parallel(int(os.environ.get("WORLD_SIZE", "1")), plan)


@torch.inference_mode(False)  # what is loaded can train
def load_full(path_or_repo: str | os.PathLike[str], config: Any, *model_args: Any, **kwargs: Any) -> Any:
    """Reads a full checkpoint, with the arguments of ``from_pretrained``.

    Args:
        path_or_repo: a folder, or the name of a repository on the Hugging Face Hub.
        config: its configuration, from ``AutoConfig``.
        *model_args: for the backbone's class.
        **kwargs: for the backbone's ``from_pretrained``.

    Raises:
        ValueError: the checkpoint is damaged, or ``use_safetensors=False``.
        OSError: a folder or a file is not there or cannot be read.
    """
    checkpoint = Checkpoint(path_or_repo, **{key: kwargs.get(key) for key in HUB_ARGUMENTS})
    return _load_full(checkpoint, config, *model_args, **kwargs)


def _full_config(checkpoint: Checkpoint) -> Any:
    fields = checkpoint.read_json(CONFIG)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{CONFIG} of {checkpoint} has no model_type: it is damaged.")
    config_class(model_type.removesuffix(TYPE_SUFFIX))  # says so if transformers does not know it
    register_backbone(model_type.removesuffix(TYPE_SUFFIX))
    return _read_config(checkpoint, fields, checkpoint.weights())


def _read_config(checkpoint: Checkpoint, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Any:
    check_values(checkpoint, fields, tensors)
    with configuration_of(checkpoint):
        return read_pretrained(AutoConfig, checkpoint.name, **checkpoint.hub)


def _load_full(checkpoint: Checkpoint, config: Any, *model_args: Any, **kwargs: Any) -> Any:
    streams = numbers(checkpoint, vars(config))
    name, further = set_names(checkpoint, vars(config))
    tensors = checkpoint.weights(kwargs.get("variant"))
    stored = {key: tensor for key, tensor in tensors.items() if part_of(key)}
    check_streams(checkpoint, streams, stored)
    check_values(checkpoint, vars(config), tensors)
    sets = {other: _read_streams(checkpoint.inside(other)) for other in further}
    with_info = kwargs.pop("output_loading_info", False)
    warn_of_adapter(checkpoint)
    model, info = _load_backbone(checkpoint, config, tensors, *model_args, **kwargs)
    with configuration_of(checkpoint, (*_FAULTS, TypeError)):
        state = attach(model)
    if name is not None:
        add(state, name, streams, tensors=_values(model, streams, stored))
    for other, (other_config, other_tensors) in sets.items():
        add(state, other, other_config, tensors=_values(model, other_config, other_tensors))
    set_streams(model, name)
    return (model, info) if with_info else model


def _load_backbone(
    checkpoint: Checkpoint, config: Any, tensors: Mapping[str, StoredTensor], *model_args: Any, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """The plain backbone of a full checkpoint, by its class's own ``from_pretrained``, and that one's report."""
    if kwargs.setdefault("use_safetensors", True) is False:
        raise ValueError("parscale reads safetensors only: leave out use_safetensors=False.")
    plain = backbone_config(config)
    plain.__dict__.pop("transformers_weights", None)  # would name other files than those that were looked at
    cls = backbone_class(config, plain)
    plain.architectures = [cls.__name__]
    if getattr(plain, "quantization_config", None) is None:
        check_size(checkpoint, cls, plain, tensors)
    tolerant = kwargs.get("ignore_mismatched_sizes", False)
    with _reports(shown=tolerant) as reports:
        try:
            with configuration_of(checkpoint, _FAULTS):
                options = checkpoint.hub | kwargs | {"config": plain, "output_loading_info": True}
                model, info = read_pretrained(cls, checkpoint.name, *model_args, **options)
        except RuntimeError as error:
            if re.search(_REPORTS, str(error)) is None:
                raise
            found = differences(checkpoint, cls, plain, tensors)[:3] or reports or [str(error)]
            raise ValueError(f"The tensors of {checkpoint} do not fit its {CONFIG}: {'; '.join(found)}.") from error
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if part_of(key) is None}
    problems = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    problems += [f"{key} is unknown" for key in sorted(info["unexpected_keys"])]
    if problems and not tolerant:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"The tensors of {checkpoint} are not those of a {cls.__name__}: {'; '.join(problems[:3])}{more}. "
            "The checkpoint is damaged: copy or save it again."
        )
    return model, info


def _load_streams(checkpoint: Checkpoint, backbone: Any, options: dict[str, Any]) -> Any:
    fields = checkpoint.read_json(STREAMS_CONFIG)
    streams, stored = _read_streams(checkpoint)
    name = set_name(checkpoint, fields)
    warn_of_adapter(checkpoint)
    if isinstance(backbone, PreTrainedModel):
        if options:
            raise ValueError(f"backbone is a model that is loaded already: leave out {', '.join(options)}.")
        check_fit(checkpoint, fields, backbone.config)
        model = backbone
    elif backbone is None or isinstance(backbone, str | os.PathLike):
        model = _named_backbone(checkpoint, fields, backbone, options)
    else:
        raise ValueError(f"backbone is a folder, a name on the Hub or a model, got {type(backbone).__name__}.")
    state = attach(model)
    try:
        add(state, name, streams, tensors=_values(model, streams, stored))
    except BaseException:
        detach(state)
        raise
    set_streams(model, name)
    return model


@torch.inference_mode(False)  # what is loaded can train
def add_saved_streams(model: Any, path_or_repo: str | os.PathLike[str], name: str | None = None) -> None:
    """Adds a further set of streams to a wrapped model from a streams-only folder, inactive and frozen until chosen.

    Args:
        model: wrapped, of the backbone that the streams were made for.
        path_or_repo: a folder that ``save_streams`` wrote, or the name of a repository on the Hugging Face Hub.
        name: of the set in this model; by default the one that it was saved under.

    Raises:
        ValueError: the folder is no streams-only checkpoint or damaged, its streams do not fit the model, or there is a
            set of that name.
        OSError: a folder or a file is not there or cannot be read.
    """
    checkpoint = Checkpoint(path_or_repo)
    if checkpoint.kind() == FULL:
        raise ValueError(f"{checkpoint} has a backbone of its own: load_streams takes what save_streams has written.")
    fields = checkpoint.read_json(STREAMS_CONFIG)
    streams, stored = _read_streams(checkpoint)
    check_fit(checkpoint, fields, model.config)
    add(model.parscale, name or set_name(checkpoint, fields), streams, tensors=_values(model, streams, stored))


def load_into_active(model: Any, checkpoint: Checkpoint) -> None:
    """Reads the values of a streams-only checkpoint into the active set.

    Args:
        model: wrapped, with streams of the same numbers as the checkpoint's.
        checkpoint: the folder or repository.

    Raises:
        ValueError: it is damaged, no streams are active, or they are others than the checkpoint's.
        OSError: a file cannot be read.
    """
    state: ParScaleState = model.parscale
    saved, stored = _read_streams(checkpoint)
    check_fit(checkpoint, checkpoint.read_json(STREAMS_CONFIG), model.config)
    streams = state.active
    ours = None if streams is None else streams.config
    if streams is None or ours is None or dataclasses.replace(saved, init=ours.init, seed=ours.seed) != ours:
        raise ValueError(
            f"{checkpoint} holds streams ({saved}), and this model's are others ({ours or 'none active'}): wrap the "
            "model with the same numbers, or parscale.load the folder with backbone= and put the adapter on that."
        )
    fill(state, streams, _values(model, saved, stored))


def _named_backbone(
    checkpoint: Checkpoint, fields: Mapping[str, Any], given: str | os.PathLike[str] | None, options: dict[str, Any]
) -> Any:
    """The backbone that was given by name or that the streams name, without streams of its own."""
    name = os.fspath(given) if given is not None else backbone_place(checkpoint, fields)
    if not name:
        raise ValueError(f"{checkpoint} does not name its backbone: give it as backbone=, a folder or a model.")
    try:
        base = Checkpoint(name)
        config = _read_config(base, base.read_json(CONFIG), base.weights())
    except ValueError as error:
        raise ValueError(f"The backbone {name} of {checkpoint} cannot be read: {error}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"The backbone {name} of {checkpoint} cannot be read; give backbone=, a folder or a model. ({error})"
        ) from error
    check_fit(checkpoint, fields, config)
    if NUM_STREAMS in vars(config):
        return _load_backbone(base, config, base.weights(), **options)[0]
    cls = class_named(fields.get("backbone_class"))
    return load_plain_model(base, AutoModelForCausalLM if cls is None else cls, **options)[0]


def load_plain_model(checkpoint: Checkpoint, reader: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model without streams, once its files and its configuration are known to be sound, and transformers' report.

    Args:
        checkpoint: of the model.
        reader: an ``AutoModel...`` or the model's class.
        **options: for ``from_pretrained``.

    Raises:
        ValueError: the checkpoint is damaged, or needs code of its own.
        OSError: a file is not there or cannot be read.
    """
    tensors = checkpoint.weights(options.get("variant"))
    config = _read_config(checkpoint, checkpoint.read_json(CONFIG), tensors)
    cls = class_read_by(reader, config)
    if cls is not None and getattr(config, "quantization_config", None) is None:
        check_size(checkpoint, cls, config, tensors)
    warn_of_adapter(checkpoint)
    return read_pretrained(reader, checkpoint.name, output_loading_info=True, **checkpoint.hub | options)


def _read_streams(checkpoint: Checkpoint) -> tuple[ParScaleConfig, dict[str, StoredTensor]]:
    """Numbers and tensors of a streams-only checkpoint."""
    fields = checkpoint.read_json(STREAMS_CONFIG)
    unknown = sorted(fields.keys() - _STREAMS_FIELDS)
    if unknown or fields.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        warnings.warn(
            f"{STREAMS_CONFIG} of {checkpoint} was written by another version of parscale "
            f"({fields.get('version', 'unknown')}); ignored: {brief(', '.join(unknown)) or 'nothing'}.",
            stacklevel=2,
        )
    streams = numbers(checkpoint, {key: fields[key] for key in fields.keys() & _STREAMS_FIELDS})
    stored = checkpoint.streams()
    check_streams(checkpoint, streams, stored)
    return streams, stored


def _values(model: Any, config: ParScaleConfig, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The tensors of a set by their released names in the model."""
    state: ParScaleState = model.parscale
    names = {_stored_name(model, name, stored): name for name in state.names(StreamSet(state, DEFAULT, config))}
    values = {}
    for file in {tensor.file for tensor in stored.values()}:
        with safe_open(file, "pt") as tensors:
            for name in (name for name, tensor in stored.items() if tensor.file == file):
                values[names.get(name, name)] = tensors.get_tensor(name)
    return values


def _stored_name(model: Any, name: str, stored: Iterable[str]) -> str:
    """What a tensor is called in a file: some classes save their modules under other names than they have."""
    if name in stored:
        return name
    return stored_name(model, name)


@contextmanager
def _reports(*, shown: bool) -> Iterator[list[str]]:
    """In this block transformers' tables of tensors that do not fit go into a list: an error will say it in a line.

    Args:
        shown: they are shown too, without the rows of streams, which the backbone's class does not expect.
    """
    reports: list[str] = []

    def keep(report: str) -> str | None:
        lines = [line for line in report.splitlines() if part_of(line.partition("|")[0].strip()) is None]
        reports.append("\n".join(lines))
        rows = sum("|" in line for line in lines) - 1  # below their head
        return reports[-1] if shown and rows else None

    with loading_reports(keep):
        yield reports
