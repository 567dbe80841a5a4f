"""Calls with two passes, for sets of streams that share stream 0's keys and values.

Stream 0 is the plain backbone, and the other streams keep no state after their token. So stream 0 may run first, alone,
and the others afterwards, only for the tokens that need them: the last ones of a prompt, or those where stream 0 is
uncertain. `parscale.hooks.two_passes` runs the passes.
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
    """Runs streams only on tokens where stream 0's prediction is uncertain.

    Attributes:
        threshold: entropy of the prediction, in nats, above which they run.
        num_streams: P.
        ran: number of tokens on which all streams ran.
        tokens: number of predicted tokens.
        chosen: where all streams ran in the last call, `(B, positions)`.
    """

    threshold: float
    num_streams: int
    ran: int = 0
    tokens: int = 0
    chosen: torch.Tensor | None = None

    def ran_in(self, row: int, positions: int) -> int:
        """The number of a row's first positions on which all streams ran in the last call."""
        if self.chosen is None:  # a threshold that chooses no token
            return positions if self.threshold == 0 else 0
        return int(self.chosen[row, :positions].sum())

    @property
    def mean_streams(self) -> float:
        """The mean number of streams that ran for a token."""
        return float(self.num_streams) if self.threshold == 0 else self.mean_of(self.ran, self.tokens)

    def mean_of(self, ran: int, tokens: int) -> float:
        """The mean number of streams for `tokens` tokens, if all streams ran on `ran` of them."""
        return 1.0 + (self.num_streams - 1) * ran / max(1, tokens)


@dataclasses.dataclass
class TwoPasses:
    """A call of the whole model with two passes of its backbone.

    Attributes:
        streams: the set.
        kept: number of last positions that the caller wants; `None`: all.
        adaptive: where the streams run; `None`: everywhere.
        is_second: whether the second pass runs.
        arguments: of the backbone in the first pass, by name, with B rows.
        rows: B.
        length: S, new tokens.
        seen: tokens in the cache before them.
        positions: number of last positions in the second pass.
        hidden: final hidden states of stream 0 there, `(B, positions, H)`.
        keys: the keys, values and mask of each attention call in the first pass, in order.
        chosen: the rows of the second pass; `None`: all.
        is_packed: whether all positions and rows take part, since arguments cannot be cut.
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
    is_packed: bool = False
