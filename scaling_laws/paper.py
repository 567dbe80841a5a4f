"""The cost that arXiv 2505.10475 reports, by its authors' method (`method="paper"`).

They used llm-analysis 0.2.2 with 0.7 of an A100's arithmetic and 0.9 of its bandwidth, 16 bits everywhere, and averaged
over input = output = 64, 128, 256, 512 (`headline`). The differences between this count and a real run:

- The prefix counts as T more prompt tokens of every row: computed by every layer of the prefill, and cached P*B times.
  `parscale` stores it once for each stream and computes nothing for it. Too high for ParScale.
- The aggregator is counted once, for all tokens in one pass; its `P*H*H` weights, which are read again for each
  generated token, are omitted (at 1.6B and P = 8, 38 MB a token next to 3.6 GB of other weights). Too low for ParScale.
- Prefixes are in the cache but not among the parameters; the aggregator's biases and its second matrix are omitted.
  Negligible.
- Each decoding step reads *and writes* the cache at its final length, and its attention arithmetic sees one token.
  Too high at long context, for every model.
- The whole embedding table is read at each step although a step looks up a few rows, while the output matrix, which is
  read, counts as arithmetic only. The two errors cancel if embeddings are tied.
- The prefill computes logits for every prompt token, and keeps them in memory: V*S*2 bytes, 0.14 GiB at S = 512. For
  P > 1 the prefix tokens have logits too.
- Activations count the largest buffer of a layer without the residual stream.
- Kernel launches take no time. At batch 1 the six models would need 0.8 to 5.3 ms a token, less than the launches of 36
  layers take on many systems; where launches dominate, streams are cheaper than this count says.
- Sequences of 64 to 512 tokens are short: the P-fold cache, small here, grows with context.
"""

from __future__ import annotations

from parscale.scaling_laws.hardware import Hardware
from parscale.scaling_laws.roofline import Split, Workload
from parscale.scaling_laws.shapes import ModelShape

BYTES = 2
"""Bytes of a number: the paper counts 16 bits throughout."""


def memory(shape: ModelShape, work: Workload) -> Split:
    """Bytes, split by content."""
    length = _prompt(shape, work)
    rows, h = work.rows, shape.hidden
    layer = max(3 * h, 2 * h + 4 * shape.attention[0].heads, shape.intermediate)
    return {
        "weights": BYTES
        * (shape.layers * (_attention_params(shape) + _mlp_params(shape) + 2 * h) + h * (shape.vocab + 1)),
        "aggregator": BYTES * _aggregator_params(shape, work.streams),
        "kv_cache": _cache_bytes(shape, work),
        "activations": BYTES * length * max(rows * layer, work.batch * shape.vocab),
    }


def seconds(shape: ModelShape, work: Workload, device: Hardware) -> tuple[Split, float, float]:
    """Seconds by operation, of the prefill and of decoding; the last two exclude the aggregator's one pass."""
    rate, bandwidth = device.flops(16), device.bandwidth
    length = _prompt(shape, work)
    tokens = work.input_length + work.output_length
    heads = shape.attention[0].heads

    def attention(rows: int, span: int) -> float:
        groups = heads / shape.attention[0].kv_heads
        flops = 4 * rows * span * shape.hidden * (shape.hidden * (1 + 1 / groups) + span)
        buffers = max(3 * shape.hidden, 2 * shape.hidden + 4 * heads) * rows * span
        return max(flops / rate, BYTES * (_attention_params(shape) + buffers) / bandwidth)

    def mlp(rows: int, span: int) -> float:
        flops = 6 * rows * span * shape.hidden * shape.intermediate
        buffers = max(shape.hidden, shape.intermediate) * rows * span
        return max(flops / rate, BYTES * (_mlp_params(shape) + buffers) / bandwidth)

    def norms(rows: int, span: int) -> float:
        return 2 * rows * span * shape.hidden * max(5 / rate, 4 / bandwidth)

    def logits(rows: int, span: int) -> float:
        return 2 * rows * span * shape.vocab * shape.hidden / rate

    table = shape.vocab * shape.hidden * BYTES / bandwidth
    out = work.output_length
    prefill, decode = (
        {
            "attention": shape.layers * attention(work.rows, span),
            "mlp": shape.layers * mlp(work.rows, span),
            "norms": shape.layers * norms(work.rows, span),
            "embedding_and_head": table + logits(work.rows, span),
        }
        for span in (length, 1)
    )
    # The logits were counted for every row; all but those of B rows are subtracted, for the tokens without the prefix.
    surplus = logits(work.rows, tokens) - logits(work.batch, tokens)
    split = {name: prefill[name] + out * decode[name] for name in prefill}
    split["embedding_and_head"] -= surplus
    split["kv_cache"] = out * 2 * _cache_bytes(shape, work) / bandwidth
    split["aggregator"] = _aggregator_params(shape, work.streams) / _mlp_params(shape) * mlp(work.batch, tokens)
    share = work.input_length / tokens
    first = sum(prefill.values()) - share * surplus
    later = out * sum(decode.values()) + split["kv_cache"] - (1 - share) * surplus
    return split, first, later


def _prompt(shape: ModelShape, work: Workload) -> int:
    return work.input_length + (shape.prefix_length if work.streams > 1 else 0)


def _attention_params(shape: ModelShape) -> float:
    layer = shape.attention[0]
    return 2 * shape.hidden**2 * (1 + layer.kv_heads / layer.heads)


def _mlp_params(shape: ModelShape) -> float:
    return 3 * shape.hidden * shape.intermediate


def _aggregator_params(shape: ModelShape, streams: int) -> float:
    return (shape.hidden + 1) * shape.hidden * streams if streams > 1 else 0


def _cache_bytes(shape: ModelShape, work: Workload) -> float:
    """Keys and values of every row at its final length, including the prefix."""
    length = _prompt(shape, work) + work.output_length
    layer = shape.attention[0]
    return 2 * work.rows * length * shape.hidden * layer.kv_heads / layer.heads * BYTES * shape.layers
