"""The part of a model whose rows are copied and mixed.

Kind: what is copied; what is mixed.

- causal LM, vision-language model: the language model; its final hidden states
- encoder (text, vision): the encoder; its final hidden states, before pooling
- encoder-decoder (text, audio): encoder and decoder; the decoder's final hidden states (the encoder's stay P*B rows)
- two parallel encoders (CLIP): both; the final hidden states of each, with one aggregator each
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from parscale.compat.arguments import AUDIO, CACHES, IMAGES, TEXT
from parscale.distributed.offloading import execution_device
from parscale.errors import UnsupportedModelError

TRIAL_TOKENS = 2  # in each row of a brief run


@dataclasses.dataclass
class Parts:
    """The parts of a model that get P*B rows.

    Attributes:
        backbone: its rows are copied and mixed.
        encoder: of an encoder-decoder model: its rows are copied.
        towers: parallel encoders of other inputs; their rows are copied and mixed too.
    """

    backbone: Any
    encoder: Any = None
    towers: list[Any] = dataclasses.field(default_factory=list)


def find_parts(model: Any) -> Parts:
    """The parts of a model that streams run on.

    Raises:
        UnsupportedModelError: it is not a Hugging Face model, or the parts were not found.
    """
    if not isinstance(model, PreTrainedModel):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UnsupportedModelError(
            f"wrap takes a loaded Hugging Face model (a transformers.PreTrainedModel), got {given}: "
            "load one with AutoModelForCausalLM.from_pretrained(...) first; with PEFT, wrap before get_peft_model."
        )
    decoder, encoder = model.get_decoder(), None  # found by attribute name
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    if is_encoder_decoder and isinstance(model.get_encoder(), nn.Module) and model.get_encoder() is not model:
        encoder = model.get_encoder()
    if decoder is not model and has_head(decoder):  # a complete language model with its head (BLIP-2, Llama 4)
        inner = find_parts(decoder)
        return Parts(inner.backbone, encoder or inner.encoder)
    if is_encoder_decoder:
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
        readers = [child for child in children if takes_argument(child, model.main_input_name)]
        backbone = readers[0] if len(readers) == 1 else owner if takes_argument(owner, model.main_input_name) else model
    if backbone is model and has_head(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no backbone of its own behind its head, and streams are mixed between the "
            "two: use another class of this architecture, such as its base model (AutoModel)."
        )
    return Parts(backbone)


def _side_by_side(model: Any, owner: Any) -> Parts:
    """The parts of a model with parallel encoders, held by `owner`; the backbone is the encoder of text."""
    inputs = argument_names(owner)
    children = [child for child in owner.children() if isinstance(child, PreTrainedModel)]
    towers = [child for child in children if main_input(child) in inputs]
    names = {main_input(child) for child in towers}
    if len(towers) < 2 or len(names) < len(towers) or TEXT not in names:
        raise UnsupportedModelError(
            f"{type(model).__name__} has encoders side by side, and not each is a model that reads an input of its "
            "own, as streams need it: wrap one of them by itself, such as model.text_model."
        )
    towers.sort(key=lambda tower: main_input(tower) != TEXT)
    backbones = [find_parts(tower).backbone for tower in towers]  # the same as for the tower alone
    return Parts(backbones[0], towers=backbones[1:])


def main_input(part: nn.Module) -> str:
    """The name of a part's main input: the one that its class declares, or else its first argument."""
    name: str | None = getattr(part, "main_input_name", None)
    return name if name is not None and takes_argument(part, name) else argument_names(part)[0]


def takes_argument(part: nn.Module, name: str) -> bool:
    """Whether a part takes an argument of this name."""
    return name in argument_names(part)


def cache_argument(part: nn.Module) -> str | None:
    """The name of a part's cache argument; `None` if it takes none."""
    return next((name for name in CACHES if takes_argument(part, name)), None)


def argument_names(part: nn.Module) -> list[str]:
    """The arguments of its class's forward: another library may have replaced the object's own `forward`."""
    return list(inspect.signature(type(part).forward).parameters)[1:]


