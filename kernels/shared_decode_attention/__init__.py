"""Attention of one new token of each of P streams over its prefix and the cache of stream 0."""

from parscale.kernels.shared_decode_attention.api import fits_fused, shared_decode_attention

__all__ = ["fits_fused", "shared_decode_attention"]
