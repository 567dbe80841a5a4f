"""Changes to the method that could make streams pay sooner, each by its name.

- `draw=D`: prefixes drawn D times as large as by default
- `embedding`: a learned vector for each stream, added to its input
- `lora=R`: low-rank differences of rank R for each stream in place of prefixes
- `left-out`: in each training step one stream, drawn anew, does not count in the mixture
- `apart=C`: C times the mean cosine of the streams' final states is added to the loss
- `probabilities`: the streams' predicted probabilities are mixed, in place of their states
- `rate=F`: prefixes and aggregator train at F times the rate
- `shared`: all streams read stream 0's keys and values, `kv="shared"`

P streams, B rows, S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, log_softmax

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
    """`embedding`."""

    def __init__(self, model: Any, streams: int) -> None:
        super().__init__(model, streams)
        embedding = model.get_input_embeddings()
        generator = torch.Generator().manual_seed(1)
        std = model.config.initializer_range
        self.of_stream = nn.Parameter(torch.randn(streams, embedding.embedding_dim, generator=generator) * std)
        embedding.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return (output.unflatten(0, (self.streams, -1)) + self.of_stream[:, None, None]).flatten(0, 1)  # (P*B, S, H)


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
        """`(B, S)` to logarithms of the mixed probabilities `(B, S, V)`."""
        self.model.get_decoder()(input_ids=ids, use_cache=False)
        weights = self.model.get_decoder().aggregate_layer.weights(self.states)  # (B, S, P)
        logits = self.model.lm_head(self.states).unflatten(0, (self.streams, -1))  # (P, B, S, V)
        by_stream = log_softmax(logits.float(), dim=-1) + weights.permute(2, 0, 1)[..., None].log()
        return by_stream.logsumexp(0)


def apply_variant(variant: str, model: Any, streams: int, prefix_length: int, seed: int) -> Streams:
    """The model with P streams, and with a variant if it has a name."""
    kind, _, value = variant.partition("=")
    if kind == "lora":
        wrapped = wrap(model, streams, transform="lora", rank=int(value), seed=seed)
        return Streams(wrapped, streams)
    kv = "shared" if kind == "shared" else "own"
    wrapped = wrap(model, streams, prefix_length=prefix_length, init="random", seed=seed, kv=kv)
    if kind == "draw":
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if ".prefix_" in name:
                    parameter.mul_(float(value))
    if kind == "apart":
        return Apart(wrapped, streams, float(value))
    simple = {"embedding": Embedding, "left-out": LeftOut, "probabilities": Probabilities}
    if kind in simple:
        return simple[kind](wrapped, streams)
    if kind not in ("", "draw", "rate", "shared"):
        raise ValueError(f"no variant {variant!r}")
    result = Streams(wrapped, streams)
    if kind == "rate":
        result.rate_of_streams = float(value)
    return result
