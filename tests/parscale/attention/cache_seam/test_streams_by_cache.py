"""Attention that is an architecture's own and reads a cache: what streams compute there, cached, padded, generated."""

import dataclasses
import warnings

import pytest
import torch
from model_calls import choose_stream, given, logits_of
from transformers import DynamicCache

import parscale

TOLERANCE = 2e-5  # logits of size 1; measured: 4e-6 at most
P, T = 3, 6

GPTS = ["bloom", "codegen", "gptj", "falcon multi-query", "falcon grouped", "falcon alibi", "gpt_neo"]
GPTS += ["gpt_neox_japanese", "mpt", "xglm"]
BERTS = ["megatron-bert", "rembert", "roformer", "big_bird"]
DECODERS = ["mvp", "trocr"]
RELATIVE = [name for name in GPTS if name not in ("gpt_neo", "xglm")] + ["roformer"]


def padded(zoo, amount=4):
    """A text in place of whose beginning there is padding, and a whole one, with their mask."""
    ids = zoo.token_ids(length=zoo.S + amount)
    mask = torch.ones_like(ids)
    mask[0, :amount] = 0
    return ids * mask, mask


# -- against the reference


def test_streams_are_runs_with_a_cache_that_has_the_prefix(kind, zoo, wrapped, reference):
    model, ids = wrapped(kind), zoo.token_ids()
    zoo.close(logits_of(model, ids, use_cache=False), reference(kind, model).logits(ids), TOLERANCE)
    zoo.close(logits_of(model, ids, use_cache=True), reference(kind, model).logits(ids), TOLERANCE)


@pytest.mark.parametrize("kind", RELATIVE, indirect=True)
def test_each_stream_has_read_its_text(kind, zoo):
    kind.need_causality(zoo)
    model, plain, texts = kind.plain(), kind.plain(), zoo.token_ids(P, 12, seed=8)
    ids = zoo.token_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing here is an approximation
        parscale.wrap(model, P, prefix_length=12, smoothing=0.0, init="context", calibration=texts)
    for p, text in enumerate(texts):
        choose_stream(model, p)
        expected = logits_of(plain, torch.cat([text.expand(zoo.B, -1), ids], dim=1))[:, 12:]
        zoo.close(logits_of(model, ids), expected, TOLERANCE)


@pytest.mark.parametrize(
    "kind", ["gpt_neo", "xglm", "megatron-bert", "rembert", "big_bird", "mvp", "trocr", "xlm"], indirect=True
)
def test_where_reading_a_text_is_an_approximation_it_says_so(kind, zoo):
    with pytest.warns(UserWarning, match="learned positions.*approximation"):
        model = parscale.wrap(kind.plain(), P, prefix_length=12)
    assert logits_of(model, zoo.token_ids()).isfinite().all()


