"""Inputs for a tiny model of any class: what its signature names, in the forms that models of transformers take."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

ROWS, TOKENS, DECODER_TOKENS = 2, 8, 5
LARGEST_ID = 80  # ids from here on may stand for images and the like
SIDES = (None, 32, 64)  # of an image; None: as the configuration says
CHOICES = 2


def candidates(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Arguments that the model may take, the plainest first; most models refuse most of them.

    Args:
        model: in eval mode, on the CPU.
    """
    names, draw = inspect.signature(model.forward).parameters, torch.Generator().manual_seed(3)
    text = _text(model, names, draw)
    if text:
        yield text
        yield text | {"input_ids": text["input_ids"][:, None].repeat(1, CHOICES, 1)} if "input_ids" in text else text
        yield {name: ids for name, ids in text.items() if name != "decoder_input_ids"}
        yield text | {"bbox": torch.zeros(*text["input_ids"].shape, 4, dtype=torch.long)} if "bbox" in names else text
    for arguments in (*_images(model, names, draw), *_sounds(model, names, draw), *_series(model, names, draw)):
        yield arguments
        if text:
            yield text | arguments
            yield {name: ids for name, ids in text.items() if name != "decoder_input_ids"} | arguments
            yield from _with_places(model, names, text, arguments)
    if text:
        yield {name: ids[:1] for name, ids in text.items()}  # without a token for padding, only one row


def _with_places(
    model: Any, names: Any, text: dict[str, torch.Tensor], arguments: dict[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Text with a token for each query of each image in it (BLIP-2), or that says where they are (Kosmos-2)."""
    number = getattr(model.config, "num_query_tokens", getattr(model.config, "latent_query_num", None))
    tokens = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    token = next((value for name in tokens if isinstance(value := getattr(model.config, name, None), int)), 0)
    if "pixel_values" not in arguments or not isinstance(number, int):
        return
    number *= arguments["pixel_values"].shape[1] if arguments["pixel_values"].ndim == 5 else 1  # for each frame
    ids = torch.cat([torch.full((ROWS, number), token), text["input_ids"]], dim=1)
    found = arguments | {name: x for name, x in text.items() if name == "qformer_input_ids"} | {"input_ids": ids}
    if "image_embeds_position_mask" in names:
        found["image_embeds_position_mask"] = (torch.arange(ids.shape[1]) < number).long().expand(ROWS, -1)
    yield found


def configs_of(model: Any) -> list[Any]:
    """The model's configuration and the parts of it."""
    config = model.config
    parts = [getattr(config, name, None) for name in ("vision_config", "audio_config", "backbone_config", "encoder")]
    parts += [getattr(config, name, None) for name in type(config).sub_configs]
    return [config, *(part for part in parts if part is not None)]


def field(model: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the configuration, or a part of it, has."""
    values = (getattr(config, name, None) for config in configs_of(model) for name in names)
    return next((value for value in values if value is not None), default)


def _text(model: Any, names: Any, draw: torch.Generator) -> dict[str, torch.Tensor]:
    size = min(field(model, "vocab_size", default=LARGEST_ID), LARGEST_ID)
    ids = torch.randint(3, max(size, 4), (ROWS, TOKENS), generator=draw)
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    if isinstance(end, int):
        ids[:, -1] = end  # where some classes look for it
    found = {"input_ids": ids} if "input_ids" in names else {}
    if "qformer_input_ids" in names:
        found["qformer_input_ids"] = ids
    if "decoder_input_ids" in names:
        found["decoder_input_ids"] = ids[:, :DECODER_TOKENS]
    return found


def _images(model: Any, names: Any, draw: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    channels = field(model, "num_channels", "in_channels", default=3)
    for side in SIDES if "pixel_values" in names or "pixel_values_videos" in names else ():
        size = field(model, "image_size", "input_size", default=32) if side is None else side
        if isinstance(size, dict):
            size = size["height"], size["width"]
        height, width = size[-2:] if isinstance(size, list | tuple) else (size, size)
        image = torch.randn(ROWS, channels if isinstance(channels, int) else 3, height, width, generator=draw)
        frames = field(model, "num_frames", "frames_per_clip", default=4)
        video = image[:, None].repeat(1, frames, 1, 1, 1)
        for name in ("pixel_values", "pixel_values_videos"):
            if name in names:
                yield {name: image}
                yield {name: video}
    if "flattened_patches" in names:
        yield {"flattened_patches": torch.randn(ROWS, 8, 770, generator=draw)}


def _sounds(model: Any, names: Any, draw: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    bands = field(model, "num_mel_bins", "feature_size", "input_feat_per_channel", default=80)
    frames = 2 * field(model, "max_source_positions", default=50)
    shapes = [(bands, frames), (frames, bands), (4000,), (1, 4000), (field(model, "max_length", default=1024), bands)]
    for name in ("input_features", "input_values"):
        for shape in shapes if name in names else ():
            yield {name: torch.randn(ROWS, *shape, generator=draw)}


def _series(model: Any, names: Any, draw: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    if "past_values" in names:
        length, channels = field(model, "context_length", default=16), field(model, "num_input_channels")
        shape = (length + 7,) if channels is None else (length, channels)
        yield {"past_values": torch.randn(ROWS, *shape, generator=draw)}


def labels_for(model: Any, output: Any) -> dict[str, torch.Tensor]:
    """Labels that fit what the plain model returned; empty where its signature names none or the logits do not tell."""
    names, draw = inspect.signature(model.forward).parameters, torch.Generator().manual_seed(5)
    if "start_positions" in names and "start_logits" in output:
        ends = torch.zeros(output["start_logits"].shape[0], dtype=torch.long)
        return {"start_positions": ends, "end_positions": ends + 1}
    logits = output.get("logits")
    if "labels" not in names or not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3):
        return {}
    if logits.shape[-1] == 1:
        return {"labels": torch.randn(logits.shape[:-1], generator=draw)}
    return {"labels": torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=draw)}
