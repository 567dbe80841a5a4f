"""Training, compiling and exporting models whose streams share keys and values."""

import pytest
import torch
from model_calls import given
from torch import nn
from torch._dynamo.utils import counters
from torch.export import Dim
from transformers import CompileConfig, StaticCache

import parscale

SAME = 2e-6  # as in test_gradients.py
TOLERANCE = 2e-5
NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("mistral", "mixtral")]
NAMES = ["llama", "gemma2", "gpt2", "deepseek_v3", *NIGHTLY]  # whose losses have no kinks
PADDING = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def make(zoo, name, attention=None, **changes):
    family = zoo.FAMILIES[name]
    return zoo.share(zoo.Case(family, attention or family.attention[-1]).plain(**changes))


def new_tensors(model):
    return {n: p for n, p in model.named_parameters() if "prefix_" in n or "aggregate_layer" in n}


def gradients(model, ids, **arguments):
    """Padding predicts nothing: what stands there has nothing to attend to."""
    model.zero_grad()
    labels = ids
    if "attention_mask" in arguments:
        labels = torch.cat([ids[:, :1], ids[:, 1:].where(arguments["attention_mask"][:, :-1].bool(), -100)], dim=1)
    model(input_ids=ids, labels=labels, **arguments).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, zoo, tolerance=SAME):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        zoo.close(actual[name], gradient, tolerance * max(1.0, gradient.abs().max().item()))


def loss_of(model, ids, **arguments):
    logits = model(input_ids=ids, **arguments).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.grid
@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(name, padded, zoo):
    """Directional derivatives against central differences; noise and steps as in test_gradients.py.

    The loss bends more along all parameters of the backbone at once: a smaller step, and the noise with it.
    """
    family = zoo.FAMILIES[name]
    if padded and family.attention == ("eager",):
        pytest.skip("its softmax makes NaN of what attends to nothing, in a plain float64 model too")
    model, ids = make(zoo, name, dtype=torch.float64, **family.all_experts), zoo.token_ids()
    arguments = {"attention_mask": PADDING} if padded else {}
    loss_of(model, ids, **arguments).backward()
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for parameter_name, tensor in model.named_parameters():
        group = parameter_name.rsplit(".", 1)[1] if "prefix" in parameter_name else "backbone"
        groups.setdefault("aggregator" if "aggregate" in parameter_name else group, []).append(tensor)
    assert groups.keys() == {"prefix_k", "prefix_v", "aggregator", "backbone"}
    for group_name, group in groups.items():
        step = 1e-3 if group_name == "backbone" else 4e-3
        noise = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in group]
        lengths = [torch.cat([x.flatten() for x in xs]).norm() for xs in ([t.grad for t in group], noise)]
        along = [(t.grad / lengths[0] + n / lengths[1]) / 2**0.5 for t, n in zip(group, noise, strict=True)]
        start = [tensor.detach().clone() for tensor in group]
        values = {}
        with torch.no_grad():
            for factor in (-2, -1, 1, 2):
                for tensor, begin, direction in zip(group, start, along, strict=True):
                    tensor.copy_(begin + factor * step * direction)
                values[factor] = loss_of(model, ids, **arguments).item()
            for tensor, begin in zip(group, start, strict=True):
                tensor.copy_(begin)
        numeric = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
        exact = sum((t.grad * d).sum().item() for t, d in zip(group, along, strict=True))
        assert numeric == pytest.approx(exact, abs=2e-4, rel=1e-4)


def test_gradients_are_the_same_by_every_implementation(zoo):
    """Flash attention's merged parts, and one softmax over joined keys."""
    ids = zoo.token_ids()
    for arguments in ({}, {"attention_mask": PADDING}):
        expected = gradients(make(zoo, "llama", "eager"), ids, **arguments)
        found = gradients(make(zoo, "llama", "sdpa"), ids, **arguments)
        assert_same(found, expected, zoo, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, zoo):
    model, ids = make(zoo, "llama").train(), zoo.token_ids()
    model.freeze_backbone()
    expected = gradients(model, ids)
    assert expected.keys() == new_tensors(model).keys()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, ids), expected, zoo)


def test_a_frozen_backbone_lets_the_streams_learn(zoo):
    model, ids = make(zoo, "llama").train(), zoo.token_ids()
    model.freeze_backbone()
    optimizer = torch.optim.Adam(new_tensors(model).values(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


# -- compiled and exported


@pytest.fixture
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.nightly  # by day the next two
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prefill_and_decoding_are_one_graph_each(name, zoo):
    model, ids = make(zoo, name), zoo.token_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    @torch.no_grad()
    def along(run):
        cache = StaticCache(config=model.config, max_cache_len=16)
        pieces = ids.split([4] + [1] * 5, dim=1)
        logits = torch.cat([run(input_ids=x, logits_to_keep=4, **given(model, cache)).logits for x in pieces], 1)
        assert all(layer.keys.shape[0] == zoo.B for layer in cache.layers)
        return logits

    zoo.close(along(compiled), along(model), TOLERANCE)
    assert 0 < counters["stats"]["unique_graphs"] <= 3  # prompt, first token, and a length that became dynamic


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.nightly)])
def test_a_compiled_training_pass_is_one_graph(name, zoo):
    model, ids = make(zoo, name), zoo.token_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, ids, use_cache=False)
    model.zero_grad()
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, expected, zoo, 1e-5)


@pytest.mark.usefixtures("_fresh")
def test_generate_compiles_its_decoding(zoo):
    model, ids = make(zoo, "llama"), zoo.token_ids() * PADDING
    arguments = {"attention_mask": PADDING, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    arguments |= {"eos_token_id": None, "cache_implementation": "static"}
    expected = model.generate(ids, **arguments)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    assert torch.equal(model.generate(ids, **arguments, compile_config=config), expected)
    assert counters["stats"]["unique_graphs"] > 0
    output = model.generate(ids, **arguments, compile_config=config, adaptive=2.0)  # which runs without
    assert torch.equal(output, model.generate(ids, **arguments, adaptive=2.0))


@pytest.mark.nightly  # by day with own keys, in tests/parscale/export
@pytest.mark.parametrize("transform", [{"prefix_length": 4}, {"transform": "lora", "rank": 2}])
def test_export_with_any_length(zoo, transform):
    model = parscale.wrap(
        zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain(), 3, init="random", seed=0, kv="shared", **transform
    )
    sizes = {0: Dim("rows", min=2, max=16), 1: Dim("tokens", min=2, max=32)}

    def arguments(rows, tokens):
        ids = zoo.token_ids(rows, tokens)
        mask = torch.ones_like(ids)
        mask[0, :1] = 0
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), arguments(3, 9), dynamic_shapes=shapes).module()
        for rows, tokens in ((3, 9), (5, 17)):
            given = arguments(rows, tokens)
            seen = given["attention_mask"].bool()
            zoo.close(program(**given).logits[seen], model(**given).logits[seen], TOLERANCE)
