"""Short runs of a model's backbone, and blocks in which a model runs without streams while it is examined."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from parscale.compat.bitsandbytes import four_bits_unpacked
from parscale.compat.flash import flash_in_torch
from parscale.compat.patching import replaced
from parscale.compat.torch import fake_tensors, held_buffers, version_of
from parscale.compat.transformers import experts_without_data_dependence
from parscale.distributed.parallel import each_module_gathered
from parscale.errors import IncompatibleVersionError, UnsupportedModelError
from parscale.streams.backbones import TRIAL_TOKENS, cuda_devices, input_device, input_of, takes_argument
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState


def run_briefly(
    state: ParScaleState,
    rows: int = 1,
    streams: StreamSet | None = None,
    *,
    gradients: bool = False,
    tokens: int = TRIAL_TOKENS,
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> list[torch.Tensor]:
    """Runs the backbone and its towers on a few tokens in each row, on an image, or on silence.

    Args:
        state: the model's state.
        rows: number of rows.
        streams: a set to run with; by default the plain backbone.
        gradients: whether to record gradients.
        tokens: number of tokens in each row.
        change: what each part is given in place of the arguments that it would be.

    Returns:
        The final hidden states `(rows, S, H)` of each mixed part, the backbone's first.

    Raises:
        UnsupportedModelError: a part needs another input, or returns another output.
    """
    device = input_device(state.model)
    fake: Any = fake_tensors() if device.type == "meta" else contextlib.nullcontext()
    results = []
    with examining(state), fake, torch.set_grad_enabled(gradients), state.calls.choosing(streams):
        for part in state.mixed:
            arguments: dict[str, Any] = {}
            if state.encoder is not None:
                arguments["encoder_hidden_states"] = state.encoder(**input_of(state.encoder, rows, device, tokens))[0]
            arguments |= input_of(part, rows, device, tokens)
            if takes_argument(part, "use_cache"):
                arguments["use_cache"] = False
            hidden = part(**(arguments if change is None else change(arguments)))[0]
            if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or hidden.shape[0] != rows:
                given = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
                raise UnsupportedModelError(
                    f"{type(part).__name__} of {type(state.model).__name__} returns {given} where streams are mixed, "
                    "and should return final hidden states of the shape (rows, positions, hidden size)."
                )
            results.append(hidden)
    return results


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a forward hook act in this thread only: the results of other threads must not change."""
    own = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == own else None


@contextlib.contextmanager
def examining(state: ParScaleState) -> Iterator[None]:
    """In this block a model is examined: in eval mode, without gradients, without streams but those of `choosing`.

    Random state and buffers are restored afterwards. Nothing is compiled: compiling FlexAttention, which transformers
    does for each length, takes seconds. Where streams run, `kernels="fused"` is as `"auto"`: it may be meant for a
    device that comes later. For the same reason flash-attention runs in plain torch where it does not take the weights
    as they are.
    """
    training = {module: module.training for module in state.model.modules()}
    experts: Any = contextlib.nullcontext()
    if any(p.is_meta for p in state.backbone.parameters()):
        experts = experts_without_data_dependence(state.model.config)
    try:
        state.model.eval()
        own_draws = torch.random.fork_rng(cuda_devices(state.model))
        uncompiled = torch.compiler.set_stance("force_eager")
        pieces, buffers = each_module_gathered(state.model), _restored_buffers(state.model)
        plain, weights = state.calls.choosing(None), four_bits_unpacked(state.model)
        with (
            flash_in_torch(state.model, input_device(state.model)),
            plain,
            replaced(state, "kernels", "auto" if state.kernels == "fused" else state.kernels),
            torch.no_grad(),
            own_draws,
            experts,
            uncompiled,
            pieces,
            buffers,
            weights,
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            yield
    finally:
        for module in state.model.modules():
            # a new configuration was chosen when the backbone first ran on a short text (BigBird's attention)
            module.training = training.get(module, training[state.backbone])


def is_machine_error(error: BaseException) -> bool:
    """Whether an error comes from a device, its memory or a library, not from the model."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError | IncompatibleVersionError):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error)  # the CPU's memory error has no class of its own


@contextlib.contextmanager
def unsupported(sentence: str) -> Iterator[None]:
    """In this block an error that a model raises becomes an `UnsupportedModelError`.

    Args:
        sentence: its message, with `{}` in the place of the error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UnsupportedModelError) or is_machine_error(error):
            raise
        raise UnsupportedModelError(sentence.format(f"{type(error).__name__}: {one_line(error)}")) from error


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


@contextlib.contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """After this block every buffer is the same tensor, with the same values, as before.

    Integers, such as quantized weights, are not copied: no forward pass in eval mode changes them.
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
