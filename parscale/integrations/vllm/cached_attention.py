"""Attention over vLLM's paged cache by itself: with its log-sum-exp, or as the keys and values that a request sees.

A prefix that lies in no cache is attended to beside it. On CPUs vLLM's own kernel does not return the log-sum-exp and
lays out the cache for itself, so there the cache is written in plain order and read from torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from parscale.compat.vllm import CPUAttentionBackendImpl, FlashAttentionImpl, canonicalize_singleton_dim_strides

if TYPE_CHECKING:
    from parscale.compat.vllm import AttentionMetadata


class Sequences(NamedTuple):
    """B requests, whose last tokens attend to all up to themselves.

    Attributes:
        starts: of their queries, `(B + 1,)`.
        lengths: `(B,)`, tokens up to the last query.
        blocks: of the cache, `(B, most)`.
        max_query: the most queries of a request.
        max_length: the most tokens of a request.
        schedule: of vLLM's flash attention, for its own number of heads.
        num_splits: the most parts that it makes of a request; 0 leaves it to the kernel.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    blocks: torch.Tensor
    max_query: int
    max_length: int
    schedule: torch.Tensor | None = None
    num_splits: int = 0

    @classmethod
    def of(
        cls, attn_metadata: AttentionMetadata, schedule: torch.Tensor | None = None, num_splits: int = 0
    ) -> Sequences:
        """The requests of a step."""
        return cls(
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            attn_metadata.max_query_len,
            attn_metadata.max_seq_len,
            schedule,
            num_splits,
        )


class PagedCpuAttention(CPUAttentionBackendImpl):
    """vLLM's attention on CPUs, with a cache in plain order, `(blocks, G, size, 2*D)`, which torch can read."""

    def planned(self, attn_metadata: AttentionMetadata) -> Sequences:
        """The requests of a step."""
        return Sequences.of(attn_metadata)

    def do_kv_cache_update(
        self, layer: object, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Writes `(N, G, D)` keys and values."""
        block = kv_cache.shape[2]
        kv_cache[slot_mapping // block, :, slot_mapping % block] = torch.cat((key, value), dim=-1)

    def gather(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, new: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last `new` of `length` tokens attend to, all of them or some: `(G, m, D)` twice."""
        size, start = kv_cache.shape[2], self._start(new, length)
        held = _pages(kv_cache, blocks[start // size : -(-length // size)]).flatten(1, 2)  # (G, blocks * size, 2*D)
        held = held[:, start % size :][:, : length - start]  # (G, m, 2*D)
        keys, values = held.split(self.head_size, dim=-1)
        return keys, values

    def visible(self, new: int, length: int) -> torch.Tensor:
        """Which of what `gather` returns each of the tokens attends to, `(new, m)`."""
        distance = torch.arange(length - new, length)[:, None] - torch.arange(self._start(new, length), length)
        return (distance >= 0) & (distance < self._window(length))

    def _start(self, new: int, length: int) -> int:
        """The first token that one of the last `new` attends to."""
        return max(0, length - new - self._window(length) + 1)

    def _window(self, length: int) -> int:
        """The number of tokens that a token of a text attends to."""
        return self.sliding_window if 0 < self.sliding_window < length else length

    def gather_batch(
        self, kv_cache: torch.Tensor, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the last token of each request attends to: `(B, G, m, D)` twice, and which of them, `(B, 1, m)`.

        `None` in place of these: all of them.
        """
        size, longest = kv_cache.shape[2], int(sequences.lengths.max())
        blocks = sequences.blocks[:, : -(-longest // size)]
        held = _pages(kv_cache, blocks.flatten()).unflatten(1, blocks.shape)  # (G, B, blocks, size, 2*D)
        held = held.flatten(2, 3).transpose(0, 1)[:, :, :longest]  # (B, G, m, 2*D)
        distance = sequences.lengths[:, None, None] - 1 - torch.arange(longest)  # (B, 1, m)
        is_visible = (distance >= 0) & (distance < self._window(longest))
        if bool(is_visible.all()):
            return *held.split(self.head_size, dim=-1), None
        held = held.masked_fill(~is_visible[..., None], 0)  # a page that nobody has filled may hold anything
        return *held.split(self.head_size, dim=-1), is_visible


def _pages(kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The blocks `(n,)` of a cache, `(G, n, size, 2*D)`: head by head, since one index of all copies twice."""
    return torch.stack([head.index_select(0, blocks) for head in kv_cache.unbind(1)])


class PagedFlashAttention(FlashAttentionImpl):
    """vLLM's flash attention over its paged cache, with its log-sum-exp."""

    def planned(self, attn_metadata: AttentionMetadata) -> Sequences:
        """The requests of a step, with what vLLM planned for the layer's number of heads."""
        return Sequences.of(attn_metadata, attn_metadata.scheduler_metadata, attn_metadata.max_num_splits)

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(N, heads, D)` queries; the mixture `(N, heads, D)` and the log-sum-exp `(heads, N)` in float32."""
        from parscale.compat.vllm import flash_attn_varlen_func

        # (blocks, G, size, 2*D) -> (blocks, size, G, D), twice
        halves = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        keys, values = (canonicalize_singleton_dim_strides(x) for x in halves)
        mixed, lse = flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=sequences.starts,
            max_seqlen_q=sequences.max_query,
            seqused_k=sequences.lengths,
            max_seqlen_k=sequences.max_length,
            softmax_scale=self.scale,
            causal=True,
            window_size=list(self.sliding_window),
            block_table=sequences.blocks,
            return_softmax_lse=True,
            scheduler_metadata=sequences.schedule,
            fa_version=self.vllm_flash_attn_version,
            num_splits=sequences.num_splits,
        )
        return mixed, lse
