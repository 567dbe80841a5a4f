"""Changes to the method that could make streams pay sooner, each by its name.

- `draw=D`: prefixes drawn D times as large as by default
- `embedding`: a learned vector for each stream, added to its input; `embedding=shared`: with `kv="shared"`, for all
  streams but the first. The dense model and one prefix may have one too: what one stream of this variant has
- `lora=R`: low-rank differences of rank R for each stream in place of prefixes
- `left-out`: in each training step one stream, drawn anew, does not count in the mixture
- `apart=C`: C times the mean cosine of the streams' final states is added to the loss
- `probabilities`: the streams' predicted probabilities are mixed, in place of their states
- `rate=F`: prefixes and aggregator train at F times the rate
- `smoothing=E`: each stream counts at least E / P, where it is 0.1 otherwise; with 1 all count alike
- `shared`: all streams read stream 0's keys and values, `kv="shared"`
- `shared-own`: the same, but each stream reads its own key and value of the current token
- `shared-window=W`: each stream also reads its own keys and values of the last W tokens, the current one included; a
  learned number for each head of a layer is added to their logits. The dense model and one prefix may have one too:
  they read their last W tokens twice, once with that number
- `shared-prefix`: stream 0 has a prefix too

P streams, B rows, S tokens, H hidden size, V vocabulary; h heads of size D, T prefix tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, linear, log_softmax, pad, softplus
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, eager_attention_forward, repeat_kv

from parscale import wrap


class Streams(nn.Module):
    """A wrapped model as a function of token ids, with a term of the loss and factors of the learning rate."""

    def __init__(self, model: Any, streams: int) -> None:
        super().__init__()
        self.model, self.streams = model, streams
        self.generator = torch.Generator()
        self.penalty = torch.zeros(())
        self.rate_of_streams = 1.0

    def at_step(self, seed: int, step: int) -> None:
        """What is drawn in a step depends on the seed and the step alone, so that a run can go on."""
        self.generator.manual_seed(seed * 1_000_003 + step)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(B, S)` to logits `(B, S, V)`."""
        return self.model(input_ids=ids, use_cache=False).logits


class Embedding(Streams):
    """`embedding`; where the cache is shared, stream 0 stays the plain backbone."""

    def __init__(self, model: Any, streams: int, shared: bool = False) -> None:
        super().__init__(model, streams)
        self.of_stream = add_vectors(model, streams, first=int(shared))


def add_vectors(model: Any, streams: int, first: int = 0) -> nn.Parameter:
    """Adds a learned vector to the input of each stream from `first` on; returns them, `(P - first, H)`."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(streams, embedding.embedding_dim, generator=generator)[first:]
    of_stream = nn.Parameter(vectors * model.config.initializer_range)

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if getattr(model, "num_streams", 1) != streams:  # they are off
            return output
        by_stream = output.unflatten(0, (streams, -1))  # (P, B, S, H)
        changed = by_stream[first:] + of_stream[:, None, None]
        return torch.cat([by_stream[:first], changed]).flatten(0, 1)  # (P*B, S, H)

    embedding.register_forward_hook(add)
    return of_stream


def add_window(model: Any, window: int) -> None:
    """Lets each head of a model without streams read its last `window` tokens once more, with a learned gate.

    A number that is added to the logits of the second reading is the same as `softplus` of it added to the first: the
    gates of `shared-window`, at the price of the plain model.
    """
    name = f"window={window}"
    AttentionInterface.register(name, functools.partial(_attend_with_window, window))
    AttentionMaskInterface.register(name, eager_mask)
    for layer in model.model.layers:
        layer.self_attn.gate = nn.Parameter(torch.zeros(model.config.num_attention_heads))
    model.set_attn_implementation(name)


def _attend_with_window(
    window: int,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager`, with the gate of each head on its last tokens; a prefix, T keys in front, has none."""
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position
    near = pad((distance >= 0) & (distance < window), (key.shape[2] - query.shape[2], 0))  # (S, T + S)
    bias = softplus(module.gate.float())[:, None, None] * near  # (h, S, T + S)
    return eager_attention_forward(module, query, key, value, attention_mask + bias, **kwargs)


