"""The released ParScale code under transformers 5, where it no longer imports, so that both are timed on one machine.

It wants names that are gone, and a cache that is two lists of tensors. Only these are supplied here; all that it
computes it computes itself. `python benchmarks/released.py FOLDER` holds it against the reference vectors of the
tests, which it wrote itself under transformers 4.51.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers
from safetensors.torch import load_file
from transformers import cache_utils


class LossKwargs(TypedDict, total=False):
    """Arguments of a loss function; the released code inherits from it."""


def default_rope(config: Any, device: Any = None, seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `(D/2,)` of plain rotary embeddings, and the factor on them."""
    size = config.hidden_size // config.num_attention_heads
    return config.rope_theta ** (-torch.arange(0, size, 2, device=device).float() / size), 1.0


class ListCache(transformers.Cache):
    """A cache as in transformers 4.51: for each layer a tensor of keys and one of values, joined at every step."""

    def __init__(self) -> None:
        self.key_cache: list[torch.Tensor] = []
        self.value_cache: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(R, G, K, D)` of a layer, the new ones included."""
        for cache, states in ((self.key_cache, key_states), (self.value_cache, value_states)):
            if layer_idx == len(cache):
                cache.append(states)
            else:
                cache[layer_idx] = torch.cat([cache[layer_idx], states], dim=-2)
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache, the prefix included."""
        return self.key_cache[layer_idx].shape[-2] if self.key_cache else 0


def load_released(folder: Path) -> tuple[Any, Any]:
    """The released `Qwen2ParScaleConfig` and `Qwen2ParScaleForCausalLM`.

    Args:
        folder: with `configuration_qwen2_parscale.py` and `modeling_qwen2_parscale.py`; einops is installed.
    """
    package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("released", None, is_package=True))
    package.__path__ = [str(folder)]
    sys.modules["released"] = package
    configuration = importlib.import_module("released.configuration_qwen2_parscale")
    configuration.Qwen2ParScaleConfig.pad_token_id = None  # what was the default
    transformers.utils.LossKwargs = LossKwargs
    own, cache_utils.DynamicCache = cache_utils.DynamicCache, ListCache
    try:
        modeling = importlib.import_module("released.modeling_qwen2_parscale")
    finally:
        cache_utils.DynamicCache = own
        del transformers.utils.LossKwargs
    modeling.ROPE_INIT_FUNCTIONS = {"default": default_rope}
    modeling.Qwen2RotaryEmbedding.compute_default_rope_parameters = staticmethod(default_rope)
    modeling.Qwen2ParScaleForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    return configuration.Qwen2ParScaleConfig, modeling.Qwen2ParScaleForCausalLM


def released_model(folder: Path, shape: dict[str, Any], P: int) -> Any:
    """A random model of the released code, of the paper's prefix length and smoothing, on the default device.

    Args:
        folder: as `load_released`.
        shape: the arguments of a `Qwen2Config`.
        P: streams.
    """
    config_class, model_class = load_released(folder)
    streams = {"parscale_n": P, "parscale_n_tokens": 48, "parscale_attn_smooth": 0.1}
    model = model_class(config_class(**shape, **streams, rope_theta=1e4, attn_implementation="sdpa"))
    for name, parameter in model.named_parameters():
        if "prefix_" in name:  # the released code leaves them uninitialised
            torch.nn.init.normal_(parameter, 0, 0.02)
    return model


@torch.no_grad()
def check(folder: Path, vectors: Path) -> None:
    """Logits within 5e-5 and the same greedy tokens, from every checkpoint of `vectors`."""
    config_class, model_class = load_released(folder)
    for checkpoint in sorted(path.parent for path in vectors.glob("*/config.json")):
        config = config_class(**json.loads((checkpoint / "config.json").read_text()), attn_implementation="sdpa")
        model = model_class(config).eval()
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=not config.tie_word_embeddings)
        model.tie_weights()
        expected = load_file(checkpoint / "expected.safetensors")
        ids, cache, text = expected["input_ids"], None, [expected["input_ids"]]
        error = (model(ids).logits - expected["logits"]).abs().max().item()
        for _ in range(expected["greedy"].shape[1] - ids.shape[1]):
            output = model(text[-1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            text.append(output.logits[:, -1:].argmax(-1))
        same = torch.equal(torch.cat(text, dim=1), expected["greedy"])
        print(f"{checkpoint.name:20} logits {error:.1e}  greedy tokens {'the same' if same else 'DIFFER'}")
        if error > 5e-5 or not same:
            sys.exit("The released code does not compute here what it computed under transformers 4.51.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the released modeling and configuration code")
    check(parser.parse_args().folder, Path(__file__).parents[1] / "tests" / "golden")
