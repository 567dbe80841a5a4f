"""The aggregator in vLLM: one linear layer on adjacent rows, split over the tensor-parallel processes.

A token's P rows are adjacent in memory, `(N, P*H)`. With the columns of the first projection in the same order
(stream outer, feature inner), the projection is one matrix product without a copy. Its H inner features are split over
the tensor-parallel processes, so that each holds a part of the weights; they exchange the sums of P logits for each
token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from parscale.compat.vllm import (
    ColumnParallelLinear,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    set_weight_attrs,
    tensor_model_parallel_all_reduce,
)
from parscale.kernels import aggregate

FIRST = "aggregate_layer.0.weight"


class StreamAggregator(nn.Module):
    """`Linear(P*H -> H)`, SiLU, `Linear(H -> P)`, softmax over streams, smoothing, weighted sum.

    Its parameters have the names of checkpoints; `stream_outer` reorders the columns of the first one. The logits,
    which go into a softmax, are float32.

    Args:
        num_streams: P.
        hidden_size: H.
        smoothing: epsilon in `w * (1 - epsilon) + epsilon / P`.
        prefix: the prefix of its layers' names.
    """

    def __init__(self, num_streams: int, hidden_size: int, smoothing: float, *, prefix: str) -> None:
        super().__init__()
        self.num_streams, self.smoothing = num_streams, smoothing
        self.processes = get_tensor_model_parallel_world_size()
        first = ColumnParallelLinear(
            num_streams * hidden_size, hidden_size, bias=True, prefix=f"{prefix}.0", return_bias=False
        )
        last = nn.Module()
        last.weight = nn.Parameter(
            torch.zeros(num_streams, hidden_size // self.processes, dtype=torch.float32), requires_grad=False
        )
        last.bias = nn.Parameter(torch.zeros(num_streams, dtype=torch.float32), requires_grad=False)
        set_weight_attrs(last.weight, {"weight_loader": _load_columns})
        self.add_module("0", first)
        self.add_module("2", last)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(N*P, H)`, token-major, to `(N, H)`."""
        first: Any = self.get_submodule("0")
        last: Any = self.get_submodule("2")
        x = hidden.unflatten(0, (-1, self.num_streams))  # (N, P, H)
        inner = nn.functional.silu(first(x.flatten(1)).float())  # (N, H / processes)
        logits = nn.functional.linear(inner, last.weight)  # (N, P)
        if self.processes > 1:
            logits = tensor_model_parallel_all_reduce(logits)
        return aggregate(x.transpose(0, 1), logits + last.bias, self.smoothing)


def stream_outer(weights: Iterable[tuple[str, torch.Tensor]], num_streams: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors, with the columns of the first projection reordered: by stream, not by hidden feature."""
    for name, tensor in weights:
        if name.endswith(FIRST):
            tensor = tensor.unflatten(1, (-1, num_streams)).transpose(1, 2).flatten(1)  # (H, H*P) -> (H, P*H)
        yield name, tensor


def _load_columns(param: nn.Parameter, whole: torch.Tensor) -> None:
    """Fills `(P, H / processes)` with this process's columns of `(P, H)`."""
    size = param.shape[1]
    if whole.shape != (param.shape[0], size * get_tensor_model_parallel_world_size()):
        raise ValueError(f"The aggregator's last projection is {tuple(whole.shape)} and does not fit the backbone.")
    first = get_tensor_model_parallel_rank() * size
    param.data.copy_(whole[:, first : first + size])
