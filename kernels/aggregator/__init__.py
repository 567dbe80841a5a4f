"""The whole aggregator: two projections with SiLU between them, then softmax, smoothing and weighted sum."""

from parscale.kernels.aggregator.api import aggregator

__all__ = ["aggregator"]
