"""A language model as a graph takes it: tensors in, tensors out, and its cache among them.

The cache of a wrapped model has P*B rows where streams keep keys of their own. A runtime that knows nothing of streams
counts B rows, so they are folded: a row's streams lie beside each other among its heads. What goes in and comes out is
then the cache of any decoder, and beams and batches reorder it as any other.

Shapes: C copies of a row in the cache, P where streams keep keys of their own and 1 otherwise; B rows; S new tokens;
K tokens in the cache; G key/value heads; D head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, DynamicLayer

from parscale.compat.transformers import carries_state
from parscale.config import PROMPT
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import cache_argument, takes_argument
from parscale.streams.brief_runs import unsupported
from parscale.streams.state import active_streams

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What a decoder keeps of each token, in every layer alike.

    Attributes:
        layers: how many layers keep keys and values.
        copies: C.
        heads: G.
        head_size: D.
        argument: the model's name for it.
    """

    layers: int
    copies: int
    heads: int
    head_size: int
    argument: str

    def empty(self, rows: int, tokens: int, dtype: torch.dtype) -> list[Pair]:
        """Keys and values of each layer, `(B, C*G, K, D)`, all zeros."""
        shape = (rows, self.copies * self.heads, tokens, self.head_size)
        return [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(self.layers)]


class FoldedLayer(DynamicLayer):
    """A layer of a cache that holds `(B, C*G, K, D)` and deals in `(C*B, G, K, D)`.

    Args:
        keys: what is held.
        values: likewise.
        copies: C.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, copies: int) -> None:
        super().__init__()
        self.keys, self.values, self.copies = keys, values, copies
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def get_seq_length(self) -> int:
        """Tokens in the cache; a graph in which their number varies cannot ask whether there are any."""
        return self.keys.shape[2]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Adds `(C*B, G, S, D)`, and gives all keys and values so."""
        self.keys = torch.cat([self.keys, copies_to_heads(key_states, self.copies)], dim=2)
        self.values = torch.cat([self.values, copies_to_heads(value_states, self.copies)], dim=2)
        return heads_to_copies(self.keys, self.copies), heads_to_copies(self.values, self.copies)


def copies_to_heads(states: torch.Tensor, copies: int) -> torch.Tensor:
    """`(C*B, G, S, D)`, stream-major, as `(B, C*G, S, D)`."""
    return states.unflatten(0, (copies, -1)).transpose(0, 1).flatten(1, 2)  # (C, B, G, ...) -> (B, C, G, ...)


def heads_to_copies(states: torch.Tensor, copies: int) -> torch.Tensor:
    """`(B, C*G, K, D)` as `(C*B, G, K, D)`, stream-major."""
    return states.unflatten(1, (copies, -1)).transpose(0, 1).flatten(0, 1)  # (B, C, G, ...) -> (C, B, G, ...)


class Decoder(nn.Module):
    """A step of a language model over a cache of tensors.

    Args:
        model: wrapped or plain.
        shape: of its cache.
    """

    def __init__(self, model: Any, shape: CacheShape) -> None:
        super().__init__()
        self.model = model
        self.shape = shape
        self.takes_positions = takes_argument(model, "position_ids")

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[Pair]
    ) -> tuple[torch.Tensor, list[Pair]]:
        """The logits of new tokens, and the cache with them.

        Args:
            input_ids: `(B, S)`.
            attention_mask: `(B, K + S)`, 0 for padding; the first real token of a row has position 0.
            past: keys and values of each layer, `(B, C*G, K, D)`.

        Returns:
            The logits `(B, S, V)`, and keys and values `(B, C*G, K + S, D)`.
        """
        layers = [FoldedLayer(*pair, self.shape.copies) for pair in past]
        cache = Cache(layers=[*layers])
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]  # (B, S)
        options = {self.shape.argument: cache} | ({"position_ids": positions} if self.takes_positions else {})
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **options)
        return output.logits, [(layer.keys, layer.values) for layer in layers]


@torch.no_grad()
def cache_shape(model: Any) -> CacheShape:
    """What a model keeps of each token, as a run on two tokens shows.

    Raises:
        UnsupportedModelError: a layer keeps more than keys and values, or they have another shape than other layers'.
    """
    name = type(model).__name__
    streams = active_streams(model)
    if streams is not None and streams.config.transform == PROMPT:
        raise UnsupportedModelError(
            "Streams with transform='prompt' cannot be exported: the first step puts the prompt into the cache, and "
            "later ones do not, so that they are no one graph. Use transform='prefix'."
        )
    if any(map(carries_state, DynamicCache(config=model.config).layers)):
        raise UnsupportedModelError(
            f"{name} cannot be exported: some of its layers carry a state (Mamba, linear attention), and runtimes for "
            "decoders keep keys and values only."
        )
    cache, argument = DynamicCache(), cache_argument(model)
    if argument is None:
        raise UnsupportedModelError(f"{name} cannot be exported: it takes no cache.")
    with unsupported(
        f"{name} cannot be exported: it does not run with a cache of keys and values for each layer ({{}})."
    ):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), **{argument: cache}, use_cache=True)
        layers: list[Any] = cache.layers
        shapes = {(*layer.keys.shape, layer.values.shape[-1]) for layer in layers}
    if len(shapes) != 1 or (shape := shapes.pop())[3] != shape[4]:
        raise UnsupportedModelError(
            f"{name} cannot be exported: its layers keep keys and values of different shapes, and a runtime's "
            "configuration names one number of heads and one head size for all."
        )
    return CacheShape(len(layers), shape[0], shape[1], shape[3], argument)
