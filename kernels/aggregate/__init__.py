"""Softmax over streams, smoothing and weighted sum in one operation."""

from parscale.kernels.aggregate.api import aggregate
from parscale.kernels.aggregate.reference import stream_weights

__all__ = ["aggregate", "stream_weights"]
