"""The part of a model whose rows are copied and mixed, and a brief run of it.

================================ =================== ==========================================================
kind                             copied before       mixed
================================ =================== ==========================================================
causal LM, vision-language model the language model  its final hidden states
encoder (text, vision)           the encoder         its final hidden states, before any pooling of them
encoder-decoder (text, audio)    encoder and decoder the decoder's final hidden states; the encoder's stay P*B rows
two encoders side by side (CLIP) both                the final hidden states of each, by an aggregator of its own
================================ =================== ==========================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from parscale.compat.arguments import AUDIO, IMAGES, TEXT
from parscale.compat.torch import fake_tensors, held_buffers, version_of
from parscale.compat.transformers import experts_without_data_dependence
from parscale.distributed.offloading import execution_device
from parscale.distributed.parallel import each_module_gathered
from parscale.errors import IncompatibleVersionError, UnsupportedModelError

if TYPE_CHECKING:
    from parscale.streams.state import ParScaleState, StreamSet


class Hidden(NamedTuple):
    """The final hidden states of a part: H, their dtype and their device."""

    size: int
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass
class Parts:
    """The parts of a model that get P*B rows.

    Args:
        backbone: its rows are copied and mixed.
        encoder: of a model that is an encoder with a decoder: its rows are copied.
        towers: encoders beside the backbone, of other inputs; their rows are copied and mixed too.
    """

    backbone: Any
    encoder: Any = None
    towers: list[Any] = dataclasses.field(default_factory=list)


def find_parts(model: Any) -> Parts:
    """The parts of a model that streams run on.

    Raises:
        UnsupportedModelError: not a Hugging Face model, or one in which they are not found.
    """
    if not isinstance(model, PreTrainedModel):
        given = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UnsupportedModelError(
            f"wrap takes a loaded Hugging Face model (a transformers.PreTrainedModel), got {given}: "
            "load one with AutoModelForCausalLM.from_pretrained(...) first; with PEFT, wrap before get_peft_model."
        )
    decoder, encoder = model.get_decoder(), None  # finds it by the names of attributes
    is_pair = getattr(model.config, "is_encoder_decoder", False)
    if is_pair and isinstance(model.get_encoder(), nn.Module) and model.get_encoder() is not model:
        encoder = model.get_encoder()
    if decoder is not model and has_head(decoder):  # a language model of its own, with its head (BLIP-2, Llama 4)
        inner = find_parts(decoder)
        return Parts(inner.backbone, encoder or inner.encoder)
    if is_pair:
        if encoder is None or decoder is model or not hasattr(decoder, "main_input_name"):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder with a decoder, of which get_encoder() and get_decoder() do not "
                "give both as models: streams need the two."
            )
        return Parts(decoder, encoder)
    owner = model.base_model
    if any(re.fullmatch(r"get_text(_\w+)?_(features|embeds)", name) for name in dir(type(owner))):
        return _side_by_side(model, owner)
    backbone = decoder
    inside = isinstance(backbone, PreTrainedModel) and main_input(backbone) == "hidden_states"  # of DINOv3
    if backbone is model or inside or not isinstance(backbone, PreTrainedModel):  # under another name, or the head's
        children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        reads = [child for child in children if _reads(child, model.main_input_name)]
        backbone = reads[0] if len(reads) == 1 else owner if _reads(owner, model.main_input_name) else model
    if backbone is model and has_head(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no backbone of its own behind its head, and streams are mixed between the "
            "two: use another class of this architecture, such as its base model (AutoModel)."
        )
    return Parts(backbone)


def _side_by_side(model: Any, owner: Any) -> Parts:
    """Encoders of a text and of something else, side by side in ``owner``: the one of text is the backbone."""
    inputs = inspect.signature(owner.forward).parameters
    children = [child for child in owner.children() if isinstance(child, PreTrainedModel)]
    towers = [child for child in children if main_input(child) in inputs]
    names = {main_input(child) for child in towers}
    if len(towers) < 2 or len(names) < len(towers) or TEXT not in names:
        raise UnsupportedModelError(
            f"{type(model).__name__} has encoders side by side, and not each is a model that reads an input of its "
            "own, as streams need it: wrap one of them by itself, such as model.text_model."
        )
    towers.sort(key=lambda tower: main_input(tower) != TEXT)
    backbones = [find_parts(tower).backbone for tower in towers]  # mixed where the tower alone would be
    return Parts(backbones[0], towers=backbones[1:])


def main_input(part: Any) -> str:
    """What a part reads: what its class says that it does, or, where that is not so, the first of its arguments."""
    name: str | None = getattr(part, "main_input_name", None)
    return name if name is not None and _reads(part, name) else _arguments(part)[0]


def _reads(part: Any, name: str) -> bool:
    return name in _arguments(part)


def _arguments(part: Any) -> list[str]:
    """Of its class: another library may have put something else in front of the object's own ``forward``."""
    return list(inspect.signature(type(part).forward).parameters)[1:]


