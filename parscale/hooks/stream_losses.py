"""The measurement behind `stream_losses`, `stream_report` and `parscale diagnose`: every stream in one pass.

P streams, B rows, S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

IGNORED = -100  # as a label: no loss is counted here


class StreamLosses(NamedTuple):
    """What the streams of a model do at each token of a text; losses and weights keep their gradients."""

    losses: torch.Tensor
    """Next-token losses in nats, `(P, B, S - 1)`, or `(P + 1, B, S - 1)` with the mixture last; 0 where ignored."""
    counted: torch.Tensor
    """Where a loss is counted, `(B, S - 1)`."""
    weights: torch.Tensor
    """Aggregation weights of the aggregator's own layers, `(B, S, P)`."""
    uncertainty: torch.Tensor
    """Entropy of stream 0's prediction in nats, `(B, S - 1)`, without gradients."""


def measure_streams(
    model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, *, mixture: bool = False, **kwargs: Any
) -> StreamLosses:
    """Measures every active stream alone, in one pass.

    Args:
        model: with at least two active streams.
        input_ids: `(B, S)`.
        labels: `(B, S)`, -100 where no loss counts.
        mixture: also measure what the streams are mixed to, which is the model itself.
        **kwargs: passed to the model (`attention_mask`, ...).
    """
    with _streams_apart(model, mixture) as captured:
        logits = model(input_ids=input_ids, use_cache=False, **kwargs).logits  # (P*B or (P + 1)*B, S, V)
    by_stream = logits.unflatten(0, (-1, len(input_ids)))  # (P or P + 1, B, S, V)
    targets = labels[:, 1:].to(logits.device, torch.long)  # (B, S - 1)
    rows, uncertainty = [], []
    for row, target in enumerate(targets):  # one at a time: a float32 copy of all logits may be large
        predicted = by_stream[:, row, :-1].transpose(1, 2)  # (P or P + 1, V, S - 1)
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        first = predicted[0].detach().softmax(0)  # (V, S - 1)
        uncertainty.append(torch.special.entr(first).sum(0))
        repeated = target.expand(len(predicted), -1)
        rows.append(cross_entropy(predicted, repeated, reduction="none", ignore_index=IGNORED))
    return StreamLosses(torch.stack(rows, dim=1), targets != IGNORED, captured[0], torch.stack(uncertainty))


@contextmanager
def _streams_apart(model: Any, mixture: bool) -> Iterator[list[torch.Tensor]]:
    """In this block the head sees the streams' hidden states and, if wanted, their mixture behind them.

    The list that is yielded gets the aggregation weights `(B, S, P)` of each forward pass.
    """
    state = model.parscale
    aggregator = state.aggregator(state.active)
    captured: list[torch.Tensor] = []

    def weigh(module: object, args: object, output: Any) -> None:  # while FSDP has the aggregator in one piece
        if state.call.aggregating:  # another thread's pass
            return
        hidden = output[0]  # (P*B, S, H)
        captured.append(aggregator.weights(hidden))
        if mixture:
            output.last_hidden_state = torch.cat([hidden, aggregator(hidden, impl=state.kernels)])

    with state.backbone.register_forward_hook(weigh), state.calls.unmixed():  # the hook runs after the streams' own
        yield captured
