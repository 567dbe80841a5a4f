"""What streams add to the plain backbone's own work on P*B rows, in counts: operators, calls, bytes, strides.

Times depend on the machine. These numbers do not, nor on the versions of torch and transformers, and each bound is what
the method needs: an operator or a call of Python that comes back in a layer counts once for each of the layers.
"""

import functools
import math
import sys
from collections import Counter

import pytest
import torch
import transformers
from model_calls import given
from torch.profiler import ProfilerActivity, profile

import parscale

P, S, LAYERS = 4, 16, 3
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HIDDEN = 4 * P * S * SHAPE["hidden_size"]  # bytes of all streams' hidden states in float32
PREFIX = 5
# Without `reshape`, by which torch 2.9 flattens, and later versions do not.
VIEWS = ("view", "flatten", "unflatten", "transpose", "permute", "slice", "expand", "squeeze", "unsqueeze")


@pytest.fixture
def models():
    """The plain backbone, and the same with streams."""
    config = transformers.Qwen2Config(**SHAPE, attn_implementation="sdpa")
    torch.manual_seed(0)
    plain, wrapped = (transformers.Qwen2ForCausalLM(config).eval() for _ in range(2))
    return plain, parscale.wrap(wrapped, P, prefix_length=PREFIX, seed=0)


@pytest.fixture
def sharing(models):
    """The plain backbone, and the same with streams that share keys."""
    config = transformers.Qwen2Config(**SHAPE, attn_implementation="sdpa")
    shared = transformers.Qwen2ForCausalLM(config).eval()
    return models[0], parscale.wrap(shared, P, prefix_length=PREFIX, seed=0, kv="shared")


def run(model, ids, cache=None):
    """Logits of B rows: by streams, or by the plain backbone on P*B rows."""
    if hasattr(model, "num_streams"):
        return model(ids, use_cache=cache is not None, **given(model, cache)).logits
    rows = torch.cat([ids] * P)  # copied as ours are: what `repeat` is made of differs between versions of torch
    hidden = model.model(rows, use_cache=cache is not None, **given(model.model, cache))[0]
    return model.lm_head(hidden[: ids.shape[0]])


def decoding(model):
    """A step of one token."""
    ids, cache = torch.arange(S)[None], transformers.DynamicCache()
    with torch.no_grad():
        run(model, ids, cache)

    @torch.no_grad()
    def step():
        run(model, ids[:, :1], cache)

    step()
    return step


def prefill(model):
    """A prompt, into an empty cache."""

    @torch.no_grad()
    def step():
        run(model, torch.arange(S)[None], transformers.DynamicCache())

    step()
    return step


def training(model):
    """Forward and backward pass."""

    def step():
        model.train().zero_grad()
        run(model, torch.arange(S)[None]).sum().backward()

    step()
    return step


def operators(step):
    """How often each operator runs, and the bytes that the step takes, however often it gives them back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    counts = {event.key.removeprefix("aten::"): event.count for event in found.key_averages()}
    taken = sum(max(0, event.self_cpu_memory_usage) for event in found.events())
    return counts, taken


def copied(step):
    """The bytes that copies write in a step, in float32."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    return sum(4 * math.prod(event.input_shapes[0]) for event in found.events() if event.key == "aten::copy_")


def calls(step):
    """How often each Python function is called in one step, but for transformers' helpers, which vary by version."""
    counts = Counter()

    def note(frame, event, argument):
        if event == "call" and "transformers/utils/" not in frame.f_code.co_filename:
            counts[frame.f_code] += 1

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return counts


def added(make, models):
    """What operators streams add to a step, and to its bytes."""
    (plain, plain_bytes), (streams, taken) = (operators(make(model)) for model in models)
    return {name: streams.get(name, 0) - plain.get(name, 0) for name in {*plain, *streams}}, taken - plain_bytes


