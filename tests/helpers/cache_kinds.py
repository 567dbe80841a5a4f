"""Caches of every kind, for streams with keys and values of their own and for streams that share them."""

import pytest
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

TOLERANCE = 2e-5  # float32 rounding of logits of size 1 to 5 through two layers
# dense, grouped queries, sliding windows, learned positions, experts, latent attention, sinks
NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("mistral", "mixtral")]
NAMES = ["llama", "gemma3", "gpt2", "deepseek_v3", "gpt_oss", *NIGHTLY]
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "dynamic in chunks": {"prefill_chunk_size": 4},
    "static in chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
}


class UnroundedLayer(QuantizedLayer):
    """Stands in for a quantizer: everything of a quantized cache but the rounding."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


def unrounded_cache(model, residual):
    """A quantized cache of such layers."""
    return Cache(layers=[UnroundedLayer(residual_length=residual) for _ in range(model.config.num_hidden_layers)])
