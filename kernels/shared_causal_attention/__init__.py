"""Causal attention of P streams over the keys and values of stream 0, for prefill and training."""

from parscale.kernels.shared_causal_attention.api import shared_causal_attention
from parscale.kernels.shared_causal_attention.reference import shared_attention_reference

__all__ = ["shared_attention_reference", "shared_causal_attention"]
