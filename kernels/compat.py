"""The undocumented names of torch that the kernels use, one function each.

`parscale.kernels` imports nothing from the rest of parscale, so an unsupported version of torch is reported here.
"""

from __future__ import annotations

from typing import Any

import torch


def functorch_transforms_are_active() -> bool:
    """Whether a transform of `torch.func` is active (`grad`, `vmap`, `jvp`, ...); torch has no public function for it.

    Transforms may differentiate any number of times, forward and backward, and map over the result.
    """
    return _needed(torch._C, "_are_functorch_transforms_active")()


def flash_for_cpu() -> Any:
    """torch's flash attention on a CPU, with the log-sum-exp of the scores, which `sdpa` does not return."""
    return _needed(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def flash_for_cpu_backward() -> Any:
    """The gradients of `flash_for_cpu`, for an output and a log-sum-exp that may be merged ones."""
    return _needed(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")


def flash_for_gpu() -> Any:
    """torch's flash attention on CUDA and ROCm devices, whose causal mask is aligned to the lower right.

    `sdpa` aligns its mask to the upper left; `torch.nn.attention.bias.causal_lower_right` calls this operator.
    """
    return _needed(torch.ops.aten, "_scaled_dot_product_flash_attention")


def flash_for_gpu_backward() -> Any:
    """The gradients of `flash_for_gpu`, for an output and a log-sum-exp that may be merged ones."""
    return _needed(torch.ops.aten, "_scaled_dot_product_flash_attention_backward")


def _needed(owner: object, name: str) -> Any:
    """`owner.name`; torch.compile traces this.

    Raises:
        ImportError: this version of torch has no such name.
    """
    value = getattr(owner, name, None)
    if value is None:
        raise ImportError(
            f"parscale needs torch's {name}, which torch {torch.__version__} does not have: install an older torch, or "
            "a newer parscale."
        )
    return value
