"""Attention of P streams over the keys and values of one of them: stream 0's."""

from parscale.kernels.shared_attention.causal import shared_causal_attention
from parscale.kernels.shared_attention.decode import fits_fused, shared_decode_attention
from parscale.kernels.shared_attention.reference import shared_attention_reference

__all__ = ["fits_fused", "shared_attention_reference", "shared_causal_attention", "shared_decode_attention"]
