"""What the launches of an operation must take on a GPU, counted without one: bytes, operations, programs, launches.

    python benchmarks/roofline.py        # tables of a decoding step, the aggregator and decode attention on an H100

The host functions run on tensors without data and their launches are recorded. A launch takes the larger of its bytes
at the GPU's bandwidth and its operations at its rate, each divided by the share of the GPU that its programs occupy,
and never less than starting it. A matrix product by cuBLAS is counted at the best of the usual tiles and splits. None
of these figures is a measurement.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any
from unittest import mock

import torch
from compile_targets import Launch, empty, recorded

# What an H100's memory and matrix units reach, and what a kernel in a captured graph takes at least.
BYTES_PER_SECOND = 3.0e12  # of a copy
OPERATIONS_PER_SECOND = 8.0e14  # in bfloat16, dense
LAUNCH_SECONDS = 1.5e-6
PROCESSORS = 132
TILES = [(rows, columns) for rows in (64, 128, 256) for columns in (64, 128, 256) if rows * columns <= 128 * 256]


def moved(launch: Launch) -> int:
    """Bytes of the tensors that a launch reads or writes, each once."""
    tensors = {id(x): x for x in launch.args if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.itemsize for x in tensors.values())


def launch_seconds(launch: Launch) -> float:
    """Of a kernel that is bound by memory."""
    programs = 1
    for size in launch.grid:
        programs *= size
    share = min(1.0, programs / PROCESSORS)
    return max(LAUNCH_SECONDS, moved(launch) / BYTES_PER_SECOND / share)


def product_seconds(M: int, N: int, K: int) -> float:
    """`(M, K) @ (K, N)` in half precision with float32 results."""
    best = float("inf")
    for rows, columns in TILES:
        tiles = -(-M // rows) * -(-N // columns)
        for splits in (1, 2, 4, 8, 16):
            waves = -(-tiles * splits // PROCESSORS)
            operations = 2.0 * rows * columns * K / splits * waves * PROCESSORS / OPERATIONS_PER_SECOND
            share = min(1.0, tiles * splits / PROCESSORS)
            traffic = 2.0 * (M * K + N * K) + 4.0 * M * N * (2 * splits - 1)
            best = min(best, max(operations, traffic / BYTES_PER_SECOND / share))
    return max(LAUNCH_SECONDS, best)


def aggregator(P: int, N: int, H: int) -> dict[str, Any]:
    """Launches of the aggregator's forward pass in bfloat16 on an H100, their time, and the floor of any way."""
    fused = importlib.import_module("parscale.kernels.aggregator.fused")
    tensors = [empty(*size) for size in ((P, N, H), (H, H * P), (H,), (P, H), (P,))]
    products: list[float] = []

    def multiply(joined: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products.append(product_seconds(joined.shape[0], weight.shape[0], weight.shape[1]))
        return empty(joined.shape[0], weight.shape[0], dtype=torch.float32)

    with recorded("sm_90") as launches, mock.patch.object(fused, "_multiply", multiply):
        fused.forward(*tensors, 0.1, False)
    seconds = sum(map(launch_seconds, launches)) + sum(products)
    least = 2.0 * (P * N * H + N * H + P * H * H) / BYTES_PER_SECOND
    floor = max(least, 2.0 * N * P * H * H / OPERATIONS_PER_SECOND)
    return {"launches": len(launches) + len(products), "seconds": seconds, "floor": floor, "of_floor": floor / seconds}


def decode(P: int, B: int, K: int, *, shared: bool = False) -> dict[str, Any]:
    """The same of decode attention in a 1.8B shape, with `moved` bytes; `shared`: over the keys of stream 0."""
    fused = importlib.import_module("parscale.kernels.decode_attention.fused")
    G, n, D, T = 2, 8, 96, 48
    rows, prefixes = (B, P - 1) if shared else (P * B, P)
    sizes = ((P * B, G * n, 1, D), (rows, G, K, D), (rows, G, K, D), (prefixes, G, T, D), (prefixes, G, T, D))
    tensors = [empty(*size) for size in sizes]
    with recorded("sm_90") as launches:
        fused.decode(*tensors, None, None, None, D**-0.5, None)
    seconds = sum(map(launch_seconds, launches))
    floor = sum(x.numel() * x.itemsize for x in (*tensors, tensors[0])) / BYTES_PER_SECOND
    found = {"launches": len(launches), "moved": sum(map(moved, launches)), "splits": launches[0].grid[1]}
    return found | {"seconds": seconds, "floor": floor, "of_floor": floor / seconds}


def step_bytes(K: int, *, shared: bool) -> float:
    """Bytes of a decoding step of a 1.8B shape with P = 8 after K tokens, to those with P = 1."""
    P, H, layers = 8, 1536, 36
    weights, cached = 3.61e9, 27_648 * K  # with P = 1: 36 layers of 2 key/value heads of 96, in bfloat16
    fused = importlib.import_module("parscale.kernels.aggregator.fused")
    tensors = [empty(*size) for size in ((P, 1, H), (H, H * P), (H,), (P, H), (P,))]
    with recorded("sm_90") as launches:
        fused.forward(*tensors, 0.1, False)
    attention = layers * decode(P, 1, K, shared=shared)["moved"]
    return (weights + attention + sum(map(moved, launches))) / (weights + cached)


def tables() -> dict[str, str]:
    """What `docs/gpu.md` shows, in Markdown: the bytes of a step by length, and the aggregator by rows."""
    lengths = (512, 1024, 1640, 4096, 8192)
    lines = [f"| cached tokens | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
    for name, shared in (("one cache for each stream", False), ('one cache for all streams (`kv="shared"`)', True)):
        lines.append(f"| {name} | " + " | ".join(f"{step_bytes(K, shared=shared):.3f}" for K in lengths) + " |")
    sizes = (1536, 2560)
    titles = [f"H = {H}: floor, us | counted, us" for H in sizes]
    rows = [f"| rows | {' | '.join(titles)} |", "|---" * (2 * len(sizes) + 1) + "|"]
    for N in (1, 8, 32, 33, 64, 256, 1024, 4096, 16384):
        found = [aggregator(8, N, H) for H in sizes]
        cells = [f"{1e6 * row[key]:.0f}" for row in found for key in ("floor", "seconds")]
        rows.append(f"| {N} | {' | '.join(cells)} |")
    return {"step": "\n".join(lines), "aggregator": "\n".join(rows)}


def main() -> None:
    print("\n\n".join(tables().values()))
    print("\n| decode attention, P = 8, each layer | launches | splits | floor, us | counted, us |")
    print("|---|---|---|---|---|")
    for shared, B, K in itertools.product((False, True), (1, 8, 64), (512, 4096, 16384)):
        row = decode(8, B, K, shared=shared)
        times = f"{1e6 * row['floor']:.1f} | {1e6 * row['seconds']:.1f}"
        name = f"B = {B}, K = {K}, keys {'of stream 0' if shared else 'of each stream'}"
        print(f"| {name} | {row['launches']} | {row['splits']} | {times} |")


if __name__ == "__main__":
    main()
