"""Caches of every kind hold real tokens only, in P*B rows, and change no text."""

import contextlib
import copy
import types

import pytest
import torch
import transformers
from cache_kinds import CACHES, NAMES, TOLERANCE, unrounded_cache
from model_calls import STEPS, generate, logits_of
from packaging.version import Version
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

ALL_NAMES = [*NAMES, "qwen3_next"]  # and a hybrid


def make(zoo, name, **changes):
    family = zoo.FAMILIES[name]
    return zoo.Case(family, family.attention[-1]).wrapped(**changes)


@pytest.fixture
def llama(zoo):
    return make(zoo, "llama")


# -- text by generate, logits along it


@pytest.mark.grid
@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_text_is_the_same_without_a_cache(name, cache, search, zoo):
    model, ids = make(zoo, name), zoo.token_ids()
    padding = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    output = generate(model, ids * padding, padding, **CACHES[cache], **search, return_dict_in_generate=True)
    without = generate(model, ids * padding, padding, use_cache=False, **search)
    assert torch.equal(output.sequences, without)
    layers = [layer for layer in output.past_key_values.layers if getattr(layer, "keys", None) is not None]
    rows = zoo.B * search.get("num_beams", 1) * zoo.P
    assert all(layer.keys.shape[0] == layer.values.shape[0] == rows for layer in layers)
    assert int(output.past_key_values.get_seq_length()) == zoo.S + STEPS - 1