def has_head(model: Any) -> bool:
    """Whether the model is one with a language model's head, which follows its backbone."""
    return isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None


def writes_text(model: Any) -> bool:
    """Whether the model is a causal language model, which reads a text and can go on with it."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder and has_head(model)


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
        The final hidden states ``(rows, S, H)`` of each part that is mixed, the backbone's first.

    Raises:
        UnsupportedModelError: one takes something else, or returns something else.
    """
    device = input_device(state.model)
    fake: Any = fake_tensors() if device.type == "meta" else contextlib.nullcontext()
    results = []
    with backbone_only(state), fake, torch.set_grad_enabled(gradients), state.choosing(streams):
        for part in state.mixed:
            arguments: dict[str, Any] = {}
            if state.encoder is not None:
                arguments["encoder_hidden_states"] = state.encoder(**input_of(state.encoder, rows, device))[0]
            arguments |= input_of(part, rows, device)
            if _reads(part, "use_cache"):
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


def input_of(part: Any, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Something that a backbone or an encoder takes."""
    name = main_input(part)
    config: Any = getattr(part, "config", None)
    if name == TEXT:
        return {name: torch.zeros(rows, 2, dtype=torch.long, device=device)}
    dtype = next(parameter.dtype for parameter in part.parameters() if parameter.is_floating_point())
    if name == IMAGES and getattr(config, "image_size", None):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        frames = [config.num_frames] if getattr(config, "tubelet_size", None) else []  # of a video
        return {name: torch.zeros(rows, *frames, channels, height, width, dtype=dtype, device=device)}
    if name == AUDIO and getattr(config, "max_source_positions", None) and getattr(config, "num_mel_bins", None):
        frames = 2 * config.max_source_positions  # two for each position, as in Whisper
        return {name: torch.zeros(rows, config.num_mel_bins, frames, dtype=dtype, device=device)}
    raise UnsupportedModelError(
        f"{type(part).__name__} takes {name!r} of a form that is not known here: streams run on text ({TEXT}), images "
        f"of a fixed size ({IMAGES}) and spectrograms as Whisper's ({AUDIO})."
    )


def masking_noise(part: Any, images: torch.Tensor) -> torch.Tensor | None:
    """What a backbone that hides patches at random (ViT-MAE) draws for itself, so that all streams see the same ones.

    Args:
        part: the backbone.
        images: ``(B, C, height, width)``.

    Returns:
        ``(B, patches)``, from torch's random state, as the plain backbone draws it; ``None`` where patches overlap.
    """
    size = part.config.patch_size
    if hasattr(part.config, "patch_stride"):
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    patches = (images.shape[-2] // height) * (images.shape[-1] // width)
    return torch.rand(images.shape[0], patches, device=images.device)


def input_device(model: Any) -> torch.device:
    """Where the model takes its token ids: the device of its embeddings, or the one that they are fetched to."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # not one of text
        embeddings = None
    if embeddings is None:
        return next(model.parameters()).device
    return execution_device(embeddings)


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
        plain = state.choosing(None)
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


def cuda_devices(model: Any) -> list[int]:
    """Indices of the CUDA devices that hold parameters of the model."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
