"""The operations that P streams add to a model: one folder each, with a torch reference."""

from parscale.kernels.aggregate import aggregate, stream_weights
from parscale.kernels.aggregator import aggregator
from parscale.kernels.causal_attention import causal_attention, causal_attention_reference, flash_supports
from parscale.kernels.decode_attention import decode_attention, visible_lengths
from parscale.kernels.shared_causal_attention import shared_causal_attention
from parscale.kernels.shared_decode_attention import shared_decode_attention

__all__ = [
    "aggregate",
    "aggregator",
    "causal_attention",
    "causal_attention_reference",
    "decode_attention",
    "flash_supports",
    "shared_causal_attention",
    "shared_decode_attention",
    "stream_weights",
    "visible_lengths",
]
