"""The public function of decode attention: checks its arguments, then calls the chosen implementation."""

from __future__ import annotations

import functools

import torch

from parscale.kernels.decode_attention.checks import check_decode_shapes
from parscale.kernels.decode_attention.joined import decode_attention_joined
from parscale.kernels.decode_attention.reference import decode_attention_reference
from parscale.kernels.dispatch import Impl, runs_fused, wants_gradients

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 256
MOST_QUERIES = 64  # on one key/value head, for a program of the fused implementation


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    length: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Softmax attention of one token per row over `[prefix of stream p | cache]`, both read in place.

    Args:
        query: `(P*B, heads, 1, D)`, stream-major rows.
        key: `(P*B, G, K, D)`; `heads` is a multiple of G (grouped queries). Read in place if the last dimension of keys
            and values is contiguous.
        value: `(P*B, G, K, Dv)`.
        prefix_k: `(P, G, T, D)`, shared by the B rows of each stream.
        prefix_v: `(P, G, T, Dv)`.
        mask: `None`, or boolean (True: attend) or additive, `(P*B or 1, heads or 1, 1, T + K)`, or with `K` in place of
            `T + K`, for the cache alone. Padding and sliding windows are masks. In an additive mask, `-inf` and the
            lowest value of its dtype hide. Hidden entries are read, and must be finite.
        length: number of real tokens among the K, for a cache that is longer: integers, `(P*B,)` or one, on the device,
            so that a captured graph reads the current value. Entries beyond it may have any value.
        sinks: logits `(heads,)` that take part in the softmax but have no value (GPT-OSS).
        scaling: factor on the scores; `D ** -0.5` if `None`.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2).
        impl: `"reference"` is plain torch. `"fused"` takes tensors of one dtype (float16, bfloat16 or float32), heads
            of up to 256 elements and up to 64 queries for each key/value head, and has no gradient. `"auto"` is
            `"fused"` for such tensors on CUDA and ROCm devices where Triton is installed and no gradient is recorded,
            and `"reference"` otherwise.

    Returns:
        `(P*B, heads, 1, Dv)` in the dtype of `query`.

    Raises:
        ValueError: shapes do not fit, `impl` is unknown, or `"fused"` cannot run.
    """
    tensors = (query, key, value, prefix_k, prefix_v)
    check_decode_shapes("decode_attention", tensors, mask, length, sinks, shares_keys=False)
    if runs_fused(impl, query, functools.partial(decode_obstacle, tensors, (mask, length, sinks))):
        from parscale.kernels.decode_attention.fused import decode_op

        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return decode_op(*tensors, mask, length, sinks, factor, softcap)
    if length is None and sinks is None and softcap is None:
        return decode_attention_reference(*tensors, mask, scaling=scaling)
    return decode_attention_joined(*tensors, mask, length=length, sinks=sinks, scaling=scaling, softcap=softcap)


def visible_lengths(mask: torch.Tensor) -> torch.Tensor:
    """The visible length of each row of a mask: one more than the last token that any of its heads sees.

    Args:
        mask: over the cache, `(R or 1, heads or 1, 1, K)`, boolean or additive.

    Returns:
        `(R or 1,)` int32, on the mask's device: a `length` for `decode_attention`.
    """
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    places = torch.arange(1, mask.shape[-1] + 1, dtype=torch.int32, device=mask.device)
    return (seen * places).amax(dim=(1, 2, 3))


def fits_fused(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the fused implementation supports this number of queries for one key/value head."""
    return query.shape[0] * query.shape[1] <= MOST_QUERIES * key.shape[0] * key.shape[1]


def runs_decode_kernel(impl: Impl, tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> bool:
    """Whether decode attention, with keys of the streams' own or shared ones, runs by its kernel.

    Args:
        impl: as in `parscale.kernels.dispatch.runs_fused`.
        tensors: query, key, value, prefix_k and prefix_v.
        mask: as in `decode_attention`.

    Raises:
        ValueError: `impl` is unknown, or `"fused"` cannot run.
    """
    return runs_fused(impl, tensors[0], functools.partial(decode_obstacle, tensors, (mask,)))


def decode_obstacle(tensors: tuple[torch.Tensor, ...], options: tuple[torch.Tensor | None, ...]) -> str | None:
    """Why the kernels cannot take these tensors."""
    extra = [x for x in options if x is not None]
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or tensors[0].dtype not in FLOATS:
        return f"it takes tensors of one dtype, float16, bfloat16 or float32, got {', '.join(map(str, dtypes))}"
    if max(tensors[0].shape[-1], tensors[2].shape[-1]) > LARGEST_HEAD:
        return f"it takes heads of up to {LARGEST_HEAD} numbers, got {tensors[0].shape[-1]} and {tensors[2].shape[-1]}"
    if not fits_fused(*tensors[:2]):
        return f"it takes up to {MOST_QUERIES} queries for each key/value head, of all streams that share it"
    if len({x.device for x in (*tensors, *extra)}) > 1:
        return "the tensors are on different devices"
    if wants_gradients((*tensors, *extra)):
        return "a gradient is recorded, but the kernels have none"
    return None
