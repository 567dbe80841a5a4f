"""Decode attention: the Triton kernels against one softmax in float64, for every mask and option."""

from typing import NamedTuple

import pytest
import torch

from parscale.kernels import decode_attention, visible_lengths
from parscale.kernels.decode_attention.joined import decode_attention_joined

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
INF = float("inf")
BIAS = 5.0  # of keys


class Shape(NamedTuple):
    P: int
    B: int
    G: int
    n: int  # queries of a key/value head
    D: int
    V: int
    T: int
    K: int


TINY = Shape(1, 1, 1, 1, 4, 4, 1, 1)
ODD = Shape(3, 2, 1, 6, 15, 15, 3, 40)
GROUPED = Shape(2, 2, 2, 3, 64, 64, 48, 130)
SHAPES = [
    (TINY, SINGLE),
    (ODD, SINGLE),
    (GROUPED, SINGLE),
    (GROUPED, HALF),
    (GROUPED, BRAIN),
    (Shape(8, 1, 2, 8, 96, 96, 48, 70), BRAIN),
    (Shape(4, 1, 2, 1, 24, 16, 5, 9), SINGLE),  # values of another size than keys
    (Shape(2, 1, 1, 17, 192, 128, 7, 33), HALF),
    (Shape(2, 1, 1, 2, 256, 256, 5, 40), BRAIN),
    (Shape(2, 1, 2, 1, 80, 80, 130, 20), HALF),  # a prefix of several blocks
    (Shape(2, 0, 2, 1, 16, 16, 5, 20), SINGLE),  # no rows
    (Shape(2, 1, 2, 1, 16, 16, 5, 0), SINGLE),  # nothing cached
    (Shape(1, 2, 2, 3, 16, 16, 0, 40), SINGLE),  # no prefix, as the plain backbone
]
AT_THE_ENDS = [pytest.param([length], marks=pytest.mark.nightly) for length in (0, 130, 200)]  # of the cache
MASKS = [
    "boolean",
    "boolean, one row",
    "boolean, per head",
    "boolean, cache alone",
    "boolean, cache alone, per head",
    "additive -inf",
    "additive smallest",
    "additive smallest, cache alone",
    "additive, per head",
    "nothing cached",
    "window",
]


def inputs(shape, dtype, device, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    R = shape.P * shape.B
    sizes = (
        (R, shape.G * shape.n, 1, shape.D),
        (R, shape.G, shape.K, shape.D),
        (R, shape.G, shape.K, shape.V),
        (shape.P, shape.G, shape.T, shape.D),
        (shape.P, shape.G, shape.T, shape.V),
    )
    tensors = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
    tensors[0] *= scale
    # as Qwen2's, whose scores are large and nearly alike
    bias = BIAS * torch.randn(1, shape.G, 1, shape.D, generator=generator, dtype=torch.float64)
    tensors[1], tensors[3] = tensors[1] + bias, tensors[3] + bias
    return [x.to(dtype).to(device) for x in tensors]


def make_mask(kind, shape, dtype, device):
    rows = 1 if "one row" in kind else shape.P * shape.B
    heads = shape.G * shape.n if "per head" in kind else 1
    alone = "cache alone" in kind
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(rows, heads, 1, shape.K + (0 if alone else shape.T), generator=generator) < 0.6
    if kind == "nothing cached":
        seen = torch.zeros_like(seen)
    if kind == "window":
        seen = (torch.arange(seen.shape[-1]) >= seen.shape[-1] - 9).expand_as(seen).clone()
    if not alone:
        seen[..., : shape.T] = True
    mask = seen
    if kind == "additive, per head":
        mask = torch.randn(seen.shape, generator=generator).to(dtype)
    elif "additive" in kind:
        least = -INF if "-inf" in kind else torch.finfo(dtype).min
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, least)
    return mask.to(device)


def compare(check, tensors, mask=None, **options):
    exact_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact_options = {k: v.double() if k == "sinks" else v for k, v in options.items()}
    exact = decode_attention_joined(*(x.double() for x in tensors), exact_mask, **exact_options)
    reference = decode_attention_joined(*tensors, mask, **options)
    check(decode_attention(*tensors, mask, impl="fused", **options), reference, exact)


@pytest.mark.kernel
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_against_float64(shape, dtype, device, poisoned, assert_as_exact):
    compare(assert_as_exact, inputs(shape, dtype, device))


