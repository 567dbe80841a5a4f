"""Attention over a stream's prefix and the real tokens, without joining the two."""

from parscale.kernels.prefix_attention.api import decode_attention
from parscale.kernels.prefix_attention.causal import causal_attention, causal_attention_reference, is_mergeable

__all__ = ["causal_attention", "causal_attention_reference", "decode_attention", "is_mergeable"]
