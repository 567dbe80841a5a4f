"""Causal attention over a stream's prefix and new tokens, for prefill and training."""

from parscale.kernels.causal_attention.api import causal_attention, flash_supports
from parscale.kernels.causal_attention.reference import causal_attention_reference

__all__ = ["causal_attention", "causal_attention_reference", "flash_supports"]
