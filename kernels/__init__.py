"""Operations that P streams add to a model, one folder for each, with its torch reference."""

from parscale.kernels.aggregate import aggregate, stream_weights
from parscale.kernels.aggregator import aggregator
from parscale.kernels.causal_attention import causal_attention, causal_attention_reference, is_mergeable
from parscale.kernels.decode_attention import decode_attention, visible_lengths

__all__ = [
    "aggregate",
    "aggregator",
    "causal_attention",
    "causal_attention_reference",
    "decode_attention",
    "is_mergeable",
    "stream_weights",
    "visible_lengths",
]
