"""Both operations of decode attention refuse what does not fit: a kernel would read beside the tensors."""

import itertools
import re

import pytest
import torch
from torch import zeros

from parscale.kernels import decode_attention, shared_decode_attention

OPERATIONS = [decode_attention, shared_decode_attention]
R, HEADS, G, K, D, DV, P, T = 4, 4, 2, 20, 16, 12, 2, 3


def arguments(operation):
    """Tensors that fit, by name, and how many rows the keys have."""
    rows, prefixes = (R, P) if operation is decode_attention else (R // P, P - 1)
    return {
        "query": zeros(R, HEADS, 1, D),
        "key": zeros(rows, G, K, D),
        "value": zeros(rows, G, K, DV),
        "prefix_k": zeros(prefixes, G, T, D),
        "prefix_v": zeros(prefixes, G, T, DV),
        "mask": None,
    }, rows


TENSORS = {  # the changed tensors: the size of a dimension
    "half the values": {"value": {2: 10}},
    "fewer rows of keys": {"key": {0: 1}},
    "fewer rows of values": {"value": {0: 1}},
    "fewer heads of keys": {"key": {1: 1}},
    "fewer heads of values": {"value": {1: 1}},
    "queries of another size": {"query": {3: 8}},
    "prefix_k of another size": {"prefix_k": {3: 8}},
    "prefix_v of another size": {"prefix_v": {3: 8}},
    "fewer heads of prefix_k": {"prefix_k": {1: 1}},
    "fewer heads of prefix_v": {"prefix_v": {1: 1}},
    "one token of prefix_v": {"prefix_v": {2: 1}},
    "prefix_v of more streams": {"prefix_v": {0: 4}},
    "three heads for two": {"query": {1: 3}},
    "no key/value heads": {name: {1: 0} for name in ("key", "value", "prefix_k", "prefix_v")},
    "two tokens": {"query": {2: 2}},
}


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors(change, operation, impl):
    given, _ = arguments(operation)
    for name, sizes in change.items():
        given[name] = zeros([sizes.get(dim, size) for dim, size in enumerate(given[name].shape)])
    shapes = ", ".join(str(tuple(given[name].shape)) for name in ("query", "key", "value", "prefix_k"))
    with pytest.raises(ValueError, match=rf"{operation.__name__} takes query .* heads a.*got {re.escape(shapes)}"):
        operation(**given, impl=impl)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_no_streams(impl):
    given, _ = arguments(decode_attention)
    for name in ("prefix_k", "prefix_v"):
        given[name] = given[name][:0]
    with pytest.raises(ValueError, match=r"decode_attention takes query .*got \(4, 4, 1, 16\)"):
        decode_attention(**given, impl=impl)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 12), (1, 1, 1, 1), (1, 2, 1, K), (3, 1, 1, K), (1, 1, 2, K), (1, K)])
def test_masks(shape, operation, impl):
    given, rows = arguments(operation)
    allowed = f"({rows} or 1, 4 or 1, 1, {'20 or 23' if operation is decode_attention else '20'})"
    expected = re.escape(f"{operation.__name__} takes a mask of shape {allowed}")
    with pytest.raises(ValueError, match=f"{expected}.*got {re.escape(str(shape))}"):
        operation(**given | {"mask": torch.ones(shape, dtype=torch.bool)}, impl=impl)


def test_a_mask_over_prefixes_of_shared_keys():
    given, _ = arguments(shared_decode_attention)
    with pytest.raises(ValueError, match=r"takes a mask of shape \(2 or 1, 4 or 1, 1, 20\).*got \(1, 1, 1, 23\)"):
        shared_decode_attention(**given | {"mask": zeros(1, 1, 1, T + K)})


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("numbers", [0, 3])
def test_lengths(numbers, operation, impl):
    given, rows = arguments(operation)
    length = torch.ones(numbers, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"takes a length of 1 number, or of {rows}.*got \({numbers},\)"):
        operation(**given, length=length, impl=impl)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("shape", [(2,), (1,), (1, HEADS)])
def test_sinks(shape, impl):
    given, _ = arguments(decode_attention)
    with pytest.raises(ValueError, match=rf"takes sinks of shape \(4,\).*got {re.escape(str(shape))}"):
        decode_attention(**given, sinks=zeros(shape), impl=impl)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_fits(operation):
    given, rows = arguments(operation)
    columns = (K, T + K) if operation is decode_attention else (K,)
    for shape in itertools.product((1, rows), (1, HEADS), (1,), columns):
        assert operation(**given | {"mask": torch.ones(shape, dtype=torch.bool)}).shape == (R, HEADS, 1, DV)
    for numbers in (1, rows):
        assert operation(**given, length=torch.ones(numbers, dtype=torch.int32)).shape == (R, HEADS, 1, DV)


@pytest.mark.nightly
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_lengths_share_a_graph(operation):
    """The comparisons hold for any length of the cache, whose mask has its own size."""
    torch._dynamo.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend=count)
    for length in (7, 8, 30):
        given, rows = arguments(operation)
        given |= {"key": zeros(rows, G, length, D), "value": zeros(rows, G, length, DV)}
        compiled(**given | {"mask": torch.ones(rows, 1, 1, length, dtype=torch.bool)})
    assert len(graphs) == 1
