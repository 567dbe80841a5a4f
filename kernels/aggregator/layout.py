"""The order in which the first projection reads the streams: hidden index outer, stream index inner.

Shapes: P streams of B rows each; S tokens; H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch


def stream_innermost(hidden: torch.Tensor, P: int) -> torch.Tensor:
    """`(P*B, S, H)`, stream-major, as `(B, S, H*P)`: the columns of the released checkpoints' `0.weight`."""
    if not hidden.requires_grad or torch.compiler.is_compiling():  # which chooses layouts itself
        return _copied(hidden, P)
    innermost: torch.Tensor = _StreamInnermost.apply(hidden, P)
    return innermost


class _StreamInnermost(torch.autograd.Function):
    """The copy, whose gradient is copied back.

    autograd's own gradient of it is a view with the streams innermost. Elementwise operations keep such strides, so
    that the whole backbone's backward pass would run on them, and every linear layer in it copy them first.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: torch.Tensor, P: int) -> torch.Tensor:
        return _copied(hidden, P)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
        ctx.P = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        by_stream = gradient.unflatten(-1, (-1, ctx.P)).permute(3, 0, 1, 2)  # (P, B, S, H)
        return by_stream.contiguous().flatten(0, 1), None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        return _copied(tangent, ctx.P)


def _copied(hidden: torch.Tensor, P: int) -> torch.Tensor:
    return hidden.unflatten(0, (P, -1)).permute(1, 2, 3, 0).flatten(2)  # (B, S, H, P) -> (B, S, H*P)