@pytest.mark.grid
@pytest.mark.kernel
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("shape", "dtype"), [(ODD, SINGLE), (GROUPED, HALF)], ids=str)
def test_masks(kind, shape, dtype, device, poisoned, assert_as_exact):
    compare(assert_as_exact, inputs(shape, dtype, device), make_mask(kind, shape, dtype, device))


@pytest.mark.grid
@pytest.mark.kernel
@pytest.mark.parametrize("kind", [None, "additive, per head", "additive smallest, cache alone"])
@pytest.mark.parametrize("shape", [TINY, ODD, GROUPED], ids=str)
def test_nothing_beside_the_tensors_is_read(shape, kind, device, guarded):
    tensors = inputs(shape, SINGLE, device)
    mask = None if kind is None else make_mask(kind, shape, SINGLE, device)
    sinks = torch.linspace(-2, 6, shape.G * shape.n, device=device)
    found = decode_attention(*map(guarded, tensors), guarded(mask), sinks=guarded(sinks), impl="fused")
    assert found.isfinite().all()
    assert torch.equal(found, decode_attention(*tensors, mask, sinks=sinks, impl="fused"))


@pytest.mark.kernel
@pytest.mark.parametrize("splits", [1, 3, *(pytest.param(splits, marks=pytest.mark.nightly) for splits in (2, 7))])
def test_splits(splits, device, poisoned, assert_as_exact):
    """However the sequence is cut, with sinks and without, the parts make the same whole."""
    from parscale.kernels.decode_attention.fused import decode

    tensors = inputs(GROUPED, SINGLE, device)
    mask = make_mask("nothing cached", GROUPED, SINGLE, device)  # most parts see nothing
    for sinks in (None, torch.linspace(-3, 9, 6, device=device)):
        for seen in (None, mask):
            exact_sinks = None if sinks is None else sinks.double()
            exact = decode_attention_joined(*(x.double() for x in tensors), seen, sinks=exact_sinks)
            reference = decode_attention_joined(*tensors, seen, sinks=sinks)
            found = decode(*tensors, seen, None, sinks, 64**-0.5, None, splits=splits)
            assert_as_exact(found, reference, exact)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "length", [pytest.param([7], marks=pytest.mark.nightly), [0, 1, 64, 65], *AT_THE_ENDS], ids=str
)
def test_valid_length(length, device, poisoned, assert_as_exact):
    """What lies beyond it may be anything."""
    tensors = inputs(GROUPED, SINGLE, device)
    length = torch.tensor(length, device=device)
    compare(assert_as_exact, tensors, length=length)
    hidden = torch.arange(130, device=device) >= length.view(-1, 1)  # (R or 1, K)
    spoiled = [x.masked_fill(hidden[:, None, :, None], float("nan")) for x in tensors[1:3]]
    found, clean = (
        decode_attention(tensors[0], *cache, *tensors[3:], None, length=length, impl="fused")
        for cache in (spoiled, tensors[1:3])
    )
    assert torch.equal(found, clean)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("boolean, cache alone", marks=pytest.mark.nightly),
        "additive smallest, cache alone",
        "boolean, cache alone, per head",
    ],
)
def test_what_a_mask_hides_at_the_end_need_not_be_read(kind, device):
    """With the length that a mask allows the result is the same, and what lies beyond may be anything."""
    tensors = inputs(GROUPED, SINGLE, device)
    mask = make_mask(kind, GROUPED, SINGLE, device)
    for row, seen in enumerate((130, 77, 3, 0)):
        mask[row, ..., seen:] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    length = visible_lengths(mask)
    assert length.shape == (4,)
    assert all(length.tolist()[row] <= seen for row, seen in enumerate((130, 77, 3, 0)))
    hidden = torch.arange(130, device=device) >= length.view(-1, 1)
    spoiled = [x.masked_fill(hidden[:, None, :, None], float("nan")) for x in tensors[1:3]]
    found = decode_attention(tensors[0], *spoiled, *tensors[3:], mask, length=length, impl="fused")
    torch.testing.assert_close(found, decode_attention(*tensors, mask, impl="fused"))


@pytest.mark.parametrize("dtype", [torch.bool, BRAIN], ids=str)
def test_visible_lengths(dtype):
    seen = torch.zeros(5, 2, 1, 9, dtype=torch.bool)
    expected = [0, 1, 9, 4, 6]
    for row, length in enumerate(expected):
        seen[row, row % 2, 0, max(0, length - 3) : length] = True
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -INF).to(dtype)
    assert visible_lengths(mask).tolist() == expected


