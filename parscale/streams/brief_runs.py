"""Brief runs of a model's backbone, and a model as it is without streams while something is looked up in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from parscale.compat.torch import fake_tensors, held_buffers, version_of
from parscale.compat.transformers import experts_without_data_dependence
from parscale.distributed.parallel import each_module_gathered
from parscale.errors import IncompatibleVersionError, UnsupportedModelError
from parscale.streams.backbones import cuda_devices, input_device, input_of, reads
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState


def run_briefly(
    state: ParScaleState, rows: int = 1, streams: StreamSet | None = None, *, gradients: bool = False
) -> list[torch.Tensor]:
    """Runs the backbone on two tokens in each row, or on an image, or on silence; and the towers beside it.

    Args:
        state: of the model.
        rows: how many.
        streams: a set to run with; by default the plain backbone.
        gradients: whether the result can be differentiated.

    Returns:
        The final hidden states `(rows, S, H)` of each part that is mixed, the backbone's first.

    Raises:
        UnsupportedModelError: one takes something else, or returns something else.
    """
    device = input_device(state.model)
    fake: Any = fake_tensors() if device.type == "meta" else contextlib.nullcontext()
    results = []
    with backbone_only(state), fake, torch.set_grad_enabled(gradients), state.calls.choosing(streams):
        for part in state.mixed:
            arguments: dict[str, Any] = {}
            if state.encoder is not None:
                arguments["encoder_hidden_states"] = state.encoder(**input_of(state.encoder, rows, device))[0]
            arguments |= input_of(part, rows, device)
            if reads(part, "use_cache"):
                arguments["use_cache"] = False
            hidden = part(**arguments)[0]
            if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or hidden.shape[0] != rows:
                given = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
                raise UnsupportedModelError(
                    f"{type(part).__name__} of {type(state.model).__name__} returns {given} where streams are mixed, "
                    "and should return final hidden states of the shape (rows, positions, hidden size)."
                )
            results.append(hidden)
    return results


@contextlib.contextmanager
def backbone_only(state: ParScaleState) -> Iterator[None]:
    """The plain backbone, in eval mode, without gradients and without touching the caller's random state or buffers.

    Nothing is compiled for it: FlexAttention, which transformers compiles for each length, takes seconds to do so.
    """
    training = {module: module.training for module in state.model.modules()}
    experts: Any = contextlib.nullcontext()
    if any(p.is_meta for p in state.backbone.parameters()):
        experts = experts_without_data_dependence(state.model.config)
    try:
        state.model.eval()
        own_draws = torch.random.fork_rng(cuda_devices(state.model))
        uncompiled = torch.compiler.set_stance("force_eager")
        pieces, buffers = each_module_gathered(state.model), _same_buffers(state.model)
        plain = state.calls.choosing(None)
        with plain, torch.no_grad(), own_draws, experts, uncompiled, pieces, buffers, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            yield
    finally:
        for module in state.model.modules():
            # one that is new was chosen as the backbone first ran on a short text (BigBird's attention)
            module.training = training.get(module, training[state.backbone])


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error is that of a device, of its memory or of an installed library, and says nothing of the model."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError | IncompatibleVersionError):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error)  # that of a CPU has no class of its own


def one_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """After this block every buffer is the one that it was, with the numbers that it had.

    Integers, such as quantized weights, are not copied: no forward pass in eval mode writes into them.
    """
    held = [(buffers, dict(buffers)) for buffers in map(held_buffers, model.modules())]
    buffers = {id(buffer): buffer for _, own in held for buffer in own.values() if buffer is not None}
    numbers = [x for x in buffers.values() if x.is_floating_point() and not x.is_meta and not x.is_inference()]
    copies = [(buffer, version_of(buffer), buffer.detach().clone()) for buffer in numbers]
    try:
        yield
    finally:
        for current, own in held:
            current.clear()
            current.update(own)
        for buffer, version, copy in copies:
            if version_of(buffer) != version:
                buffer.copy_(copy)
