"""Attention of one new token of each of P streams over its prefix and the cache of stream 0."""

from parscale.kernels.shared_decode_attention.api import shared_decode_attention

__all__ = ["shared_decode_attention"]
