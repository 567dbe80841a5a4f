"""Attention of streams that share stream 0's keys and values, over the plain backbone's cache.

Where all tokens run with all streams, the streams are further queries on the same key heads, in one call over the
cache, which is read once for all of them. Where a prompt is read, its tokens attend as those of the plain backbone
do, and those that are to be predicted from once more, one token at a time, with the other streams. Streams 1 to
P - 1 attend to their prefixes separately, and the two parts are merged by their log-sum-exp.

Shapes: N tokens of a step, M of them with all streams; P streams; G key heads; D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from parscale.compat.vllm import CPUAttentionBackend, FlashAttentionBackend, merge_attn_states
from parscale.integrations.vllm.cached_attention import PagedCpuAttention, PagedFlashAttention, Sequences
from parscale.integrations.vllm.rows import StreamRows
from parscale.integrations.vllm.windows import SeparatePrefix, attend_to_prefix, backend_for
from parscale.kernels.compat import flash_for_cpu
from parscale.kernels.flash import flash

if TYPE_CHECKING:
    from parscale.compat.vllm import AttentionMetadata

OutputAndLse = tuple[torch.Tensor, torch.Tensor]  # (N, heads, D), (heads, N)


def shared_backend(own: type[Any]) -> type[Any]:
    """The backend for streams that share keys, in place of the one that vLLM has chosen.

    Raises:
        ValueError: there is none for it.
    """
    return backend_for(own, (SharedCpuBackend, SharedFlashBackend), SharedKeys.served)


class SharedKeys(SeparatePrefix):
    """Base of the implementations for streams that share keys and values, over vLLM's cache."""

    served = "Streams that share keys and values are served"
    rows: StreamRows
    prefix: tuple[nn.Parameter, nn.Parameter]  # keys and values, (P - 1, G, T, D) each
    num_heads: int
    num_kv_heads: int
    scale: float
    attend: Callable[[torch.Tensor, torch.Tensor, Sequences], OutputAndLse]
    planned: Callable[[AttentionMetadata], Sequences]

    def share(self, rows: StreamRows, prefix_k: nn.Parameter, prefix_v: nn.Parameter) -> None:
        """Takes the step's rows, which the model sets, and the prefixes `(P - 1, G, T, D)`.

        The number of heads becomes that of a call with all streams, by which vLLM's builder of metadata plans.
        """
        self.rows, self.prefix = rows, (prefix_k, prefix_v)
        self.num_heads *= rows.num_streams

    def do_kv_cache_update(
        self, layer: object, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Writes the keys and values of stream 0, which lie in front."""
        N = slot_mapping.shape[0]
        super().do_kv_cache_update(layer, key[:N], value[:N], kv_cache, slot_mapping)  # type: ignore[misc]

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
        """`(N + (P - 1) * M, heads, D)` queries; writes as many into `output`."""
        if attn_metadata is None:  # a warm-up
            return output.fill_(0)
        N = attn_metadata.num_actual_tokens  # without the padding of a CUDA graph
        (first, others), (out_first, out_others) = self.rows.split(query), self.rows.split(output)
        if self.rows.chosen is None:
            others, out_others = others[:N], out_others[:N]
            queries = torch.cat((first[:N, None], others), dim=1)  # (N, P, heads, D)
            mixed, lse = self._attend_together(queries, kv_cache, self.planned(attn_metadata))
            out_first[:N] = mixed[:, 0]
            mixed, lse = mixed[:, 1:], lse[1:]
        else:
            out_first[:N] = self.attend(first[:N], kv_cache, Sequences.of(attn_metadata))[0]
            if others.shape[0] == 0:
                return output
            mixed, lse = self._attend_together(others, kv_cache, self._one_by_one(attn_metadata))
        learned, learned_lse = attend_to_prefix(others.flatten(1, 2), *self.prefix, self.scale)
        self.merge(out_others.flatten(1, 2), learned, learned_lse, mixed.flatten(1, 2), lse.flatten(0, 1))
        return output

    def _attend_together(
        self, query: torch.Tensor, kv_cache: torch.Tensor, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Several streams of each token, `(N, Q, heads, D)`, as queries of the same key heads.

        Returns:
            The mixture `(N, Q, heads, D)` and the log-sum-exp `(Q, heads, N)`.
        """
        G, Q = self.num_kv_heads, query.shape[1]
        folded = query.unflatten(2, (G, -1)).transpose(1, 2).flatten(1, 3)  # (N, G * Q * heads/G, D)
        mixed, lse = self.attend(folded, kv_cache, sequences)
        mixed = mixed.unflatten(1, (G, Q, -1)).transpose(1, 2).flatten(2, 3)
        return mixed, lse.unflatten(0, (G, Q, -1)).transpose(0, 1).flatten(1, 2)

    def _one_by_one(self, attn_metadata: AttentionMetadata) -> Sequences:
        """The chosen tokens, each a request with one query."""
        lengths = self.rows.lengths
        starts = torch.arange(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
        return Sequences(starts, lengths, attn_metadata.block_table[self.rows.owners], 1, attn_metadata.max_seq_len)

    def merge(
        self,
        output: torch.Tensor,
        learned: torch.Tensor,
        learned_lse: torch.Tensor,
        mixed: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Writes the whole attention of two parts into `output`, all `(M, heads, D)` and `(heads, M)`."""
        share = torch.sigmoid(learned_lse - lse).T[..., None]  # of the prefix in the whole, (M, heads, 1)
        output.copy_(mixed.to(share.dtype).lerp(learned.to(share.dtype), share))


class SharedCpuImpl(SharedKeys, PagedCpuAttention):
    """By torch's flash attention, on keys and values that are gathered from the cache."""

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, sequences: Sequences) -> OutputAndLse:
        """A request at a time, or all at once where each has one query."""
        if sequences.max_query == 1:
            B = sequences.lengths.shape[0]
            gathered = self.gather_batch(kv_cache, sequences)
            mixed, lse = self._attend(query[:B, :, None], *gathered)  # (B, heads, 1, D)
            return mixed[:, :, 0], lse[:, :, 0].T
        starts, lengths = sequences.starts.tolist(), sequences.lengths.tolist()
        parts = []
        for first, last, length, blocks in zip(starts, starts[1:], lengths, sequences.blocks, strict=False):
            queries = query[first:last].transpose(0, 1)[None]  # (1, heads, n, D)
            keys, values = (x[None] for x in self.gather(kv_cache, blocks, last - first, length))
            if self._window(length) < length:  # the window hides some of them
                parts.append(self._attend(queries, keys, values, self.visible(last - first, length)[None]))
            else:
                parts.append(self._attend_causally(queries, keys, values))
        mixed, lse = (torch.cat([part[i][0] for part in parts], dim=1) for i in (0, 1))
        return mixed.transpose(0, 1), lse

    def _attend_causally(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last n of m tokens, each with those up to itself: `(B, heads, n, D)` on `(B, G, m, D)`.

        In two parts, neither of which has a mask, so that nothing hidden is computed: their own tokens and those
        before. Also the log-sum-exp, `(B, heads, n)`.
        """
        past = key.shape[2] - query.shape[2]
        mixed, lse = flash(query, key[:, :, past:], value[:, :, past:], True, self.scale)
        if past:
            before, before_lse = flash(query, key[:, :, :past], value[:, :, :past], False, self.scale)
            share = torch.sigmoid(before_lse - lse)[..., None].to(mixed.dtype)
            mixed, lse = mixed.lerp(before, share), torch.logaddexp(lse, before_lse)
        return mixed, lse

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, heads, n, D)` on `(B, G, m, D)`, of which `(B, n, m)` are seen; also `(B, heads, n)`."""
        G, n = key.shape[1], query.shape[2]
        grouped = query.unflatten(1, (G, -1)).flatten(2, 3)  # (B, G, heads/G * n, D): no key is copied
        mask = None
        if is_visible is not None:
            mask = torch.zeros(is_visible.shape, dtype=query.dtype).masked_fill_(~is_visible, -torch.inf)
            mask = mask.repeat(1, grouped.shape[2] // n, 1)[:, None]  # (B, 1, heads/G * n, m)
        mixed, lse = flash_for_cpu()(grouped, key, value, 0.0, False, attn_mask=mask, scale=self.scale)
        return mixed.unflatten(2, (-1, n)).flatten(1, 2), lse.unflatten(2, (-1, n)).flatten(1, 2)


class SharedCpuBackend(CPUAttentionBackend):
    """For `SharedCpuImpl`."""

    @staticmethod
    def get_impl_cls() -> type[SharedCpuImpl]:
        """As vLLM asks for it."""
        return SharedCpuImpl


class SharedFlashImpl(SharedKeys, PagedFlashAttention):
    """By vLLM's flash attention, and its kernel that merges."""

    def merge(
        self,
        output: torch.Tensor,
        learned: torch.Tensor,
        learned_lse: torch.Tensor,
        mixed: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """See `SharedKeys.merge`. The kernel addresses tokens by heads and head size alone, not by strides."""
        merge_attn_states(output, learned, learned_lse, mixed.contiguous(), lse.contiguous())


class SharedFlashBackend(FlashAttentionBackend):
    """For `SharedFlashImpl`."""

    @staticmethod
    def get_impl_cls() -> type[SharedFlashImpl]:
        """As vLLM asks for it."""
        return SharedFlashImpl
