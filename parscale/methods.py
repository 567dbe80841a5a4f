"""The methods that a wrapped model has in addition to those of its class: one function each."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from parscale.attention.registered import CONTINUOUS_BATCHING
from parscale.compat.arguments import KEYS_OF_TARGET
from parscale.compat.transformers import REORDER_CACHE, TOKEN_TIMES, keeping_columns
from parscale.config import LORA, OWN, PREFIX, ParScaleConfig, as_config, takes_fields
from parscale.distributed.parallel import reshard
from parscale.format import saving, stored_sets
from parscale.format.counting import parameter_sizes
from parscale.format.folders import Checkpoint
from parscale.hooks.adding import add
from parscale.hooks.encoded import by_source
from parscale.hooks.stream_losses import IGNORED, StreamLosses, measure_streams
from parscale.hooks.two_passes import ROUTER_LOGITS
from parscale.streams.backbones import generates_text, takes_argument
from parscale.streams.naming import LABELS, TRANSFORM_PART, part_of
from parscale.streams.passes import Adaptive
from parscale.streams.state import ParScaleState, find_state
from parscale.streams.trainability import parameters_of, set_trainable


@takes_fields
def add_streams(
    model: Any,
    name: str,
    num_streams: int | ParScaleConfig = 4,
    *,
    prefix_length: int = 48,
    smoothing: float = 0.1,
    init: str | None = None,
    seed: int | None = None,
    calibration: torch.Tensor | None = None,
    transform: str = PREFIX,
    rank: int = 8,
    kv: str = OWN,
) -> None:
    """Adds a set of streams on the same backbone, inactive and frozen until `set_streams(name)`.

    To train it, add and choose it before an optimizer, DDP or accelerate's `prepare`, which take what trains then. The
    arguments are those of `wrap` but `kernels`, which `wrap` is given for all sets of the model.

    Args:
        name: the set's name; letters, digits, `-` and `_`, but not `"off"`.
        num_streams: P, or a `ParScaleConfig`, beside which no other field may be given.
        prefix_length: as in `ParScaleConfig`.
        smoothing: as in `ParScaleConfig`.
        init: as in `ParScaleConfig`.
        seed: as in `ParScaleConfig`.
        calibration: token ids `(P, T)`, or `(P - 1, T)` with `kv="shared"`, as in `parscale.wrap`.
        transform: as in `ParScaleConfig`.
        rank: as in `ParScaleConfig`.
        kv: as in `ParScaleConfig`.

    Raises:
        ValueError: as in `parscale.wrap`, or the name is taken or invalid.
    """
    config = as_config(num_streams, prefix_length, smoothing, init, seed, transform, rank, kv)
    add(model.parscale, name, config, calibration=calibration)


def freeze_backbone(model: Any) -> None:
    """Freezes all parameters but those of the active streams.

    Raises:
        ValueError: no streams with parameters are active, so nothing would be trainable.
    """
    state: ParScaleState = model.parscale
    if state.num_streams == 1:
        raise ValueError("No streams are active (or P is 1), so nothing would be trainable: set_streams(name) first.")
    reshard(model)
    trained = parameters_of(state, state.active)
    model.requires_grad_(False)
    for parameter in trained:
        set_trainable(parameter, True)


def stream_parameters(model: Any) -> list[torch.nn.Parameter]:
    """The active streams' parameters, for an optimizer that treats them apart from the backbone's.

    Streams take a far higher learning rate than weights, and no weight decay. Under FSDP ask once the model is sharded.

    Returns:
        What makes the streams differ, and their aggregator, whether or not it trains; nothing while streams are off or
        P is 1.
    """
    state: ParScaleState = model.parscale
    return parameters_of(state, state.active)


def print_trainable_parameters(model: Any) -> None:
    """Prints the number of trainable parameters, of all parameters, their ratio in per cent, and the parts.

    The parts are those of the streams, by transform, their aggregators, and all others: the backbone's own parameters
    and those of adapters.
    """
    state: ParScaleState = model.parscale
    sizes = parameter_sizes(model)
    total = sum(sizes.values())
    trained = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    counts = dict.fromkeys([LABELS[streams.config.transform] for streams in state.sets.values()], 0) | {"aggregator": 0}
    for streams in state.sets.values():
        for name, parameter in state.tensors(streams).items():
            label = LABELS[streams.config.transform] if part_of(name) == TRANSFORM_PART else "aggregator"
            counts[label] += sizes[parameter] if parameter.requires_grad else 0
    counts["others"] = trained - sum(counts.values())
    share = 100 * trained / total if total else 0.0
    print(
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f} "
        f"({', '.join(f'{label}: {count:,}' for label, count in counts.items())})"
    )


@dataclasses.dataclass
class StreamReport:
    """What the streams of a model do on a text.

    Attributes:
        losses: mean next-token loss of each stream alone, in nats, `(P,)`.
        weights: aggregation weights, `(B, S, P)`.
        entropy: of the weights at each token, in nats, `(B, S)`; `log(P)` for equal weights.
        correlation: of the token losses of each pair of streams, `(P, P)`; NaN if only one is counted.
    """

    losses: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor
    correlation: torch.Tensor


@torch.no_grad()
def stream_report(
    model: Any, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
) -> StreamReport:
    """Measures each stream's loss, the aggregation weights, and the correlation of the streams' losses.

    The model runs as it is: call `model.eval()` first, or dropout is on. The weights are those of the aggregator's own
    layers, also where a forward hook on the aggregator mixes otherwise.

    Args:
        input_ids: `(B, S)`.
        labels: `(B, S)`, -100 where no loss is counted, such as at padding; `input_ids` if `None`.
        **kwargs: passed to the model (`attention_mask`, ...).

    Returns:
        Losses, weights, their entropy, and the correlation of the streams.

    Raises:
        ValueError: no streams are active, the model is not a causal language model, shapes do not fit, or no loss is
            counted.
    """
    measured = stream_losses(model, input_ids, labels, **kwargs)
    losses, weights = measured.losses[:, measured.counted], measured.weights  # (P, tokens), (B, S, P)
    P, tokens = losses.shape
    return StreamReport(
        losses=losses.mean(dim=1),
        weights=weights,
        entropy=-torch.special.xlogy(weights, weights).sum(-1),
        correlation=torch.corrcoef(losses) if tokens > 1 else losses.new_full((P, P), math.nan),
    )


def stream_losses(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    mixture: bool = False,
    **kwargs: Any,
) -> StreamLosses:
    """Measures each stream's loss at each token, with gradients where they are recorded, for a loss of your own.

    One pass of the model as it is: call `model.eval()` first, or dropout is on. The head computes logits for every
    stream at once.

    `DistributedDataParallel` reduces gradients of its own forward pass only. To train by this loss on several devices,
    give it a module that holds the model and whose `forward` calls this method.

    Args:
        input_ids: `(B, S)`.
        labels: `(B, S)`, -100 where no loss is counted, such as at padding; `input_ids` if `None`.
        mixture: also measure what the streams are mixed to, in a last row of the losses: the model's own loss.
        **kwargs: passed to the model (`attention_mask`, ...).

    Returns:
        Losses `(P, B, S - 1)`, or `(P + 1, B, S - 1)` with the mixture, and what else was measured.

    Raises:
        ValueError: no streams are active, the model is not a causal language model, shapes do not fit, or no loss is
            counted.
    """
    if model.num_streams == 1:
        raise ValueError("No streams are active (or P is 1): set_streams(name) first.")
    if not generates_text(model):
        raise ValueError(f"Streams are measured by next-token losses, which {type(model).__name__} does not have.")
    labels = input_ids if labels is None else labels
    if input_ids.ndim != 2 or labels.shape != input_ids.shape:
        raise ValueError(
            "Measuring streams takes input_ids (B, S) and labels (B, S), got "
            f"{tuple(input_ids.shape)} and {tuple(labels.shape)}."
        )
    if not (labels[:, 1:] != IGNORED).any():
        raise ValueError(
            f"There is no loss to measure in labels {tuple(labels.shape)}: give at least two tokens, of which one "
            f"after the first is not {IGNORED}."
        )
    return measure_streams(model, input_ids, labels, mixture=mixture, **kwargs)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Writes a full checkpoint: backbone and active streams, and each other set in a folder of its name.

    Of a model with an adapter from its own `add_adapter`, only the adapter and the active streams are written, as by
    `save_streams`.

    Args:
        save_directory: the folder to write; it appears only when it is complete.
        is_main_process: as in transformers' own `save_pretrained`.
        state_dict: likewise.
        **kwargs: likewise.

    Raises:
        ValueError: `distributed_checkpoint=True`, streams on the meta device, or an adapter with streams for a folder
            that holds a full checkpoint.
        OSError: the folder is a file, cannot be written, or the disk is full.
    """
    saving.save_full(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)


