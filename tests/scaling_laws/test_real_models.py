"""Counted memory against the tensors of real models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from parscale import wrap
from parscale.scaling_laws import cost

FAMILIES = {
    "qwen2": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 4, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"num_key_value_heads": 2, "head_dim": 16},
}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("streams", [1, 3])
def test_counted_memory_is_that_of_the_tensors(kind, streams):
    """To the byte but for the norms of queries and keys, which are not counted."""
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=99, **sizes, **FAMILIES[kind])
    model = wrap(AutoModelForCausalLM.from_config(config), streams, prefix_length=5, init="random", seed=0).eval()
    ids = torch.randint(3, 99, (2, 7))
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    held = {"weights": 0, "prefixes": 0, "aggregator": 0}
    for name, parameter in model.named_parameters():
        part = "prefixes" if "prefix_" in name else "aggregator" if "aggregate_layer" in name else "weights"
        held[part] += parameter.nbytes
    fields = model.config.to_dict() | {"parscale_n_tokens": 5}
    counted = cost(fields, num_streams=streams, batch_size=2, input_length=7, output_length=4, dtype="float32").memory
    uncounted = 4 * 3 * 2 * 16 if kind == "qwen3" else 0
    assert counted["weights"] + uncounted == held["weights"]
    assert counted["prefixes"] == held["prefixes"]
    assert counted["aggregator"] == held["aggregator"]
    assert counted["kv_cache"] == cached
