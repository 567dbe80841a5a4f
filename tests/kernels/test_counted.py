"""What can be counted without a GPU: compiled variants, launches, bytes, programs, and the time that they leave for.

The host functions run on tensors without data, their launches are recorded, and nothing is compiled or run.
"""

import dataclasses
import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch

from parscale.kernels import decode_attention
from parscale.kernels.decode_attention.api import MOST_QUERIES

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
LENGTHS = sorted({*range(1, 70), *range(70, 4097, 53), *(2**i + d for i in range(5, 13) for d in (-1, 0, 16)), 4096})
ROWS = sorted({*range(1, 70), *range(70, 8193, 101), *(2**i + d for i in range(5, 13) for d in (-1, 0, 16)), 8192})


@pytest.fixture(scope="module")
def benchmark():
    """Imports a benchmark by its name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


def fused(name):
    return importlib.import_module(f"parscale.kernels.{name}.fused")


def decode(targets, K, P=8, B=1, mask=None, shared=False):
    rows, prefixes = (B, P - 1) if shared else (P * B, P)
    sizes = ((P * B, 16, 1, 96), (rows, 2, K, 96), (rows, 2, K, 96), (prefixes, 2, 48, 96), (prefixes, 2, 48, 96))
    mask = None if mask is None else targets.empty(rows, 1, 1, K, dtype=mask)
    fused("decode_attention").decode(*(targets.empty(*s) for s in sizes), mask, None, None, 0.1, None)


def variants(targets, launches):
    """How many versions of each kernel Triton compiles for these launches."""
    found = {}
    for name, *what in map(targets.variant, launches):
        found.setdefault(name, set()).add(tuple(what))
    return {name: len(kinds) for name, kinds in found.items()}


def some_or_all(name, some, most):
    """A parameter that is each of some numbers by day, and each up to the largest one at night."""
    every = pytest.param(range(1, most + 1), id="all", marks=pytest.mark.nightly)
    return pytest.mark.parametrize(name, [pytest.param(some, id="some"), every])


@pytest.mark.parametrize("shared", [False, True], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.bfloat16], ids=str)
@some_or_all("lengths", LENGTHS, 4096)
def test_a_growing_cache_compiles_nothing_new(benchmark, mask, shared, lengths):
    """At most the sequence in one piece and in several."""
    targets = benchmark("compile_targets")
    with targets.recorded("sm_90") as launches:
        for K in lengths:
            decode(targets, K, mask=mask, shared=shared)
    assert len(launches) > len(lengths)
    assert variants(targets, launches) == {"part_kernel": 1, "merge_kernel": 1}
    with targets.recorded("sm_90") as launches:
        for B in (1, 2, 5, 40, 100, 400):
            for K in (16, 17, 1000):
                decode(targets, K, B=B, mask=mask, shared=shared)
    assert variants(targets, launches) == {"part_kernel": 2, "merge_kernel": 1}


@some_or_all("rows", ROWS, 8192)
def test_other_numbers_of_rows_compile_nothing_new(benchmark, rows):
    """Two blocks of few rows; what follows them starts early, what follows cuBLAS does not."""
    targets = benchmark("compile_targets")
    P, H = 8, 1536
    weights = [targets.empty(*size) for size in ((H, H * P), (H,), (P, H), (P,))]
    with targets.recorded("sm_90") as launches:
        for N in rows:
            x, logits = targets.empty(P, N, H), targets.empty(N, P, dtype=torch.float32)
            fused("aggregator").forward(x, *weights, 0.1, False)
            fused("aggregate").backward(targets.empty(N, H), x, logits, 0.1)
    expected = {"few_rows_kernel": 2, "finish_kernel": 2, "join_kernel": 1, "backward_kernel": 1}
    assert variants(targets, launches) == expected


@some_or_all("rows", ROWS, 8192)
def test_one_warm_up_covers_what_vllm_runs(benchmark, rows):
    """Rows as they lie there, `(N, P, H)`: any batch runs the version that the first one compiled."""
    targets = benchmark("compile_targets")
    with targets.recorded("sm_90") as launches:
        for N in rows:
            x = targets.empty(N, 8, 1536).transpose(0, 1)
            fused("aggregate").forward(x, targets.empty(N, 8, dtype=torch.float32), 0.1)
    assert variants(targets, launches) == {"forward_kernel": 1}


def test_launches_of_a_step(benchmark):
    """Two for each layer, the second of which starts early where the GPU can do that; two of the aggregator."""
    targets = benchmark("compile_targets")
    for target in TARGETS:
        with targets.recorded(target) as launches:
            decode(targets, 4096)
        assert [launch.kernel.__name__ for launch in launches] == ["part_kernel", "merge_kernel"]
        early = target in ("sm_90", "sm_100", "sm_120")
        assert [launch.meta.get("launch_pdl", False) for launch in launches] == [False, early]
        assert [launch.meta["EARLY"] for launch in launches] == [early, early]
        with targets.recorded(target) as launches:
            decode(targets, 4096, B=200)
        assert [launch.kernel.__name__ for launch in launches] == ["part_kernel"]
        assert launches[0].meta["EARLY"] is False  # what follows is not ours, and does not wait


@pytest.mark.parametrize(("target", "processors"), [*((target, None) for target in TARGETS), ("sm_90", 114)])
def test_the_parts_of_a_sequence_fill_the_gpu_once(benchmark, target, processors, monkeypatch):
    """Of each target's GPU, and of a smaller H100."""
    targets = benchmark("compile_targets")
    gpu = targets.TARGETS[target].gpu
    if processors is not None:
        gpu = dataclasses.replace(gpu, processors=processors)
        monkeypatch.setitem(targets.TARGETS, target, dataclasses.replace(targets.TARGETS[target], gpu=gpu))
    part = fused("decode_attention")
    config = part.part_config(8, 96, 96, torch.bfloat16, gpu)
    resident_programs = gpu.processors * part.part_programs(config, 8, 96, 96, torch.bfloat16, gpu)
    for K in (512, 1000, 4096, 16384, 32768):
        with targets.recorded(target) as launches:
            decode(targets, K)
        rows, splits = launches[0].grid
        blocks = sum(-(-tokens // launches[0].meta["BT"]) for tokens in (48, K))  # of prefix and cache
        waves = -(-rows * splits // resident_programs)
        assert waves == 1 or blocks > 5 * splits  # a second time only where the sequence is long
        most = min(part.MAX_SPLITS, resident_programs // rows)
        assert waves > 1 or -(-blocks // splits) == -(-blocks // most)  # no program could have fewer blocks


@pytest.mark.parametrize("target", TARGETS)
def test_every_size_has_the_shared_memory_that_it_takes(benchmark, target):
    """Counted as the compiler lays it out: what it does is compared with this at night, for each target."""
    gpu, part = benchmark("compile_targets").TARGETS[target].gpu, fused("decode_attention")
    sizes = itertools.product((1, 16, 17, 32, 33, MOST_QUERIES), (8, 64, 80, 96, 128, 192, 256), (8, 64, 128, 256))
    for (queries, D, V), dtype in itertools.product(sizes, (torch.float16, torch.bfloat16, torch.float32)):
        config = part.part_config(queries, D, V, dtype, gpu)
        assert part.part_shared(config, queries, D, V, dtype, gpu) <= gpu.most_shared, (queries, D, V, dtype)


def test_decode_attention_makes_at_most_40_python_calls(benchmark, monkeypatch):
    """What a layer's step calls in Python before its two launches, with the mask and the length of a static cache."""
    monkeypatch.setattr("parscale.kernels.dispatch._interpreted", lambda: True)
    sizes = ((8, 16, 1, 96), (8, 2, 256, 96), (8, 2, 256, 96), (8, 2, 48, 96), (8, 2, 48, 96))
    states = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    mask, length = torch.ones(8, 1, 1, 256, dtype=torch.bool), torch.tensor([200])
    found = []

    def note(frame, event, argument):
        if event == "call" and "unittest" not in frame.f_code.co_filename:
            found.append(frame.f_code.co_name)

    with benchmark("compile_targets").recorded("sm_90") as launches, torch.no_grad():
        for _ in range(2):  # the first one imports, and chooses the splits
            found.clear()
            sys.setprofile(note)
            try:
                decode_attention(*states, mask, length=length, impl="fused")
            finally:
                sys.setprofile(None)
    assert len(launches) == 4
    assert len(found) <= 40, found


@pytest.mark.parametrize("H", [1536, 2560])
@some_or_all("rows", [*range(1, 600), *range(600, 2048, 7), *range(2048, 16385, 64)], 16384)
def test_counted_time_grows_smoothly_with_rows(benchmark, rows, H):
    """At every number the counted time is at most twice the floor, and at the next one it is not much longer."""
    roofline = benchmark("roofline")
    shares = [roofline.aggregator(8, N, H)["of_floor"] for N in rows]
    assert min(shares) >= 0.5
    assert max(a - b for a, b in itertools.pairwise(shares)) < 0.2


def test_the_sweep_finds_a_cliff(benchmark, monkeypatch):
    """A product of one block for each 128 rows, as few rows once had it, falls below."""
    roofline = benchmark("roofline")

    def one_block(M, N, K):
        processors, blocks = roofline.PROCESSORS, -(-M // 128) * -(-N // 128)
        return 2.0 * 128 * 128 * K * processors / roofline.OPERATIONS_PER_SECOND * -(-blocks // processors)

    monkeypatch.setattr(roofline, "product_seconds", one_block)
    assert roofline.aggregator(8, 64, 1536)["of_floor"] < 0.5


@pytest.mark.parametrize("K", [512, 1024, 1640, 4096, 8192, 16384])
def test_bytes_of_a_step_with_shared_keys(benchmark, K):
    """One cache for all streams: what must move is 1.013 times the plain backbone's at any length, and 5 per cent."""
    assert 1.01 <= benchmark("roofline").step_bytes(K, shared=True) <= 1.05 * 1.013


@pytest.mark.parametrize(("K", "ratio"), [(512, 1.041), (1024, 1.068), (1640, 1.100), (4096, 1.226), (8192, 1.426)])
def test_bytes_of_a_decoding_step(benchmark, K, ratio):
    """Of a 1.8B shape with P = 8, counted from the launches, to those with P = 1: what must move, and 5 per cent."""
    assert ratio * 0.99 <= benchmark("roofline").step_bytes(K, shared=False) <= 1.05 * ratio


def test_the_published_tables_are_what_is_counted(benchmark):
    page = (BENCHMARKS.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    for name, table in benchmark("roofline").tables().items():
        assert table in page, f"{name}: run benchmarks/roofline.py"
