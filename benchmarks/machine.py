"""Where a figure was measured, and the clock.

torch is imported where it is used: the scaling law's benchmark needs none.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name, as Linux knows it, or what Python knows of it elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_average() -> float | None:
    """How busy the machine was in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def is_gpu(device: str) -> bool:
    """Whether a device, such as `cuda:1`, is one of CUDA's."""
    import torch

    return torch.device(device).type == "cuda"


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name(device) if is_gpu(device) else processor()


def software() -> dict[str, str]:
    """The versions of what computes."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def surroundings(device: str, threads: int) -> dict[str, Any]:
    """What a figure depends on besides what is measured."""
    where = {"processor": device_name(device), "threads": threads, "python": platform.python_version()}
    return where | software()


def seconds(step: Callable[[], Any], device: str) -> float:
    """Wall time of one step, with all that it launches on the device."""
    import torch

    on_gpu = is_gpu(device)
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
