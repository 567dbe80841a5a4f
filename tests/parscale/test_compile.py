"""`torch.compile(fullgraph=True)` with a static cache: one graph, the same numbers, and no graph too many."""

import pytest
import torch
from model_calls import given
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import parscale

STEPS = 6
TOLERANCE = 2e-5  # float32 rounding of logits of size 1 to 5 through two layers
# dense, grouped queries, sliding windows, soft caps, learned positions, latent attention, fused projections
NAMES = ["gemma3"]
NIGHTLY = ["deepseek_v3", "llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2"]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make(zoo, name, **changes):
    family = zoo.FAMILIES[name]
    return zoo.Case(family, family.attention[-1]).wrapped(**changes)


def graphs():
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def along(run, model, ids, prompt=4, length=16):
    """Logits of a prompt and of one token after another, by `run`, into a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    pieces = ids.split([prompt] + [1] * (ids.shape[1] - prompt), dim=1)
    return torch.cat([run(input_ids=piece, **given(model, cache)).logits for piece in pieces], dim=1)


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)])
def test_prefill_and_decoding(name, zoo):
    """Each is one graph; further tokens make no other."""
    model, ids = make(zoo, name), zoo.token_ids()
    expected = along(model, model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    zoo.close(along(compiled, model, ids[:, :7]), expected[:, :7], TOLERANCE)
    made = graphs()
    assert 0 < made <= 3  # prompt, first token, and a length that became dynamic
    zoo.close(along(compiled, model, ids), expected, TOLERANCE)
    assert graphs() == made


def test_switching_sets_between_compiled_calls(zoo):
    """A set is a part of what was compiled: another one compiles anew, and the first is found again.

    What is captured decides that, so the graphs run as they are.
    """
    model, ids = make(zoo, "llama", num_hidden_layers=1), zoo.token_ids()[:, :5]  # a prompt and one token
    model.add_streams("other", 2, prefix_length=3, init="random")
    zoo.fill_streams(model, seed=9, name="other")
    compiled, expected = torch.compile(model, fullgraph=True, backend="eager"), {}
    for name in ("default", "other", None):
        model.set_streams(name)
        expected[name] = along(model, model, ids)
        zoo.close(along(compiled, model, ids), expected[name], TOLERANCE)
    assert not torch.allclose(expected["default"], expected["other"], atol=1e-2)
    made = graphs()
    for name in ("other", "default", None):
        model.set_streams(name)
        zoo.close(along(compiled, model, ids), expected[name], TOLERANCE)
    assert graphs() == made


@pytest.mark.nightly  # by day with shared keys, in hooks/test_shared_training.py
@pytest.mark.parametrize("name", ["gemma3", "llama", "gpt2"])
def test_generate_compiles_its_decoding(name, zoo):
    """As it does by itself on a GPU with a static cache, left padding included. Its beam search never compiles."""
    model, ids = make(zoo, name), zoo.token_ids()
    padding = torch.tensor([[1] * zoo.S, [0] * 3 + [1] * (zoo.S - 3)])
    arguments = {"attention_mask": padding, "max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    arguments |= {"eos_token_id": None, "cache_implementation": "static"}
    expected = model.generate(ids * padding, **arguments)
    assert graphs() == 0
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    assert torch.equal(model.generate(ids * padding, **arguments, compile_config=config), expected)
    assert 0 < graphs() <= 2


def test_streams_on_chosen_tokens(zoo):
    """Their two passes can be compiled, but not the hooks around them."""
    plain, ids = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain, zoo.token_ids(rows=1, length=4)
    model, other = (zoo.share(plain(num_hidden_layers=1), 2) for _ in range(2))
    options = {"adaptive": 1.0, "max_new_tokens": 1, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    assert model.last_mean_streams == 2  # or the second pass would not be compiled
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled: call .* not compiled, .* model.forward = torch.compile"):
        model.generate(ids, **options)
    other.forward = torch.compile(other.forward, backend="eager")
    assert torch.equal(other.generate(ids, **options), expected)
    assert graphs() > 0


@pytest.mark.slow
@pytest.mark.nightly  # it compiles C++
def test_by_inductor(zoo):
    """Torch's own backend, with code made for this machine."""
    model, ids = make(zoo, "llama"), zoo.token_ids()
    expected = along(model, model, ids)
    zoo.close(along(torch.compile(model, fullgraph=True), model, ids), expected, TOLERANCE)


def test_what_was_compiled_before_wrapping(zoo):
    """Hooks and attention that came later are seen."""
    family = zoo.FAMILIES["llama"]
    plain, ids = zoo.Case(family, "sdpa").plain(), zoo.token_ids()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = compiled(input_ids=ids).logits
        model = parscale.wrap(plain, zoo.P, prefix_length=zoo.T)
        zoo.fill_streams(model)
        after = compiled(input_ids=ids).logits
        zoo.close(after, model(input_ids=ids).logits, TOLERANCE)
        assert not torch.allclose(before, after, atol=1e-2)
        parscale.unwrap(model)
        assert torch.equal(compiled(input_ids=ids).logits, before)
