"""The public function of causal attention over `[prefix of stream p | new tokens]`, by torch's flash attention.

On a GPU the prefix is put before the keys, and torch's operator aligns its causal mask to the lower right: one call,
forward and backward. On ROCm the alignment depends on torch's version and build, and the backward pass takes as many
queries as keys only: queries of zeros are put before the others, so that the mask is square. On a CPU the mask is
aligned to the upper left, and two calls are merged.

Shapes: R = P*B rows, stream-major; G key/value heads; S tokens; T prefix tokens; D head size.
"""

from __future__ import annotations

import torch

from parscale.kernels.causal_attention.merged import causal_attention_merged
from parscale.kernels.compat import flash_for_gpu, functorch_transforms_are_active
from parscale.kernels.dispatch import Impl, autocast_dtype
from parscale.kernels.prefix import prepend

HALVES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


def flash_supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, impl: Impl = "auto") -> bool:
    """Whether torch's flash attention supports these tensors, so that `causal_attention` can run.

    On a CPU it supports every floating dtype; on CUDA and ROCm devices (compute capability 8 or more) float16 and
    bfloat16, with head sizes up to 256 that are multiples of 8. It does not run where `torch.nn.attention.sdpa_kernel`
    disables flash attention, or under a transform of `torch.func`.

    Args:
        query: `(P*B, heads, S, D)`.
        key: `(P*B, G, S, D)`.
        value: `(P*B, G, S, D)`.
        impl: as `kernels` in `wrap`; False for `"reference"`.

    Returns:
        Whether it supports them.
    """
    if impl == "reference" or key.shape[-1] != value.shape[-1] or functorch_transforms_are_active():
        return False
    dtype, size = autocast_dtype(query), query.shape[-1]
    if not query.is_cpu and (not query.is_cuda or dtype not in HALVES or size % 8 or size > LARGEST_HEAD):
        return False
    return _flash_runs(query.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _flash_runs(device: torch.device) -> bool:
    if not torch.backends.cuda.flash_sdp_enabled():  # also on CPUs
        return False
    if device.type == "cpu":
        return True
    is_built = torch.backends.cuda.is_flash_attention_available()  # not on Windows
    return is_built and torch.cuda.get_device_properties(device).major >= 8


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """Each token attends to its stream's whole prefix and to the tokens up to and including itself.

    Args:
        query: `(P*B, heads, S, D)`, stream-major rows; tensors that `flash_supports` accepts.
        key: `(P*B, G, S, D)`; `heads` is a multiple of G (grouped queries).
        value: `(P*B, G, S, D)`.
        prefix_k: `(P, G, T, D)`, shared by the B rows of each stream.
        prefix_v: `(P, G, T, D)`.
        scaling: factor on the scores; `D ** -0.5` if `None`.

    Returns:
        `(P*B, heads, S, D)` in the dtype of `query`, or that of autocast; differentiable once in every tensor, and
        a second time is a `RuntimeError`.
    """
    dtype = autocast_dtype(query)
    # as views: torch 2.9 loses the gradient of a parameter that was frozen after a checkpointed forward pass
    prefix = (x.view_as(x) for x in (prefix_k, prefix_v))
    query, key, value, prefix_k, prefix_v = (x.to(dtype) for x in (query, key, value, *prefix))
    if query.is_cpu:
        return causal_attention_merged(query, key, value, prefix_k, prefix_v, scaling)
    keys, values = prepend(prefix_k, key), prepend(prefix_v, value)  # (R, G, T + S, D)
    if torch.version.hip is not None:
        T = prefix_k.shape[2]
        query = torch.nn.functional.pad(query, (0, 0, T, 0))  # (R, heads, T + S, D)
        return flash_for_gpu()(query, keys, values, 0.0, True, scale=scaling)[0][:, :, T:]
    # as torch.nn.attention.bias.causal_lower_right does: this operator's causal mask is aligned to the lower right
    return flash_for_gpu()(query, keys, values, 0.0, True, scale=scaling)[0]
