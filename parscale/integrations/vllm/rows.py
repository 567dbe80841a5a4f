"""Rows of a step where streams share keys: one for each token, and P - 1 more for those that are to be predicted from.

N tokens of which M run with all streams make `N + (P - 1) * M` rows: stream 0's in the order of the tokens, so that
the first N keys and values are those of the cache, and behind them the others', token by token.
"""

from __future__ import annotations

import torch


class StreamRows:
    """Which tokens of a step run with all streams. The model sets it before its layers run, and they read it.

    Args:
        num_streams: P.
        max_tokens: of a step.

    Attributes:
        chosen: `(M,)`, the tokens that run with all streams; `None` for all of them, which a CUDA graph needs.
        owners: `(M,)`, the request of each chosen token.
        lengths: `(M,)`, tokens of its request up to a chosen one.
        is_single: `(max_tokens,)`, tokens of requests that run with one stream; where all tokens run with all
            streams, these give stream 0's result.
    """

    chosen: torch.Tensor | None = None
    owners: torch.Tensor
    lengths: torch.Tensor

    def __init__(self, num_streams: int, max_tokens: int) -> None:
        self.num_streams = num_streams
        self.is_single = torch.zeros(max_tokens, dtype=torch.bool)
        self._has_single = False

    def mark(self, is_single: torch.Tensor | None) -> None:
        """Says which of the step's first tokens are of requests with one stream; `None`: none."""
        if self._has_single:
            self.is_single.fill_(False)
        self._has_single = is_single is not None
        if is_single is not None:
            self.is_single[: is_single.shape[0]].copy_(is_single, non_blocking=True)

    def choose(self, chosen: torch.Tensor | None, positions: torch.Tensor, starts: torch.Tensor | None) -> None:
        """Sets the tokens that run with all streams.

        Args:
            chosen: `(M,)`, or `None` for all.
            positions: of all tokens `(N,)`.
            starts: of the requests' tokens `(B + 1,)`; needed with `chosen`.
        """
        self.chosen = None if chosen is None else chosen.long()
        if chosen is not None and starts is not None:
            self.owners = torch.searchsorted(starts[1:], chosen.to(starts.dtype), right=True)
            self.lengths = positions[chosen].int() + 1

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, ...)` of tokens to rows."""
        further = x if self.chosen is None else x[self.chosen]
        return torch.cat((x, further.repeat_interleave(self.num_streams - 1, dim=0)))

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows to those of stream 0, `(N, ...)`, and those of the other streams, `(M, P - 1, ...)`."""
        others = self.num_streams - 1
        M = x.shape[0] // self.num_streams if self.chosen is None else self.chosen.shape[0]
        N = x.shape[0] - others * M
        return x[:N], x[N:].unflatten(0, (M, others))
