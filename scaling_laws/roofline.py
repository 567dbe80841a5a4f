"""Memory and time of generation, operation by operation.

Each operation takes the longer of its arithmetic at the device's achievable rate and its memory traffic at the
achievable bandwidth; operations run one after another. The count follows `parscale`: B sequences become P*B rows;
prefixes are stored once, whatever the batch; the aggregator, the output matrix and the logits are never counted P
times; the prefill computes logits of the last token only. Streams that share keys and values (`kv="shared"`) have a
cache of B rows; their prompt runs with B rows, and then its last token with the others, in a pass that reads the
layers' weights again; attention in a step reads the cache once for all streams. The states of linear attention, state
spaces and short convolutions are read and written once per row and layer in each pass, with two multiply-adds for each
element and token, one that updates it and one that reads it (a delta rule reads once more, a convolution only reads).
Not counted: kernel launches (see `overhead`), fragmentation of the allocator, sampling.

Shapes: n = rows * tokens of a step. `bits` is 16 or 32 for activations and the cache; `weight_bits` may be lower.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parscale.scaling_laws.data import Array
from parscale.scaling_laws.hardware import Hardware
from parscale.scaling_laws.shapes import ModelShape

Split = dict[str, float]


@dataclass(frozen=True)
class Workload:
    """One call of generate: B prompts of equal length, with outputs of equal length."""

    streams: int
    batch: int
    input_length: int
    output_length: int
    bits: int = 16
    weight_bits: float = 16
    kv: str = "own"

    @property
    def rows(self) -> int:
        """P*B."""
        return self.streams * self.batch

    @property
    def shares(self) -> bool:
        """Whether several streams share one cache."""
        return self.kv == "shared" and self.streams > 1

    @property
    def cache_rows(self) -> int:
        """Rows of the cache: B if streams share it, else P*B."""
        return self.batch if self.shares else self.rows

    @property
    def together(self) -> Pass:
        """All streams in one batch, as in a decoding step."""
        prefixed = self.streams - self.shares if self.streams > 1 else 0
        return Pass(self.rows, self.cache_rows, prefixed, self.batch if self.streams > 1 else 0, self.batch)

    @property
    def embedding_bits(self) -> float:
        """Bits of the embedding and the output matrix, which keep 16 where the layers' matrices have fewer."""
        return max(self.weight_bits, 16)

    @property
    def of_prompt(self) -> list[tuple[Pass, int]]:
        """The passes over a prompt, each with its number of tokens per row."""
        if not self.shares:
            return [(self.together, self.input_length)]
        others = self.streams - 1
        return [
            (Pass(self.batch, self.batch, 0, 0, 0), self.input_length),
            (Pass(others * self.batch, self.batch, others, self.batch, self.batch), 1),
        ]


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model together."""

    rows: int
    """Rows of queries."""
    cache_rows: int
    """Rows of keys and values that these attend to."""
    prefixes: int
    """The number of streams with a prefix among them."""
    mixed: int
    """Rows after the streams are mixed; 0 if they are not mixed."""
    predicted: int
    """Rows whose next token is predicted; 0 in a pass that only fills the cache."""


@dataclass(frozen=True)
class Operation:
    """One kind of operation in one step: arithmetic operations and bytes moved.

    Each is a number, or one for each step.
    """

    name: str
    flops: float | Array
    bytes: float | Array


def memory(shape: ModelShape, work: Workload) -> Split:
    """Peak bytes, at the end of generation or in the prefill, split by content."""
    number, weight = work.bits / 8, work.weight_bits / 8
    length = work.input_length + work.output_length - 1  # the last token's keys and values are not needed
    streamed = work.streams > 1
    tokens = work.cache_rows * work.input_length  # in the pass over the prompt, the largest
    attention = max(kind.query + kind.projected + kind.value for kind in shape.attention)
    inner = (shape.mlp_matrices - 1) * max(
        shape.intermediate, shape.used_experts * shape.expert_intermediate + shape.shared_intermediate
    )
    gathered = 2 * shape.hidden if streamed else 0  # the aggregator's input and output, besides the residual stream
    expanded = max(  # keys and values that the last step makes of one layer's latents
        kind.kv_per_token * min(length, kind.window or length) if kind.expansion else 0 for kind in shape.attention
    )
    return {
        "weights": shape.backbone_params * weight + shape.embedding_params * work.embedding_bits / 8,
        "prefixes": shape.prefix_params(work.streams, work.kv) * number,
        "aggregator": shape.aggregator_params(work.streams) * number,
        "kv_cache": work.cache_rows
        * number
        * sum(kind.layers * kind.cached_per_token * min(length, kind.window or length) for kind in shape.attention),
        "states": work.rows * _state_bytes(shape, work),
        "activations": number
        * max(tokens * (shape.hidden + max(attention, inner, gathered)), work.cache_rows * expanded)
        + 4 * work.batch * shape.vocab,
    }


def seconds(shape: ModelShape, work: Workload, device: Hardware, overhead: float = 0.0) -> tuple[Split, float, float]:
    """Time by operation, of the prefill and of decoding, all in seconds.

    The prefill yields the first token, so there are `output_length - 1` decoding steps. overhead: additional seconds
    for each layer of each step, and of each pass over the prompt.
    """
    passes = [
        _price(_step(shape, work, each, tokens, np.full(1, float(work.input_length - tokens))), work, device)
        for each, tokens in work.of_prompt
    ]
    prefill = {name: sum(found.get(name, 0.0) for found in passes) for name in passes[-1]}
    steps = work.output_length - 1
    contexts = work.input_length + np.arange(1.0, work.output_length) - 1
    decode = _price(_step(shape, work, work.together, 1, contexts), work, device) if steps else {}
    total = {name: prefill[name] + decode.get(name, 0.0) for name in prefill}
    first, later = sum(prefill.values()), sum(decode.values())
    if overhead:
        once = overhead * shape.layers
        total["overhead"] = once * (len(passes) + steps)
        first += once * len(passes)
        later += once * steps
    return total, first, later


def _price(operations: list[Operation], work: Workload, device: Hardware) -> Split:
    rate, bandwidth = device.flops(work.bits), device.bandwidth
    return {
        operation.name: float(
            np.sum(np.maximum(np.asarray(operation.flops) / rate, np.asarray(operation.bytes) / bandwidth))
        )
        for operation in operations
    }


def _step(shape: ModelShape, work: Workload, rows: Pass, tokens: int, contexts: Array) -> list[Operation]:
    """Operations of steps that add `tokens` new tokens per row to `contexts` earlier ones.

    Arrays are `(steps,)`.
    """
    h, n = shape.hidden, rows.rows * tokens
    number, weight = work.bits / 8, work.weight_bits / 8
    once = np.ones_like(contexts)
    widths = sum(kind.layers * (2 * h + kind.query + kind.projected + kind.value) for kind in shape.attention)
    projections = shape.attention_params * weight + number * n * widths
    expansions = sum(kind.layers * kind.expansion for kind in shape.attention if kind.keys == "own")  # see _attention
    operations = [
        Operation("projections", once * 2 * n * (shape.attention_params - expansions), once * projections),
        _attention(shape, work, rows, tokens, contexts),
        _mlp(shape, work, n, once),
        Operation("norms", once * 10 * n * h * shape.layers, once * 10 * n * h * shape.layers * number),
        _embedding_and_head(shape, work, rows, n, once),
    ]
    if elements := shape.state_elements:
        moved = 2 * rows.rows * _state_bytes(shape, work)
        operations.append(Operation("states", once * 4 * n * elements, once * moved))
    if rows.mixed:
        merged = rows.mixed * tokens
        operations.append(
            Operation(
                "aggregator",
                once * 2 * merged * (shape.aggregator_params(work.streams) + work.streams * h),
                once * number * (shape.aggregator_params(work.streams) + merged * h * (2 * work.streams + 3)),
            )
        )
    return operations


def _attention(shape: ModelShape, work: Workload, rows: Pass, tokens: int, contexts: Array) -> Operation:
    """Scores and weighted sums, in the layers that read keys and values; prefixes are read as these are.

    Latent attention makes keys and values of all latents that are seen, in each step. An indexer scores all keys, and
    what it does not choose is masked: queries are multiplied with all of them.
    """
    prefix = rows.prefixes * shape.prefix_length
    flops, elements = np.zeros_like(contexts), np.zeros_like(contexts)
    for kind in shape.attention:
        if kind.keys == "none":
            continue
        seen, loaded = _attended(kind.window, tokens, contexts)
        per_token = kind.query + kind.value
        flops += kind.layers * 2 * (rows.rows * seen + work.batch * tokens * prefix) * per_token
        cached = (rows.cache_rows * loaded + prefix) * kind.kv_per_token
        elements += kind.layers * (cached + rows.rows * tokens * per_token)
        if kind.expansion:
            flops += kind.layers * 2 * rows.cache_rows * loaded * kind.expansion
            made = kind.kv_rank + kind.rope_dim + kind.kv_per_token
            elements += kind.layers * rows.cache_rows * (loaded - tokens) * made
        flops += kind.layers * 2 * rows.rows * seen * kind.indexer_heads * (kind.indexer_dim + 1)
        indexer = (rows.cache_rows * loaded + rows.rows * tokens * kind.indexer_heads) * kind.indexer_dim
        elements += kind.layers * indexer
    return Operation("attention", flops, work.bits / 8 * elements)


def _state_bytes(shape: ModelShape, work: Workload) -> float:
    """Of the states that one row keeps in all layers."""
    return sum(kind.layers * (work.bits / 8 * kind.state + 4 * kind.float32_state) for kind in shape.attention)


def _embedding_and_head(shape: ModelShape, work: Workload, rows: Pass, n: float, once: Array) -> Operation:
    """The vectors of n tokens, and the logits of the rows that are predicted from."""
    number, logits = work.bits / 8, rows.predicted * shape.vocab
    matrix = shape.vocab * shape.hidden * work.embedding_bits / 8 if rows.predicted else 0
    traffic = matrix + logits * number + 2 * n * shape.hidden * number
    return Operation("embedding_and_head", once * 2 * logits * shape.hidden, once * traffic)


def _mlp(shape: ModelShape, work: Workload, n: float, once: Array) -> Operation:
    """Dense layers and layers with experts; only the experts that n tokens are expected to use are loaded."""
    number, weight = work.bits / 8, work.weight_bits / 8
    dense = shape.layers - shape.sparse_layers
    flops = dense * shape.dense_mlp_params
    loaded = dense * shape.dense_mlp_params
    inner = dense * shape.mlp_matrices * shape.intermediate
    if shape.sparse_layers:
        met = shape.experts * (1 - (1 - shape.used_experts / shape.experts) ** n)
        flops += shape.sparse_layers * (shape.used_experts * shape.expert_params + shape.shared_params)
        loaded += shape.sparse_layers * (met * shape.expert_params + shape.shared_params)
        width = shape.used_experts * shape.expert_intermediate + shape.shared_intermediate
        inner += shape.sparse_layers * shape.mlp_matrices * width
    traffic = loaded * weight + number * n * (2 * shape.layers * shape.hidden + inner)
    return Operation("mlp", once * 2 * n * flops, once * traffic)


def _attended(window: int, tokens: int, contexts: Array) -> tuple[Array, Array]:
    """Pairs of a new token and a visible token, and tokens whose keys and values are read.

    Both per row of one layer.
    """
    kept = contexts + tokens
    reach = window or kept.max()
    near = np.clip(reach - contexts, 0, tokens)  # new tokens whose window is not full
    pairs = near * contexts + near * (near + 1) / 2 + (tokens - near) * reach
    return pairs, np.minimum(kept, reach + tokens - 1)
