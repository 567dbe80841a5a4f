"""Attention of one new token over its stream's prefix and the cache, without joining the two."""

from parscale.kernels.prefix_attention.reference import decode_attention

__all__ = ["decode_attention"]
