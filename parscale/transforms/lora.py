"""`lora`: a low-rank difference for each stream in each linear layer.

    y = W x + up_p (down_p x)         down (P, r, in), up (P, out, r)

for a row of stream p, as one batched product over the streams (Hu et al., arXiv 2106.09685, with alpha = r). `down`
starts as in that paper's code and `up` at zero, so each stream starts as the backbone itself.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Conv1D

from parscale.distributed.offloading import execution_device, parameter_of
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import inner_modules
from parscale.streams.brief_runs import is_machine_error, run_briefly
from parscale.streams.layer_specs import Linear, ParameterSpec
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState
from parscale.transforms.base import ModelTransform

ROWS = 3  # of the forward pass that finds linear layers on whole rows; two tokens in each
# Experts get the tokens routed to them, from any row. Of correction_coefs (Gemma 3n) training uses the weight alone.
_WITHOUT = re.compile(r"(^|\.)(experts\.|correction_coefs$)")


class LoraTransform(ModelTransform):
    """`stream_down` and `stream_up` on each linear layer of the backbone that runs on whole rows."""

    def __init__(self, state: ParScaleState, streams: StreamSet) -> None:
        super().__init__(state, streams)
        self.down_name, self.up_name = streams.own_name("stream_down"), streams.own_name("stream_up")
        self._hooks: list[Any] = []

    def linears(self) -> list[Linear]:
        """The layers that get a difference."""
        if not self.state.linears:
            self.state.linears = _find_linears(self.state)
        return self.state.linears

    def parameter_specs(self) -> list[ParameterSpec]:
        """Two on each linear layer."""
        P, r = self.streams.config.num_transformed, self.streams.config.rank
        return [
            ParameterSpec(
                layer.module_name, layer.module, name, shape, self.state.hidden[0].dtype, execution_device(layer.module)
            )
            for layer in self.linears()
            for name, shape in (("stream_down", (P, r, layer.in_size)), ("stream_up", (P, layer.out_size, r)))
        ]

    def add_hooks(self) -> None:
        """A hook on each linear layer."""
        self._hooks = [layer.module.register_forward_hook(self._add) for layer in self.linears()]

    def detach(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def draw(self, std: float) -> None:
        """`down` uniform in +-1/sqrt(in), `up` zero."""
        for spec, parameter in zip(self.parameter_specs(), self.parameters(), strict=True):
            if spec.name == "stream_down":
                bound = 1 / math.sqrt(spec.shape[-1])
                parameter.uniform_(-bound, bound)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """After a linear layer: adds the streams' differences to `(P*B, ..., out)` or `(P*B*S, out)`."""
        if self.state.in_flight is not self.streams:
            return output
        return output + self.difference(module, args[0]).reshape(output.shape).to(output)

    def difference(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The low-rank differences `(P, N, out)` for inputs `(P*B, ..., in)`, stream-major, of the streams with one."""
        down, up = parameter_of(module, self.down_name), parameter_of(module, self.up_name)
        low = torch.bmm(x.to(down).reshape(len(down), -1, x.shape[-1]), down.mT)  # (P, N, in) -> (P, N, r)
        return torch.bmm(low, up.mT)


def _find_linears(state: ParScaleState) -> list[Linear]:
    """The linear layers that a forward pass calls with one or more items of each row, row after row.

    Layers without a differentiable effect on the result are excluded, such as those that choose tokens to attend to.
    """
    found: dict[int, Linear] = {}
    probes: dict[int, torch.Tensor] = {}
    paths = {id(module): path.replace(".base_layer", "") for path, module in state.model.named_modules()}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor) or not isinstance(output, torch.Tensor):
            return output
        if x.shape[:-1] != output.shape[:-1] or x.ndim < 2 or x.shape[0] % ROWS != 0:
            return output
        layer = Linear(paths[id(module)], module, x.shape[-1], output.shape[-1])
        found.setdefault(id(module), layer)
        probe = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        return output + probes.setdefault(id(module), probe)

    modules = {id(module): module for part in state.parts for module in inner_modules(part)}
    poolers = [pooler for part in state.mixed if isinstance(pooler := getattr(part, "pooler", None), nn.Module)]
    mixed = {id(module) for pooler in poolers for module in pooler.modules()}  # these see the mixed states
    apart = mixed | _of_adapters(modules.values())
    linears = [
        module
        for i, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and i not in apart and not _WITHOUT.search(paths[i])
    ]
    with contextlib.ExitStack() as hooks, _without_inference_tensors(state):
        for module in linears:
            hooks.enter_context(module.register_forward_hook(record))
        results = run_briefly(state, rows=ROWS, gradients=True)
    if not found:
        raise UnsupportedModelError(
            f"No linear layer was found in {type(state.model).__name__} that runs on whole rows, so transform='lora' "
            "has no place in it."
        )
    try:
        with torch.enable_grad():
            total = torch.stack([hidden.sum().to(results[0].device) for hidden in results]).sum()
            gradients = torch.autograd.grad(total, list(probes.values()), allow_unused=True)
    except RuntimeError as error:  # Reformer runs its layers again in its own backward
        if is_machine_error(error):
            raise
        raise UnsupportedModelError(
            f"{type(state.model).__name__} differentiates its layers by code of its own, which does not know of "
            f"transform='lora' ({error}): use another one."
        ) from error
    return [layer for layer, gradient in zip(found.values(), gradients, strict=True) if gradient is not None]


def _of_adapters(modules: Iterable[nn.Module]) -> set[int]:
    """The modules that PEFT's layers have besides the layer that they stand on; they go when the adapter does."""
    found: set[int] = set()
    for module in modules:
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            found |= {id(inner) for inner in module.modules()} - {id(inner) for inner in base.modules()}
    return found


@contextlib.contextmanager
def _without_inference_tensors(state: ParScaleState) -> Iterator[None]:
    """In this block the model's tensors from `torch.inference_mode`, which cannot record gradients, are copied."""
    own: list[tuple[nn.Module, str, torch.Tensor]] = []
    for module in (module for part in state.parts for module in part.modules()):
        for tensors in (module.named_parameters, module.named_buffers):
            named = tensors(recurse=False, remove_duplicate=False)
            own += [(module, name, x) for name, x in named if x.is_inference()]
    try:
        for module, name, x in own:
            copy = x.clone()
            setattr(module, name, nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy)
        yield
    finally:
        for module, name, x in own:
            setattr(module, name, x)
