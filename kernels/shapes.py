"""One sentence for tensors whose shapes do not fit together."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shapes_error(operation: str, layouts: Sequence[str], tensors: Sequence[torch.Tensor]) -> ValueError:
    """The error that says what an operation takes and what it was given.

    Args:
        operation: its name, the subject of the sentence.
        layouts: name and shape in letters of each tensor, such as `"x (P, N, H)"`.
        tensors: as they were given, in the same order.
    """
    given = [str(tuple(x.shape)) for x in tensors]
    return ValueError(f"{operation} takes {_listed(layouts)}, got {_listed(given)}.")


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
