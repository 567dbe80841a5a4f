"""The clock, the results and the inputs of the programs for a GPU."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from parscale.kernels.dispatch import TRITON
from parscale.kernels.prefix import prepend

Call = Callable[[], Any]
Row = dict[str, Any]


class Bench:
    """Sizes, device and clock.

    Args:
        dry: tiny sizes on the CPU.
        add: takes each figure as it comes.
        seconds: after which no further figure is begun.
        ceilings: bandwidth and rate, once they are measured.
        released: the folder of the released code, if it is at hand.
    """

    def __init__(
        self,
        dry: bool,
        add: Callable[[Row], None] = print,
        seconds: float = float("inf"),
        ceilings: dict[str, float] | None = None,
        released: Path | None = None,
    ) -> None:
        self.dry = dry
        self.add = add
        self.ends = time.perf_counter() + seconds
        self.ceilings = ceilings or {}
        self.released = released
        self.device = "cpu" if dry else "cuda"
        self.impl = "auto"

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.dry else full

    def figure(self, what: str, find: Callable[[], Row], **sizes: Any) -> Row:
        """Adds one figure, unless the time is over; an error is its result, and the next figure comes all the same.

        Args:
            what: its name.
            find: measures it.
            **sizes: what it is measured at.

        Returns:
            What `find` returned; nothing if it failed or did not run.
        """
        found: Row = {}
        if time.perf_counter() > self.ends:
            self.add({"what": what, **sizes, "left_out": "the time was over"})
            return found
        try:
            found = find()
        except Exception as error:
            if self.dry:
                raise
            self.add({"what": what, **sizes, "failed": f"{type(error).__name__}: {error}"[:500]})
        else:
            self.add({"what": what, **sizes, **found})
        finally:
            if not self.dry:
                torch.cuda.empty_cache()  # what a captured graph held
        return found

    def seconds(self, call: Call, repeats: int = 30) -> float:
        """Median time of one call on the device, after warming up, with a cold cache."""
        if self.dry:
            call()
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        for _ in range(3):
            call()
        # read, not written: what is dirty in the cache would be written back within the time of the call
        flush = torch.zeros(64 * 2**20, dtype=torch.int32, device=self.device)
        times = []
        for _ in range(repeats):
            flush.max()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def graphed(self, call: Call) -> Call:
        """The call as a CUDA graph, so that launching from Python is not what is measured."""
        if self.dry:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

        def replay(kept: Call = call) -> None:  # the graph reads the call's tensors, and does not hold them
            graph.replay()

        return replay

    def floor(self, moved_bytes: float, operations: float = 0.0) -> float:
        """Seconds; not a number where the ceilings are not known."""
        bandwidth, rate = (self.ceilings.get(f"{what}_per_second", math.nan) for what in ("bytes", "operations"))
        return max(moved_bytes / bandwidth, operations / rate)


def randn(bench: Bench, *size: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*size, device=bench.device) * scale).to(dtype)


def aggregator_tensors(bench: Bench, P: int, N: int, H: int, dtype: torch.dtype) -> list[torch.Tensor]:
    scales = (((P, N, H), 1.0), ((H, H * P), (H * P) ** -0.5), ((H,), 1.0), ((P, H), H**-0.5), ((P,), 1.0))
    return [randn(bench, *size, dtype=dtype, scale=scale) for size, scale in scales]


def prefill_tensors(bench: Bench, S: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Query, key and value `(P*B, heads or G, S, D)` of a projection, and both prefixes `(P, G, 48, D)`."""
    P, B, heads, G, D = 4, 2, 16, 2, bench.size(96, 8)
    states = [randn(bench, P * B, S, n, D, dtype=dtype).transpose(1, 2) for n in (heads, G, G)]
    bias = key_bias(bench, G, D, dtype)
    states[1] += bias
    return [*states, randn(bench, P, G, 48, D, dtype=dtype) + bias, randn(bench, P, G, 48, D, dtype=dtype)]


def key_bias(bench: Bench, G: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """What keys have in common, as in Qwen2: their scores are large, and a rounded score is a wrong weight."""
    return randn(bench, 1, G, 1, D, dtype=dtype, scale=5.0)


def decode_tensors(
    bench: Bench, P: int, B: int, K: int, D: int, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """Query, key and value of one token for each row, and both prefixes."""
    sizes = ((P * B, 16, 1, D), (P * B, 2, K, D), (P * B, 2, K, D), (P, 2, 48, D), (P, 2, 48, D))
    states = [randn(bench, *size, dtype=dtype) for size in sizes]
    bias = key_bias(bench, 2, D, dtype)
    states[1] += bias
    states[3] += bias
    return states


def square_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """`parscale.kernels.causal_attention` by torch's flash attention: T queries of zeros in front, no mask.

    The baseline for errors in half precision: where there is a mask torch may compute in float32.
    """
    T, group = prefix_k.shape[2], query.shape[1] // key.shape[1]
    keys, values = prepend(prefix_k, key), prepend(prefix_v, value)
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))  # (P*B, heads, T + S, D)
    padded = nn.functional.pad(query, (0, 0, T, 0))  # (P*B, heads, T + S, D)
    return nn.functional.scaled_dot_product_attention(padded, keys, values, is_causal=True, scale=scaling)[:, :, T:]


def prefill_operations(tensors: list[torch.Tensor]) -> float:
    """Of the forward pass: two products over the causal half and over the prefix."""
    R, heads, S, D = tensors[0].shape
    return 4.0 * R * heads * D * S * (S / 2 + tensors[3].shape[2])


def versions(dry: bool) -> dict[str, Any]:
    """What was measured on."""
    return {
        "device": "dry run" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "triton": importlib.import_module("triton").__version__ if TRITON else None,
        "transformers": transformers.__version__,
    }
