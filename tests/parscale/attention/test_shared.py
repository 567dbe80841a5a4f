"""Streams that share stream 0's keys and values: what they compute, held against loops over an unwrapped model."""

import pytest
import torch
import transformers
from model_calls import logits_of
from torch import nn

import parscale

TOLERANCE = 2e-5  # as in test_families.py
FAMILIES = [  # those without layers that carry a state
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "olmo2", "gpt_neox"),
    *("gpt2", "opt", "mixtral", "deepseek_v3", "gpt_oss"),
]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def cases(zoo, name):
    family = zoo.FAMILIES[name]
    return [zoo.Case(family, attention) for attention in family.attention]


def attention_by_streams(module, query, key, value, mask, **kwargs):
    """Each stream by itself, in float64: its queries, its prefix if it is not the first, and the first stream's keys.

    Args:
        module: its `reference_prefix` is `(P - 1, G, T, D)`, keys and values.
        query: `(P*B, heads, S, D)`.
        key: `(P*B, G, S, D)`.
        value: `(P*B, G, S, Dv)`.
        mask: `(1 or B, 1, S, S)`, additive.
        kwargs: `scaling`, `softcap`, `s_aux`.
    """
    prefixes = module.reference_prefix
    B = query.shape[0] // (len(prefixes[0]) + 1)
    outputs = []
    for p, rows in enumerate(query.double().split(B)):
        keys, values, hidden = key[:B].double(), value[:B].double(), mask.double()
        if p > 0:
            own = [x[p - 1].double().expand(B, -1, -1, -1) for x in prefixes]
            own[1] = nn.functional.pad(own[1], (0, values.shape[-1] - own[1].shape[-1]))
            keys, values = torch.cat([own[0], keys], 2), torch.cat([own[1], values], 2)
            hidden = nn.functional.pad(hidden, (own[0].shape[2], 0))
        groups = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = torch.einsum("bhqd,bhkd->bhqk", rows, keys) * kwargs["scaling"]
        if kwargs.get("softcap") is not None:
            scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
        scores = scores + hidden
        sinks = kwargs.get("s_aux")
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(B, -1, scores.shape[2], 1)], -1)
        weights = scores.softmax(-1)[..., : keys.shape[2]]
        outputs.append(torch.einsum("bhqk,bhkd->bqhd", weights, values))
    return torch.cat(outputs).to(query.dtype), None


@torch.no_grad()
def reference(zoo, case, model, ids, positions=None, **mask):
    """The logits that `model` should give, by an unwrapped model that runs P*B rows; `mask` as `zoo.allowed`."""
    plain = case.plain()
    by_hand = zoo.Reference(case.family, plain, model)
    config, length, P = plain.config.get_text_config(), ids.shape[1], len(by_hand.prefixes[0][0]) + 1
    transformers.AttentionInterface.register("by_streams", attention_by_streams)
    layers = [module for module in plain.modules() if hasattr(module, "reference_prefix") or _attends(module)]
    for layer, prefix in zip(layers, by_hand.prefixes, strict=True):
        layer.reference_prefix = prefix
    plain.config._attn_implementation = "by_streams"

    def additive(window):
        seen = zoo.allowed(length, window, **mask)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    kinds = {case.family.window_of(config, i) for i in range(config.num_hidden_layers)}
    masks = additive(case.family.window)
    if len(kinds) > 1:
        masks = {"full_attention": additive(None), "sliding_attention": masks}
    positions = torch.arange(length).expand(ids.shape[0], -1) if positions is None else positions
    hidden = plain.get_decoder()(
        input_ids=ids.repeat(P, 1), attention_mask=masks, position_ids=positions.repeat(P, 1), use_cache=False
    )[0]
    streams = hidden.split(ids.shape[0])
    weights = by_hand.weights(streams)
    return by_hand.head(sum(w[..., None] * h.double() for w, h in zip(weights.unbind(-1), streams, strict=True)))


def _attends(module):
    return any(hasattr(module, x) for x in ("q_proj", "qkv_proj", "query_key_value", "c_attn", "q_a_proj"))


