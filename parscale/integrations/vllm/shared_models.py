"""Models in vLLM whose streams share stream 0's keys and values: the backbone's own class, run on further rows.

The backbone runs as it is on `N + (P - 1) * M` rows for N tokens, M of which run with all streams
(`parscale.integrations.vllm.rows`). Only its attention knows of streams
(`parscale.integrations.vllm.shared_attention`). Its cache, its blocks and what lies in them are the plain backbone's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from parscale.compat.vllm import (
    CUDAGraphMode,
    LlamaModel,
    MistralModel,
    Qwen2Model,
    Qwen3Model,
    get_forward_context,
    maybe_prefix,
)
from parscale.config import ParScaleConfig
from parscale.integrations.vllm.aggregator import StreamAggregator
from parscale.integrations.vllm.models import StreamsForCausalLM, attention_in_place, prefix_parameter
from parscale.integrations.vllm.rows import StreamRows
from parscale.integrations.vllm.sampling import batch_options
from parscale.integrations.vllm.shared_attention import shared_backend

if TYPE_CHECKING:
    from parscale.compat.vllm import AttentionMetadata, VllmConfig


class _SharedForCausalLM(StreamsForCausalLM):
    """A language model whose streams share keys and values.

    Args:
        vllm_config: vLLM's, as `parscale.integrations.vllm.startup.prepare` left it.
        prefix: of the names of its layers.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        streams = ParScaleConfig.from_fields(vars(config))
        P, most = streams.num_streams, vllm_config.scheduler_config.max_num_batched_tokens
        self.rows = StreamRows(P, most)
        # Of what the model holds, vLLM's sleep at level 2 gives back the buffers alone.
        self.register_buffer("is_single", self.rows.is_single, persistent=False)
        for layer in self.model.layers:
            _share_keys(layer.self_attn, streams, self.rows, vllm_config)
        name = maybe_prefix(maybe_prefix(prefix, "model"), "aggregate_layer")
        self.model.aggregate_layer = StreamAggregator(P, config.hidden_size, streams.smoothing, prefix=name)
        self.model.num_streams = P
        self.batch_options = None if vllm_config.use_v2_model_runner else batch_options(vllm_config)
        endpoints = vllm_config.compilation_config.compile_ranges_endpoints
        if endpoints:  # what the backbone is compiled for: its rows
            endpoints[-1] = P * most

    def get_model_state_cls(self) -> type[Any]:
        """What Model Runner V2 asks for."""
        from parscale.integrations.vllm.model_state import StreamState

        return StreamState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(N,)` tokens or `(N, H)` embeddings to `(N, H)`.

        These are the mixed states of the tokens `chosen`, `(M,)`, and stream 0's of the others. Model Runner V2
        chooses them; without it they are found here. `None`: all tokens.
        """
        metadata = next(iter((get_forward_context().attn_metadata or {}).values()), None)
        if metadata is None:  # a step without requests, by which vLLM measures how much memory the largest one takes
            chosen = None
        elif self.batch_options is not None:
            chosen = self._choose(metadata)
        self.rows.choose(chosen, positions, None if metadata is None else metadata.query_start_loc)
        ids, embeds = (None if x is None else self.rows.spread(x) for x in (input_ids, inputs_embeds))
        with _no_graph() if chosen is not None else nullcontext():
            hidden = self.model(ids, self.rows.spread(positions), intermediate_tensors, embeds)
        return self._mix(hidden)

    def _choose(self, metadata: AttentionMetadata) -> torch.Tensor | None:
        """The tokens of a step of Model Runner V1 that run with all streams: each request's last, if it wants them."""
        assert self.batch_options is not None
        starts, N = metadata.query_start_loc, metadata.num_actual_tokens
        requests = self.batch_options.of(starts.shape[0] - 1)
        has_single, marks = any(request.single for request in requests), None
        if has_single:
            is_single = torch.tensor([request.single for request in requests], device=starts.device)
            marks = is_single.repeat_interleave(starts.diff(), output_size=N)
        self.rows.mark(marks)
        if any(request.prompt for request in requests):
            return None
        last = starts[1:] - 1
        if has_single:
            last = last[[index for index, request in enumerate(requests) if not request.single]]
        return None if last.shape[0] == N else last

    def _mix(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows to `(N, H)`."""
        first, others = self.rows.split(hidden)  # (N, H), (M, P - 1, H)
        chosen = self.rows.chosen
        if chosen is not None and not len(chosen):
            return first
        own = first if chosen is None else first[chosen]
        mixed = self.model.aggregate_layer(torch.cat((own[:, None], others), dim=1).flatten(0, 1))  # (M, H)
        if chosen is None:
            return torch.where(self.rows.is_single[: first.shape[0], None], first, mixed)
        return first.index_copy(0, chosen, mixed)


def _share_keys(own: Any, streams: ParScaleConfig, rows: StreamRows, vllm_config: VllmConfig) -> None:
    """Gives vLLM's attention of a layer the prefixes, and an attention that knows of the streams."""
    P, T = streams.num_streams, streams.prefix_length
    shape = (P - 1, own.num_kv_heads, T, own.head_dim)
    prefix_k, prefix_v = prefix_parameter(*shape), prefix_parameter(*shape)
    own.register_parameter("prefix_k", prefix_k)
    own.register_parameter("prefix_v", prefix_v)
    backend = shared_backend(own.attn.attn_backend)
    own.attn = attention_in_place(own, own.num_heads, own.num_kv_heads, backend, vllm_config)
    own.attn.impl.share(rows, prefix_k, prefix_v)


@contextmanager
def _no_graph() -> Iterator[None]:
    """Without the CUDA graphs of pieces, which hold as many rows as all tokens with all streams have."""
    context = get_forward_context()
    mode, context.cudagraph_runtime_mode = context.cudagraph_runtime_mode, CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = mode


class Qwen2ParScaleSharedForCausalLM(_SharedForCausalLM):
    """Qwen2 with streams that share keys and values."""

    backbone = Qwen2Model


class Qwen3ParScaleSharedForCausalLM(_SharedForCausalLM):
    """Qwen3 with streams that share keys and values."""

    backbone = Qwen3Model


class LlamaParScaleSharedForCausalLM(_SharedForCausalLM):
    """Llama with streams that share keys and values."""

    backbone = LlamaModel


class MistralParScaleSharedForCausalLM(_SharedForCausalLM):
    """Mistral with streams that share keys and values."""

    backbone = MistralModel
