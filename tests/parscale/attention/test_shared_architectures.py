"""Architectures in which shared keys and values meet something that others do not have."""

import pytest
import torch
from model_calls import given
from scripts import load_script

import parscale

TOLERANCE = 2e-5
tiny_models = load_script("tiny_models")


def build(name):
    if name not in tiny_models.names():
        pytest.skip(f"no {name} in this transformers")
    return tiny_models.Tiny(name).build(window=6)


@pytest.mark.parametrize(
    "name",
    [
        "AfmoeForCausalLM",  # views what attention returns
        "CTRLLMHeadModel",  # absolute positions
        "DiffLlamaForCausalLM",  # attends twice in each layer
        "Gemma3ForConditionalGeneration",  # a language model in another one
        "Gemma4ForCausalLM",  # layers that borrow keys
        "RoCBertForCausalLM",  # makes a cache for an encoder too
    ],
)
@torch.no_grad()
def test_a_cache_two_passes_and_none(name, zoo):
    model, ids = zoo.share(build(name)), zoo.token_ids().clamp(max=tiny_models.FIRST_SPECIAL - 1)
    whole = model(input_ids=ids).logits
    zoo.close(model(input_ids=ids, logits_to_keep=2).logits, whole[:, -2:], TOLERANCE)
    output = model(input_ids=ids[:, :6], use_cache=True, logits_to_keep=1)
    zoo.close(output.logits, whole[:, 5:6], TOLERANCE)
    for at in range(6, zoo.S):
        output = model(input_ids=ids[:, at : at + 1], use_cache=True, **given(model, output.past_key_values))
        zoo.close(output.logits, whole[:, at : at + 1], TOLERANCE)
    cache = output.past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert {layer.keys.shape[0] for layer in layers} == {zoo.B}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BltForCausalLM", "attention layers that are not causal"),
        ("DeepseekV32ForCausalLM", "its cache holds an index of keys"),
        ("DeepseekV4ForCausalLM", "does not run where keys have fewer rows than queries"),
        ("MllamaForCausalLM", "layers without keys of the text"),
    ],
)
def test_what_is_refused(name, reason):
    model = build(name)
    with pytest.raises(parscale.UnsupportedModelError, match=rf"{reason}.*Use kv='own'"):
        parscale.wrap(model, 2, prefix_length=3, init="random", kv="shared")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("OpenAIGPTLMHeadModel", "it takes no cache that streams could share"),
        ("MambaForCausalLM", "layers without keys of the text, which carry a state"),
    ],
)
def test_models_without_layers_that_could_be_shared(name, reason):
    for options, message in (
        ({"transform": "lora"}, rf"kv='shared' is not for {name}: .*{reason}.*Use kv='own'"),
        ({"prefix_length": 3}, "No attention was found"),
    ):
        model = build(name)
        with pytest.raises(parscale.UnsupportedModelError, match=message):
            parscale.wrap(model, 2, init="random", kv="shared", **options)
        assert not hasattr(model, "parscale")


def test_weights_that_are_no_numbers_yet_are_said_to_be_so(zoo):
    """A memory that nobody has filled: the model cannot be tried, and its layers are not to blame."""
    model = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(parscale.UnsupportedModelError, match=r"are not finite.*load or initialise its weights first"):
        parscale.wrap(model, zoo.P, prefix_length=zoo.T, init="random", kv="shared")
    assert not hasattr(model, "parscale")
