"""The part of a model whose rows are copied and mixed, and a brief run of it.

================================ =================== ==========================================================
kind                             copied before       mixed
================================ =================== ==========================================================
causal LM, vision-language model the language model  its final hidden states
encoder (text, vision)           the encoder         its final hidden states, before any pooling of them
encoder-decoder (text, audio)    encoder and decoder the decoder's final hidden states; the encoder's stay P*B rows
================================ =================== ==========================================================
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from parscale.errors import UnsupportedModelError
from parscale.offloading import execution_device
from parscale.parallel import each_module_gathered

if TYPE_CHECKING:
    from parscale.streams import ParScaleState, StreamSet

TEXT, IMAGES, AUDIO = "input_ids", "pixel_values", "input_features"  # a model's main input, in transformers' words


def find_backbone(model: Any) -> tuple[nn.Module, nn.Module | None]:
    """The backbone, whose rows are copied and mixed, and the encoder before it, whose rows are copied, if there is one.

    Raises:
        UnsupportedModelError: not a Hugging Face model, or one in which they are not found.
    """
    if not isinstance(model, PreTrainedModel):
        given = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UnsupportedModelError(
            f"wrap takes a loaded Hugging Face model (a transformers.PreTrainedModel), got {given}: "
            "load one with AutoModelForCausalLM.from_pretrained(...) first; with PEFT, wrap before get_peft_model."
        )
    backbone = model.get_decoder()  # finds it by the names of attributes
    if getattr(model.config, "is_encoder_decoder", False):
        encoder = model.get_encoder()
        if backbone.get_output_embeddings() is not None:  # a language model of its own, with its head
            backbone = backbone.get_decoder()
        if encoder is model or backbone is model or not isinstance(encoder, nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder with a decoder, of which get_encoder() and get_decoder() do not "
                "give both: streams need the two."
            )
        return backbone, encoder
    if backbone is model or not isinstance(backbone, PreTrainedModel):  # under another name, or that of the head
        children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        reads = [child for child in children if model.main_input_name in inspect.signature(child.forward).parameters]
        backbone = reads[0] if len(reads) == 1 else model.base_model
    if backbone is model and model.get_output_embeddings() is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no backbone of its own behind its head, and streams are mixed between the "
            "two: use another class of this architecture, such as its base model (AutoModel)."
        )
    return backbone, None


def writes_text(model: Any) -> bool:
    """Whether the model is a causal language model, which reads a text and can go on with it."""
    return (
        bool(model.can_generate()) and not model.config.is_encoder_decoder and model.get_output_embeddings() is not None
    )


def run_briefly(
    state: ParScaleState, rows: int = 1, streams: StreamSet | None = None, *, gradients: bool = False
) -> torch.Tensor:
    """Runs the backbone on two tokens in each row, or on an image, or on silence.

    Args:
        state: of the model.
        rows: how many.
        streams: a set to run with; by default the plain backbone.
        gradients: whether the result can be differentiated.

    Returns:
        Its final hidden states ``(rows, S, H)``.

    Raises:
        UnsupportedModelError: it takes something else, or returns something else.
    """
    device = input_device(state.model)
    # transformers looks at positions and masks as if they had values, but not at those of fake tensors
    fake: Any = FakeTensorMode(allow_non_fake_inputs=True) if device.type == "meta" else contextlib.nullcontext()
    arguments: dict[str, Any] = {}
    with backbone_only(state), fake, torch.set_grad_enabled(gradients):
        state.active = streams
        if state.encoder is not None:
            arguments["encoder_hidden_states"] = state.encoder(**_input(state.encoder, rows, device))[0]
        arguments |= _input(state.backbone, rows, device)
        if "use_cache" in state.positional:
            arguments["use_cache"] = False
        hidden = state.backbone(**arguments)[0]
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or hidden.shape[0] != rows:
        given = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise UnsupportedModelError(
            f"{type(state.backbone).__name__} of {type(state.model).__name__} returns {given} where streams are mixed, "
            "and should return final hidden states of the shape (rows, positions, hidden size)."
        )
    return hidden


def _input(part: Any, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Something that a backbone or an encoder takes."""
    name, config = part.main_input_name, part.config
    if name == TEXT:
        return {name: torch.zeros(rows, 2, dtype=torch.long, device=device)}
    dtype = next(parameter.dtype for parameter in part.parameters() if parameter.is_floating_point())
    if name == IMAGES and getattr(config, "image_size", None):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {name: torch.zeros(rows, config.num_channels, height, width, dtype=dtype, device=device)}
    if name == AUDIO and getattr(config, "max_source_positions", None):
        frames = 2 * config.max_source_positions  # two for each position, as in Whisper
        return {name: torch.zeros(rows, config.num_mel_bins, frames, dtype=dtype, device=device)}
    raise UnsupportedModelError(
        f"{type(part).__name__} takes {name!r} of a form that is not known here: streams run on text ({TEXT}), images "
        f"of a fixed size ({IMAGES}) and spectrograms as Whisper's ({AUDIO})."
    )


def input_device(model: Any) -> torch.device:
    """Where the model takes its token ids: the device of its embeddings, or the one that they are fetched to."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # not one of text
        return next(model.parameters()).device
    return execution_device(embeddings)


@contextlib.contextmanager
def backbone_only(state: ParScaleState) -> Iterator[None]:
    """The plain backbone, in eval mode, without gradients and without touching the caller's random state.

    Nothing is compiled for it: FlexAttention, which transformers compiles for each length, takes seconds to do so.
    """
    training = {module: module.training for part in state.parts for module in part.modules()}
    active, state.active = state.active, None
    experts: Any = contextlib.nullcontext()
    if any(p.is_meta for p in state.backbone.parameters()):
        experts = _experts_without_data_dependence(state.model)
    try:
        for part in state.parts:
            part.eval()
        own_draws = torch.random.fork_rng(cuda_devices(state.model))
        uncompiled = torch.compiler.set_stance("force_eager")
        pieces = each_module_gathered(state.model)
        with torch.no_grad(), own_draws, experts, uncompiled, pieces, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            yield
    finally:
        state.active = active
        for module in (module for part in state.parts for module in part.modules()):
            # one that is new was chosen as the backbone first ran on a short text (BigBird's attention)
            module.training = training.get(module, training[state.backbone])


def cuda_devices(model: Any) -> list[int]:
    """Indices of the CUDA devices that hold parameters of the model."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def _experts_without_data_dependence(model: Any) -> Iterator[None]:
    """On the meta device a mixture of experts runs in the form whose shapes do not depend on the routing."""
    previous = getattr(model.config, "_experts_implementation", None)
    if previous is None:
        yield
        return
    model.config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        model.config._experts_implementation = previous
