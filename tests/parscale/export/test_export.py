"""`torch.export` with any number of rows and tokens, and static caches that have memory before their first call."""

import pytest
import torch
from torch.export import Dim
from transformers import StaticCache

import parscale
from parscale.streams.backbones import cache_argument

ROUNDING = 1e-5


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        ("prefix", "gemma3"),
        ("lora", "llama"),
        *(pytest.param(x, "llama", marks=pytest.mark.nightly) for x in ("prefix", "prompt")),
    ],
)
def test_any_length(transform, name, zoo):
    """One program for all, with a mask, as for the plain backbone."""
    case, sizes = zoo.Case(zoo.FAMILIES[name], "sdpa"), {0: Dim("rows", min=2, max=16), 1: Dim("tokens", min=2, max=32)}
    model = parscale.wrap(case.plain(), 3, prefix_length=4, init="random", seed=0, transform=transform)

    def arguments(rows, tokens):
        ids = zoo.token_ids(rows, tokens)
        mask = torch.ones_like(ids)
        mask[0, :1] = 0
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), arguments(3, 9), dynamic_shapes=shapes).module()
        for rows, tokens in ((3, 9), (2, 5), (5, 17)):
            given = arguments(rows, tokens)
            seen = given["attention_mask"].bool()
            zoo.close(program(**given).logits[seen], model(**given).logits[seen], ROUNDING)


def early(model, rows, heads=2):
    cache = StaticCache(config=model.config, max_cache_len=24)
    cache.early_initialization(rows, heads, 8, torch.float32, torch.device("cpu"))
    return cache


@torch.no_grad()
def along(model, ids, cache):
    pieces = ids.split([5, 1, ids.shape[1] - 6], dim=1)
    return torch.cat([model(piece, **{cache_argument(model): cache}).logits for piece in pieces], dim=1)


@pytest.mark.parametrize("transform", ["prefix", "lora"])
def test_static_caches_that_were_made_early(transform, tiny, zoo):
    """For the caller's rows or for those of all streams, before or after wrapping."""
    plain, ids = tiny(), zoo.token_ids()
    caches = [early(plain, zoo.B), early(plain, 3 * zoo.B)]
    model = parscale.wrap(plain, 3, prefix_length=4, init="random", transform=transform)
    with torch.no_grad():
        expected = model(ids).logits
    for cache in [*caches, early(model, zoo.B)]:
        zoo.close(along(model, ids, cache), expected, ROUNDING)


def test_a_static_cache_that_does_not_fit_is_named(tiny, zoo):
    plain, ids = tiny(), zoo.token_ids()
    read = early(plain, zoo.B)
    with torch.no_grad():
        plain(ids, **{cache_argument(plain): read})
        model = parscale.wrap(plain, 3, prefix_length=4, init="random")
        for cache, found in ((read, "2 rows and 9 tokens"), (early(model, 5), "5 rows and 0 tokens")):
            with pytest.raises(ValueError, match=f"{found}.*need 6 cache rows.*batch_size=6"):
                model(ids, **{cache_argument(model): cache})
        read.reset()
        zoo.close(along(model, ids, read), model(ids).logits, ROUNDING)
