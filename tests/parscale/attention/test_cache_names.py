"""A backbone's cache goes by more than one name: transformers 5.24 calls `cache` what was `past_key_values` before.

Both are tried with every transformers, on a Llama that hands its cache to a backbone of the test's own.
"""

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel, StaticCache
from transformers.modeling_outputs import CausalLMOutput

import parscale

TOLERANCE = 2e-5  # float32 rounding of logits of size 1 to 5 through two layers


class NewBackbone(LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)


class OldBackbone(LlamaModel):
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)


class Llama(LlamaForCausalLM):
    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        hidden = self.model(input_ids, **kwargs)[0]  # (B, S, H)
        return CausalLMOutput(logits=self.lm_head(hidden[:, -logits_to_keep:]))  # 0: all


@torch.no_grad()
def logits_of(model, ids, **arguments):
    """With the cache under the name that the test says."""
    return model(input_ids=ids, **arguments).logits


BACKBONES = {"cache": NewBackbone, "past_key_values": OldBackbone}


@pytest.fixture(params=BACKBONES)
def name(request):
    return request.param


@pytest.fixture
def make(name, zoo):
    """A function that makes the wrapped model, with streams that matter."""

    def wrapped(**arguments):
        family = zoo.FAMILIES["llama"]
        model = Llama(family.config("sdpa"))
        model.model = BACKBONES[name](model.config)
        model.load_state_dict(family.build("sdpa").state_dict())
        parscale.wrap(model.eval(), zoo.P, prefix_length=zoo.T, init="random", **arguments)
        zoo.fill_streams(model)
        return model

    return wrapped


@pytest.mark.parametrize("kind", [{}, {"transform": "prompt"}, {"kv": "shared"}], ids=["prefix", "prompt", "shared"])
def test_padded_text_in_pieces(make, name, kind, zoo):
    """As at once: its positions, and those of a prompt, are counted from what the cache holds."""
    model, ids = make(**kind), zoo.token_ids()
    padding = torch.tensor([[1] * zoo.S, [0] * 3 + [1] * (zoo.S - 3)])
    cache, pieces = DynamicCache(config=model.config), []
    for start, end in ((0, 4), (4, 7), (7, 8), (8, zoo.S)):
        arguments = {"attention_mask": padding[:, :end], name: cache}
        pieces.append(logits_of(model, ids[:, start:end], **arguments))
    whole = logits_of(model, ids, attention_mask=padding, use_cache=False)
    zoo.close(torch.cat(pieces, dim=1)[padding.bool()], whole[padding.bool()], TOLERANCE)


def test_the_second_pass_keeps_out_of_the_callers_cache(make, name, zoo):
    model, ids = make(kv="shared"), zoo.token_ids()
    cache = DynamicCache(config=model.config)
    for start, end in ((0, 4), (4, zoo.S)):
        last = logits_of(model, ids[:, start:end], logits_to_keep=1, **{name: cache})
    assert cache.get_seq_length() == zoo.S
    assert cache.layers[0].keys.shape[0] == zoo.B
    zoo.close(last, logits_of(model, ids, use_cache=False)[:, -1:], TOLERANCE)


def test_a_cache_of_another_set_is_refused(make, name, zoo):
    model, ids = make(), zoo.token_ids()
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits_of(model, ids, **{name: cache})
    with model.use_streams(None), pytest.raises(ValueError, match="filled with streams 'default'"):
        logits_of(model, ids[:, :1], **{name: cache})


def test_an_empty_static_cache_gets_rows_for_the_streams(make, name, zoo):
    model, ids = make(), zoo.token_ids()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with model.use_streams(None):
        logits_of(model, ids, **{name: cache})
    cache.reset()
    logits = logits_of(model, ids, **{name: cache})
    assert cache.layers[0].keys.shape[0] == zoo.P * zoo.B
    zoo.close(logits, logits_of(model, ids, use_cache=False), TOLERANCE)