@pytest.mark.kernel
def test_hidden_tokens_do_not_count(device):
    """However large they are."""
    tensors = inputs(GROUPED, SINGLE, device)
    mask = make_mask("boolean, cache alone", GROUPED, SINGLE, device)
    spoiled = [x.masked_fill(~mask.transpose(-1, -2), 1e30) for x in tensors[1:3]]
    found = decode_attention(tensors[0], *spoiled, *tensors[3:], mask, impl="fused")
    assert torch.equal(found, decode_attention(*tensors, mask, impl="fused"))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_sinks_soft_cap_and_scaling(dtype, device, poisoned, assert_as_exact):
    tensors = inputs(GROUPED, dtype, device, scale=4.0)
    sinks = torch.linspace(-2, 6, 6).to(dtype).to(device)
    mask = make_mask("boolean", GROUPED, dtype, device)
    compare(assert_as_exact, tensors, mask, sinks=sinks, softcap=5.0, scaling=0.3)
    compare(assert_as_exact, tensors, mask, softcap=50.0)


@pytest.mark.kernel
def test_extreme_scores(device, poisoned, assert_as_exact):
    compare(assert_as_exact, inputs(GROUPED, SINGLE, device, scale=300.0))
    compare(assert_as_exact, inputs(GROUPED, SINGLE, device, scale=0.0))


@pytest.mark.kernel
def test_strides(device, poisoned, assert_as_exact):
    """A part of a longer static cache, keys by token first, a query that is a slice."""
    query, key, value, prefix_k, prefix_v = inputs(GROUPED, SINGLE, device)
    long = torch.full((4, 2, 200, 64), float("nan"), device=device)
    long[:, :, 30:160] = key
    by_token = value.transpose(1, 2).contiguous().transpose(1, 2)
    query = torch.stack([query, query], dim=2)[:, :, 0]
    tensors = [query, long[:, :, 30:160], by_token, prefix_k.mT.contiguous().mT, prefix_v]
    compare(assert_as_exact, tensors)


@pytest.mark.kernel
def test_strides_of_length_and_sinks(device, poisoned, assert_as_exact):
    """One length for all rows, every second of some, and sinks that are a column."""
    tensors = inputs(GROUPED, SINGLE, device)
    sinks = torch.linspace(-2, 6, 12, device=device).view(6, 2)[:, 0]
    for length in (torch.tensor([70], device=device).expand(4), torch.tensor([7, 0, 64, 0, 65, 0, 9, 0])[::2]):
        compare(assert_as_exact, tensors, length=length.to(device), sinks=sinks)


@pytest.mark.kernel
def test_nothing_in_sight_gives_nothing(device):
    tensors = inputs(ODD, SINGLE, device)
    mask = torch.zeros(6, 1, 1, 43, dtype=torch.bool, device=device)
    assert not decode_attention(*tensors, mask, impl="fused").any()


@pytest.mark.kernel
def test_compiles_in_one_graph(device):
    tensors = inputs(ODD, SINGLE, device)
    mask = make_mask("boolean", ODD, SINGLE, device)
    compiled = torch.compile(lambda *x: decode_attention(*x, impl="fused") * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, mask), decode_attention(*tensors, mask, impl="fused") * 2)
    operator = torch.ops.parscale.decode_attention.default
    torch.library.opcheck(operator, (*tensors, mask, None, None, 0.25, None))


@pytest.mark.parametrize("options", [{}, {"sinks": torch.randn(6)}, {"softcap": 5.0}, {"length": torch.tensor([3])}])
def test_references_agree(options):
    tensors = inputs(ODD, torch.float64, "cpu")
    mask = make_mask("boolean, cache alone", ODD, torch.float64, "cpu")
    found = decode_attention(*tensors, mask, **options)
    torch.testing.assert_close(found, decode_attention_joined(*tensors, mask, **options))


def test_what_does_not_fit_is_named():
    tensors = inputs(ODD, SINGLE, "cpu")
    with pytest.raises(ValueError, match=r"query \(P\*B, heads, 1, D\).*got \(6, 6, 2, 15\)"):
        decode_attention(torch.zeros(6, 6, 2, 15), *tensors[1:], None)
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(tensors[0].double(), *tensors[1:], None, impl="fused")
    with pytest.raises(ValueError, match="a gradient is recorded"):
        decode_attention(tensors[0].requires_grad_(), *tensors[1:], None, impl="fused")
    with pytest.raises(ValueError, match="impl must be"):
        decode_attention(*tensors, None, impl="fast")
