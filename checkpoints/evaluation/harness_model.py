"""lm-eval's model for streams that share keys and values: contexts run with one row, and answers with all streams.

lm-eval reads the logits of an answer's tokens only, but asks for those of its context too. `logits_to_keep` says which
ones it reads, so that the context costs what it costs the plain backbone (`parscale.hooks.two_passes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from parscale.streams.backbones import takes_argument
from parscale.streams.state import active_streams


def harness_model(model: Any, **options: Any) -> Any:
    """lm-eval's `HFLM` around a model, which asks it for the logits of answers alone where that saves something.

    Args:
        model: wrapped or plain.
        **options: of `HFLM`.
    """
    from lm_eval.models.huggingface import HFLM

    streams = active_streams(model)
    if streams is None or not streams.shares_keys or not takes_argument(model, "logits_to_keep"):
        return HFLM(pretrained=model, **options)

    class Answers(HFLM):
        firsts: dict[tuple[int, ...], int]

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.firsts = {}  # by a row's tokens, the first position whose logits are read
            for _, context, answer in requests:
                ids = (context + answer)[-(self.max_length + 1) :][:-1]
                first, key = len(ids) - len(answer), _without_padding(ids)
                self.firsts[key] = min(first, self.firsts.get(key, first))
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            first = min(self.firsts[_without_padding(row)] for row in inps.tolist())
            with torch.no_grad():
                logits: torch.Tensor = self.model(inps, logits_to_keep=inps.shape[1] - first).logits
            return logits

    return Answers(pretrained=model, **options)


def _without_padding(ids: Sequence[int]) -> tuple[int, ...]:
    """A row without the zeros at its end, with which lm-eval pads it."""
    return tuple(np.trim_zeros(ids, "b"))
