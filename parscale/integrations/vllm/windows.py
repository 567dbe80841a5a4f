"""Attention for models with a sliding window: queries attend to the prefix separately, where no window hides it.

The cache then holds only the user's tokens, and layers without a window attend in the same way. On CPUs the keys that
a request sees are gathered after the prefix, and torch computes the attention. On GPUs vLLM's flash attention reads the
cache, matrix products read the prefix, and the two results are merged by their log-sum-exp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from parscale.compat.vllm import CPUAttentionBackend, FlashAttentionBackend, merge_attn_states
from parscale.integrations.vllm.cached_attention import PagedCpuAttention, PagedFlashAttention

if TYPE_CHECKING:
    from parscale.compat.vllm import AttentionMetadata


def window_backend(own: type[Any]) -> type[Any]:
    """The backend that attends to a prefix separately, in place of the one that vLLM has chosen.

    Raises:
        ValueError: there is no such backend.
    """
    backends = (WindowCpuBackend, WindowFlashBackend)
    return backend_for(own, backends, SeparatePrefix.served, ", or a --max-model-len not beyond the window")


def backend_for(own: type[Any], backends: tuple[type[Any], ...], served: str, otherwise: str = "") -> type[Any]:
    """The backend among `backends` that derives from the one that vLLM has chosen.

    Args:
        own: vLLM's choice.
        backends: to choose from.
        served: the beginning of the message, up to its verb.
        otherwise: another remedy, for the end of the message.

    Raises:
        ValueError: there is no such backend.
    """
    for backend in backends:
        if issubclass(backend, own):
            return backend
    raise ValueError(
        f"{served} by the attention backends CPU_ATTN and FLASH_ATTN, and vLLM has chosen {own.get_name()}: give "
        f"--attention-backend FLASH_ATTN{otherwise}."
    )


class SeparatePrefix:
    """Base of the attention implementations that attend to a prefix separately from the cache."""

    served = "A sliding window and a prefix are served"
    kv_cache_dtype: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.kv_cache_dtype.startswith("fp8"):
            raise ValueError(f"{self.served} without --kv-cache-dtype fp8: leave it out.")


class WindowCpuImpl(SeparatePrefix, PagedCpuAttention):
    """The keys that a request sees are gathered behind the prefix.

    `prefix` is set by the layer: keys and values `(P, G, T, D)`.
    """

    prefix: tuple[torch.Tensor, torch.Tensor]

    def forward(
        self,
        layer: object,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata | None,
        output: torch.Tensor,
        *scales: Any,
        **further: Any,
    ) -> torch.Tensor:
        """`(N, P*heads, D)` queries; writes `(N, P*heads, D)` into `output`."""
        if attn_metadata is None:  # a warm-up
            return output
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for first, last, length, blocks in zip(starts, starts[1:], lengths, attn_metadata.block_table, strict=False):
            q = query[first:last].transpose(0, 1)  # (P*heads, n, D)
            is_visible, held = self.visible(last - first, length), self.gather(kv_cache, blocks, last - first, length)
            k, v = (torch.cat((x.flatten(0, 1), y), dim=1) for x, y in zip(self.prefix, held, strict=True))
            T = k.shape[1] - is_visible.shape[1]
            mask = torch.nn.functional.pad(is_visible, (T, 0), value=True)  # (n, T + m)
            mixed = scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)
            output[first:last] = mixed.transpose(0, 1)
        return output


class WindowCpuBackend(CPUAttentionBackend):
    """For `WindowCpuImpl`."""

    @staticmethod
    def get_impl_cls() -> type[WindowCpuImpl]:
        """The method that vLLM calls for the implementation."""
        return WindowCpuImpl


class WindowFlashImpl(SeparatePrefix, PagedFlashAttention):
    """Cache and prefix separately, merged by their log-sum-exp.

    `prefix` is set by the layer: keys and values `(P, G, T, D)`.
    """

    prefix: tuple[torch.Tensor, torch.Tensor]

    def forward(
        self,
        layer: object,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata | None,
        output: torch.Tensor,
        *scales: Any,
        **further: Any,
    ) -> torch.Tensor:
        """`(N, P*heads, D)` queries; writes `(N, P*heads, D)` into `output`."""
        if attn_metadata is None:  # a warm-up
            return output.fill_(0)
        N = attn_metadata.num_actual_tokens
        mixed, lse = self.attend(query[:N], kv_cache, self.planned(attn_metadata))
        learned, learned_lse = attend_to_prefix(query[:N], *self.prefix, self.scale)
        merge_attn_states(output[:N], learned, learned_lse, mixed, lse)
        return output


class WindowFlashBackend(FlashAttentionBackend):
    """For `WindowFlashImpl`."""

    @staticmethod
    def get_impl_cls() -> type[WindowFlashImpl]:
        """The method that vLLM calls for the implementation."""
        return WindowFlashImpl


def attend_to_prefix(
    query: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a prefix alone.

    Args:
        query: `(N, P*heads, D)`, stream-major.
        prefix_k: `(P, G, T, D)`.
        prefix_v: likewise.
        scale: of the attention scores.

    Returns:
        The output `(N, P*heads, D)`, and the log-sum-exp of the scores, `(P*heads, N)` in float32.
    """
    keys, values = prefix_k.flatten(0, 1), prefix_v.flatten(0, 1)  # (P*G, T, D)
    q = query.unflatten(1, (keys.shape[0], -1)).permute(1, 2, 0, 3).flatten(1, 2)  # (P*G, heads/G * N, D)
    # in float32: scores rounded to half precision, such as those of keys with a large bias, give errors of some percent
    scores = _in_float32(q, keys.transpose(1, 2)) * scale  # (P*G, heads/G * N, T)
    mixed = torch.bmm(scores.softmax(-1).to(values.dtype), values)  # (P*G, heads/G * N, D)
    N = query.shape[0]
    mixed = mixed.unflatten(1, (-1, N)).flatten(0, 1).transpose(0, 1)  # (N, P*heads, D)
    return mixed.contiguous(), scores.logsumexp(-1).unflatten(1, (-1, N)).flatten(0, 1)


def _in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The batched matrix product, computed and returned in float32 (in float64 for float64)."""
    if a.is_cuda and torch.version.hip is None and a.dtype.itemsize == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)  # CPUs and ROCm do not support out_dtype
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(dtype), b.to(dtype))
