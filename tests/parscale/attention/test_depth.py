"""Attention of each token to its own states in earlier layers: a layer that streams leave alone."""

import pytest
import torch
import transformers
from model_calls import choose_stream, logits_of
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward

import parscale

TOLERANCE = 2e-5  # float32 rounding of logits of size 1 to 5 through two layers


class DepthAttention(nn.Module):
    """Attends to a layer's input and output, each token to its own, in the layout of attention over tokens."""

    def __init__(self, config):
        super().__init__()
        self.query = nn.Parameter(torch.linspace(-1, 1, config.hidden_size))
        self.config = config
        self.num_key_value_groups = 1
        self.is_causal = False

    def forward(self, before, after):
        states = torch.stack([before, after], dim=-2)  # (B, S, depth, H), where heads and tokens would be
        query = self.query.expand(*states.shape[:-2], 1, -1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(self, query, states, states, None, scaling=0.1)[0].transpose(1, 2).squeeze(-2)


class Layer(LlamaDecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.depth = DepthAttention(config)

    def forward(self, hidden_states, **kwargs):
        return self.depth(hidden_states, super().forward(hidden_states, **kwargs))


@pytest.fixture(params=[1, 2, 4])
def plain(request):
    """A Llama with such a layer after each of its own; with two heads for keys, as many as a short run has tokens."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.model.layers = nn.ModuleList(Layer(config, index) for index in range(2))
    return model.eval()


def test_only_attention_over_tokens_gets_a_prefix(plain):
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = plain(ids).logits
        model = parscale.wrap(plain, 3, prefix_length=4, init="random")
        assert [layer.module_name for layer in model.parscale.layers] == [
            "model.layers.0.self_attn",
            "model.layers.1.self_attn",
        ]
        assert {layer.key_heads for layer in model.parscale.layers} == {plain.config.num_key_value_heads}
        mixed = model(ids).logits
        with model.use_streams(None):
            assert torch.equal(model(ids).logits, expected)
    assert (mixed - expected).abs().max() > TOLERANCE


def test_the_prefix_is_that_of_a_cache(plain):
    """A cache that begins with a stream's prefix gives the plain model what that stream gives."""
    ids = torch.arange(3, 12)[None]
    model = parscale.wrap(plain, 2, prefix_length=4, smoothing=0.0, init="random")
    choose_stream(model, 1)
    cache = transformers.DynamicCache()
    for index, layer in enumerate(model.model.layers):
        cache.update(layer.self_attn.prefix_k[1:].detach(), layer.self_attn.prefix_v[1:].detach(), index)
    found = logits_of(model, ids)
    with model.use_streams(None):
        expected = logits_of(model, ids, cache, position_ids=torch.arange(9)[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
