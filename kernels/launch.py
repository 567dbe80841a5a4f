"""The common parts of the Triton host functions: launching, and properties of the device."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl

# Triton's interpreter runs kernels on CPU tensors, for tests. Its bfloat16 products are wrong, so tiles are cast first.
INTERPRETED = triton.knobs.runtime.interpret

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that determine blocks and splits.

    Attributes:
        processors: multiprocessors (compute units on AMD).
        shared_memory: bytes of shared memory of one multiprocessor.
        is_hip: whether torch was built for ROCm.
        dependent_launch: whether a kernel may start before the kernel that it waits for has ended (programmatic
            dependent launch, from compute capability 9).
    """

    processors: int
    shared_memory: int
    is_hip: bool = False
    dependent_launch: bool = False

    @property
    def is_small(self) -> bool:
        """Whether a multiprocessor has little shared memory for its registers, as in GPUs without HBM (100 KiB)."""
        return not self.is_hip and self.shared_memory <= 128 * 1024

    @property
    def has_warpgroups(self) -> bool:
        """Whether four warps together multiply blocks that lie in shared memory, asynchronously (sm_90 and sm_100)."""
        return self.dependent_launch and not self.is_small

    @property
    def most_shared(self) -> int:
        """The most bytes of shared memory that a program can have; NVIDIA's runtime takes 1 KiB of them for itself."""
        return self.shared_memory - (0 if self.is_hip else 1024)

    def programs(self, shared_bytes: int, warps: int, registers: int) -> int:
        """The number of programs that one multiprocessor holds at a time.

        Args:
            shared_bytes: shared memory of a program; NVIDIA's runtime takes 1 KiB more for itself.
            warps: of a program.
            registers: of a thread, about. A multiprocessor has 2048 for a lane of NVIDIA's warps, 4 times 512 on AMD.
        """
        by_memory = self.shared_memory // (shared_bytes + (0 if self.is_hip else 1024))
        by_registers = (4 * (512 // registers) if self.is_hip else 2048 // registers) // warps
        return max(1, min(by_memory, by_registers))


TYPICAL = Gpu(processors=132, shared_memory=228 * 1024)  # an H100's sizes, where there is no GPU to ask


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device; a typical one where there is none."""
    if device.type != "cuda":
        return TYPICAL
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Gpu(found.multi_processor_count, 64 * 1024, is_hip=True)
    return Gpu(found.multi_processor_count, found.shared_memory_per_multiprocessor, dependent_launch=found.major >= 9)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Runs `kernel` on the device of its first tensor, which need not be the current one."""
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **meta)  # Triton 3.9 warns where this is left open


def dependent(early: bool) -> dict[str, bool]:
    """Launch options of a kernel that starts early and waits for the one before it; ROCm knows no such option."""
    return {"launch_pdl": True} if early else {}


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton type in which values of `dtype` are added up: float64 for itself, else float32."""
    return TRITON_DTYPES[torch.promote_types(dtype, torch.float32)]


def operand(dtype: torch.dtype) -> Any:
    """The Triton type in which tiles of `dtype` enter a matrix product."""
    return TRITON_DTYPES[torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype]


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its last dimension lies contiguous, as the kernels ask, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def cdiv(size: int, block: int) -> int:
    """The number of blocks that cover `size`. `triton.cdiv`, which kernels call too, is ten calls of Python here."""
    return -(-size // block)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()
