"""Caches of streams that share keys and values: they are the plain backbone's, whatever their kind."""

import copy

import pytest
import torch
from cache_kinds import CACHES, NAMES, TOLERANCE, unrounded_cache
from model_calls import generate, logits_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import parscale

PADDING = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def plain(zoo, name, **changes):
    family = zoo.FAMILIES[name]
    return zoo.Case(family, family.attention[-1]).plain(**changes)


@pytest.fixture
def llama(zoo):
    return zoo.share(plain(zoo, "llama"))


def held(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def assert_equal(cache, other):
    for mine, theirs in zip(held(cache), held(other), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


# -- the plain backbone's


@pytest.mark.grid
@pytest.mark.parametrize("num_streams", [2, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_after_a_prompt_the_cache_is_the_backbones_to_the_last_bit(name, num_streams, zoo):
    backbone, ids = plain(zoo, name), zoo.token_ids()
    model = zoo.share(plain(zoo, name), num_streams)
    positions = (PADDING.cumsum(-1) - 1).clamp(min=0)
    for arguments in ({}, {"attention_mask": PADDING, "position_ids": positions}):
        caches = [DynamicCache(config=backbone.config) for _ in range(2)]
        for each, cache in zip((backbone, model), caches, strict=True):
            logits_of(each, ids, cache=cache, logits_to_keep=1, **arguments)
        assert_equal(*caches)


def test_generate_leaves_the_backbones_cache_after_one_token(llama, zoo):
    backbone, ids = plain(zoo, "llama"), zoo.token_ids()
    options = {"max_new_tokens": 1, "return_dict_in_generate": True}
    caches = [generate(each, ids, PADDING, **options).past_key_values for each in (llama, backbone)]
    assert_equal(*caches)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_may_change_sides(name, zoo):
    """Begun by the backbone and continued with streams, and the other way round; and sets may take turns."""
    model, ids, split = zoo.share(plain(zoo, name)), zoo.token_ids(), 5
    model.add_streams("other", 2, prefix_length=3, init="random", kv="shared")
    zoo.fill_streams(model, seed=7, name="other")
    wholes = {}
    for chosen in ("default", "other", None):
        with model.use_streams(chosen):
            wholes[chosen] = logits_of(model, ids)
    cache, order = DynamicCache(config=model.config), [None, "default", "other", None, "default"]
    with model.use_streams(None):
        logits_of(model, ids[:, :split], cache=cache)
    for at, chosen in zip(range(split, zoo.S), order[1:], strict=False):
        with model.use_streams(chosen):
            found = logits_of(model, ids[:, at : at + 1], cache=cache)
        zoo.close(found, wholes[chosen][:, at : at + 1], TOLERANCE)


def test_a_cache_of_streams_with_keys_of_their_own_is_refused(llama, zoo):
    llama.add_streams("own", 2, prefix_length=3, init="random")
    ids = zoo.token_ids()
    with llama.use_streams("own"):
        cache = DynamicCache(config=llama.config)
        logits_of(llama, ids, cache=cache)
    with pytest.raises(ValueError, match="filled with streams 'own', but None are active"):
        logits_of(llama, ids[:, :1], cache=cache)
    cache = DynamicCache(config=llama.config)
    logits_of(llama, ids, cache=cache)
    with llama.use_streams("own"), pytest.raises(ValueError, match="filled with streams None"):
        logits_of(llama, ids[:, :1], cache=cache)


@pytest.mark.parametrize("kind", ["", "static "])
def test_a_cache_of_other_rows_is_refused(kind, llama, zoo):
    """It needs the backbone's rows: one for each row of the input, whatever the number of streams."""
    cache = StaticCache(config=llama.config, max_cache_len=24) if kind else DynamicCache(config=llama.config)
    ids = zoo.token_ids(rows=3)
    logits_of(llama, ids, cache=cache)
    with pytest.raises(ValueError, match=rf"This {kind}cache has 3 rows.*, but 2 rows of input need 2\b"):
        logits_of(llama, ids[:2, :1], cache=cache)


# -- what generate does with it


@pytest.mark.grid
@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_same_without_a_cache(name, cache, search, zoo):
    model, ids = zoo.share(plain(zoo, name)), zoo.token_ids() * PADDING
    output = generate(model, ids, PADDING, **CACHES[cache], **search, return_dict_in_generate=True)
    assert torch.equal(output.sequences, generate(model, ids, PADDING, use_cache=False, **search))
    rows = zoo.B * search.get("num_beams", 1)
    assert all(keys.shape[0] == values.shape[0] == rows for keys, values in held(output.past_key_values))


@pytest.mark.parametrize("residual", [1, 4, 128])
def test_a_quantized_cache_that_does_not_round(residual, llama, zoo):
    cache = unrounded_cache(llama, residual)
    ids = zoo.token_ids()
    assert torch.equal(generate(llama, ids, cache=cache), generate(llama, ids, use_cache=False))


@pytest.mark.parametrize("help_", ["assistant", "lookup"])
def test_assisted_decoding(help_, zoo):
    model, ids = zoo.share(plain(zoo, "llama")), zoo.token_ids(rows=1)
    options = {"assistant": {"assistant_model": plain(zoo, "llama")}, "lookup": {"prompt_lookup_num_tokens": 3}}
    assert torch.equal(generate(model, ids, **options[help_]), generate(model, ids, use_cache=False))


# -- step by step


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_any_length(name, kind, zoo):
    model, ids = zoo.share(plain(zoo, name)), zoo.token_ids()
    whole = logits_of(model, ids)
    cache = StaticCache(config=model.config, max_cache_len=16)
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
    for start, stop in ((0, 3), (3, 4), (4, 8), (8, 9)):
        found = logits_of(model, ids[:, start:stop], cache=cache)
        zoo.close(found, whole[:, start:stop], TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_the_last_positions_by_two_passes(name, kind, kept, zoo):
    """Of a first piece, and of one that follows it."""
    model, ids = zoo.share(plain(zoo, name)), zoo.token_ids()
    whole = logits_of(model, ids)
    caches = {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, max_cache_len=16)}
    cache = caches.get(kind)
    if cache is None:
        zoo.close(logits_of(model, ids, logits_to_keep=kept, use_cache=False), whole[:, -kept:], TOLERANCE)
        return
    for start, stop in ((0, 4), (4, 9)):
        found = logits_of(model, ids[:, start:stop], logits_to_keep=kept, cache=cache)
        zoo.close(found, whole[:, max(start, stop - kept) : stop], TOLERANCE)


def test_a_cache_that_is_cut_copied_and_chosen_from(llama, zoo):
    ids = zoo.token_ids()
    whole = logits_of(llama, ids)
    cache = DynamicCache(config=llama.config)
    logits_of(llama, ids[:, :7], cache=cache)
    other = copy.deepcopy(cache)
    cache.crop(-2)
    zoo.close(logits_of(llama, ids[:, 5:], cache=cache), whole[:, 5:], TOLERANCE)
    other.batch_select_indices(torch.tensor([1]))
    zoo.close(logits_of(llama, ids[1:, 7:], cache=other), whole[1:, 7:], TOLERANCE)


# -- what it costs


class Largest(TorchDispatchMode):
    """Notes the numbers in the largest tensor that an operation makes; a view makes none."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.numel())
        return result


def test_a_step_makes_no_copy_of_the_cache_for_streams(zoo):
    model, ids = zoo.share(plain(zoo, "llama", max_position_embeddings=256)), zoo.token_ids(length=200)
    cache = DynamicCache(config=model.config)
    logits_of(model, ids, cache=cache, logits_to_keep=1)
    with Largest() as largest:
        logits_of(model, ids[:, :1], cache=cache)
    assert largest.numel == cache.layers[0].keys.numel()  # the cache's own, one token longer


def rows_and_tokens(model):
    """Records the shapes of what the first layer sees."""
    shapes = []
    model.get_decoder().layers[0].register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape[:2]))
    )
    return shapes


def test_a_prompt_runs_with_one_row_and_its_last_token_with_all(llama, zoo):
    shapes, ids = rows_and_tokens(llama), zoo.token_ids()
    generate(llama, ids, max_new_tokens=3)
    others = (zoo.P - 1) * zoo.B
    assert shapes == [(zoo.B, zoo.S), (others, 1), (zoo.P * zoo.B, 1), (zoo.P * zoo.B, 1)]


def test_logits_of_a_prompt_are_computed_once(llama, zoo):
    """The mixture's. An adaptive call reads stream 0's first."""
    rows, ids = [], zoo.token_ids()
    llama.lm_head.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape[:2])))
    logits_of(llama, ids, logits_to_keep=2)
    assert rows == [(zoo.B, 2)]
    rows.clear()
    generate(llama, ids, max_new_tokens=1, adaptive=1e-6)
    assert rows == [(zoo.B, 1)] * 2


def test_a_turn_of_a_chat_reads_its_own_tokens_with_one_row(llama, zoo):
    """Three turns over one cache: with streams, of the plain backbone, and with streams again."""
    ids, cache, turns = zoo.token_ids(length=12), DynamicCache(config=llama.config), []
    shapes, text = rows_and_tokens(llama), ids[:, :4]
    for turn, chosen in enumerate(["default", None, "default"]):
        before = len(shapes)
        with llama.use_streams(chosen):
            output = generate(llama, text, max_new_tokens=2, cache=cache)
            turns.append(shapes[before:])
            assert torch.equal(output, generate(llama, text, max_new_tokens=2, use_cache=False))
        text = torch.cat([output, ids[:, 4 + 3 * turn : 7 + 3 * turn]], 1)
    others, all_rows = ((zoo.P - 1) * zoo.B, 1), (zoo.P * zoo.B, 1)
    assert turns[0] == turns[2] == [(zoo.B, 4), others, all_rows]  # later: the last token said, and three new ones
    assert turns[1] == [(zoo.B, 4), (zoo.B, 1)]


def test_hidden_states_labels_index_tensors_and_gradients_run_all_streams_at_all_positions(llama, zoo):
    shapes, ids = rows_and_tokens(llama), zoo.token_ids()
    with torch.no_grad():
        llama(ids, logits_to_keep=1, output_hidden_states=True)
        llama(ids, logits_to_keep=1, labels=ids[:, -1:])
        llama(ids, logits_to_keep=torch.tensor([3]))
        llama(ids)
    llama(ids, logits_to_keep=1)
    assert set(shapes) == {(zoo.P * zoo.B, zoo.S)}


@torch.no_grad()
def test_hidden_states_that_the_configuration_asks_for(llama, zoo):
    ids = zoo.token_ids()
    expected = llama(ids, logits_to_keep=1, output_hidden_states=True).hidden_states
    llama.config.output_hidden_states = True
    found = llama(ids, logits_to_keep=1).hidden_states
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_zero_keeps_all_logits(llama, zoo):
    zoo.close(logits_of(llama, zoo.token_ids(), logits_to_keep=0), logits_of(llama, zoo.token_ids()), TOLERANCE)


def test_after_an_error_the_next_call_is_whole(llama, zoo):
    ids = zoo.token_ids()
    expected = logits_of(llama, ids)

    def fail(module, args):
        raise RuntimeError("on purpose")

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        logits_of(llama, ids, logits_to_keep=1)
    hook.remove()
    assert llama.parscale.call.passes is None
    assert torch.equal(logits_of(llama, ids), expected)
    assert torch.equal(parscale.unwrap(llama)(ids).logits, plain(zoo, "llama")(ids).logits)