def test_operators_of_a_decoded_token(models):
    found, _ = added(decoding, models)
    # two products with the cache and two with the prefix, a softmax over both; and the mixture
    assert found["bmm"] == 4 * LAYERS + 1
    assert found["_softmax"] == LAYERS + 1
    assert found["cat"] <= LAYERS  # of scores: keys and values are read where they lie
    assert found["mul"] <= LAYERS + 1
    assert found["add"] <= LAYERS + 1  # of the two outputs
    assert found["copy_"] <= LAYERS + 5  # the joined scores; around the layers, such as the aggregator's input
    assert found["clone"] <= 1
    assert sum(found.get(name, 0) for name in VIEWS) <= 8 * LAYERS + 20


def test_operators_of_a_decoded_token_with_shared_keys(sharing):
    found, _ = added(decoding, sharing)
    assert found["_scaled_dot_product_flash_attention_for_cpu"] == LAYERS  # over the prefixes, beside the cache
    assert found["lerp_"] == found["sigmoid"] == found["sub"] == LAYERS  # the merge
    assert found["bmm"] == found["_softmax"] == found["mul"] == 1  # the mixture
    assert found.get("cat", 0) <= 0
    assert found["add"] <= 1  # around the layers
    assert found["copy_"] <= 2 * LAYERS + 5  # queries and outputs, from streams to key heads and back
    assert found.get("constant_pad_nd", 0) == 0
    assert sum(found.get(name, 0) for name in VIEWS) <= 21 * LAYERS + 26
    assert found.get("repeat", 0) == 0  # rows of keys are not copied for the streams


def test_bytes_of_a_decoded_token_do_not_grow_with_the_cache_but_for_its_scores(models):
    _, few = added(decoding, models)
    many = added(lambda model: longer(model, 200), models)[1]
    scores = 4 * P * SHAPE["num_attention_heads"] * 200  # bytes in float32
    assert many - few <= 3 * LAYERS * scores  # of the cache, joined to the prefix's, and their softmax


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_a_mask_copies_no_cache_on_a_gpu_that_runs_no_kernel(kv, monkeypatch):
    """Only the kernel leaves out what a mask hides at the end; the reference would copy the cache for it."""
    config = transformers.Qwen2Config(**SHAPE, attn_implementation="sdpa")
    model = transformers.Qwen2ForCausalLM(config).eval()
    parscale.wrap(model, P, prefix_length=PREFIX, kv=kv, kernels="reference")
    tokens = 200
    ids, padding = torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens + 1, dtype=torch.long)
    padding[0, 0] = 0
    found = []
    for is_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
        with torch.no_grad():
            cache = model(ids, attention_mask=padding[:, :tokens], use_cache=True).past_key_values
            step = functools.partial(model, ids[:, :1], attention_mask=padding, past_key_values=cache)
            found.append(operators(step)[1])
    one_layer = sum(x.nbytes for x in (cache.layers[0].keys, cache.layers[0].values))
    assert found[1] - found[0] < one_layer


def longer(model, tokens):
    """A step of one token after `tokens` more."""
    ids, cache = torch.zeros(1, S + tokens, dtype=torch.long), transformers.DynamicCache()
    with torch.no_grad():
        run(model, ids, cache)

    @torch.no_grad()
    def step():
        run(model, ids[:, :1], cache)

    step()
    return step


def test_python_calls_of_a_decoded_token(models):
    """Calls that streams save do not count: those of transformers' function for `sdpa` vary by version."""
    one_more = {"num_hidden_layers": LAYERS + 1}
    config = transformers.Qwen2Config(**SHAPE | one_more, attn_implementation="sdpa")
    plain, streams = (calls(decoding(model)) for model in models)
    deeper = transformers.Qwen2ForCausalLM(config).eval()
    deeper_plain = calls(decoding(deeper))
    deeper_streams = calls(decoding(parscale.wrap(deeper, P, prefix_length=PREFIX, seed=0)))
    added = (streams - plain).total()  # of counters: what is less than zero is left out
    each = (deeper_streams - deeper_plain).total() - added
    assert each <= 35, f"{each} calls in each layer"
    assert added - LAYERS * each <= 199, f"{added - LAYERS * each} calls around the layers"


