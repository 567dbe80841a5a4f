"""Operations that P streams add to a model, one folder for each, with its torch reference."""

from parscale.kernels.aggregate import aggregate
from parscale.kernels.aggregator import aggregator

__all__ = ["aggregate", "aggregator"]
