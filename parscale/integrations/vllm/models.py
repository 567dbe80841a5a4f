"""Models with parallel streams in vLLM: its own layers, run on P rows for each token.

These are the streams with keys and values of their own; those that share them are in
`parscale.integrations.vllm.shared_models`.

vLLM's batch is a flat list of N tokens. From the embedding to the final norm a token has P rows, token-major, so that
`(N*P, H)` is a view of `(N, P, H)`. In the attention it has one row of `P * heads` query heads and `P * G` key and
value heads, stream-major, so that each stream's query heads use its own keys. The parameters have the names of full
checkpoints, the released ones included.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import nn

from parscale.compat.vllm import (
    Attention,
    AutoWeightsLoader,
    LlamaModel,
    LogitsProcessor,
    MistralModel,
    ParallelLMHead,
    Qwen2Model,
    Qwen3Model,
    SupportsQuant,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    maybe_prefix,
    set_weight_attrs,
)
from parscale.config import DEFAULT_SET, SET_NAME, ParScaleConfig
from parscale.integrations.vllm.aggregator import StreamAggregator, stream_outer
from parscale.integrations.vllm.startup import SLOTS, check_backend, checkpoint_of, further_streams, quantize_attention
from parscale.integrations.vllm.windows import window_backend
from parscale.streams.naming import is_further, part_of

if TYPE_CHECKING:
    from parscale.compat.vllm import AttentionBackend, VllmConfig


class StreamAttention(nn.Module):
    """Replaces a layer's attention: the same projections, with the streams as heads and a prefix for each stream.

    Args:
        own: vLLM's attention of the layer, whose parts are reused.
        streams: P and T.
        num_slots: T, if the prefix takes slots of the cache before each request; 0, if it is attended to separately.
        vllm_config: vLLM's.
    """

    def __init__(self, own: Any, streams: ParScaleConfig, num_slots: int, vllm_config: VllmConfig) -> None:
        super().__init__()
        P, G, T, D = streams.num_streams, own.num_kv_heads, streams.prefix_length, own.head_dim
        self.num_slots, self.head_dim = num_slots, D
        self.sizes = [own.q_size, own.kv_size, own.kv_size]
        self.qkv_proj, self.o_proj, self.rotary_emb = own.qkv_proj, own.o_proj, own.rotary_emb
        self.q_norm, self.k_norm = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
        self.prefix_k, self.prefix_v = (prefix_parameter(P, G, T, D) for _ in ("keys", "values"))
        check_backend(own.attn.attn_backend)
        backend = None if num_slots else window_backend(own.attn.attn_backend)
        self.attn = attention_in_place(own, P * own.num_heads, P * G, backend, vllm_config)
        if not num_slots:
            self.attn.impl.prefix = (self.prefix_k, self.prefix_v)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(N*P, H)` to `(N*P, H)`; `positions`, `(N,)`, count the slots."""
        N = positions.shape[0]
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k, v = (x.reshape(N, -1) for x in (q, k, v))  # (N*P, heads*D) -> (N, P*heads*D)
        q, k = self.rotary_emb((positions - self.num_slots).clamp(min=0), q, k)
        if self.num_slots:
            k, v = self._fill_slots(positions, k, self.prefix_k), self._fill_slots(positions, v, self.prefix_v)
        mixed = self.attn(q, k, v)  # (N, P*heads*D)
        output, _ = self.o_proj(mixed.reshape(-1, self.sizes[0]))  # (N*P, heads*D) -> (N*P, H)
        return output

    def _fill_slots(self, positions: torch.Tensor, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """The keys or values `(N, P*G*D)`, with those of the prefix where the token is a slot."""
        is_slot = positions < self.num_slots
        learned = prefix.permute(2, 0, 1, 3)[positions.clamp(max=self.num_slots - 1)]  # (N, P, G, D)
        return torch.where(is_slot[:, None], learned.flatten(1).to(x.dtype), x)


def attention_in_place(
    own: Any, num_heads: int, num_kv_heads: int, backend: type[AttentionBackend] | None, vllm_config: VllmConfig
) -> Attention:
    """vLLM's attention over a cache, with other heads or another backend, in place of that of a layer.

    Args:
        own: vLLM's attention of the layer; what is returned takes the name and the cache of its `attn`.
        num_heads: of the queries.
        num_kv_heads: of the cache.
        backend: `None` for vLLM's choice.
        vllm_config: vLLM's.
    """
    layer_name = own.attn.layer_name
    del vllm_config.compilation_config.static_forward_context[layer_name]
    return Attention(
        num_heads,
        own.head_dim,
        own.scaling,
        num_kv_heads=num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        per_layer_sliding_window=own.attn.sliding_window,
        prefix=layer_name,
        attn_backend=backend,
    )


def prefix_parameter(*shape: int) -> nn.Parameter:
    """A prefix `(P, G, T, D)` to be read from a checkpoint."""
    parameter = nn.Parameter(torch.zeros(*shape), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": _load_heads})
    return parameter


def _load_heads(param: nn.Parameter, whole: torch.Tensor) -> None:
    """Fills `(P, G, T, D)` with this process's heads out of all, `(P, G_total, T, D)`.

    A loader's first argument is called `param`: vLLM replaces it by that name when it loads new weights layer by layer.
    """
    num_heads, ranks = param.shape[1], get_tensor_model_parallel_world_size()
    copies = max(1, ranks // whole.shape[1])  # of each head, if there are fewer heads than processes
    first = get_tensor_model_parallel_rank() // copies * num_heads
    part = whole[:, first : first + num_heads]
    if part.shape != param.shape:
        raise ValueError(f"A prefix of the checkpoint is {tuple(whole.shape)} and does not fit the backbone's heads.")
    param.data.copy_(part)


class _Streams(nn.Module):
    """Wraps a model of vLLM: repeats its input P times for each token, and mixes the streams after its final norm."""

    layers: Any
    embed_input_ids: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        config = model_config.hf_config
        num_slots: int = getattr(config, SLOTS)
        model_config.max_model_len -= num_slots  # by the longest text vLLM chooses the factors of LongRoPE
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            model_config.max_model_len += num_slots
        streams = ParScaleConfig.from_fields(vars(config))
        self.num_streams = streams.num_streams
        for layer in self.layers:
            layer.self_attn = StreamAttention(layer.self_attn, streams, num_slots, vllm_config)
        self.aggregate_layer = StreamAggregator(
            streams.num_streams, config.hidden_size, streams.smoothing, prefix=maybe_prefix(prefix, "aggregate_layer")
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(N,)` tokens or `(N, H)` embeddings to `(N, H)`."""
        P = self.num_streams
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # (N, H)
        x = x.repeat_interleave(P, dim=0)  # (N*P, H)
        hidden = super().forward(None, positions, None, x)  # (N*P, H)
        return self.aggregate_layer(hidden)  # (N, H)


class _Qwen2(_Streams, Qwen2Model):
    pass


class _Qwen3(_Streams, Qwen3Model):
    pass


class _Llama(_Streams, LlamaModel):
    pass


class _Mistral(_Streams, MistralModel):
    pass


class StreamsForCausalLM(nn.Module, SupportsQuant):
    """A language model with streams.

    Args:
        vllm_config: vLLM's, as `parscale.integrations.vllm.startup.prepare` left it.
        prefix: the prefix of its layers' names.
    """

    backbone: type[nn.Module]
    hf_to_vllm_mapper = Qwen2Model.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.vllm_config = vllm_config
        self.is_loaded = vllm_config.load_config.load_format == "dummy"  # what comes then is a trainer's
        quantize_attention(vllm_config)
        config = vllm_config.model_config.hf_config
        self.model: Any = self.backbone(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=getattr(config, "logit_scale", 1.0))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(N,)` to `(N, H)`."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(N,)` tokens or `(N, H)` embeddings to the mixed states `(N, H)`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`(N, H)` to `(N, vocabulary)`; `None` on processes that do not sample."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Reads a full checkpoint's tensors; those of an additional set come from its sub-folder, if it was chosen.

        Later calls take new tensors from a trainer, any of them, under the names that they have in its model.

        Raises:
            ValueError: a tensor has no place in the model, the checkpoint lacks one of its streams, or there are new
                tensors for another set than the default.
        """
        if self.is_loaded:
            self._check_updatable()
            return self._load(weights)
        loaded, self.is_loaded = self._load(self._stored(weights)), True
        self._check_complete(loaded)
        return loaded

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        served = ((name, tensor) for name, tensor in weights if not is_further(name))
        return AutoWeightsLoader(self).load_weights(stream_outer(served, self.model.num_streams))

    def _check_complete(self, loaded: set[str]) -> None:
        """vLLM itself looks for tensors that are missing in some models only: in no quantized one, say."""
        missing = sorted({name for name, _ in self.named_parameters() if part_of(name)} - loaded)
        if missing:
            raise ValueError(
                f"{checkpoint_of(self.vllm_config)} has no {missing[0]} ({len(missing)} tensors of its streams are "
                "missing): the checkpoint is damaged, copy or save it again."
            )

    def _stored(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """Those of the checkpoint, with the streams of the chosen set."""
        further = further_streams(checkpoint_of(self.vllm_config), self.vllm_config.model_config.hf_config)
        if further is None:
            return weights
        backbone = ((name, tensor) for name, tensor in weights if part_of(name) is None)
        return chain(backbone, load_file(further).items())

    def _check_updatable(self) -> None:
        name = getattr(self.vllm_config.model_config.hf_config, SET_NAME, DEFAULT_SET)
        if name != DEFAULT_SET:
            raise ValueError(
                f"New weights are taken for the streams named {DEFAULT_SET!r}, but vLLM serves the set {name!r}: train "
                "and save a model that has one set."
            )


class Qwen2ParScaleForCausalLM(StreamsForCausalLM):
    """Qwen2 with streams."""

    backbone = _Qwen2


class Qwen3ParScaleForCausalLM(StreamsForCausalLM):
    """Qwen3 with streams."""

    backbone = _Qwen3


class LlamaParScaleForCausalLM(StreamsForCausalLM):
    """Llama with streams."""

    backbone = _Llama


class MistralParScaleForCausalLM(StreamsForCausalLM):
    """Mistral with streams."""

    backbone = _Mistral
