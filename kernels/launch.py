"""What the Triton host functions share: launching, and what they need to know about the device."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def _probe():
    pass


# Triton's interpreter runs kernels on CPU tensors, for tests. Its bfloat16 products are wrong: tiles are raised first.
INTERPRETED = not isinstance(_probe, JITFunction)

WAVES = 4  # programs for each processor that splits of a sum aim at

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Runs ``kernel`` on the device of its first tensor, which need not be the current one."""
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **meta)  # Triton 3.9 warns where this is left open


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton type in which values of ``dtype`` are added up: float64 for itself, else float32."""
    return TRITON_DTYPES[torch.promote_types(dtype, torch.float32)]


def operand(dtype: torch.dtype) -> Any:
    """The Triton type in which tiles of ``dtype`` enter a matrix product."""
    return TRITON_DTYPES[torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype]


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; a typical number where there is no GPU to ask."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 128


def on_hip() -> bool:
    """Whether torch was built for ROCm, whose programs have 64 KiB of shared memory."""
    return torch.version.hip is not None


def on_hopper(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU of compute capability 9: the only ones whose products take blocks of 128 x 256."""
    return device.type == "cuda" and not on_hip() and torch.cuda.get_device_capability(device)[0] == 9


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below ``number``, and at least 1."""
    return 1 << max(0, number - 1).bit_length()
