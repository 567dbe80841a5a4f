"""Attention that is an architecture's own and reads a cache: training, saving, copies, and what is refused."""

import copy
import dataclasses
import functools
import inspect
import pickle

import pytest
import torch
import transformers
from model_calls import logits_of
from packaging.version import Version
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

import parscale
from parscale import UnsupportedModelError
from parscale.streams.brief_runs import run_briefly

TOLERANCE = 2e-5
P, T = 3, 6

CHECKPOINTS = ["bloom", "codegen", "gptj", "falcon multi-query", "falcon grouped", "falcon alibi", "gpt_neo", "mpt"]
CHECKPOINTS += ["xglm", "megatron-bert", "rembert", "roformer", "big_bird", "mvp", "trocr"]


# -- training


def loss_of(model, ids):
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    logits = model(input_ids=ids, **no_cache).logits[:, :-1]  # RoFormer's own checkpointing fails with a cache
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients_of(model, ids):
    model.zero_grad()
    loss_of(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "prefix_" in name or "aggregate" in name}


def test_gradients_reach_every_prefix(kind, zoo, wrapped):
    gradients = gradients_of(wrapped(kind).train(), zoo.token_ids())
    assert len(gradients) == 8
    assert all(g.flatten(1).norm(dim=1).min() > 1e-6 for name, g in gradients.items() if "prefix_" in name)


