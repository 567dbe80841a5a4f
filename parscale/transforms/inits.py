"""How a new set of streams starts.

- `random`: prefixes or prompts drawn independently from a normal distribution with the backbone's `initializer_range`;
  with `transform="lora"` the streams equal the backbone, and differ once they are trained
- `context`: each stream has read a different text of T tokens: its prefix is the text's keys and values, at positions
  -T..-1, or its prompt is the text's embeddings
- `documents`: the same, with the end-of-text token in place of each text's last token, so that the input begins a new
  document
- all of them: the aggregator's first layer comes from that distribution, its last layer is zero: equal weights

The end-of-text token is the model's `eos_token_id`, the first if there are several. If the vocabulary has none, or if T
is 1, which leaves no room for a text, `documents` equals `context`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from parscale.compat.deepspeed import whole_shape
from parscale.config import FROM_TEXTS, TEXT_INITS, ParScaleConfig
from parscale.streams.backbones import cuda_devices, generates_text, input_device
from parscale.streams.brief_runs import examining
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState


def default_init(state: ParScaleState, config: ParScaleConfig) -> str:
    """The default init: from texts, if the model generates text and streams can start from it."""
    return "documents" if generates_text(state.model) and config.transform in FROM_TEXTS else "random"


def initialize(state: ParScaleState, streams: StreamSet, calibration: torch.Tensor | None) -> None:
    """Fills the tensors of a new set of streams, by its `config.init` and `config.seed`.

    Args:
        state: the wrapped model's state.
        streams: a set of several streams, whose parameters exist.
        calibration: as in `parscale.wrap`.

    Raises:
        ValueError: an init that reads texts, for a model on the meta device.
    """
    config = state.model.config.get_text_config()
    std = getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02  # init_std: OPT
    with torch.no_grad(), _seeded(streams.config.seed, state.model):
        if streams.config.init in TEXT_INITS:
            streams.transform.read(_texts(state, streams, calibration))
        else:
            streams.transform.draw(std)
        for aggregator in state.aggregators(streams):
            first, *_ = aggregator.parameters()
            first.normal_(0.0, std)


def _texts(state: ParScaleState, streams: StreamSet, calibration: torch.Tensor | None) -> torch.Tensor:
    """The texts that the streams start from, token ids `(P, T)`."""
    T, init = streams.config.prefix_length, streams.config.init
    if next(iter(state.tensors(streams).values())).is_meta:
        raise ValueError(
            f"init={init!r} runs the backbone, which has no weights on the meta device: use init='random'."
        )
    texts = _sample_texts(state, streams) if calibration is None else calibration
    texts = texts.to(input_device(state.model), torch.long)
    end = _end_of_text(state.model)
    if init == "documents" and T > 1 and end is not None:
        texts = torch.cat([texts[:, :-1], torch.full_like(texts[:, -1:], end)], dim=1)  # (P, T)
    return texts


def _sample_texts(state: ParScaleState, streams: StreamSet) -> torch.Tensor:
    """P texts of T tokens, `(P, T)`, sampled from the backbone itself; each starts with a different token."""
    P, T = streams.config.num_transformed, streams.config.prefix_length
    model: Any = state.model
    vocabulary = _vocabulary_size(model)
    start = torch.randperm(vocabulary).repeat(-(-P // vocabulary))[:P, None].to(input_device(model))
    plain = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=T, min_new_tokens=T, pad_token_id=0, eos_token_id=None
    )
    sampler = copy.copy(model)  # the model's own settings are for users' texts, and other threads generate by them
    sampler.generation_config = plain
    with examining(state):
        return type(model).generate(sampler, start, attention_mask=torch.ones_like(start))[:, -T:]


def _end_of_text(model: Any) -> int | None:
    """The token that ends a document; `None` if the model names none in its vocabulary."""
    for config in (model.config.get_text_config(), model.generation_config):
        ends = getattr(config, "eos_token_id", None)
        end = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
        if isinstance(end, int) and 0 <= end < _vocabulary_size(model):
            return end
    return None


def _vocabulary_size(model: Any) -> int:
    """The number of tokens in the model's vocabulary; that of each table, if it has several (Musicgen)."""
    return whole_shape(next(model.get_input_embeddings().parameters()))[0]


def check_texts(state: ParScaleState, streams: StreamSet) -> None:
    """Checks that the model can start streams from texts of T tokens, if their init reads texts.

    Raises:
        ValueError: the model does not generate text, or has fewer positions.
    """
    T, init = streams.config.prefix_length, streams.config.init
    if init not in TEXT_INITS:
        return
    if not generates_text(state.model):
        raise ValueError(
            f"init={init!r} starts streams from texts that a causal language model reads and generates, "
            f"but {type(state.model).__name__} is not one: omit it, or use init='random'."
        )
    most = streams.transform.longest_text() if streams.num_streams > 1 else None
    if most is not None and most < T:
        raise ValueError(
            f"{type(state.model).__name__} has {most:,} positions for a text, so init={init!r} cannot read {T:,} "
            "tokens: choose a prefix_length of at most that, or init='random'."
        )


def check_calibration(state: ParScaleState, streams: StreamSet, calibration: torch.Tensor | None) -> None:
    """Checks that the set can read a calibration.

    Raises:
        ValueError: the calibration has another shape, ids outside the vocabulary, or comes with `init="random"`.
    """
    if calibration is None:
        return
    P, T = streams.config.num_transformed, streams.config.prefix_length
    if streams.config.init not in TEXT_INITS:
        raise ValueError(
            f"calibration is read by init={' or '.join(map(repr, TEXT_INITS))} only, got "
            f"init={streams.config.init!r}: omit one of them."
        )
    number = "num_streams - 1" if streams.shares_keys else "num_streams"
    wanted = f"token ids, a tensor of integers of shape ({number}, prefix_length) = ({P}, {T})"
    if not isinstance(calibration, torch.Tensor):
        raise ValueError(f"calibration must be {wanted}, got {type(calibration).__name__}.")
    kind = calibration.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool or calibration.shape != (P, T):
        raise ValueError(f"calibration must be {wanted}, got {kind} of shape {tuple(calibration.shape)}.")
    vocabulary = _vocabulary_size(state.model)
    if calibration.numel() and not 0 <= int(calibration.min()) <= int(calibration.max()) < vocabulary:
        raise ValueError(f"calibration has token ids outside 0..{vocabulary - 1}.")


@contextlib.contextmanager
def _seeded(seed: int | None, model: nn.Module) -> Iterator[None]:
    """Random numbers in this block come from `seed`, and the random state is restored afterwards; `None`: no change."""
    with torch.random.fork_rng(devices=cuda_devices(model), enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
