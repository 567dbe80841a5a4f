"""Attention of one new token over a stream's prefix and the cache, without joining the two."""

from parscale.kernels.decode_attention.api import (
    decode_attention,
    fits_fused,
    runs_decode_kernel,
    visible_lengths,
)

__all__ = ["decode_attention", "fits_fused", "runs_decode_kernel", "visible_lengths"]
