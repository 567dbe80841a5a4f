"""A graph beside the model that it was made of: the same logits on a few tokens, or an error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parscale.errors import UnsupportedModelError
from parscale.export.decoder import CacheShape
from parscale.export.graph import INPUTS, LOGITS, PAST, PRESENT, cache_names
from parscale.streams.backbones import takes_argument

FIRST, TOKENS, PADDING = 5, 8, 2  # tokens of the first step, in all, and of padding in front of one row
# The largest difference, as a share of the largest logit. Rounding alone is a hundredth of it.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some tokens, and what a model says of them.

    Attributes:
        ids: `(B, N)`.
        mask: `(B, N)`, 0 for padding in front.
        logits: `(B, N, V)`.
        dtype: of the model.
    """

    ids: np.ndarray[Any, Any]
    mask: np.ndarray[Any, Any]
    logits: np.ndarray[Any, Any]
    dtype: torch.dtype


@torch.no_grad()
def sample(model: Any) -> Sample:
    """Random tokens in two rows, one of them padded, and the model's logits of them, in one pass without a cache."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    options = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_argument(model, "position_ids") else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    return Sample(ids.numpy(), mask.numpy(), logits.float().numpy(), model.dtype)


def check_graph(path: Path, shape: CacheShape, known: Sample) -> None:
    """Runs a graph on the sample, several tokens first and then one at a time.

    Raises:
        UnsupportedModelError: its logits differ from the model's.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    half = known.dtype == torch.float16
    cache = [x.numpy() for pair in shape.empty(len(known.ids), 0, known.dtype) for x in pair]
    names = [LOGITS, *cache_names(PRESENT, shape.layers)]
    found, start = [], 0
    for end in (FIRST, *range(FIRST + 1, TOKENS + 1)):
        step = dict(zip(INPUTS, (known.ids[:, start:end], known.mask[:, :end]), strict=True))
        logits, *cache = session.run(names, step | dict(zip(cache_names(PAST, shape.layers), cache, strict=True)))
        found.append(logits.astype(np.float32) if half else logits)
        start = end
    seen = known.mask.astype(bool)
    difference = np.abs(np.concatenate(found, axis=1) - known.logits)[seen].max()
    largest = np.abs(known.logits[seen]).max()
    if not difference <= TOLERANCE[known.dtype] * largest:  # also true for NaN
        raise UnsupportedModelError(
            f"The exported graph differs from the model: by {difference:.2g}, where the largest logit is "
            f"{largest:.2g}. Models of this architecture, or in this dtype, cannot be exported."
        )
