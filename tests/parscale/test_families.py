"""Every family against an independent run of each stream, in one forward pass, with a cache, and with padding."""

import pytest
import torch
from model_calls import logits_of
from transformers import DynamicCache

# float32 rounding of logits of size 1 to 5 through 2 to 4 layers; measured: 4e-6 at most.
TOLERANCE = 2e-5


def test_forward_is_each_stream_by_itself_then_the_mixture(case, zoo):
    model = case.wrapped()
    reference, ids = case.reference(model), zoo.token_ids()
    logits = logits_of(model, input_ids=ids)
    zoo.close(logits, reference.logits(ids), TOLERANCE)
    # and the comparison has power: streams, weights and the backbone itself differ by far more
    hidden = [reference.hidden(p, ids) for p in range(zoo.P)]
    assert (hidden[0] - hidden[1]).abs().mean() > 0.05
    assert reference.weights(hidden).std(-1).mean() > 0.1
    assert (logits - logits_of(reference.plain, input_ids=ids)).abs().max() > 0.1


def test_a_single_token_is_each_stream_by_itself_then_the_mixture(case, zoo):
    model, ids = case.wrapped(), zoo.token_ids(length=1)
    zoo.close(logits_of(model, input_ids=ids), case.reference(model).logits(ids), TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("chunks", [[1] * 9, [3, 6], [5, 1, 3]], ids=["token by token", "3 + rest", "5 + 1 + 3"])
def test_cached_decoding_is_the_full_forward(case, zoo, chunks):
    model, ids = case.wrapped(), zoo.token_ids()
    full = logits_of(model, input_ids=ids)
    cache = DynamicCache(config=model.config)
    pieces = [logits_of(model, input_ids=piece, cache=cache) for piece in ids.split(chunks, dim=1)]
    zoo.close(torch.cat(pieces, dim=1), full, TOLERANCE)
    assert cache.get_seq_length() == zoo.S  # real tokens only


def padded(case):
    """The recurrent layers of Qwen3-Next round padded rows otherwise: its plain backbone is 5e-5 off."""
    return TOLERANCE if case.family.attention_layers is None else 1e-4


@pytest.mark.grid
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(case, zoo, side):
    model, ids, short = case.wrapped(), zoo.token_ids(), 6
    mask = torch.ones_like(ids)
    (mask[1, :-short] if side == "left" else mask[1, short:]).zero_()
    ids = ids.where(mask.bool(), 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = logits_of(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    zoo.close(logits[0], logits_of(model, input_ids=ids[:1])[0], padded(case))
    real = mask[1].bool()
    zoo.close(logits[1, real], logits_of(model, input_ids=ids[1:, real])[0], padded(case))
    expected = case.reference(model).logits(ids, positions, padding=mask)
    zoo.close(logits[mask.bool()], expected[mask.bool()], padded(case))


def test_padded_decoding_is_the_unpadded_run(case, zoo):
    model, ids, short = case.wrapped(), zoo.token_ids(), 6
    mask = torch.ones_like(ids)
    mask[1, :-short] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, pieces, end = DynamicCache(config=model.config), [], 0
    for width in (5, 1, 1, 2):
        start, end = end, end + width
        pieces.append(
            logits_of(
                model,
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                cache=cache,
            )
        )
    decoded = torch.cat(pieces, dim=1)
    zoo.close(decoded[0], logits_of(model, input_ids=ids[:1])[0], padded(case))
    zoo.close(decoded[1, -short:], logits_of(model, input_ids=ids[1:, -short:])[0], padded(case))


def test_packed_documents_are_separate_runs(case, zoo):
    """Each document sees the whole prefix and nothing of its neighbours, where the backbone can tell them apart."""
    lengths, ids = [4, 2, 3], zoo.token_ids(rows=1)
    arguments = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "use_cache": False,
    }
    for model in (case.plain(), case.wrapped()):
        logits = logits_of(model, **arguments)
        alone = torch.cat([logits_of(model, input_ids=piece) for piece in ids.split(lengths, dim=1)], dim=1)
        if case.family.packs:
            zoo.close(logits, alone, TOLERANCE)
        else:  # a backbone that cannot: the prefix makes it no better
            assert (logits - alone).abs().max() > 0.01


def custom_masks(zoo, case, config):
    """A mask that is neither causal nor padding: also, no token sees the one two places before it."""
    distance = torch.arange(zoo.S)[:, None] - torch.arange(zoo.S)[None, :]
    rows = torch.stack([(distance >= 0) & (distance != 2), (distance >= 0) & (distance != 3)])[:, None]  # (B, 1, S, S)
    if case.family.window is not None:
        rows = rows & (distance < case.family.window)
    return rows


@pytest.mark.grid
@pytest.mark.parametrize("rows", ["each row its own", "one for all"])
def test_custom_masks(case, zoo, rows):
    """Four-dimensional masks reach attention as they are, with room for the prefix; against the reference."""
    model, ids = case.wrapped(), zoo.token_ids()
    allowed = custom_masks(zoo, case, model.config)
    allowed = allowed if rows == "each row its own" else allowed[:1]
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = torch.arange(zoo.S)[None].expand(zoo.B, -1)
    # the eager functions of the backbones add their mask, so take no booleans
    masks = [additive, allowed] if case.attention == "sdpa" else [additive]
    if case.family.attention_layers is not None:  # a mask over pairs of tokens means nothing to recurrent layers
        masks = [{"full_attention": mask, "linear_attention": None} for mask in masks]
    expected = case.reference(model).logits(ids, positions, mask=allowed)
    for mask in masks:
        zoo.close(logits_of(model, input_ids=ids, attention_mask=mask, position_ids=positions), expected, TOLERANCE)


@pytest.mark.parametrize("case", ["gemma2-eager", "gemma3-sdpa", "qwen3-sdpa", "gpt_oss-eager"], indirect=True)
def test_masks_by_kind_of_layer(case, zoo):
    model, ids = case.wrapped(), zoo.token_ids()
    padding = torch.ones_like(ids)
    padding[1, :3] = 0
    masks = {}
    for kind, window in (("full_attention", None), ("sliding_attention", case.family.window)):
        allowed = zoo.allowed(zoo.S, window, padding=padding)
        masks[kind] = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    logits = logits_of(model, input_ids=ids, attention_mask=masks, position_ids=positions)
    by_padding = logits_of(model, input_ids=ids, attention_mask=padding, position_ids=positions)
    zoo.close(logits[padding.bool()], by_padding[padding.bool()], TOLERANCE)
