"""A model's shape, and its numbers of parameters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from parscale.scaling_laws.data import data_rows

PREFIX_LENGTH = 48
"""T, the prefix tokens of each stream, if the configuration does not give it."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine parameters, memory and time, in elements."""

    name: str
    """The configuration's `model_type`."""
    layers: int
    """Decoder layers."""
    hidden: float
    """H, the size of a hidden state. May be fractional in a scaled shape (`scaled`)."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key heads, G."""
    head_dim: float
    """D, the size of a query or a key of one head."""
    value_dim: float
    """The size of a value of one head."""
    intermediate: float
    """Inner size of a dense MLP."""
    vocab: int
    """Tokens in the vocabulary."""
    gated: bool
    """Whether the MLP is gated: two matrices up and one down, rather than one of each."""
    tied: bool
    """Whether the output matrix is tied to the embedding."""
    attention_layers: int
    """Layers that cache keys and values; the others (linear attention, state space) have a state of constant size."""
    query_rank: int = 0
    """Rank of a low-rank query projection; 0 for a full one."""
    kv_rank: int = 0
    """Rank of multi-head latent attention; 0 without it."""
    rope_dim: int = 0
    """With latent attention: how many of `head_dim` encode positions."""
    window: int = 0
    """Tokens in the window of a layer with a sliding window; 0 without one."""
    window_layers: int = 0
    """The number of `attention_layers` with this window."""
    experts: int = 0
    """Routed experts in a sparse layer; 0 for a dense model."""
    active_experts: int = 0
    """Routed experts per token."""
    expert_intermediate: float = 0
    """Inner size of a routed expert."""
    shared_intermediate: float = 0
    """Inner size of the shared experts."""
    sparse_layers: int = 0
    """Layers with experts."""
    biases: str = "none"
    """`"none"`, `"qkv"` or `"all"`."""
    norms_per_layer: int = 2
    """Normalizations over H in a layer."""
    positions: int = 0
    """Rows of a learned position table."""
    layer_embeddings: int = 0
    """Elements of the layers' own embeddings of tokens."""
    prefix_length: int = PREFIX_LENGTH
    """T, tokens of a prefix."""

    @property
    def mlp_matrices(self) -> int:
        """Matrices in an MLP: 3 if gated, 2 otherwise."""
        return 3 if self.gated else 2

    @property
    def attention_params(self) -> float:
        """Matrices and biases of the attention in one layer."""
        h, query, key, value = (
            self.hidden,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.kv_heads * self.value_dim,
        )
        total = self.query_rank * (h + query) if self.query_rank else h * query
        if self.kv_rank:
            unrotated = self.head_dim - self.rope_dim
            total += h * (self.kv_rank + self.rope_dim) + self.kv_rank * self.heads * (unrotated + self.value_dim)
        else:
            total += h * (key + value)
        total += self.heads * self.value_dim * h
        total += {"none": 0, "qkv": query + key + value, "all": query + key + value + h}[self.biases]
        return total

    @property
    def dense_mlp_params(self) -> float:
        """Parameters of one dense MLP."""
        return self.mlp_matrices * self.hidden * self.intermediate + (self.hidden + self.intermediate) * (
            self.biases == "all"
        )

    @property
    def expert_params(self) -> float:
        """Parameters of one routed expert."""
        return self.mlp_matrices * self.hidden * self.expert_intermediate

    @property
    def shared_params(self) -> float:
        """Parameters that every token uses in a sparse layer: shared experts and the router."""
        return self.mlp_matrices * self.hidden * self.shared_intermediate + self.hidden * self.experts

    @property
    def embedding_params(self) -> float:
        """Embedding, output matrix if it is not tied, learned positions, embeddings of layers."""
        return self.hidden * (self.vocab * (1 if self.tied else 2) + self.positions) + self.layer_embeddings

    @property
    def backbone_params(self) -> float:
        """Non-embedding parameters without streams: the law's N at P = 1."""
        norms = (self.norms_per_layer * self.layers + 1) * self.hidden * (2 if self.biases == "all" else 1)
        dense = (self.layers - self.sparse_layers) * self.dense_mlp_params
        sparse = self.sparse_layers * (self.experts * self.expert_params + self.shared_params)
        return self.layers * self.attention_params + dense + sparse + norms

    @property
    def kv_per_token(self) -> float:
        """Keys and values of one token in one attention layer."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def cached_per_token(self) -> float:
        """What the cache keeps of one token in one attention layer: its keys and values, or their latents."""
        return self.kv_rank + self.rope_dim if self.kv_rank else self.kv_per_token

    def prefix_params(self, streams: int, kv: str = "own") -> float:
        """Parameters of the prefixes.

        Args:
            streams: P.
            kv: the keys and values that a stream reads, `"own"` or `"shared"`.

        Returns:
            `attention layers * P * G * T * (D of keys + D of values)`; with `P - 1` in place of P if the streams share
            keys, since stream 0 has no prefix then; 0 at P = 1.
        """
        prefixed = streams - (kv == "shared") if streams > 1 else 0
        return self.attention_layers * prefixed * self.prefix_length * self.kv_per_token

    def aggregator_params(self, streams: int) -> float:
        """Parameters of the aggregator.

        Args:
            streams: P.

        Returns:
            `P*H*H + H` and `H*P + P`; 0 at P = 1.
        """
        return streams * self.hidden**2 + self.hidden + (self.hidden + 1) * streams if streams > 1 else 0

    def params(self, streams: int = 1, kv: str = "own") -> float:
        """Non-embedding parameters including those of the streams.

        Args:
            streams: P.
            kv: as in `prefix_params`.

        Returns:
            N.
        """
        return self.backbone_params + self.prefix_params(streams, kv) + self.aggregator_params(streams)

    def scaled(self, width: float) -> ModelShape:
        """The same model with another width: hidden, head and MLP sizes change; layers, heads and experts do not.

        Args:
            width: the factor of the width.

        Returns:
            A shape whose sizes may be fractions.
        """
        names = ("hidden", "head_dim", "value_dim", "intermediate", "expert_intermediate", "shared_intermediate")
        return dataclasses.replace(self, **{name: getattr(self, name) * width for name in names})

    def scaled_to(self, params: float) -> ModelShape:
        """The same model, wider or narrower, with a given size.

        Args:
            params: non-embedding parameters, at P = 1.

        Returns:
            A shape of this size, to a part in 10^12.
        """
        low, high = 1e-4, 1e4
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.scaled(middle).backbone_params < params else (low, middle)
        return self.scaled((low * high) ** 0.5)


def published_models() -> dict[str, dict[str, Any]]:
    """The six configurations of the published points by name (`"0.5B"` to `"4.4B"`), as in a `config.json`."""
    common = {
        "model_type": "qwen2",
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }
    sizes = ("hidden_size", "intermediate_size")
    return {row["name"]: common | {size: int(row[size]) for size in sizes} for row in data_rows("models.csv")}
