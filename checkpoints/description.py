"""Describes a checkpoint from its configuration and the headers of its files, without reading any weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from parscale.config import LORA, MADE_FROM, OWN, VERSION, ParScaleConfig
from parscale.format.folders import (
    ADAPTER_CONFIG,
    BACKBONE,
    CAUSAL_LM,
    CONFIG,
    FULL,
    INFIX,
    PLAIN,
    STREAMS_CONFIG,
    TYPE_SUFFIX,
    Checkpoint,
    hub_name,
    set_name,
    set_names,
    stream_config,
)
from parscale.format.headers import StoredTensor
from parscale.format.packed import stored_sizes
from parscale.streams.naming import AGGREGATOR_PART, LABELS, TRANSFORM_PART, part_of

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def describe(path_or_repo: str) -> dict[str, Any]:
    """Describes a checkpoint, as a report that can be written as JSON.

    Args:
        path_or_repo: a folder, or a name on the Hugging Face Hub, whose weights are then downloaded.

    Returns:
        `kind` (`"full"`, `"streams only"` or `"plain backbone"`), `written_by` (of streams: the version of parscale,
        None if unknown), `backbone` (its class, type and name, and `made_from`: what the one in a full checkpoint was
        on the Hub, if it is recorded), the configuration of the active streams, `dtype`, `parameters` by part, and
        `further_streams` by name. An adapter in the same folder adds `adapter`, its type.

    Raises:
        ValueError: the checkpoint is damaged.
        OSError: it does not exist.
    """
    checkpoint = Checkpoint(path_or_repo)
    kind = checkpoint.kind()
    fields = checkpoint.read_json(CONFIG if kind in (FULL, PLAIN) else STREAMS_CONFIG)
    tensors = checkpoint.weights() if kind in (FULL, PLAIN) else checkpoint.streams()
    name: str | None = None
    further: list[str] = []
    if kind == PLAIN:
        streams = ParScaleConfig(num_streams=1)
    elif kind == FULL:
        (name, further), streams = set_names(checkpoint, fields), stream_config(checkpoint, fields)
    else:
        name, streams = set_name(checkpoint, fields), stream_config(checkpoint, fields)
    return {
        "checkpoint": path_or_repo,
        "kind": kind,
        **({} if kind == PLAIN else {"written_by": _version(fields.get(VERSION if kind == FULL else "version"))}),
        "backbone": _backbone(fields, kind),
        "active_streams": name,
        **describe_streams(streams),
        **_adapter(checkpoint),
        "dtype": _dtype(tensors),
        "parameters": _parameters(tensors, streams.transform, fields.get("quantization_config")),
        "further_streams": {other: _further(checkpoint.inside(other)) for other in further},
    }


def _backbone(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind not in (FULL, PLAIN):
        return {
            name: value if isinstance(value := fields.get(field), str) else None
            for name, field in (("class", "backbone_class"), ("model_type", "backbone_model_type"), ("name", BACKBONE))
        }
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # takes a second to import

    model_type = str(fields.get("model_type")).removesuffix(TYPE_SUFFIX)
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    name = classes[0] if isinstance(classes, tuple) else classes
    architectures = fields.get("architectures")
    saved = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(saved, str) and not saved.endswith(CAUSAL_LM):
        name = saved.replace(INFIX, "", 1)
    made_from = hub_name(fields.get(MADE_FROM))
    return {
        "class": name,
        "model_type": model_type,
        "name": "in this folder",
        **({} if made_from is None else {"made_from": made_from}),
    }


def _version(version: object) -> str | None:
    return f"parscale {version}" if isinstance(version, str) else None


def _adapter(checkpoint: Checkpoint) -> dict[str, str]:
    if checkpoint.file(ADAPTER_CONFIG) is None:
        return {}
    return {"adapter": str(checkpoint.read_json(ADAPTER_CONFIG).get("peft_type", "unknown"))}


def describe_streams(streams: ParScaleConfig) -> dict[str, Any]:
    """The fields of a set of streams that have an effect; one stream is the plain backbone, whatever they say."""
    if streams.num_streams == 1:
        of_streams = ("transform", "prefix_length", "smoothing", "init", "seed")
        return {"num_streams": 1, **dict.fromkeys(of_streams)}
    low_rank = streams.transform == LORA
    return {
        "num_streams": streams.num_streams,
        "transform": streams.transform,
        **({} if streams.kv == OWN else {"kv": streams.kv}),
        **({"rank": streams.rank} if low_rank else {"prefix_length": streams.prefix_length}),
        "smoothing": streams.smoothing,
        "init": streams.init,
        "seed": streams.seed,
    }


def _further(checkpoint: Checkpoint) -> dict[str, Any]:
    streams = stream_config(checkpoint, checkpoint.read_json(STREAMS_CONFIG))
    return {**describe_streams(streams), "parameters": _parameters(checkpoint.streams(), streams.transform)}


def _parameters(tensors: Mapping[str, StoredTensor], transform: str, quantization: object = None) -> dict[str, int]:
    counts = {None: 0, TRANSFORM_PART: 0, AGGREGATOR_PART: 0}
    for name, size in stored_sizes(tensors, quantization).items():
        counts[part_of(name)] += size
    return {"backbone": counts[None], LABELS[transform]: counts[TRANSFORM_PART], "aggregator": counts[AGGREGATOR_PART]}


def _dtype(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The dtype that most of the parameters have."""
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        numbers[_DTYPES.get(tensor.dtype, tensor.dtype)] += tensor.numel
    return numbers.most_common(1)[0][0] if numbers else None
