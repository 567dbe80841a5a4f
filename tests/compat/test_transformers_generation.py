"""Private names of transformers around caches and `generate`."""

import copy
import inspect

import pytest
import torch
import transformers
from model_calls import given

from parscale.compat import transformers as compat
from parscale.errors import IncompatibleVersionError

# -- caches


def test_a_cache_answers_otherwise_until_that_is_taken_back(make, ids):
    """Whoever holds the cache is told the new answer: the model places its next token by it."""
    model, cache = make(), transformers.DynamicCache()
    mask, after = torch.ones(2, 6, dtype=torch.long), {"position_ids": torch.tensor([[9]])}
    with torch.no_grad():
        model(input_ids=ids[:, :5], **given(model, cache))
        own, moved = (
            model(input_ids=ids[:, 5:], attention_mask=mask, **given(model, copy.deepcopy(cache)), **options).logits
            for options in ({}, after)
        )
        compat.answer_by(cache, {"get_seq_length": lambda layer_idx=0: 9})
        asked = copy.deepcopy(cache)
        assert torch.equal(model(input_ids=ids[:, 5:], attention_mask=mask, **given(model, asked)).logits, moved)
        compat.answer_itself(cache, ["get_seq_length"])
        assert torch.equal(model(input_ids=ids[:, 5:], attention_mask=mask, **given(model, cache)).logits, own)
    assert not torch.equal(own, moved)


def test_layers_of_a_cache_that_carry_a_state():
    from transformers import cache_utils

    assert not compat.carries_state(transformers.DynamicLayer())
    assert compat.carries_state(cache_utils.LinearAttentionLayer())


def test_a_cache_without_such_a_method_is_refused():
    with pytest.raises(IncompatibleVersionError, match=r"DynamicCache\.get_gone, which the installed transformers"):
        compat.answer_by(transformers.DynamicCache(), {"get_gone": len})


# -- generate


def test_generate_asks_for_the_methods_by_these_names(make, ids, monkeypatch):
    model, calls = make(), []

    def reorder(cache, rows):
        calls.append(rows)
        cache.reorder_cache(rows)
        return cache

    monkeypatch.setattr(model, compat.REORDER_CACHE, reorder, raising=False)
    model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=2, pad_token_id=0)
    assert calls
    assert not hasattr(type(model), compat.REORDER_CACHE)


def test_weights_of_drafted_tokens_keep_the_columns_of_a_prefix():
    split = "_split_model_outputs"  # of a prompt of three tokens and two drafted ones, with two columns of a prefix
    weights = torch.randn(1, 4, 5, 7)
    with compat.keeping_columns(2):
        steps = getattr(transformers.generation.utils, split)((), (weights,), 3, 5, is_decoder_attention=True)
        later = getattr(transformers.generation.utils, split)(steps, (weights,), 4, 2, is_decoder_attention=True)
        hidden = getattr(transformers.generation.utils, split)((), (weights,), 3, 5)
    assert torch.equal(steps[0][0], weights[:, :, :3, :5])
    assert [layer.shape[3] for (layer,) in steps] == [5, 6]
    assert later[: len(steps)] == steps
    for step, columns in ((0, 6), (1, 7)):
        assert torch.equal(later[len(steps) + step][0], weights[:, :, step : step + 1, :columns])
    assert torch.equal(hidden[0][0], weights[:, :, :3])
    plain = getattr(transformers.generation.utils, split)((), (weights,), 3, 5, is_decoder_attention=True)
    assert torch.equal(plain[0][0], weights[:, :, :3, :3])


def test_generate_asks_for_the_shape_of_a_static_cache(make, ids, monkeypatch):
    """Where it is given none, the cache takes its number of rows from the first keys."""
    model, calls = make(), []
    monkeypatch.setattr(model, compat.STATIC_CACHE_SHAPE, lambda: calls.append(1))
    monkeypatch.setattr(model, "forward", doubled_rows(model.forward))
    options = {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True}
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        return_dict_in_generate=True,
        pad_token_id=0,
        **options,
    )
    assert calls
    assert result.past_key_values.layers[0].keys.shape[0] == 2 * len(ids)


def twice(x):
    """Each row again, also of masks by the kind of layer."""
    if isinstance(x, dict):
        return {name: twice(value) for name, value in x.items()}
    return None if x is None else torch.cat([x, x])


def doubled_rows(forward):
    """A model's forward pass that runs each row twice, as two streams do."""

    def doubled(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        kwargs["input_ids"], kwargs["position_ids"] = twice(input_ids), twice(position_ids)
        kwargs["attention_mask"] = twice(attention_mask)
        output = forward(**kwargs)
        output.logits = output.logits[: len(input_ids)]
        return output

    doubled.__signature__ = inspect.signature(forward)
    return doubled
