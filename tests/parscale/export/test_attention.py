"""Grouped attention against torch's own, and what it refuses."""

import pytest
import torch
from torch import nn

from parscale.attention.grouped import grouped_attention


def tensors(heads=4, groups=2, queries=3, keys=7, size=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, queries, size), (2, groups, keys, size), (2, groups, keys, size + 2))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_grouped_attention_is_torchs_attention(scaling, additive):
    query, key, value = tensors()
    mask = torch.rand(2, 1, 3, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[..., 0] = True
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if additive else mask
    output, weights = grouped_attention(None, query, key, value, given, scaling=scaling)
    expected = nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (query, key, value)), attn_mask=mask, scale=scaling, enable_gqa=True
    )
    assert weights is None
    torch.testing.assert_close(output.double(), expected.transpose(1, 2), rtol=0, atol=1e-6)


def test_scores_are_capped_before_the_mask():
    query, key, value = (x[:, :2].double() for x in tensors())
    mask = torch.ones(1, 1, 3, 7, dtype=torch.bool).tril(4)
    output, _ = grouped_attention(None, 9 * query, key, value, mask, softcap=2.0)
    scores = 2.0 * torch.tanh(torch.einsum("bhsd,bhkd->bhsk", 9 * query, key) / 8**0.5 / 2.0)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    torch.testing.assert_close(output, torch.einsum("bhsk,bhkd->bshd", weights, value))


def test_padding_that_sees_nothing_stays_finite():
    query, key, value = tensors()
    output, _ = grouped_attention(None, query, key, value, torch.zeros(2, 1, 3, 7, dtype=torch.bool))
    assert output.isfinite().all()


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_what_would_change_the_result_is_refused(name):
    mask = torch.ones(1, 1, 3, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=name):
        grouped_attention(nn.Linear(1, 1), *tensors(), mask, **{name: torch.zeros(4)})


def test_a_mask_is_needed():
    with pytest.raises(ValueError, match="attention_mask"):
        grouped_attention(nn.Linear(1, 1), *tensors(), None)