def has_head(model: object) -> bool:
    """Whether the model has a language model head after its backbone."""
    return isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None


def generates_text(model: PreTrainedModel) -> bool:
    """Whether the model is a causal language model, which can continue a text."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder and has_head(model)


def find_generators(model: Any, backbone: nn.Module) -> list[Any]:
    """The model, and the models inside it that can generate text with its backbone, from the outside in.

    The `generate` of some models is that of a model inside them (BLIP-2): then the inner model's methods are called.
    """
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module.can_generate())
    around = [module for module in inside if any(part is backbone for part in module.modules())]
    return [model, *(module for module in around if module is not model and module is not backbone)]


def input_of(part: nn.Module, rows: int, device: torch.device, tokens: int = TRIAL_TOKENS) -> dict[str, torch.Tensor]:
    """A small input that a backbone or an encoder accepts; of text, some tokens in each row."""
    name = main_input(part)
    config: Any = getattr(part, "config", None)
    if name == TEXT:
        return {name: torch.zeros(rows, tokens, dtype=torch.long, device=device)}
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


def ordinary_tokens(model: Any, number: int) -> list[int]:
    """Different token ids that are neither padding nor special; they repeat if the vocabulary has fewer.

    The embedding of a padding token is often zero, and so is everything that is computed from it.
    """
    text = model.config.get_text_config()
    fields = [*vars(model.config).items(), *vars(text).items()]
    special = {value for name, value in fields if "token" in name and isinstance(value, int)}
    most = getattr(text, "vocab_size", None)
    ids = range(1, most if isinstance(most, int) else number + len(special) + 1)
    words = list(itertools.islice((word for word in ids if word not in special), number)) or [0]
    return [words[i % len(words)] for i in range(number)]


def masking_noise(part: Any, images: torch.Tensor) -> torch.Tensor | None:
    """The random numbers by which a backbone masks patches (ViT-MAE), so that all streams mask the same ones.

    Args:
        part: the backbone.
        images: `(B, C, height, width)`.

    Returns:
        `(B, patches)`, from torch's random state, drawn as in the plain backbone; `None` if patches overlap.
    """
    size = part.config.patch_size
    if hasattr(part.config, "patch_stride"):
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    patches = (images.shape[-2] // height) * (images.shape[-1] // width)
    return torch.rand(images.shape[0], patches, device=images.device)


def input_device(model: Any) -> torch.device:
    """The device for the model's token ids: that of its embeddings, or the one to which they are fetched."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # not a text model
        embeddings = None
    if embeddings is None:
        return next(model.parameters()).device
    return execution_device(embeddings)


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parameters of the model."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def has_learned_positions(backbone: nn.Module) -> bool:
    """Whether positions come from a table (GPT-2, OPT, XGLM, CTRL), which has no entry for negative positions."""
    for child in backbone.children():
        if "text" in getattr(child, "input_modalities", "text") and has_learned_positions(child):
            return True  # positions of images or audio do not count
    return hasattr(backbone, "pos_encoding") or any(
        (isinstance(child, nn.Embedding) and "position" in name) or name in ("wpe", "embed_positions")
        for name, child in backbone.named_children()
    )


def has_position_table(backbone: Any) -> bool:
    """Whether added positions are read from a table with `max_position_embeddings` rows, so that others have none."""
    if getattr(backbone.config, "max_position_embeddings", None) is None:
        return False
    names = {name.rpartition(".")[2] for name, module in backbone.named_modules() if isinstance(module, nn.Embedding)}
    return hasattr(backbone, "pos_encoding") or any("position" in name or name == "wpe" for name in names)


def inner_modules(part: nn.Module) -> Iterator[Any]:
    """The modules of a part, except for those of another model inside it that has its own head.

    Blt splits a text into patches by the predictions of such a model: no gradient comes back from there.
    """
    yield part
    for child in part.children():
        if not (isinstance(child, PreTrainedModel) and child.get_output_embeddings() is not None):
            yield from inner_modules(child)
