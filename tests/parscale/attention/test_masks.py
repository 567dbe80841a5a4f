"""What is made of a pass's masks: once for all layers that share one, and no longer than it is there."""

import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from parscale.attention.masks import extended_mask, last_queries_of_mask, rows_of_mask, visible_lengths_once

S, K, T, P, B = 4, 6, 3, 2, 2


def dense():
    return torch.ones(P * B, 1, S, K, dtype=torch.bool).tril(K - S)


def blocks():
    return create_block_mask(lambda b, h, q, kv: q >= kv, P * B, None, S, K, device="cpu")


@pytest.mark.parametrize(
    ("mask", "make"),
    [
        (dense, lambda memo, mask: extended_mask(memo, mask, T, P * B)),
        (blocks, lambda memo, mask: extended_mask(memo, mask, T, P * B)),
        (dense, visible_lengths_once),
        (dense, lambda memo, mask: rows_of_mask(memo, mask, B)),
        (dense, lambda memo, mask: last_queries_of_mask(memo, mask, 1, torch.tensor([0, 2]))),
    ],
)
def test_layers_share_a_result_while_the_mask_is_there(mask, make):
    memo, one, other = {}, mask(), mask()
    assert make(memo, one) is make(memo, one)
    assert make(memo, other) is not make(memo, one)
    del one
    assert len(memo) == 1  # on further devices each layer has a copy of its own
    del other
    assert not memo


def test_another_mask_of_the_same_id_is_another():
    memo, mask, gone = {}, dense(), dense()
    memo["extended", id(mask)] = (weakref.ref(gone), "that of the one before")
    del gone
    assert extended_mask(memo, mask, T, P * B).shape == (P * B, 1, S, T + K)


def test_different_results_of_one_mask_are_kept_apart():
    memo, mask = {}, torch.ones(P * B, 1, 1, K, dtype=torch.bool)
    assert extended_mask(memo, mask, T, P * B).shape == (P * B, 1, 1, T + K)
    assert visible_lengths_once(memo, mask).tolist() == [K] * (P * B)
    assert rows_of_mask(memo, mask, B).shape == (B, 1, 1, K)


def test_the_first_rows_of_a_block_mask_are_asked_by_its_own_function(monkeypatch):
    """In eager layers, in compiled ones, and in eager ones behind them."""
    memo, mask = {}, blocks()
    queries, keys = torch.meshgrid(torch.arange(S), torch.arange(K), indexing="ij")
    for compiling in (False, True, False):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        rows = rows_of_mask(memo, mask, B)
        assert rows.shape == (B, 1, S, K)
        assert torch.equal(rows.mask_mod(0, 0, queries, keys), torch.ones(S, K, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    "make", [lambda memo, mask: rows_of_mask(memo, mask, B), lambda memo, mask: extended_mask(memo, mask, T, P * B)]
)
def test_an_eager_layer_behind_a_compiled_one_makes_a_block_mask_of_its_own(make, monkeypatch):
    memo, mask = {}, blocks()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = make(memo, mask)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert make(memo, mask).shape == compiled.shape


def test_a_mask_that_is_learned_gets_its_gradient():
    mask = torch.zeros(6, 1, S, K, requires_grad=True)
    rows_of_mask({}, mask, 2).sum().backward()
    assert torch.equal(mask.grad, torch.cat([torch.ones(2, 1, S, K), torch.zeros(4, 1, S, K)]))