@pytest.mark.grid
@pytest.mark.parametrize("chunks", [[9, 1, 1], [4, 4, 2, 1]], ids=["prefill and decoding", "in chunks"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_static_cache_along_a_text(name, attention, chunks, zoo):
    """Longer than the text, so that its last places are empty; in layers with a window, shorter."""
    if attention not in zoo.FAMILIES[name].attention:
        attention = zoo.FAMILIES[name].attention[0]
    case, ids = zoo.Case(zoo.FAMILIES[name], attention), zoo.token_ids(length=11)
    model = case.wrapped()
    cache = StaticCache(config=model.config, max_cache_len=16)
    pieces = [logits_of(model, piece, cache=cache) for piece in ids.split(chunks, dim=1)]
    # the recurrent and the chunked form of linear attention round differently
    tolerance = 1e-4 if name == "qwen3_next" else TOLERANCE
    zoo.close(torch.cat(pieces, dim=1), case.reference(model).logits(ids), tolerance)


# -- the next turn of a chat


@pytest.mark.grid
@pytest.mark.parametrize("cache", ["dynamic", "static of the user's"])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_the_next_turn_goes_on_from_the_cache(name, cache, zoo):
    model, text, cached = make(zoo, name), zoo.token_ids(), None
    if cache != "dynamic":
        cached = StaticCache(config=model.config, max_cache_len=48)
    for turn in range(3):
        output = generate(model, text, cache=cached, return_dict_in_generate=True)
        assert torch.equal(output.sequences, generate(model, text, use_cache=False))
        cached = output.past_key_values
        text = torch.cat([output.sequences, zoo.token_ids(length=4, seed=turn)], dim=1)


def test_one_prompts_cache_for_many_texts(llama, zoo):
    """Copied for each; and cut back to the prompt."""
    prompt, cache = zoo.token_ids(length=6), DynamicCache(config=llama.config)
    logits_of(llama, prompt, cache=cache)
    for seed in (1, 2):
        text = torch.cat([prompt, zoo.token_ids(length=3, seed=seed)], dim=1)
        expected = generate(llama, text, use_cache=False)
        assert torch.equal(generate(llama, text, cache=copy.deepcopy(cache)), expected)
    assert cache.get_seq_length() == 6
    text = torch.cat([prompt, zoo.token_ids(length=3, seed=3)], dim=1)
    generate(llama, text, cache=cache)
    cache.crop(-(cache.get_seq_length() - 6))
    zoo.close(logits_of(llama, text[:, 6:], cache=cache), logits_of(llama, text)[:, 6:], TOLERANCE)


def test_rows_of_a_cache_that_are_selected_and_repeated(llama, zoo):
    """As decoding loops of the user's own do, in the cache's rows: stream after stream."""
    ids, cache = zoo.token_ids(), DynamicCache(config=llama.config)
    logits_of(llama, ids, cache=cache)
    cache.batch_select_indices(torch.tensor([p * zoo.B + 1 for p in range(zoo.P)]))  # the second text
    cache.batch_repeat_interleave(2)
    more = zoo.token_ids(length=3, seed=5)
    whole = torch.cat([ids[1:].repeat(2, 1), more], dim=1)
    zoo.close(logits_of(llama, more, cache=cache), logits_of(llama, whole)[:, zoo.S :], TOLERANCE)


# -- caches and sets of streams


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_another_set_is_refused(kind, llama, zoo):
    """Of the same shape, so that nothing else would notice; a cache that was emptied is anyone's."""
    llama.add_streams("other", zoo.P, prefix_length=zoo.T, init="random")
    zoo.fill_streams(llama, seed=9, name="other")
    cache = StaticCache(config=llama.config, max_cache_len=16)
    if kind == "dynamic":
        cache = DynamicCache(config=llama.config)
    ids = zoo.token_ids()
    logits_of(llama, ids[:, :4], cache=cache)
    for chosen in ("other", None):
        with llama.use_streams(chosen), pytest.raises(ValueError, match="filled with streams 'default'"):
            logits_of(llama, ids[:, 4:], cache=cache)
        with llama.use_streams(chosen), pytest.raises(ValueError, match="filled with streams 'default'"):
            generate(llama, ids, cache=cache)
    assert int(cache.get_seq_length()) == 4
    if kind == "static":
        cache.reset()
        with llama.use_streams("other"):
            zoo.close(logits_of(llama, ids, cache=cache), logits_of(llama, ids), TOLERANCE)


def test_a_static_cache_of_other_texts_is_refused(llama, zoo):
    ids, cache = zoo.token_ids(), StaticCache(config=llama.config, max_cache_len=24)
    logits_of(llama, ids, cache=cache)
    for rows in (1, 6):  # 6: as many as the cache has, but not three for each
        said = rf"static cache has 6 rows and 9 tokens, but {rows} rows of input need {3 * rows} cache rows"
        with pytest.raises(ValueError, match=said):
            logits_of(llama, ids[:1].expand(rows, -1), cache=cache)
    whole = torch.cat([ids, ids[:, :1]], dim=1)
    zoo.close(logits_of(llama, ids[:, :1], cache=cache), logits_of(llama, whole)[:, -1:], TOLERANCE)


def test_an_empty_static_cache_of_other_rows_is_refused(llama, zoo):
    """It was given its size before the first text."""
    cache, config = StaticCache(config=llama.config, max_cache_len=16), llama.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache.early_initialization(4, heads, size, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="4 rows and 0 tokens, but 2 rows of input need 6"):
        logits_of(llama, zoo.token_ids(), cache=cache)


# -- quantized caches


def quantized(model, backend, bits, residual):
    """A cache that rounds whatever is older than `residual` tokens; its groups divide these small tensors."""
    if backend == "as it is":
        return unrounded_cache(model, residual)
    return QuantizedCache(backend, model.config, nbits=bits, q_group_size=16, residual_length=residual)


@pytest.fixture
def unpacked_in_python(monkeypatch):
    """Without quanto's extension, which is compiled first, for half a minute, and has this one function."""
    from optimum.quanto.library.extensions.extension import get_extension

    def unpack(packed, bits):
        return torch.cat([packed >> bits * place & 2**bits - 1 for place in range(8 // bits)])

    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", types.SimpleNamespace(unpack=unpack))


BACKENDS = {"quanto": (4, QuantoQuantizedLayer), "hqq": (8, HQQQuantizedLayer)}


@pytest.mark.grid
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("residual", [1, 4, 128])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_quantized_cache_that_does_not_round(name, residual, search, zoo):
    model, ids = make(zoo, name), zoo.token_ids()
    if search and Version(transformers.__version__) < Version("5.19"):
        with pytest.raises(IndexError), model.use_streams(None):
            generate(model, ids, cache=quantized(model, "as it is", 4, residual), **search)
        pytest.skip("this version's quantized caches cannot follow the beams of a plain model either")
    cache = quantized(model, "as it is", 4, residual)
    expected = generate(model, ids, use_cache=False, **search)
    assert torch.equal(generate(model, ids, cache=cache, **search), expected)


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quantized_cache(name, backend, unpacked_in_python, zoo):
    """The next token's logits are those over the keys and values that the cache gives back, and not the exact ones."""
    model, ids = make(zoo, name), zoo.token_ids(length=17)
    prompt, new = ids[:, :16], ids[:, 16:]
    bits, kind = BACKENDS[backend]
    cache, plain = quantized(model, backend, bits, residual=4), DynamicCache()
    logits_of(model, prompt, cache=cache)
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, kind)
        kept = layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)
        assert kept[0].shape[:3] == (zoo.P * zoo.B, kept[0].shape[1], 16)
        plain.update(*kept, number)
    logits = logits_of(model, new, cache=cache)
    zoo.close(logits, logits_of(model, new, cache=plain), TOLERANCE)
    error = (logits - logits_of(model, ids)[:, -1:]).abs().max()
    assert TOLERANCE < error < 0.5
    text = generate(model, ids[:, :16], cache=quantized(model, backend, bits, residual=4))
    assert text.shape == (zoo.B, 16 + STEPS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_makes_a_quantized_cache(backend, unpacked_in_python, llama, zoo):
    config = {"backend": backend, "nbits": BACKENDS[backend][0], "q_group_size": 16, "residual_length": 64}
    ids = zoo.token_ids(length=16)
    arguments = {"cache_implementation": "quantized", "cache_config": config, "return_dict_in_generate": True}
    output = generate(llama, ids, **arguments)
    assert isinstance(output.past_key_values.layers[0], BACKENDS[backend][1])
    cache = quantized(llama, backend, BACKENDS[backend][0], residual=64)
    assert torch.equal(output.sequences, generate(llama, ids, cache=cache))


# -- offloaded caches


class Stream(contextlib.nullcontext):
    """Stands in for a stream of a GPU: everything is done in order anyway."""

    def wait_stream(self, other) -> None:
        pass


@pytest.mark.grid
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_offloaded_caches(name, cache, zoo, monkeypatch):
    """They prefetch in a stream of the GPU, of which a CPU has none; all else runs, to and fro between one device."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    model, ids = make(zoo, name), zoo.token_ids()
    for search in ({}, {"num_beams": 3}):
        output = generate(model, ids, cache_implementation=cache, return_dict_in_generate=True, **search)
        assert output.past_key_values.offloading
        assert torch.equal(output.sequences, generate(model, ids, use_cache=False, **search))
