"""Calls in two passes, of sets of streams that share stream 0's keys and values.

Stream 0 is the plain backbone, and no other stream's state outlives its token. So stream 0 may run first, alone, and
the others afterwards, for the tokens where they are wanted: the last ones of a prompt, or those that stream 0 is
uncertain about. `parscale.hooks.two_passes` makes the passes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from parscale.streams.sets import StreamSet

LayerKeys = tuple[torch.Tensor, torch.Tensor, Any]  # keys and values (B, G, K, D), and the mask


@dataclasses.dataclass
class Adaptive:
    """Streams run on tokens where stream 0's prediction is uncertain only.

    Args:
        threshold: entropy of the prediction, nats, above which they run.
        num_streams: P.
        ran: tokens on which all streams ran.
        tokens: all tokens that were predicted.
        chosen: of the last call, where all streams ran, `(B, positions)`.
    """

    threshold: float
    num_streams: int
    ran: int = 0
    tokens: int = 0
    chosen: torch.Tensor | None = None

    def ran_in(self, row: int, positions: int) -> int:
        """On how many of the first positions of a row all streams ran in the last call."""
        if self.chosen is None:  # of a threshold that chooses nothing
            return positions if self.threshold == 0 else 0
        return int(self.chosen[row, :positions].sum())

    @property
    def mean_streams(self) -> float:
        """How many streams ran for a token on average."""
        return float(self.num_streams) if self.threshold == 0 else self.mean_of(self.ran, self.tokens)

    def mean_of(self, ran: int, tokens: int) -> float:
        """The same where all streams ran on `ran` of these tokens."""
        return 1.0 + (self.num_streams - 1) * ran / max(1, tokens)


@dataclasses.dataclass
class TwoPasses:
    """A call of the whole model, in two passes of its backbone.

    Args:
        streams: the set.
        kept: how many of the last positions the caller wants; `None`: all.
        adaptive: where the streams run; `None`: everywhere.
        is_second: whether stream 0 is through, and the other streams run.
        arguments: the backbone's in the first pass, by their names; B rows.
        rows: B.
        length: S, new tokens.
        seen: tokens in the cache before them.
        positions: how many of the last positions the second pass has.
        hidden: final hidden states of stream 0 there, `(B, positions, H)`.
        keys: what the attention of each layer was given in the first pass, call after call.
        chosen: which rows the second pass has; `None`: all.
    """

    streams: StreamSet
    kept: int | None
    adaptive: Adaptive | None
    is_second: bool = False
    arguments: dict[str, Any] | None = None
    rows: int = 0
    length: int = 0
    seen: int = 0
    positions: int = 0
    hidden: torch.Tensor | None = None
    keys: dict[nn.Module, list[LayerKeys]] = dataclasses.field(default_factory=dict)
    chosen: torch.Tensor | None = None