def test_operators_of_a_prefill(models):
    found, _ = added(prefill, models)
    assert found["_scaled_dot_product_flash_attention_for_cpu"] == LAYERS  # over the prefixes, beside the tokens
    assert found["lerp_"] == found["sigmoid"] == found["sub"] == LAYERS  # the merge
    assert found["bmm"] == found["_softmax"] == found["mul"] == found["add"] == 1  # the mixture
    assert found["addmm"] == 2  # the aggregator's two layers
    assert found.get("cat", 0) <= 0
    assert found["copy_"] <= 5  # around the layers, as the next: none in any
    assert found["clone"] <= 1
    assert sum(found.get(name, 0) for name in VIEWS) <= 29 * LAYERS + 25
    assert found.get("repeat", 0) == 0


def test_operators_of_a_prefill_with_shared_keys(sharing):
    found, _ = added(prefill, sharing)
    assert found["_scaled_dot_product_flash_attention_for_cpu"] == LAYERS
    assert found["lerp"] == found["sigmoid"] == found["sub"] == LAYERS
    assert found["bmm"] == found["_softmax"] == found["mul"] == found["add"] == 1
    assert found["addmm"] == 2
    assert found["cat"] <= 3 * LAYERS  # queries, outputs and log-sums of stream 0 and of the others
    assert found["copy_"] <= 3 * LAYERS + 5  # of the same, from streams to key heads and back
    assert found["clone"] <= 3 * LAYERS + 1
    assert sum(found.get(name, 0) for name in VIEWS) <= 63 * LAYERS + 25
    assert found.get("repeat", 0) == 0


def around(times=1):
    """Bytes that the aggregator copies: its input, `times` over, and the biases of its two layers for each token."""
    return times * HIDDEN + 4 * S * (SHAPE["hidden_size"] + P) + 16  # and four numbers


def test_bytes_that_a_prefill_copies(models):
    """None that grow with the layers."""
    plain, streams = (copied(prefill(model)) for model in models)
    assert streams - plain <= around()


def test_bytes_that_a_prefill_copies_with_shared_keys(sharing):
    plain, streams = (copied(prefill(model)) for model in sharing)
    logsums = 4 * P * S * SHAPE["num_attention_heads"]
    assert streams - plain <= LAYERS * (2 * HIDDEN + logsums) + around()  # queries and outputs, to key heads and back


def test_bytes_that_a_training_step_copies(models):
    """In each layer the prefix's gradients and the log-sums; around them, the aggregator's input and its gradient."""
    plain, streams = (copied(training(model)) for model in models)
    prefixes = 2 * 4 * P * SHAPE["num_key_value_heads"] * PREFIX * 8
    logsums = 4 * P * S * SHAPE["num_attention_heads"]
    assert streams - plain <= LAYERS * (prefixes + logsums) + around(2)


def test_layout_of_gradients(models):
    """Every gradient of hidden states lies as the hidden states do: else each layer copies it, one after another."""
    _, model = models
    strides = []
    for layer in (model.model.norm, *model.model.layers):
        layer.register_full_backward_hook(lambda module, inner, outer: strides.append(outer[0].stride()))
    model.train()
    run(model, torch.arange(S)[None]).sum().backward()
    assert strides == [(S * SHAPE["hidden_size"], SHAPE["hidden_size"], 1)] * (LAYERS + 1)


def test_operators_of_a_training_step(models):
    found, _ = added(training, models)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    assert found[name] == found[f"{name}_backward"] == LAYERS  # of the prefixes
    assert found.get("lerp", 0) == 0  # in place
    assert found["clone"] <= 2 * LAYERS + 3
    assert found["bmm"] == 3
    assert found["mm"] == 4  # the aggregator's two layers: of their inputs and of their weights
