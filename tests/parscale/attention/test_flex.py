"""FlexAttention: its block masks, made by transformers or by the user, with room for the prefix.

transformers compiles it; these tests run it uncompiled, which is the same arithmetic in plain operations, but for the
last one. It has no backward pass on a CPU, so gradients are not tested.
"""

import pytest
import torch
from model_calls import logits_of
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import DynamicCache

import parscale
from parscale.attention.masks import extend_block_mask

TOLERANCE = 2e-5  # float32 rounding of logits of size 1 to 5 through two layers
NAMES = ["llama", "mistral", "gemma2", "gemma3"]


@pytest.fixture
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def make(zoo, name, **changes):
    case = zoo.Case(zoo.FAMILIES[name], "flex_attention")
    return case, case.wrapped(**changes)


def padded(zoo, length=None):
    """Ids, padding mask and positions; the second row begins with three padding tokens."""
    ids = zoo.token_ids(length=length or zoo.S)
    padding = torch.ones_like(ids)
    padding[1, :3] = 0
    return ids, padding, (padding.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", NAMES)
def test_forward(name, uncompiled, zoo):
    case, model = make(zoo, name)
    ids, padding, positions = padded(zoo)
    reference = case.reference(model)
    zoo.close(logits_of(model, ids), reference.logits(ids), TOLERANCE)
    expected = reference.logits(ids, positions, padding=padding)
    for given in ({"position_ids": positions}, {}):
        logits = logits_of(model, ids, attention_mask=padding, **given)
        zoo.close(logits[padding.bool()], expected[padding.bool()], TOLERANCE)
    with model.use_streams(None):
        assert torch.equal(logits_of(model, ids), logits_of(case.plain(), ids))


def test_large_biases_of_keys(uncompiled, zoo):
    case = zoo.Case(zoo.BIASED, "flex_attention")
    model, (ids, padding, positions) = case.wrapped(), padded(zoo)
    expected = case.reference(model).logits(ids, positions, padding=padding)
    logits = logits_of(model, ids, attention_mask=padding)
    zoo.close(logits[padding.bool()], expected[padding.bool()], zoo.BIASED_TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("given", [True, False], ids=["positions", "no positions"])
@pytest.mark.parametrize("name", NAMES)
def test_with_a_cache(name, given, uncompiled, zoo):
    """A dynamic one: in a static one, transformers' own block masks read the length after it has grown."""
    case, model = make(zoo, name)
    ids, padding, positions = padded(zoo)
    expected = case.reference(model).logits(ids, positions, padding=padding)
    cache = DynamicCache(config=model.config)
    pieces, end = [], 0
    for width in (4, 3, 1, 1):
        start, end = end, end + width
        now = slice(start, end)
        pieces.append(
            logits_of(
                model,
                ids[:, now],
                attention_mask=padding[:, :end],
                cache=cache,
                **({"position_ids": positions[:, now]} if given else {}),
            )
        )
    zoo.close(torch.cat(pieces, dim=1)[padding.bool()], expected[padding.bool()], TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_packed_documents_in_several_rows(name, uncompiled, zoo):
    _, model = make(zoo, name)
    ids, lengths = zoo.token_ids(), [[4, 2, 3], [1, 8]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = logits_of(model, ids, position_ids=positions, use_cache=False)
    for b, row in enumerate(lengths):
        alone = torch.cat([logits_of(model, piece) for piece in ids[b : b + 1].split(row, dim=1)], dim=1)
        zoo.close(logits[b : b + 1], alone, TOLERANCE)


@pytest.mark.parametrize("rows", [1, 2], ids=["one row for all", "each row its own"])
def test_additive_masks(rows, uncompiled, zoo):
    """FlexAttention also takes a four-dimensional mask that is added, with a row for each row."""
    case, model = make(zoo, "llama")
    ids = zoo.token_ids(rows=rows)
    distance = torch.arange(zoo.S)[:, None] - torch.arange(zoo.S)
    visible = torch.stack([(distance >= 0) & (distance != n) for n in (2, 3)])[:rows, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    zoo.close(logits_of(model, ids, attention_mask=mask), case.reference(model).logits(ids, mask=visible), TOLERANCE)


# -- block masks of the user's own

BLOCK_SIZES = [128, 16, (32, 16)]


def every_third(b, h, q, kv):
    """Causal, but no token sees those that are 2, 5, 8, ... places before it."""
    return (q >= kv) & ((q - kv) % 3 != 2)


def by_row(skipped):
    """Causal, but no token sees the one `skipped[b]` places before it."""
    return lambda b, h, q, kv: (q >= kv) & (q - kv != skipped[b])


@pytest.mark.grid
@pytest.mark.parametrize("block", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("length", [9, 33, 48])  # not all of them whole blocks
@pytest.mark.parametrize("kind", ["no row", "one row", "each row its own"])
def test_the_users_block_mask(kind, length, block, uncompiled, zoo):
    case, model = make(zoo, "llama")
    ids = zoo.token_ids(length=length)
    function = every_third if kind == "no row" else by_row(torch.tensor([2, 4] if "each" in kind else [3]))
    rows = {"no row": None, "one row": 1, "each row its own": zoo.B}[kind]
    mask = create_block_mask(function, rows, None, length, length, device="cpu", BLOCK_SIZE=block)
    visible = create_mask(function, rows, None, length, length, device="cpu")
    zoo.close(logits_of(model, ids, attention_mask=mask), case.reference(model).logits(ids, mask=visible), TOLERANCE)


def test_the_users_block_mask_for_one_row_of_text(uncompiled, zoo):
    """Which has P rows inside: the mask's only row is every stream's."""
    case, model = make(zoo, "llama")
    ids, function = zoo.token_ids(rows=1), by_row(torch.tensor([2]))
    mask = create_block_mask(function, 1, None, zoo.S, zoo.S, device="cpu")
    visible = create_mask(function, 1, None, zoo.S, zoo.S, device="cpu")
    zoo.close(logits_of(model, ids, attention_mask=mask), case.reference(model).logits(ids, mask=visible), TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("block", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("heads", "rows"), [(None, None), (2, None), (None, 3), (2, 3)])
@pytest.mark.parametrize("T", [4, 16, 130])  # less than a block, a whole one, more
def test_a_longer_block_mask_is_the_same_mask_behind_open_columns(T, heads, rows, block):
    """For six rows, from a mask for three, or for any."""

    def function(b, h, q, kv):
        return (q >= kv) & ((q + kv + 2 * b + h) % 5 != 0)

    S, K = 33, 40
    mask = create_block_mask(function, rows, heads, S, K, device="cpu", BLOCK_SIZE=block)
    extended = extend_block_mask(mask, T, num_rows=6)
    own_rows, own_heads = 1 if rows is None else 6, 1 if heads is None else heads
    assert extended.shape == (own_rows, own_heads, S, T + K)
    assert extended.BLOCK_SIZE == mask.BLOCK_SIZE
    dense = create_mask(extended.mask_mod, 6, heads, S, T + K, device="cpu")
    original = create_mask(function, rows, heads, S, K, device="cpu")
    assert dense[..., :T].all()
    for row in range(6):
        assert torch.equal(dense[row, :, :, T:], original[row % 3 if rows else 0])
    # the blocks that it does not visit hold nothing, those that it calls full hold no gap
    whole = create_block_mask(lambda b, h, q, kv: dense[b, h, q, kv], *dense.shape, device="cpu", BLOCK_SIZE=block)
    assert torch.equal(extended.to_dense().expand_as(whole.to_dense()), whole.to_dense())
    assert torch.equal(extended.full_kv_num_blocks.expand_as(whole.full_kv_num_blocks), whole.full_kv_num_blocks)


def test_generate(uncompiled, zoo):
    _, model = make(zoo, "mistral")
    ids, padding, _ = padded(zoo)
    arguments = {"attention_mask": padding, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generated = model.generate(ids, **arguments, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generated, model.generate(ids, **arguments, pad_token_id=0))


def test_wrapping_compiles_nothing(zoo, monkeypatch):
    """Finding the layers takes a forward pass; compiled, it would take longer than all the rest."""
    plain = zoo.Case(zoo.FAMILIES["llama"], "flex_attention").plain()
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    parscale.wrap(plain, zoo.P, prefix_length=zoo.T)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    "plain_lengths",
    [
        pytest.param((), id="first"),
        pytest.param((5,), id="after the plain backbone"),
        pytest.param((5, 11, 8), id="after the plain backbone at several lengths"),
    ],
)
def test_compiled(plain_lengths, zoo):
    """For real, as transformers runs it, at two lengths, so that the second makes a dimension dynamic.

    What transformers compiles serves all models, so that the plain backbone's lengths count too. Slow: it compiles C++.
    """
    torch._dynamo.reset()
    case, model = make(zoo, "llama")
    for length in plain_lengths:
        logits_of(case.plain(), zoo.token_ids(length=length), use_cache=False)
    reference = case.reference(model)
    reference.plain.set_attn_implementation("eager")  # torch aborts where a mask of scores is compiled on one thread
    for length in (9, 7):
        ids, padding, positions = padded(zoo, length)
        logits = logits_of(model, ids, attention_mask=padding, position_ids=positions, use_cache=False)
        expected = reference.logits(ids, positions, padding=padding)
        zoo.close(logits[padding.bool()], expected[padding.bool()], TOLERANCE)