def test_logits(name, zoo):
    ids = zoo.token_ids()
    for case in cases(zoo, name):
        model = zoo.share(case.plain())
        zoo.close(logits_of(model, ids), reference(zoo, case, model, ids), TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_large_biases_of_keys(attention, zoo):
    """With and without a cache, whose one-token steps take a path of their own, and padded."""
    case, ids, padding = zoo.Case(zoo.BIASED, attention), zoo.token_ids(), torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    model = zoo.share(case.plain())
    expected = reference(zoo, case, model, ids)
    zoo.close(logits_of(model, ids), expected, zoo.BIASED_TOLERANCE)
    cache = transformers.DynamicCache(config=model.config)
    pieces = [logits_of(model, piece, cache=cache) for piece in ids.split([5, 3, 1], dim=1)]
    zoo.close(torch.cat(pieces, dim=1), expected, zoo.BIASED_TOLERANCE)
    behind = reference(zoo, case, model, ids, (padding.cumsum(-1) - 1).clamp(min=0), padding=padding)
    logits = logits_of(model, ids, attention_mask=padding)
    zoo.close(logits[padding.bool()], behind[padding.bool()], zoo.BIASED_TOLERANCE)


def test_left_padding(name, zoo):
    ids, padding = zoo.token_ids(), torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    for case in cases(zoo, name):
        model = zoo.share(case.plain())
        expected = reference(zoo, case, model, ids, positions, padding=padding)
        arguments = {"attention_mask": padding} if not case.family.learned_positions else {}
        for given in ({"attention_mask": padding, "position_ids": positions}, arguments):
            if given:
                zoo.close(logits_of(model, ids, **given)[padding.bool()], expected[padding.bool()], TOLERANCE)
                two_passes = logits_of(model, ids, logits_to_keep=2, **given)
                zoo.close(two_passes, expected[:, -2:], TOLERANCE)


def test_packed_documents(name, zoo):
    if not zoo.FAMILIES[name].packs:
        pytest.skip("this model does not keep documents apart")
    ids, positions = zoo.token_ids(), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(zoo.B, -1)
    document = torch.tensor([0] * 4 + [1] * 5)
    for case in cases(zoo, name)[-1:]:
        model = zoo.share(case.plain())
        found = logits_of(model, ids, position_ids=positions, use_cache=False)
        for number in (0, 1):  # each as if it stood alone
            alone = reference(zoo, case, model, ids[:, document == number])
            zoo.close(found[:, document == number], alone, TOLERANCE)


def test_own_masks(zoo):
    """Of four dimensions, as a caller may give them: some tokens see the future."""
    case = zoo.Case(zoo.FAMILIES["llama"], "sdpa")
    model, ids = zoo.share(case.plain()), zoo.token_ids()
    seen = torch.ones(zoo.S, zoo.S, dtype=torch.bool).tril()
    seen[:4, :4] = True
    seen = seen[None, None].expand(zoo.B, 1, -1, -1)
    expected = reference(zoo, case, model, ids, mask=seen)
    zoo.close(logits_of(model, ids, attention_mask=seen), expected, TOLERANCE)
    zoo.close(logits_of(model, ids, attention_mask=seen, logits_to_keep=3), expected[:, -3:], TOLERANCE)


def test_flex_attention(zoo):
    case = zoo.Case(zoo.FAMILIES["llama"], "sdpa")
    model, ids = zoo.share(case.plain()), zoo.token_ids()
    padding = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    expected = reference(zoo, case, model, ids, (padding.cumsum(-1) - 1).clamp(min=0), padding=padding)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        found = logits_of(model, ids, attention_mask=padding, use_cache=False)
    zoo.close(found[padding.bool()], expected[padding.bool()], TOLERANCE)


def test_embeddings_and_attention_weights(zoo):
    case = zoo.Case(zoo.FAMILIES["llama"], "eager")
    model, ids = zoo.share(case.plain()), zoo.token_ids()
    expected = reference(zoo, case, model, ids)
    embeddings = model.get_input_embeddings()(ids).detach()
    zoo.close(logits_of(model, None, inputs_embeds=embeddings), expected, TOLERANCE)
    zoo.close(logits_of(model, None, inputs_embeds=embeddings, logits_to_keep=1), expected[:, -1:], TOLERANCE)
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    assert all(x.shape == (zoo.P * zoo.B, 4, zoo.S, zoo.T + zoo.S) for x in weights)
    assert all((x[: zoo.B, ..., : zoo.T] == 0).all() for x in weights)  # stream 0 has no prefix
    for x in weights:
        zoo.close(x.sum(-1), torch.ones(x.shape[:-1]), 1e-6)


def test_one_stream_is_the_backbone(zoo):
    model, ids = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain(), zoo.token_ids()
    expected = logits_of(model, ids)
    parscale.wrap(model, 1, kv="shared")
    assert torch.equal(logits_of(model, ids), expected)
    assert not [name for name, _ in model.named_parameters() if "prefix" in name or "aggregate" in name]


def test_the_first_stream_is_the_backbone(zoo):
    """The aggregator forced to it."""
    case = zoo.Case(zoo.FAMILIES["llama"], "sdpa")
    model, ids = zoo.share(case.plain(), smoothing=0.0), zoo.token_ids()
    last = model.model.aggregate_layer[2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1e4, -1e4, -1e4]))
    zoo.close(logits_of(model, ids), logits_of(case.plain(), ids), TOLERANCE)


def test_halves_and_the_device_of_a_cast_model(zoo):
    case = zoo.Case(zoo.FAMILIES["llama"], "sdpa")
    model, ids = zoo.share(case.plain()), zoo.token_ids()
    exact = logits_of(model, ids)
    half = logits_of(model.to(torch.bfloat16), ids)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()
    zoo.close(logits_of(model, ids, logits_to_keep=1), half[:, -1:], 0.1)
