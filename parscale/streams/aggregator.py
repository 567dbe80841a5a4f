"""The learned mixture of the streams, between the backbone's final norm and `lm_head`."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from parscale.compat.torch import has_hooks, require_hooks
from parscale.distributed.parallel import local
from parscale.kernels import aggregate, aggregator, stream_weights
from parscale.kernels.aggregator.layout import stream_innermost
from parscale.kernels.dispatch import Impl

TENSORS = ("0.weight", "0.bias", "2.weight", "2.bias")  # the names of an aggregator's parameters


class Projection(nn.Module):
    """`x @ weight.T + bias`.

    Not an `nn.Linear`, because tools that look for linear layers by type are meant for the backbone's: PEFT's
    `all-linear` would put adapters on the aggregator, and quantizers would round it.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`, in the dtype of the weight, whatever that of `x`."""
        return nn.functional.linear(x.to(self.weight.dtype), local(self.weight), local(self.bias))

    def extra_repr(self) -> str:
        """The text in `print(model)`."""
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


class Aggregator(nn.Sequential):
    """`Linear(P*H -> H)`, SiLU, `Linear(H -> P)`, softmax over streams, smoothing, weighted sum.

    As in Chen et al., arXiv 2505.10475, section 3.2; its parameters are named `0.*` and `2.*` as in the released
    checkpoints. All zeros after construction: equal weights.

    Args:
        num_streams: P.
        hidden_size: H.
        smoothing: epsilon in `w * (1 - epsilon) + epsilon / P`.
    """

    def __init__(
        self, num_streams: int, hidden_size: int, smoothing: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(
            Projection(num_streams * hidden_size, hidden_size, dtype=dtype, device=device),
            nn.SiLU(),
            Projection(hidden_size, num_streams, dtype=dtype, device=device),
        )
        require_hooks(self)
        self.num_streams = num_streams
        self.smoothing = smoothing

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The unnormalised weights `(B, S, P)` of the streams' hidden states `(P*B, S, H)`, stream-major."""
        return super().forward(stream_innermost(hidden, self.num_streams))  # (B, S, H*P) -> (B, S, P)

    def weights(self, hidden: torch.Tensor) -> torch.Tensor:
        """The aggregation weights `(B, S, P)`, in at least float32, as `forward` uses them."""
        return stream_weights(self.logits(hidden), self.smoothing)

    def forward(self, hidden: torch.Tensor, impl: Impl = "auto") -> torch.Tensor:
        """Mixes `(P*B, S, H)`, stream-major, into `(B, S, H)` of the same dtype; on a GPU with fused kernels.

        Args:
            hidden: the streams' final hidden states.
            impl: `"reference"` for plain torch, `"fused"` for the kernels or an error.
        """
        first, last = self[0], self[2]
        if (hidden.is_cuda or impl == "fused") and _is_untouched(first) and _is_untouched(last):
            w1, b1, w2, b2 = (local(x) for x in (first.weight, first.bias, last.weight, last.bias))
            return aggregator(hidden, w1, b1, w2, b2, self.smoothing, impl=impl)
        innermost = stream_innermost(hidden, self.num_streams)  # (B, S, H*P)
        logits = super().forward(innermost).to(hidden.device)  # (B, S, P); the layers may run on another one
        mixed = aggregate(
            innermost.view(-1, hidden.shape[-1], self.num_streams).permute(2, 0, 1),  # (P, B*S, H)
            logits.flatten(0, 1),  # (B*S, P)
            self.smoothing,
            impl=impl,
        )
        return mixed.unflatten(0, logits.shape[:2])  # (B, S, H)


def _is_untouched(layer: nn.Module) -> TypeGuard[Projection]:
    """Whether a call of the layer only computes its projection: no hook, no offloading, no replaced forward."""
    return type(layer) is Projection and not has_hooks(layer) and "forward" not in layer.__dict__