def test_ctrl_warns_that_reading_a_text_is_an_approximation(zoo, kinds):
    """CTRL, whose table a negative position would read from its end."""
    ctrl = dataclasses.replace(
        kinds["gptj"],
        model_type="ctrl",
        options={"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64},
    )
    with pytest.warns(UserWarning, match="learned positions.*approximation"):
        parscale.wrap(ctrl.plain(), P, prefix_length=12)


@pytest.mark.parametrize(
    ("kind", "length", "message"),
    [
        ("gptj", 64, "63 positions for a text.*64 tokens.*prefix_length"),
        ("cpmant", 12, "keys that do not stand for one token each.*init='random'"),
    ],
    indirect=["kind"],
)
def test_texts_that_cannot_be_read(kind, length, message):
    with pytest.raises(ValueError, match=message):
        parscale.wrap(kind.plain(), P, prefix_length=length, init="context")


# -- caches, padding, generation


@pytest.mark.parametrize("kind", [*GPTS, *BERTS, *DECODERS], indirect=True)
def test_cached_equals_full(kind, zoo, wrapped):
    kind.need_causality(zoo)
    model, ids = wrapped(kind), zoo.token_ids(length=12)
    full = logits_of(model, ids, use_cache=False)
    for sizes in ([1] * 12, [5, 4, 3], [11, 1]):
        cache, logits = None, []
        for piece in ids.split(sizes, dim=1):
            with torch.no_grad():
                output = model(input_ids=piece, use_cache=True, **given(model, cache))
            cache = output.past_key_values
            logits.append(output.logits)
        zoo.close(torch.cat(logits, dim=1), full, TOLERANCE)
        assert cache.get_seq_length() == 12
        own = getattr(cache, "self_attention_cache", cache)
        assert type(own) is DynamicCache
        assert own.layers[0].keys.shape[0] == P * zoo.B


@pytest.mark.grid
@pytest.mark.parametrize("kind", [*GPTS, "megatron-bert", "rembert", "big_bird"], indirect=True)
@pytest.mark.parametrize("attended", ["full", "cached"])
def test_left_padding(kind, attended, zoo, wrapped):
    kind.need_causality(zoo)
    wide, mask = padded(zoo)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if kind.positions == "given" else {}
    assert_padding_does_not_matter(wrapped(kind), attended, wide, mask, positions, zoo)


@pytest.mark.grid
@pytest.mark.parametrize("kind", RELATIVE, indirect=True)
@pytest.mark.parametrize("attended", ["full", "cached"])
def test_left_padding_without_positions(kind, attended, zoo, wrapped):
    kind.need_causality(zoo)
    assert_padding_does_not_matter(wrapped(kind), attended, *padded(zoo), {}, zoo)


def assert_padding_does_not_matter(model, attended, wide, mask, arguments, zoo):
    if attended == "full":
        logits = logits_of(model, wide, attention_mask=mask, **arguments)
    else:
        pieces, cache = [], None
        for start, end in ((0, 8), (8, 9), (9, 13)):
            now = {name: x[:, start:end] for name, x in arguments.items()} | {"use_cache": True}
            with torch.no_grad():
                output = model(wide[:, start:end], attention_mask=mask[:, :end], **given(model, cache), **now)
            cache = output.past_key_values
            pieces.append(output.logits)
        logits = torch.cat(pieces, dim=1)
    zoo.close(logits[:1, 4:], logits_of(model, wide[:1, 4:]), TOLERANCE)
    zoo.close(logits[1:], logits_of(model, wide[1:]), TOLERANCE)


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.grid
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(kind, beams, zoo, wrapped):
    changes = {}
    if kind.model_type == "cpmant":  # its tokens see what follows them, which in a single layer changes no later ones
        changes = {"num_hidden_layers": 1}
    elif kind.caches:
        kind.need_causality(zoo)
    model, ids = wrapped(kind, **changes), zoo.token_ids()
    plain = GREEDY | {"attention_mask": torch.ones_like(ids), "num_beams": beams}
    cached = model.generate(ids, use_cache=True, **plain)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **plain))
    assert cached.shape == (zoo.B, zoo.S + 8)


@pytest.mark.parametrize("kind", [n for n in GPTS if n not in ("falcon alibi", "gpt_neo")], indirect=True)
def test_static_caches(kind, zoo, wrapped):
    model = wrapped(kind)
    wide, mask = padded(zoo)
    static = model.generate(wide, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(static, model.generate(wide, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("kind", ["gptj", "rembert"], indirect=True)
def test_a_cache_of_the_callers_own_stays_the_callers(kind, zoo, wrapped):
    model, ids, cache = wrapped(kind), zoo.token_ids(), DynamicCache()
    with torch.no_grad():
        assert model(input_ids=ids, **given(model, cache)).past_key_values is cache
    assert cache.get_seq_length() == zoo.S
    with model.use_streams(None), pytest.raises(ValueError, match="filled with streams 'default'"):
        model(input_ids=ids[:, :1], **given(model, cache))


def test_a_mask_that_sdpa_was_spared_stands_for_the_causal_one(zoo, kinds, wrapped, monkeypatch):
    model, ids = wrapped(kinds["falcon grouped"]), zoo.token_ids()
    expected = logits_of(model, ids)
    monkeypatch.setattr(f"{type(model).__module__}.create_causal_mask", lambda *args, **kwargs: None)
    zoo.close(logits_of(model, ids), expected, TOLERANCE)
    zoo.close(logits_of(model, ids, use_cache=False), expected, TOLERANCE)
