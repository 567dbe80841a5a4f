"""How a new set of streams starts.

============= ====================================================================================================
``random``    prefixes drawn independently from a normal of the backbone's ``initializer_range``
``context``   each stream's prefix is the keys and values of a different text of T tokens, at positions -T..-1
``documents`` the same, with the end-of-text token in place of each text's last, so that the input begins a new document
all           aggregator: first layer from that normal, everything else zero, so that all streams weigh the same
============= ====================================================================================================

The end-of-text token is the model's ``eos_token_id``, the first where there are several. Where a model has none in its
vocabulary, and where T is 1, which has no room for a text beside it, ``documents`` is ``context``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from parscale.config import TEXT_INITS
from parscale.layers import (
    backbone_only,
    cuda_devices,
    has_learned_positions,
    input_device,
    number_of_attention_layers,
)
from parscale.parallel import is_partitioned, whole_shape
from parscale.streams import ParScaleState, StreamSet

AFTERWARDS = 8  # tokens on which a stream that starts as a text is compared with the backbone that reads the text
EXACT, FEW_BITS = 1e-3, 5e-2  # up to there they are the same: in float32, in the shorter formats
USER = 5  # frames from a warning here to the caller of wrap or add_streams


def initialize(state: ParScaleState, streams: StreamSet, calibration: torch.Tensor | None = None) -> None:
    """Fills the tensors of a new set of streams, by its ``config.init`` and ``config.seed``.

    Args:
        state: of the wrapped model.
        streams: a set whose parameters exist.
        calibration: token ids ``(P, T)``, for ``"documents"`` and ``"context"``; without it the backbone samples them
            itself.

    Raises:
        ValueError: an init that reads texts, for a model on the meta device.
    """
    tensors = state.tensors(streams)
    config = state.model.config.get_text_config()
    std = getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02  # init_std: OPT
    with torch.no_grad(), _seeded(streams.config.seed, state.model):
        if streams.config.init in TEXT_INITS and tensors:
            _fill_with_texts(state, streams, calibration)
        for name, parameter in tensors.items():
            is_prefix = name.endswith(("prefix_k", "prefix_v"))
            if name.endswith("aggregate_layer.0.weight") or (is_prefix and streams.config.init == "random"):
                parameter.normal_(0.0, std)


def _fill_with_texts(state: ParScaleState, streams: StreamSet, calibration: torch.Tensor | None) -> None:
    """Reads the texts with the backbone and keeps the keys and values that attention sees."""
    T, init = streams.config.prefix_length, streams.config.init
    if next(iter(state.tensors(streams).values())).is_meta:
        raise ValueError(
            f"init={init!r} runs the backbone, which has no weights on the meta device: use init='random'."
        )
    name, config = type(state.model).__name__, state.model.config.get_text_config()
    positions = torch.arange(-T, 0)[None]
    learned = has_learned_positions(state.decoder)
    reason = ""  # why such a start could be an approximation
    if learned:
        number = getattr(config, "max_position_embeddings", None) or config.max_target_positions  # the latter: Whisper
        if number < T:
            raise ValueError(
                f"{name} has {number} positions, so init={init!r} cannot read {T} tokens: choose a prefix_length of at "
                "most that, or init='random'."
            )
        reason = (
            f"{name} has learned positions, so init={init!r} is an approximation: the texts are read at positions "
            f"0..{T - 1}, where the input's own tokens stand too."
        )
        positions = positions + T
    elif number_of_attention_layers(state) < config.num_hidden_layers:
        reason = (
            f"{name} has layers without keys and values, which forget the texts: init={init!r} is an approximation."
        )
    if calibration is None:
        calibration = _sample_texts(state, streams)
    device = input_device(state.model)
    calibration = calibration.to(device, torch.long)
    end = _end_of_text(state.model)
    if init == "documents" and T > 1 and end is not None:
        calibration = torch.cat([calibration[:, :-1], torch.full_like(calibration[:, -1:], end)], dim=1)  # (P, T)

    recorded: list[nn.Module] = []

    def record(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        if key.shape[2] != T:
            raise ValueError(
                f"{type(state.model).__name__} attends to keys that do not stand for one token each, so "
                f"init={init!r} cannot keep them as a prefix: use init='random'."
            )
        recorded.append(module)
        for name, states in ((streams.key_name, key), (streams.value_name, value)):
            prefix = module._parameters.get(name)
            if prefix is not None:  # a layer that borrows its keys has none
                prefix.copy_(states[..., : prefix.shape[-1]])  # (P, G, T, D)

    def read(positions: torch.Tensor) -> None:
        with backbone_only(state):
            state.recorder = record
            try:
                rows = positions.to(device).expand_as(calibration)  # some look their row's up (Qwen4)
                state.decoder(input_ids=calibration, position_ids=rows, use_cache=False)
            finally:
                state.recorder = None

    read(positions)
    if not all(prefix.isfinite().all() for prefix in state.tensors(streams).values()):
        # queries scaled by the logarithm of their position (Ministral 3, Llama 4): only the rotation may see a
        # negative one
        recorded.clear()
        with _rotation_moved(state.decoder, -T):
            read(positions + T)
    if len(recorded) > len(set(recorded)):
        reason = (
            f"{name} runs some attention layers more than once, with one prefix for all runs: init={init!r} is an "
            "approximation."
        )
    error = None if learned else _error_alone(state, streams, calibration)
    if error is not None and error > (FEW_BITS if state.hidden_dtype.itemsize < 4 else EXACT):
        reason = reason or (
            f"init={init!r} is an approximation for {name}: after the text, the hidden states of a stream differ by "
            f"{error:.0%} from those of the backbone that reads it (it does not keep all of a text in its keys and "
            "values, has positions that are not relative, or a window that ends within the text)."
        )
    elif error is not None:
        reason = ""
    if reason:
        warnings.warn(reason, stacklevel=USER)


def _error_alone(state: ParScaleState, streams: StreamSet, texts: torch.Tensor) -> float | None:
    """How far each stream by itself is from the backbone that reads its text, on tokens that come after.

    Returns:
        The largest difference of hidden states, in units of the largest; None where the prefixes cannot run yet, since
        their layers' heads or their values are spread over devices.
    """
    spread = any(layer.mesh is not None for layer in state.layers) or any(map(is_partitioned, state.model.parameters()))
    if spread:
        return None
    P, T = texts.shape
    tokens = texts.roll(1, dims=0)[:, :AFTERWARDS]  # (P, S)
    with backbone_only(state):
        read = state.decoder(input_ids=torch.cat([texts, tokens], dim=1), use_cache=False)[0][:, T:]  # (P, S, H)
        state.active, state.aggregating = streams, False
        try:
            alone = state.decoder(input_ids=tokens, use_cache=False)[0]  # (P*P, S, H)
        finally:
            state.active, state.aggregating = None, True
    each = torch.arange(P, device=alone.device)
    alone = alone.unflatten(0, (P, P))[each, each]  # stream p on row p
    return float((alone - read).abs().max() / read.abs().max())


@contextlib.contextmanager
def _rotation_moved(decoder: nn.Module, by: int) -> Iterator[None]:
    """Rotary embeddings see positions that are further on than the rest of the backbone does."""

    def move(x: Any) -> Any:
        return x + by if isinstance(x, torch.Tensor) and x.dtype in (torch.int32, torch.int64) else x

    def moved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}

    rotary = [module for module in decoder.modules() if "Rotary" in type(module).__name__]
    hooks = [module.register_forward_pre_hook(moved, with_kwargs=True) for module in rotary]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sample_texts(state: ParScaleState, streams: StreamSet) -> torch.Tensor:
    """P texts of T tokens, ``(P, T)``, drawn from the backbone itself; each starts with another token."""
    P, T = streams.config.num_streams, streams.config.prefix_length
    model: Any = state.model
    vocabulary = _vocabulary_size(model)
    start = torch.randperm(vocabulary).repeat(-(-P // vocabulary))[:P, None].to(input_device(model))
    plain = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=T, min_new_tokens=T, pad_token_id=0, eos_token_id=None
    )
    own = model.generation_config  # what it asks for (beams, stop strings, ...) is meant for its user's texts
    try:
        model.generation_config = plain
        with backbone_only(state):
            return model.generate(start, attention_mask=torch.ones_like(start))[:, -T:]
    finally:
        model.generation_config = own


def _end_of_text(model: Any) -> int | None:
    """The token that ends a document; None if the model names none in its vocabulary."""
    for config in (model.config.get_text_config(), model.generation_config):
        ends = getattr(config, "eos_token_id", None)
        end = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
        if isinstance(end, int) and 0 <= end < _vocabulary_size(model):
            return end
    return None


def _vocabulary_size(model: Any) -> int:
    """How many tokens the model knows; in each of its tables, where it has several (Musicgen)."""
    return whole_shape(next(model.get_input_embeddings().parameters()))[0]


def check_calibration(state: ParScaleState, streams: StreamSet, calibration: torch.Tensor | None) -> None:
    """Refuses a calibration that the set cannot read.

    Raises:
        ValueError: it is of another shape, has ids outside the vocabulary, or stands beside ``init="random"``.
    """
    if calibration is None:
        return
    P, T = streams.config.num_streams, streams.config.prefix_length
    if streams.config.init not in TEXT_INITS:
        raise ValueError(
            f"calibration is read by init={' or '.join(map(repr, TEXT_INITS))} only, got "
            f"init={streams.config.init!r}: leave one out."
        )
    given = type(calibration).__name__
    if isinstance(calibration, torch.Tensor):
        given = f"{calibration.dtype} of shape {tuple(calibration.shape)}"
        kind = calibration.dtype
        integers = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if not isinstance(calibration, torch.Tensor) or not integers or calibration.shape != (P, T):
        raise ValueError(
            "calibration must be token ids, a tensor of integers of shape (num_streams, prefix_length) = "
            f"({P}, {T}), got {given}."
        )
    vocabulary = _vocabulary_size(state.model)
    if calibration.numel() and not 0 <= int(calibration.min()) <= int(calibration.max()) < vocabulary:
        raise ValueError(f"calibration has token ids outside 0..{vocabulary - 1}.")


@contextlib.contextmanager
def _seeded(seed: int | None, model: nn.Module) -> Iterator[None]:
    """Draws in this block come from ``seed``; the caller's random state is as before afterwards. None: no change."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=cuda_devices(model)):
        torch.manual_seed(seed)
        yield
