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


class CpuCache(CPUAttentionBackendImpl):
    """The cache in plain order, `(blocks, G, size, 2*D)`."""

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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the last `new` of `length` tokens attend to: `(G, m, D)` twice, and which of them, `(new, m)`."""
        size, D = kv_cache.shape[2], self.head_size
        window = self.sliding_window if self.sliding_window > 0 else length
        start = max(0, length - new - window + 1)
        held = kv_cache[blocks[start // size : -(-length // size)]]  # (blocks, G, size, 2*D)
        held = held.transpose(0, 1).flatten(1, 2)[:, start % size :][:, : length - start]  # (G, m, 2*D)
        distance = torch.arange(length - new, length)[:, None] - torch.arange(start, length)  # (new, m)
        return *held.split(D, dim=-1), (distance >= 0) & (distance < window)

    def gather_batch(
        self, kv_cache: torch.Tensor, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the last token of each request attends to: `(B, G, m, D)` twice, and which of them, `(B, 1, m)`."""
        size, D = kv_cache.shape[2], self.head_size
        held = kv_cache[sequences.blocks[:, : -(-int(sequences.lengths.max()) // size)]]  # (B, blocks, G, size, 2*D)
        held = held.transpose(1, 2).flatten(2, 3)  # (B, G, m, 2*D)
        distance = sequences.lengths[:, None, None] - 1 - torch.arange(held.shape[2])  # (B, 1, m)
        is_visible = distance >= 0
        if self.sliding_window > 0:
            is_visible &= distance < self.sliding_window
        held.masked_fill_(~is_visible[..., None], 0)  # a page that nobody has filled may hold anything
        return *held.split(D, dim=-1), is_visible


class FlashCache(FlashAttentionImpl):
    """vLLM's flash attention, which returns its log-sum-exp when it is asked to."""

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