@pytest.mark.grid
@pytest.mark.parametrize("kind", CHECKPOINTS, indirect=True)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing(kind, reentrant, frozen, zoo, wrapped):
    model, ids = wrapped(kind).train(), zoo.token_ids()
    if frozen:
        model.freeze_backbone()
    expected = gradients_of(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, gradient in gradients_of(model, ids).items():
        zoo.close(gradient, expected[name], 1e-6)


@pytest.mark.parametrize("kind", ["gpt_neox_japanese", "megatron-bert", "rembert"], indirect=True)
def test_gradients_against_finite_differences(kind, zoo, wrapped):
    model, ids = wrapped(kind, dtype=torch.float64), zoo.token_ids()
    gradients = gradients_of(model, ids)
    for name, parameter in model.named_parameters():
        if "prefix_" not in name:
            continue
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        losses = []
        direction /= direction.norm()
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(loss_of(model, ids))
                parameter.add_(direction, alpha=-step)
        slope = (losses[0] - losses[1]) / 2e-4
        zoo.close((gradients[name] * direction).sum(), slope, 1e-8)


# -- identity, saving, copies


def test_without_streams_nothing_is_in_the_way(kind, zoo, wrapped):
    plain, model, ids = kind.plain(), wrapped(kind), zoo.token_ids()
    expected = logits_of(plain, ids)
    names = set(dict(plain.named_parameters()))
    with model.use_streams(None):
        assert torch.equal(logits_of(model, ids), expected)
    assert not torch.equal(logits_of(model, ids), expected)
    parscale.unwrap(model)
    assert torch.equal(logits_of(model, ids), expected)
    assert set(dict(model.named_parameters())) == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert [set(vars(module)) for module in model.modules()] == [set(vars(module)) for module in plain.modules()]
    one = parscale.wrap(model, 1)
    assert torch.equal(logits_of(one, ids), expected)
    assert set(dict(one.named_parameters())) == names


@pytest.mark.parametrize("run", [1, 2], ids=["that finds the layers", "with a prefix on trial"])
def test_an_interrupted_wrap_leaves_nothing(run, kinds, monkeypatch):
    plain, model, runs = kinds["gpt_neo"].plain(), kinds["gpt_neo"].plain(), []

    def interrupted(state):
        runs.append(run_briefly(state))
        if len(runs) == run:
            raise KeyboardInterrupt
        return runs[-1]

    monkeypatch.setattr("parscale.attention.cache_seam.run_briefly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parscale.wrap(model, 2, prefix_length=3, seed=0)
    assert [set(vars(module)) for module in model.modules()] == [set(vars(module)) for module in plain.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_saving_and_loading(kind, zoo, wrapped, tmp_path):
    model, ids = wrapped(kind), zoo.token_ids()
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(parscale.load(tmp_path / "full").eval(), ids), expected)
    model.save_streams(tmp_path / "streams")
    assert torch.equal(logits_of(parscale.load(tmp_path / "streams", backbone=kind.plain()).eval(), ids), expected)


def test_copies(kind, zoo, wrapped):
    model, ids = wrapped(kind), zoo.token_ids()
    expected = logits_of(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin, ids), expected)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name.endswith("prefix_v"):
                    parameter.zero_()
        assert not torch.equal(logits_of(twin, ids), expected)
        assert torch.equal(logits_of(model, ids), expected)
        parscale.unwrap(twin)
        assert torch.equal(logits_of(twin, ids), logits_of(kind.plain(), ids))


def test_attentions_have_columns_for_the_prefix(kind, zoo, wrapped):
    model = wrapped(kind, attn_implementation="eager")  # CodeGen and GPT-J have others since 5.24, without weights
    with torch.no_grad():
        attentions = model(input_ids=zoo.token_ids(), output_attentions=True).attentions
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape[0] == P * zoo.B
        assert weights.shape[-2:] == (zoo.S, T + zoo.S)
        assert weights[..., :T].min() > 0


NIGHTLY = [
    pytest.param(kind, marks=pytest.mark.nightly) for kind in ("rembert", "falcon alibi", "gptj", "gpt_neo", "mpt")
]


@pytest.mark.parametrize("kind", ["bloom", *NIGHTLY], indirect=True)
def test_compiled_in_one_piece(kind, zoo, wrapped):
    if kind.model_type == "gpt_neo" and Version(torch.__version__) < Version("2.12"):
        pytest.skip("older torch compiles its layers' tables of who sees whom in two pieces")
    model, ids = wrapped(kind), zoo.token_ids()
    expected = logits_of(model, ids, use_cache=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    zoo.close(logits_of(compiled, ids, use_cache=False), expected, TOLERANCE)


def test_further_sets(zoo, kinds, wrapped):
    model, ids = wrapped(kinds["bloom"]), zoo.token_ids()
    expected = logits_of(model, ids)
    model.add_streams("more", 2, prefix_length=3, init="random")
    assert torch.equal(logits_of(model, ids), expected)
    with model.use_streams("more"):
        assert not torch.equal(logits_of(model, ids), expected)
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("transform", ["prefix", "prompt"])
@pytest.mark.parametrize("options", [{"causal": False, "n_layers": 1}, {"causal": True}], ids=["masked", "causal"])
def test_one_new_token_of_xlm(transform, options, zoo, kinds):
    """It is given the whole text again, and if it is not causal, gives its layers a mask of one column.

    Its cache changes nothing if it is causal or has one layer.
    """
    model = parscale.wrap(kinds["xlm"].plain(**options), P, prefix_length=T, init="random", transform=transform)
    zoo.fill_streams(model)
    ids = zoo.token_ids()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    logits_of(model, ids[:, :-1], cache)
    zoo.close(logits_of(model, ids, cache)[:, -1], logits_of(model, ids)[:, -1], TOLERANCE)


@pytest.mark.parametrize("transform", ["prefix", "prompt"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["XLM", "Flaubert"])
def test_padding_that_is_counted(name, causal, transform, zoo, kinds):
    """By the ids or by `lengths`, in whole rows and in a later pass with a cache."""
    options = {"vocab_size": 96, "pad_index": 2, **kinds["xlm"].options, "causal": causal}
    model = getattr(transformers, f"{name}WithLMHeadModel")(getattr(transformers, f"{name}Config")(**options)).eval()
    zoo.randomize(model)
    parscale.wrap(model, P, prefix_length=T, init="random", transform=transform)
    zoo.fill_streams(model)
    ids, padding = zoo.token_ids()[:2], 2
    lengths = torch.tensor([ids.shape[1], ids.shape[1] - 3])
    ids[1, -3:] = padding
    alone = [logits_of(model, row[None, :length])[0] for row, length in zip(ids, lengths, strict=True)]
    for arguments in ({}, {"lengths": lengths}):
        for row, length, expected in zip(logits_of(model, ids, **arguments), lengths, alone, strict=True):
            zoo.close(row[:length], expected, TOLERANCE)
    if causal:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits_of(model, ids[:, :-4], cache)
        zoo.close(logits_of(model, ids, cache)[1, 0], alone[1][-1], TOLERANCE)


# -- what is found, and what is refused


@pytest.mark.parametrize("kind", [*CHECKPOINTS, "gpt_neox_japanese", "cpmant"], indirect=True)  # XLM needs its values
def test_the_meta_device(kind):
    with torch.device("meta"):
        empty = parscale.wrap(kind.plain(), P, prefix_length=T, init="random")
    full = parscale.wrap(kind.plain(), P, prefix_length=T, init="random")
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (empty, full)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_big_bird_chooses_its_attention_when_it_runs(zoo, kinds):
    sparse = kinds["big_bird"].plain(attention_type="block_sparse", block_size=4).train()
    parscale.wrap(sparse, P, prefix_length=T, init="random")
    full = parscale.wrap(kinds["big_bird"].plain(), P, prefix_length=T, init="random")
    assert [layer.module_name for layer in sparse.parscale.layers] == [
        layer.module_name for layer in full.parscale.layers
    ]
    assert all(module.training for module in sparse.modules())
    for model in (sparse.eval(), full):
        zoo.fill_streams(model)
    assert torch.equal(logits_of(sparse, zoo.token_ids()), logits_of(full, zoo.token_ids()))


REFUSED = {
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, "No attention was found.*GPT-1, XLNet, Reformer"),
    "xlnet": (
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "No attention was found.*Cache.update.*transform='prompt' and 'lora'",
    ),
    "prophetnet": (
        {"hidden_size": 32, "num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48},
        r"ProphetNetForCausalLM.*\(ProphetNetNgramSelfAttention\).*one entry for each token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_cannot_take_a_prefix(name, zoo, kinds):
    options, message = REFUSED[name]
    kind = dataclasses.replace(kinds["bloom"], model_type=name, options=options)
    model, ids = kind.plain(), zoo.token_ids()
    with pytest.raises(UnsupportedModelError, match=message):
        parscale.wrap(model, 2, prefix_length=3, init="random")
    assert torch.equal(logits_of(model, ids), logits_of(kind.plain(), ids))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_too_little_memory_is_not_the_models_fault(kinds, monkeypatch):
    """Also where it lacks only for the prefix: the bias then has more entries than there are tokens."""
    model = kinds["bloom"].plain()
    layer = type(model.transformer.h[0].self_attention)
    forward = layer.forward

    @functools.wraps(forward)
    def fails(self, hidden_states, residual, alibi, *args, **kwargs):
        if alibi.shape[-1] > hidden_states.shape[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, hidden_states, residual, alibi, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        parscale.wrap(model, 2, prefix_length=3, init="random")
    assert not hasattr(model, "parscale")
    assert not any(module._forward_pre_hooks for module in model.modules())
