"""Mixtures of experts in a graph: products of groups of rows, each by the matrix of its expert.

torch has one operator for them and ONNX has none, so each expert becomes a product of its own on the rows routed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` writes for operators that it does not know, by operator."""
    # that of transformers, while it is exported; absent before a model with experts is made, and in some versions
    operator = getattr(getattr(torch.ops.transformers, "grouped_mm_fallback", None), "default", None)
    return {} if operator is None else {operator: _products}


def _products(states: Any, matrices: Any, ends: Any) -> Any:
    """The product of each row with its expert's matrix.

    Args:
        states: `(N, in)`, sorted by expert.
        matrices: `(E, in, out)`.
        ends: `(E,)`, where the rows of each expert end.

    Returns:
        `(N, out)`.
    """
    from onnx import TensorProto
    from onnxscript import opset18

    op: Any = opset18  # its types allow no results of operators as indices
    first_axis = start = op.Constant(value_ints=[0])
    ends, parts = op.Cast(ends, to=TensorProto.INT64), []
    for expert in range(matrices.shape[0]):
        end = op.Gather(ends, op.Constant(value_ints=[expert]))  # (1,)
        matrix = op.Gather(matrices, op.Constant(value_int=expert))  # (in, out)
        parts.append(op.MatMul(op.Slice(states, start, end, first_axis), matrix))
        start = end
    return op.Concat(*parts, axis=0)
