"""A model's shape, and its numbers of parameters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from parscale.scaling_laws.data import data_rows

PREFIX_LENGTH = 48
"""T, the prefix tokens of each stream, if the configuration does not give it."""


@dataclass(frozen=True)
class Attention:
    """The attention of the layers in which it has the same sizes, in elements."""

    layers: int
    """The number of these layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key heads, G."""
    head_dim: float
    """D, the size of a query or a key of one head. May be fractional in a scaled shape (`ModelShape.scaled`)."""
    value_dim: float
    """The size of a value of one head."""
    keys: str = "own"
    """Which keys and values a layer reads: `"own"`, which it caches; `"borrowed"`, those of another layer, without a
    projection of its own; `"none"`, as a layer with a state of constant size (linear attention, state space)."""
    window: int = 0
    """Tokens in its sliding window; 0 without one."""
    keys_are_values: bool = False
    """Whether one projection yields both keys and values."""
    query_rank: int = 0
    """Rank of a low-rank query projection; 0 for a full one."""
    kv_rank: int = 0
    """Rank of multi-head latent attention; 0 without it."""
    rope_dim: int = 0
    """With latent attention: how many of `head_dim` encode positions."""
    gated: bool = False
    """Whether what it returns is multiplied with a gate, which has a projection of its own."""
    indexer_heads: int = 0
    """Query heads of an indexer, which scores all keys and chooses some of them; 0 without one."""
    indexer_dim: int = 0
    """The size of a query or a key of an indexer; all its heads have the same key."""
    state: float = 0
    """The number of elements of state that a row keeps, however long it is, in the dtype of the cache: what short
    convolutions see of its last tokens, and the recurrent states of MiniMax and ZAYA."""
    float32_state: float = 0
    """The number of elements of state that a row keeps in float32, whatever the dtype, as transformers does: all other
    recurrent states (delta rules, Mamba, RG-LRU), and the convolutions of Inkling."""

    @property
    def query(self) -> float:
        """The queries of one token."""
        return self.heads * self.head_dim

    @property
    def value(self) -> float:
        """What attention returns for one token: a value for each query head."""
        return self.heads * self.value_dim

    @property
    def kv_per_token(self) -> float:
        """The keys and values of one token."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def projected(self) -> float:
        """The keys and values of one token that a layer projects: none if it borrows them."""
        return 0 if self.keys == "borrowed" else self.kv_per_token

    @property
    def cached_per_token(self) -> float:
        """What the cache of a layer keeps of one token: keys and values, or their latents, and its indexer's key."""
        if self.keys != "own":
            return 0
        return (self.kv_rank + self.rope_dim if self.kv_rank else self.kv_per_token) + self.indexer_dim

    @property
    def state_elements(self) -> float:
        """Elements of state that one row keeps in one layer."""
        return self.state + self.float32_state

    @property
    def expansion(self) -> float:
        """The matrix that makes keys and values of latents; 0 without them, or if those of another layer are read."""
        if self.keys == "borrowed":
            return 0
        return self.kv_rank * self.heads * (self.head_dim - self.rope_dim + self.value_dim)

    def params(self, hidden: float, biases: str) -> float:
        """Parameters of one layer.

        Args:
            hidden: H, the size of a hidden state.
            biases: as in `ModelShape`.

        Returns:
            The elements of its matrices and biases.
        """
        total = self.query_rank * (hidden + self.query) if self.query_rank else hidden * self.query
        if self.kv_rank and self.keys != "borrowed":
            total += hidden * (self.kv_rank + self.rope_dim) + self.expansion
        else:
            total += hidden * (self.projected / 2 if self.keys_are_values else self.projected)
        total += self.value * hidden * (2 if self.gated else 1)
        total += self.indexer_heads * ((self.query_rank or hidden) * self.indexer_dim + hidden)
        total += hidden * self.indexer_dim
        if biases != "none":
            total += self.query + self.projected + (hidden if biases == "all" else 0)
        return total


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine parameters, memory and time, in elements."""

    name: str
    """The configuration's `model_type`."""
    layers: int
    """Decoder layers."""
    hidden: float
    """H, the size of a hidden state. May be fractional in a scaled shape (`scaled`)."""
    attention: tuple[Attention, ...]
    """The attention of all layers, one entry for each kind of layer."""
    intermediate: float
    """Inner size of a dense MLP."""
    vocab: int
    """Tokens in the vocabulary."""
    gated: bool
    """Whether the MLP is gated: two matrices up and one down, rather than one of each."""
    tied: bool
    """Whether the output matrix is tied to the embedding."""
    experts: int = 0
    """Routed experts in a sparse layer; 0 for a dense model."""
    zero_experts: int = 0
    """Choices of a router beside these that return their input, without parameters or arithmetic."""
    active_experts: int = 0
    """Experts that a router chooses for a token, zero experts among them."""
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
    other_parts: tuple[str, ...] = ()
    """The fields of a configuration that describe parts beside the language model, which are not counted."""
    prefix_length: int = PREFIX_LENGTH
    """T, tokens of a prefix."""

    @property
    def mlp_matrices(self) -> int:
        """Matrices in an MLP: 3 if gated, 2 otherwise."""
        return 3 if self.gated else 2

    @property
    def attention_layers(self) -> int:
        """Layers that cache keys and values."""
        return sum(kind.layers for kind in self.attention if kind.keys == "own")

    @property
    def state_elements(self) -> float:
        """Elements of state that one row keeps in all layers."""
        return sum(kind.layers * kind.state_elements for kind in self.attention)

    @property
    def has_equal_layers(self) -> bool:
        """Whether grouped-query attention has the same sizes in all layers, whatever their windows."""
        first = self.attention[0]
        alike = {dataclasses.replace(kind, layers=1, window=0) for kind in self.attention}
        return alike == {Attention(1, first.heads, first.kv_heads, first.head_dim, first.head_dim)}

    @property
    def attention_params(self) -> float:
        """Matrices and biases of the attention in all layers."""
        return sum(kind.layers * kind.params(self.hidden, self.biases) for kind in self.attention)

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
    def used_experts(self) -> float:
        """Routed experts per token, on average over tokens that choose evenly: without the zero experts."""
        return self.active_experts * self.experts / max(1, self.experts + self.zero_experts)

    @property
    def shared_params(self) -> float:
        """Parameters that every token uses in a sparse layer: shared experts and the router."""
        return self.hidden * (self.mlp_matrices * self.shared_intermediate + self.experts + self.zero_experts)

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
        return self.attention_params + dense + sparse + norms

    def prefix_params(self, streams: int, kv: str = "own") -> float:
        """Parameters of the prefixes.

        Args:
            streams: P.
            kv: the keys and values that a stream reads, `"own"` or `"shared"`.

        Returns:
            `P * G * T * (D of keys + D of values)`, summed over the layers that cache keys; with `P - 1` in place of P
            if the streams share keys, since stream 0 has no prefix then; 0 at P = 1.
        """
        prefixed = streams - (kv == "shared") if streams > 1 else 0
        kept = sum(kind.layers * kind.kv_per_token for kind in self.attention if kind.keys == "own")
        return prefixed * self.prefix_length * kept

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

        States grow in proportion to the width, as keys and values do.

        Args:
            width: the factor of the width.

        Returns:
            A shape whose sizes may be fractions.
        """
        names = ("hidden", "intermediate", "expert_intermediate", "shared_intermediate")
        attention = tuple(
            dataclasses.replace(
                kind,
                head_dim=kind.head_dim * width,
                value_dim=kind.value_dim * width,
                state=kind.state * width,
                float32_state=kind.float32_state * width,
            )
            for kind in self.attention
        )
        return dataclasses.replace(self, attention=attention, **{name: getattr(self, name) * width for name in names})

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
