"""A cache that holds a prompt counts the tokens alone, for whoever makes masks for it."""

import pytest
from model_calls import logits_of
from transformers import DynamicCache

import parscale


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sizes_of_masks_are_those_without_a_prompt(name, zoo):
    """Also behind a window, which the prompt leaves, and once the cache was emptied."""
    plain = zoo.Case(zoo.FAMILIES[name], "sdpa").plain
    models = [parscale.wrap(plain(), 3, prefix_length=4, init="random", transform="prompt"), plain()]
    caches = [DynamicCache(config=model.config) for model in models]
    for piece in zoo.token_ids().split([3, 2, 4], dim=1):
        for model, cache in zip(models, caches, strict=True):
            logits_of(model, piece, cache=cache)
        assert caches[0].get_mask_sizes(1, 0) == caches[1].get_mask_sizes(1, 0)
    for cache in caches:
        cache.reset()
    assert caches[0].get_mask_sizes(3, 0) == caches[1].get_mask_sizes(3, 0)