class LeftOut(Streams):
    """`left-out`."""

    def __init__(self, model: Any, streams: int) -> None:
        super().__init__(model, streams)
        model.get_decoder().aggregate_layer[2].register_forward_hook(self._leave_out)

    def _leave_out(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not self.training:
            return None
        left_out = torch.randint(self.streams, (), generator=self.generator)
        return output.index_fill(-1, left_out, -1e4)  # (B, S, P)


class Apart(Streams):
    """`apart`."""

    def __init__(self, model: Any, streams: int, factor: float) -> None:
        super().__init__(model, streams)
        self.factor = factor
        self.pairs = torch.triu_indices(streams, streams, offset=1)
        model.get_decoder().aggregate_layer.register_forward_pre_hook(self._keep_apart)

    def _keep_apart(self, module: nn.Module, args: Any) -> None:
        first, second = args[0].unflatten(0, (self.streams, -1))[self.pairs].float()  # each (pairs, B, S, H)
        self.penalty = self.factor * cosine_similarity(first, second, dim=-1).mean()


class Probabilities(Streams):
    """`probabilities`: the aggregator gives the weights as ever; the states that it mixes are not used."""

    def __init__(self, model: Any, streams: int) -> None:
        super().__init__(model, streams)
        model.get_decoder().aggregate_layer.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any) -> None:
        self.states = args[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(B, S)` to logarithms of the mixed probabilities `(B, S, V)`; without streams to logits."""
        if self.model.num_streams == 1:
            return super().forward(ids)
        self.model.get_decoder()(input_ids=ids, use_cache=False)
        weights = self.model.get_decoder().aggregate_layer.weights(self.states)  # (B, S, P)
        logits = self.model.lm_head(self.states).unflatten(0, (self.streams, -1))  # (P, B, S, V)
        by_stream = log_softmax(logits.float(), dim=-1) + weights.permute(2, 0, 1)[..., None].log()
        return by_stream.logsumexp(0)


class SharedVariant(Streams):
    """`shared-own`, `shared-window` and `shared-prefix`: `shared` with every softmax written out, for whole sequences.

    Args:
        model: a Qwen2 with streams that share keys and values.
        streams: P.
        window: how many of its own keys and values each stream reads, the last of them its own position's.
        gated: they come beside all of stream 0's, and not for stream 0, with a learned number for each head added to
            their logits; otherwise they take their places.
        first_prefix: stream 0 has a prefix too.
    """

    def __init__(
        self, model: Any, streams: int, *, window: int = 0, gated: bool = False, first_prefix: bool = False
    ) -> None:
        super().__init__(model, streams)
        self.window = window
        layers = [layer.self_attn for layer in model.model.layers]
        heads, std = model.config.num_attention_heads, model.config.initializer_range
        generator = torch.Generator().manual_seed(1)
        self.gates_of_streams = nn.ParameterList(torch.zeros(heads) for _ in layers if gated)
        shapes = [(2, 1, *layer.prefix_k.shape[1:]) for layer in layers if first_prefix]
        self.first_prefixes = nn.ParameterList(torch.randn(shape, generator=generator) * std for shape in shapes)
        for index, layer in enumerate(layers):
            layer.forward = functools.partial(self._attention, index, layer)

    def _attention(
        self, index: int, layer: Any, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """In place of the layer's forward: `(P*B, S, H)` to the same."""
        if self.model.num_streams == 1:
            return type(layer).forward(layer, hidden_states, position_embeddings, **kwargs)
        # not called: the package gives the projections of keys and values stream 0's rows alone
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        projected = [linear(hidden_states, project.weight, project.bias) for project in projections]
        query, key, value = (x.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for x in projected)  # (P*B, h, S, D)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        rows = [query, *(repeat_kv(x, layer.num_key_value_groups) for x in (key, value))]
        query, key, value = (x.unflatten(0, (self.streams, -1)) for x in rows)  # (P, B, h, S, D)
        prefix_k, prefix_v = (repeat_kv(x, layer.num_key_value_groups) for x in self._prefix(index, layer))
        query = query * layer.scaling
        logits = [torch.einsum("pbhsd,phtd->pbhst", query, prefix_k), torch.einsum("pbhsd,bhtd->pbhst", query, key[0])]
        if self.window:  # tokens s - window + 1 to s, as (P, B, h, S, D, window)
            own_key, own_value = (pad(x, (0, 0, self.window - 1, 0)).unfold(3, self.window, 1) for x in (key, value))
            logits.append((query[..., None] * own_key).sum(-2))
        if self.gates_of_streams:
            logits[2] = logits[2] + self.gates_of_streams[index].view(1, 1, -1, 1, 1)
        sizes = [x.shape[-1] for x in logits]
        visible = self._visible(sizes, kwargs.get("position_ids"), query)
        scores = torch.cat(logits, -1).masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        of_prefix, of_shared, *of_own = weights.split(sizes, -1)
        output = torch.einsum("pbhst,phtd->pbhsd", of_prefix, prefix_v)
        output = output + torch.einsum("pbhst,bhtd->pbhsd", of_shared, value[0])
        if self.window:
            output = output + (of_own[0][..., None, :] * own_value).sum(-1)
        return layer.o_proj(output.transpose(2, 3).flatten(-2).flatten(0, 1)), None  # (P*B, S, H)

    def _prefix(self, index: int, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all streams, each `(P, G, T, D)`; zeros for a stream 0 that has none."""
        of_others = layer.prefix_k, layer.prefix_v
        first = self.first_prefixes[index] if self.first_prefixes else [torch.zeros_like(x[:1]) for x in of_others]
        prefix_k, prefix_v = (torch.cat(pair) for pair in zip(first, of_others, strict=True))
        return prefix_k, prefix_v

    def _visible(self, sizes: list[int], position_ids: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
        """What each query sees of the prefix, stream 0's tokens and the window, `(P, B or 1, 1, S, T + S + window)`.

        Where positions begin anew, `(P*B or 1, S)`, a document does, which sees none before it.
        """
        P, B, S, device = self.streams, query.shape[1], query.shape[3], query.device
        gated, place = bool(self.gates_of_streams), torch.arange(S, device=device)
        position = place[None] if position_ids is None else position_ids[:B]  # (B or 1, S)
        has_prefix, has_window = torch.ones(2, P, 1, 1, 1, 1, dtype=torch.bool, device=device)
        has_prefix[0], has_window[0] = bool(self.first_prefixes), not gated
        document = place - position  # where it begins, (B or 1, S)
        replaced = 0 if gated else self.window
        shared = place <= place[:, None] - replaced  # (S, S)
        shared = shared & (document[:, None] == document[..., None])  # (B or 1, S, S)
        rows = len(position)
        seen = [has_prefix.expand(P, rows, 1, S, sizes[0]), shared[:, None].expand(P, rows, 1, S, S)]
        if self.window:
            distance = torch.arange(self.window - 1, -1, -1, device=device)
            own = position[:, None, :, None] >= distance  # (B or 1, 1, S, window)
            seen.append(has_window & own)
        return torch.cat(seen, -1)


def with_one_cache(variant: str, model: Any, streams: int) -> SharedVariant:
    """A variant of streams that share keys and values.

    Args:
        variant: `"shared-own"`, `"shared-window=W"` or `"shared-prefix"`.
        model: a Qwen2 with such streams.
        streams: P.
    """
    kind, _, value = variant.partition("=")
    if kind == "shared-own":
        return SharedVariant(model, streams, window=1)
    if kind == "shared-window":
        return SharedVariant(model, streams, window=int(value), gated=True)
    if kind == "shared-prefix":
        return SharedVariant(model, streams, first_prefix=True)
    raise ValueError(f"no variant {variant!r} of one cache")


def apply_variant(variant: str, model: Any, streams: int, prefix_length: int, seed: int) -> Streams:
    """The model with P streams, and with a variant if it has a name."""
    kind, _, value = variant.partition("=")
    if kind == "lora":
        wrapped = wrap(model, streams, transform="lora", rank=int(value), seed=seed)
        return Streams(wrapped, streams)
    kv = "shared" if kind.startswith("shared") or value == "shared" else "own"
    smoothing = float(value) if kind == "smoothing" else 0.1
    wrapped = wrap(model, streams, prefix_length=prefix_length, smoothing=smoothing, init="random", seed=seed, kv=kv)
    if kind == "draw":
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if ".prefix_" in name:
                    parameter.mul_(float(value))
    if kind == "apart":
        return Apart(wrapped, streams, float(value))
    if kind == "embedding":
        return Embedding(wrapped, streams, shared=value == "shared")
    simple = {"left-out": LeftOut, "probabilities": Probabilities}
    if kind in simple:
        return simple[kind](wrapped, streams)
    if kind.startswith("shared-"):
        return with_one_cache(variant, wrapped, streams)
    if kind not in ("", "draw", "rate", "shared", "smoothing"):
        raise ValueError(f"no variant {variant!r}")
    result = Streams(wrapped, streams)
    if kind == "rate":
        result.rate_of_streams = float(value)
    return result
