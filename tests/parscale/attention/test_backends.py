"""Attention implementations: against attention in float64 by hand, switched after wrapping, and of the user's own."""

import importlib

import pytest
import torch
import transformers
from model_calls import logits_of
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import parscale
from parscale.attention.registered import prefix_attention

HEADS, GROUPS, SIZE = 4, 2, 8  # of the zoo's Llama
TOLERANCE = 2e-5  # float32 rounding of logits of size 1 to 5 through two layers


@pytest.fixture
def llama(zoo):
    return zoo.Case(zoo.FAMILIES["llama"], "sdpa")


# -- one layer's attention


def draw(zoo, S, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = zoo.P * zoo.B
    sizes = ((rows, HEADS, S, SIZE), (rows, GROUPS, K, SIZE), (rows, GROUPS, K, SIZE))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


@torch.no_grad()
def attend(model, query, key, value, mask, **kwargs):
    """What the first layer's attention function gives, `(R, heads, S, D)`."""
    state, layer, name = model.parscale, model.parscale.layers[0].module, model.config._attn_implementation
    state.call.in_flight = state.active
    try:
        output, _ = prefix_attention(name, layer, query, key, value, mask, scaling=0.4, **kwargs)
    finally:
        state.call.in_flight = None
    return output.transpose(1, 2)


@torch.no_grad()
def by_hand(model, query, key, value, visible=None, bias=0.0):
    """One softmax in float64 over prefix and keys; `visible` broadcasts to `(R, heads, S, K)`."""
    layer = model.parscale.layers[0].module
    rows = query.shape[0] // layer.prefix_k.shape[0]
    keys, values = (
        torch.cat([prefix.repeat_interleave(rows, dim=0), states], dim=2).repeat_interleave(HEADS // GROUPS, dim=1)
        for prefix, states in ((layer.prefix_k, key), (layer.prefix_v, value))
    )
    scores = torch.einsum("rhsd,rhkd->rhsk", query, keys) * 0.4
    T = layer.prefix_k.shape[2]
    scores[..., T:] += bias
    if visible is not None:
        visible = visible.expand(query.shape[0], HEADS, query.shape[2], key.shape[2])
        scores[..., T:].masked_fill_(~visible, -torch.inf)
    return torch.einsum("rhsk,rhkd->rhsd", scores.softmax(-1), values)


def some_keys(zoo, S, K, rows, heads):
    """A random pattern `(rows, heads, S, K)`; one query sees no key at all, only the prefix."""
    visible = torch.rand(rows, heads, S, K, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[-1, -1, 0] = False
    return visible


@pytest.mark.grid
@pytest.mark.parametrize("heads", [1, HEADS], ids=["shared by heads", "per head"])
@pytest.mark.parametrize("one_row", [False, True], ids=["each row its own", "one row"])
@pytest.mark.parametrize(("S", "K"), [(9, 9), (3, 9), (1, 9)])
@pytest.mark.parametrize(
    ("name", "form"),  # the backbones' eager functions add their mask, so take no booleans
    [(name, form) for name in ("eager", "sdpa") for form in ("additive -inf", "additive smallest")]
    + [("sdpa", "boolean")],
)
def test_masks_of_every_shape(name, form, S, K, one_row, heads, llama, zoo):
    model = llama.wrapped(dtype=torch.float64)
    model.set_attn_implementation(name)
    inputs = draw(zoo, S, K)
    visible = some_keys(zoo, S, K, 1 if one_row else zoo.P * zoo.B, heads)
    mask = visible
    if form != "boolean":
        least = -torch.inf if "inf" in form else torch.finfo(torch.float64).min
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, least)
    # Llama's eager function takes its softmax in float32
    zoo.close(attend(model, *inputs, mask), by_hand(model, *inputs, visible), 1e-6 if name == "eager" else 1e-12)


@pytest.mark.parametrize(
    ("S", "K", "causal"),
    [(9, 9, None), (9, 14, None), (2, 9, None), (1, 9, None), (9, 9, True), (9, 9, False)],
    ids=["causal", "static cache", "static cache, two tokens", "decoding", "said to be causal", "not causal"],
)
def test_without_a_mask(S, K, causal, llama, zoo):
    """`sdpa` alone may be given none: it then means the first S keys, or all of them for one token."""
    model, inputs = llama.wrapped(dtype=torch.float64), draw(zoo, S, K)
    visible = torch.ones(S, K, dtype=torch.bool)
    if S > 1 and causal is not False:
        visible = visible.tril()
    kwargs = {} if causal is None else {"is_causal": causal}
    zoo.close(attend(model, *inputs, None, **kwargs), by_hand(model, *inputs, visible), 1e-12)


@pytest.mark.parametrize("whose", ["tokens", "tokens and prefix"])
@pytest.mark.parametrize("S", [9, 3, 1])
@pytest.mark.parametrize("name", ["eager", "sdpa", "sdpa without a mask"])
def test_large_biases_of_keys(name, S, whose, llama, zoo):
    """As Qwen2's: scores of size 100 in float32, far apart or nearly alike, against float64 on the same numbers."""
    model, exact = llama.wrapped(), llama.wrapped(dtype=torch.float64)
    name, _, unmasked = name.partition(" ")
    model.set_attn_implementation(name)
    inputs = [x.float() for x in draw(zoo, S, 9 if not unmasked or S == 1 else S)]
    bias = 20 * torch.randn(1, GROUPS, 1, SIZE, generator=torch.Generator().manual_seed(3))
    inputs[1] += bias
    with torch.no_grad():
        if whose != "tokens":
            model.parscale.layers[0].module.prefix_k.add_(bias)
        prefix = model.parscale.layers[0].module.prefix_k
        exact.parscale.layers[0].module.prefix_k.copy_(prefix)
    K = inputs[1].shape[2]
    visible = torch.ones(S, K, dtype=torch.bool).tril(K - S)
    mask = None if unmasked else torch.zeros(1, 1, S, K).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = by_hand(exact, *(x.double() for x in inputs), visible)
    # a score has D products and sums and a factor, each off by 2**-24 of their sizes at most; a weight by as much,
    # relatively, for itself and for what it is divided by; and a weighted sum of T + K values is rounded too
    sizes = 0.4 * inputs[0].norm(dim=-1).max() * max(inputs[1].norm(dim=-1).max(), prefix.norm(dim=-1).max())
    largest = max(inputs[2].abs().max(), model.parscale.layers[0].module.prefix_v.abs().max())
    tolerance = (2 * (SIZE + 1) * sizes + zoo.T + K) * 2**-24 * largest
    zoo.close(attend(model, *inputs, mask), expected, tolerance.item())


@pytest.mark.parametrize(
    ("S", "K", "given"),
    [(9, 9, "mask"), (3, 9, "mask"), (1, 9, "mask"), (9, 9, "no mask"), (9, 12, "no mask"), (1, 9, "no mask")],
)
def test_a_bias_by_position_leaves_the_prefix_alone(S, K, given, llama, zoo):
    """A relative position bias is one of pairs of tokens; the prefix has no position."""
    model, inputs = llama.wrapped(dtype=torch.float64), draw(zoo, S, K)
    bias = torch.randn(zoo.P * zoo.B, HEADS, S, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if given == "mask":
        visible = some_keys(zoo, S, K, zoo.P * zoo.B, 1)
        mask = visible
    else:
        visible, mask = torch.ones(S, K, dtype=torch.bool), None
        visible = visible.tril() if S > 1 else visible
    zoo.close(attend(model, *inputs, mask, position_bias=bias), by_hand(model, *inputs, visible, bias), 1e-12)


@pytest.mark.parametrize("S", [1, 4])
def test_dropout_in_training_is_torchs_own(S, llama, zoo):
    """One token takes a path of its own, but not with dropout: every weight dropped leaves nothing."""
    model, inputs = llama.wrapped(dtype=torch.float64), draw(zoo, S, 9)
    mask = torch.ones(1, 1, S, 9, dtype=torch.bool)
    assert attend(model, *inputs, mask, dropout=1.0).eq(0).all()
    torch.manual_seed(0)
    some = attend(model, *inputs, mask, dropout=0.5)
    assert (some - by_hand(model, *inputs)).abs().max() > 0.1


# -- documents packed in several rows


@pytest.mark.grid
@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_packed_documents_in_several_rows(family, name, zoo):
    model, ids = zoo.Case(zoo.FAMILIES[family], name).wrapped(), zoo.token_ids()
    lengths = [[4, 2, 3], [1, 8]]  # of the documents in each row
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = logits_of(model, ids, position_ids=positions, use_cache=False)
    for b, row in enumerate(lengths):
        alone = torch.cat([logits_of(model, piece) for piece in ids[b : b + 1].split(row, dim=1)], dim=1)
        zoo.close(logits[b : b + 1], alone, TOLERANCE)


# -- switching


def test_switching_the_implementation_keeps_the_prefix(llama, zoo):
    model, ids = llama.wrapped(), zoo.token_ids()
    expected = llama.reference(model).logits(ids)
    for name in ("eager", "sdpa", "eager", {"": "sdpa"}):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == (name if isinstance(name, str) else "sdpa")
        zoo.close(logits_of(model, ids), expected, TOLERANCE)
    parscale.unwrap(model)
    assert torch.equal(logits_of(model, ids), logits_of(llama.plain(), ids))


def test_unknown_names_get_the_backbones_error(llama, zoo):
    model, plain = llama.wrapped(), llama.plain()
    with pytest.raises((ValueError, ImportError)) as theirs:
        plain.set_attn_implementation("no_such_thing")
    with pytest.raises(type(theirs.value)) as ours:
        model.set_attn_implementation("no_such_thing")
    assert str(ours.value) == str(theirs.value)
    zoo.close(logits_of(model, zoo.token_ids()), llama.reference(model).logits(zoo.token_ids()), TOLERANCE)


def test_attention_weights_are_the_eager_functions(llama, zoo):
    """Asked for in the configuration: `eager` gives them with the prefix's columns, `sdpa` refuses as ever."""
    model, plain, ids = llama.wrapped(), llama.plain(), zoo.token_ids()
    for each in (model, plain):
        with pytest.raises(ValueError, match="eager"):
            each.config.output_attentions = True
        each.set_attn_implementation("eager")
        each.config.output_attentions = True
    with torch.no_grad():
        weights = model(ids).attentions
    assert [w.shape for w in weights] == [(zoo.P * zoo.B, HEADS, zoo.S, zoo.T + zoo.S)] * 2
    for w in weights:
        torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))
        assert w[..., zoo.T :].triu(1).eq(0).all()


# -- implementations of the user's own


def own_sdpa(module, query, key, value, attention_mask, **kwargs):
    own_sdpa.calls += 1
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def own_eager(module, query, key, value, attention_mask, scaling, **kwargs):
    """Grouped queries by broadcasting, an additive mask, no other arguments."""
    own_eager.calls += 1
    query = query.unflatten(1, (key.shape[1], -1))  # (R, G, n, S, D)
    scores = query @ key.unsqueeze(2).mT * scaling + attention_mask.unsqueeze(2)
    return (scores.softmax(-1) @ value.unsqueeze(2)).flatten(1, 2).transpose(1, 2), None


def own_without_masks(module, query, key, value, attention_mask, scaling, **kwargs):
    """As a serving engine's: never given a mask, causal to the lower right."""
    own_without_masks.calls += 1
    assert attention_mask is None
    S, K = query.shape[2], key.shape[2]
    visible = torch.ones(S, K, dtype=torch.bool).tril(K - S)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


OWN = {"own_sdpa": (own_sdpa, sdpa_mask), "own_eager": (own_eager, eager_mask), "own_plain": (own_without_masks, None)}


@pytest.fixture(params=OWN)
def own(request, monkeypatch):
    """An implementation registered under a name of its own, and its function, which counts its calls."""
    function, mask = OWN[request.param]
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    AttentionInterface.register(request.param, function)
    if mask is not None:
        AttentionMaskInterface.register(request.param, mask)
    function.calls = 0
    return request.param, function


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
def test_the_users_own_implementation_keeps_the_prefix(own, when, llama, zoo):
    name, function = own
    if when == "before wrapping":
        plain = llama.plain()
        plain.set_attn_implementation(name)
        model = parscale.wrap(plain, zoo.P, prefix_length=zoo.T, init="random")
        zoo.fill_streams(model)
    else:
        model = llama.wrapped()
        model.set_attn_implementation(name)
    ids, function.calls = zoo.token_ids(), 0
    expected = llama.reference(model).logits(ids)
    zoo.close(logits_of(model, ids), expected, TOLERANCE)
    cache = DynamicCache(config=model.config)
    pieces = [logits_of(model, piece, cache=cache) for piece in ids.split([4, 3, 1, 1], dim=1)]
    zoo.close(torch.cat(pieces, dim=1), expected, TOLERANCE)
    assert function.calls == 5 * model.config.num_hidden_layers
    with model.use_streams(None):
        zoo.close(logits_of(model, ids), logits_of(llama.plain(), ids), TOLERANCE)


# -- layers that ask for the implementation's name

SPARSE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 3,
}


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_sparse_choice_of_keys_stays(name, zoo, monkeypatch):
    """DeepSeek-V3.2 masks all but a few chosen keys, and only if it reads `"eager"` or `"sdpa"`."""
    family = zoo.Family("DeepseekV32", SPARSE)
    plain, model = (family.build(name) for _ in range(2))
    parscale.wrap(model, zoo.P, prefix_length=zoo.T, init="random")
    zoo.fill_streams(model)
    ids = zoo.token_ids()
    with model.use_streams(None):
        assert torch.equal(logits_of(model, ids, use_cache=False), logits_of(plain, ids, use_cache=False))
    logits = logits_of(model, ids, use_cache=False)

    # the reference: the plain model, whose own function is replaced by one with a prefix
    reference = zoo.Reference(family, plain, model)
    layers = [module for path, module in plain.named_modules() if path.endswith("self_attn")]
    module = importlib.import_module(type(layers[0]).__module__)

    def with_prefix(layer, query, key, value, mask, **kwargs):
        return zoo.reference_attention(layer, query, key, value, nn.functional.pad(mask, (zoo.T, 0)), **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", with_prefix)
    plain.set_attn_implementation("eager")
    hidden = []
    for p in range(zoo.P):
        for layer, (k, v) in zip(layers, reference.prefixes, strict=True):
            layer.reference_prefix = k[p].detach(), v[p].detach()
        with torch.no_grad():
            hidden.append(plain.get_decoder()(ids, use_cache=False)[0].double())
    mixed = sum(w[..., None] * h for w, h in zip(reference.weights(hidden).unbind(-1), hidden, strict=True))
    zoo.close(logits, reference.head(mixed), TOLERANCE)


# -- continuous batching


def test_continuous_batching_is_refused(llama, zoo):
    """Its paged attention packs all requests into one row: an error before anything is allocated."""
    model, requests = llama.wrapped(), zoo.token_ids().tolist()
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for start in (model.generate_batch, model.init_continuous_batching):
        arguments = (requests,) if start == model.generate_batch else ()
        with pytest.raises(ValueError, match="Continuous batching"):
            start(*arguments, generation_config=config)
    with model.use_streams(None), pytest.raises(ValueError, match=r"set_streams\(None\)"):
        model.init_continuous_batching(generation_config=config)  # its own thread would run the streams
    model.set_streams(None)
    assert not model.init_continuous_batching(generation_config=config).is_running()
    with model.use_streams("default"), pytest.raises(ValueError, match="Continuous batching"):
        model.init_continuous_batching(generation_config=config)


def test_streams_that_are_switched_on_later_are_refused(llama):
    """By an answer to the request: the manager of the plain backbone runs already, in a thread of its own."""
    model = llama.wrapped()
    model.set_streams(None)
    options = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32, use_async_batching=False)
    greedy = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=options)
    manager.start()
    try:
        served = manager.get_result(manager.add_request([5, 6, 7], max_new_tokens=3), timeout=60)
        assert served.error is None
        model.set_streams("default")
        result = manager.get_result(manager.add_request([5, 6, 7], max_new_tokens=3), timeout=60)
    finally:
        manager.stop(block=True, timeout=60)
    assert result.error.startswith("Continuous batching")


def test_paged_attention_is_refused(llama, zoo):
    """Also where a manager was made while the streams were off, or a paged implementation was set by hand."""
    model, inputs = llama.wrapped(dtype=torch.float64), draw(zoo, 1, 9)
    with pytest.raises(ValueError, match="Continuous batching"):
        attend(model, *inputs, None, cache=object())
    model.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match="Continuous batching"):
        logits_of(model, zoo.token_ids())


def test_names_in_the_registry_stay_as_they_were():
    """Only names of parscale's own are added to transformers' registry."""
    added = [name for name in ALL_ATTENTION_FUNCTIONS._global_mapping if name.startswith("parscale_")]
    assert added
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert "eager" not in ALL_ATTENTION_FUNCTIONS._global_mapping
    assert transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS is ALL_ATTENTION_FUNCTIONS