def save_streams(model: PreTrainedModel, save_directory: str | os.PathLike[str]) -> None:
    """Writes the active streams and the backbone's name, for `parscale.load` and `load_streams`.

    The revision of a backbone on the Hub is not recorded: `load` reads its default branch. For another one, load the
    backbone by itself and give it to `load` as `backbone=`.

    Args:
        save_directory: the folder to write; it appears only when it is complete.

    Raises:
        ValueError: no streams are active, their tensors are on the meta device, or the folder holds a full checkpoint.
        OSError: the folder is a file, cannot be written, or the disk is full.
    """
    saving.save_streams(model, save_directory)


def load_streams(
    model: PreTrainedModel,
    path_or_repo: str | os.PathLike[str],
    name: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Adds a saved set of streams, inactive until `set_streams(name)`.

    Args:
        path_or_repo: a folder, or a name on the Hugging Face Hub.
        name: the set's name in this model; by default the name that it was saved with.
        revision: as in `parscale.load`.
        token: likewise.

    Raises:
        ValueError: the folder is damaged or not a streams-only checkpoint, its streams do not fit the model, or a set
            has this name already.
        OSError: a folder or a file does not exist (`FileNotFoundError`) or cannot be read.
    """
    stored_sets.add_saved_streams(model, Checkpoint(path_or_repo, revision=revision, token=token), name)


def generate(model: Any, *args: Any, adaptive: float | None = None, **kwargs: Any) -> Any:
    """Generates as the model's own method does.

    Args:
        *args: passed to the model's own method.
        adaptive: for streams that share keys and values (`kv="shared"`): the entropy of stream 0's prediction of a
            token, in nats, above which streams 1 to P - 1 run for it. 0: always; infinity: never, which is the plain
            backbone. `model.last_mean_streams` is then the mean number of streams that ran for a token, over all beams
            and returned sequences, and all positions whose logits were computed. Some of these yield no token: rejected
            drafts, and the last position of each but the last chunk of `prefill_chunk_size`. It stays until the next
            call with `adaptive`.
        **kwargs: passed to the model's own method; `encoder_outputs` have one row for each source.

    Returns:
        The result of the model's own method.

    Raises:
        ValueError: `adaptive` is not such a number, or the active streams do not share keys; or streams are active and
            the assistant model has no encoder and would use this model's, or it reads inner hidden states (DFlash), or
            the keys and values of streams that do not share them (Gemma 4's assistant).
    """
    if adaptive is not None:
        with adaptive_streams(model, adaptive) as counted:
            output = generate(model, *args, **kwargs | {"disable_compile": True})
        model.last_mean_streams = counted.mean_streams
        return output
    if kwargs.get("encoder_outputs") is not None:
        kwargs["encoder_outputs"] = by_source(kwargs["encoder_outputs"])
    config = _generation_config(model, args, kwargs)
    _check_drafts(model, config, kwargs)
    if model.num_streams > 1 and model.parscale.active.shares_keys:
        assistant = kwargs.get("assistant_model")
        readers = (model,) if assistant is None else (model, assistant)
        if all(takes_argument(reader, ROUTER_LOGITS) for reader in readers):
            # a configuration may ask for them, to train with; generate returns none, and all streams would run
            kwargs.setdefault(ROUTER_LOGITS, False)
    with _whole_attention_weights(model, config, kwargs):
        return type(model).generate(model, *args, **kwargs)


def _check_drafts(model: Any, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Checks that nothing drafts from states that each stream has for itself.

    Args:
        model: the wrapped model.
        config: of this generation.
        kwargs: of `generate`.

    Raises:
        ValueError: as `generate` says.
    """
    if model.num_streams == 1:
        return
    if kwargs.get("speculation_type", getattr(config, "speculation_type", None)) == "dflash":
        raise ValueError(
            "speculation_type='dflash' drafts from the hidden states of inner layers, which each of the "
            f"{model.num_streams} streams has for itself: use an assistant model without speculation_type, or "
            "model.use_streams(None)."
        )
    assistant = kwargs.get("assistant_model")
    reads_keys = assistant is not None and takes_argument(assistant, KEYS_OF_TARGET)
    if reads_keys and not model.parscale.active.shares_keys:
        raise ValueError(
            f"{type(assistant).__name__} drafts from the keys and values of {type(model).__name__}, which each of the "
            f"{model.num_streams} streams has for itself: use streams made with kv='shared', another assistant model, "
            "or model.use_streams(None)."
        )
    decodes_alone = assistant is not None and not assistant.config.is_encoder_decoder
    if decodes_alone and model.parscale.encoder is not None:
        raise ValueError(
            f"{type(assistant).__name__} has no encoder and would read that of {type(model).__name__}, whose output "
            f"has {model.num_streams} rows for each source: use an assistant with an encoder, or "
            "model.use_streams(None)."
        )


def _generation_config(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerationConfig:
    """The configuration that `generate` was given, or the model's."""
    given = (each for each in (*args, *kwargs.values()) if isinstance(each, GenerationConfig))
    return next(given, model.generation_config)


def _whole_attention_weights(
    model: Any, config: GenerationConfig, kwargs: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    """In this block, assisted decoding keeps the columns of prefix or prompt, if attention weights are wanted."""
    streams = model.parscale.active
    wanted = kwargs.get("output_attentions", config.output_attentions)
    if not wanted or model.num_streams == 1 or streams.config.transform == LORA:
        return contextlib.nullcontext()
    return keeping_columns(streams.config.prefix_length)


@contextlib.contextmanager
def adaptive_streams(model: PreTrainedModel, threshold: float) -> Iterator[Adaptive]:
    """In this block, streams 1 to P - 1 run only where the entropy of stream 0's prediction is above a threshold.

    Args:
        threshold: in nats; 0: always, infinity: never. These equal all streams and the plain backbone to the last bit.

    Yields:
        Counts of tokens, and where the streams ran in the last call.

    Raises:
        ValueError: the threshold is invalid, or the active streams do not share keys and values.
    """
    state = find_state(model)
    is_number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
    if not is_number or math.isnan(threshold) or threshold < 0:
        raise ValueError(f"adaptive must be an entropy in nats, 0 (all streams) to infinity (none), got {threshold!r}.")
    streams = None if state is None else state.active
    if state is None or streams is None or streams.num_streams == 1 or not streams.shares_keys:
        given = "none are active"
        if streams is not None:
            given = f"{streams.name!r} is P = {streams.num_streams}, {streams.config.kv}"
        raise ValueError(
            f"adaptive chooses tokens for streams that share keys and values, but {given}: make some with kv='shared'."
        )
    adaptive = Adaptive(float(threshold), streams.num_streams)
    if threshold == 0:
        yield adaptive
        return
    plain = state.calls.choosing(None) if math.isinf(threshold) else contextlib.nullcontext()
    with plain, state.calls.adapting(adaptive):
        yield adaptive


def reorder_cache(model: Any, generator: Any, past_key_values: Any, beam_idx: torch.Tensor) -> Any:
    """Reorders the cache's rows with the beams, in every stream (`generate` counts B rows, the cache has P*B).

    Args:
        generator: the model that generates: this one, or one inside it.
        past_key_values: the cache.
        beam_idx: `(B,)`, the row that each row continues.
    """
    active, B = model.parscale.active, beam_idx.shape[0]
    P = 1 if active is None else active.cache_copies
    rows = torch.cat([beam_idx + p * B for p in range(P)])  # (P*B,)
    own = getattr(type(generator), REORDER_CACHE, None)
    if own is not None:
        return own(past_key_values, rows)
    past_key_values.reorder_cache(rows)
    return past_key_values


def static_cache_init_shape(model: object, generator: object) -> None:
    """Makes `generate` let a static cache take its number of rows from the first keys: P*B, not B.

    Args:
        generator: as in `reorder_cache`.
    """
    return None  # no shape: generate then takes it from the first keys


def token_times(model: Any, generator: Any, outputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The times of tokens in the audio (Whisper), from stream 0's cross-attention without the columns of a prefix.

    Args:
        generator: as in `reorder_cache`.
        outputs: of `generate`; `cross_attentions` by token, then by layer, `(P*B, heads, S, T + frames)`.
        *args: passed to the generator's own method.
        **kwargs: passed to the generator's own method.
    """
    streams = model.parscale.active
    if model.num_streams > 1 and streams.config.transform == PREFIX:
        T = streams.config.prefix_length
        heard = tuple(tuple(layer[..., T:] for layer in step) for step in outputs.cross_attentions)
        outputs = dataclasses.replace(outputs, cross_attentions=heard)
    return getattr(type(generator), TOKEN_TIMES)(generator, outputs, *args, **kwargs)


def init_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls transformers' own method, for the plain backbone only (`generate_batch` uses it too).

    Args:
        *args: passed to transformers' own method.
        **kwargs: passed to transformers' own method.

    Returns:
        The result of transformers' own method.

    Raises:
        ValueError: streams are active, here or in the thread that serves the requests, which sees no `use_streams`
            block: continuous batching packs all requests into one row with one cache.
    """
    outside = model.parscale.selected
    if model.num_streams > 1 or (outside is not None and outside.num_streams > 1):
        raise ValueError(CONTINUOUS_BATCHING)
    return type(model).init_continuous_batching(model, *args, **kwargs)
