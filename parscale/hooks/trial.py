"""Runs the whole model as its users call it, with and without streams, before `wrap` accepts it.

A backbone that runs with streams does not prove that the code around it does: a head may expect as many rows as the
backbone was given, a second encoder may have no streams, a loss may be computed from states that were not mixed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from parscale.compat.arguments import TEXT
from parscale.compat.patching import replaced
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import argument_names, input_device, input_of, main_input, ordinary_tokens
from parscale.streams.brief_runs import examining, in_this_thread, is_machine_error, unsupported
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState

ROWS = 2
# Outputs with a row for each stream, or without streams: inner states, caches, outputs of an encoder before the model.
_INSIDE = re.compile(r"hidden_states|attentions|past_key_values|cache|state$|router_logits|encoder_last_hidden_state")
# Outputs that must depend on the mixed states. Models that generate text are exempt: they may return image outputs too.
_RESULTS = re.compile(r"logits|_embeds$")


def try_whole_model(state: ParScaleState, streams: StreamSet) -> None:
    """Runs the model on the smallest input that it accepts, and compares the shapes of the outputs.

    If the model accepts none of the inputs made here, or is on the meta device, the trial run of its backbone has to be
    enough.

    Args:
        state: the model's state.
        streams: a set that is already attached.

    Raises:
        UnsupportedModelError: with streams the model fails, returns other shapes, or an output does not depend on them.
    """
    model, name = state.model, type(state.model).__name__
    if input_device(model).type == "meta":
        return
    with examining(state):
        runs = ((arguments, _output(model, arguments)) for arguments in _inputs(model))
        arguments, plain = next((run for run in runs if isinstance(run[1], ModelOutput)), ({}, None))
        if plain is None:
            return
        labels = _labels(model, plain)
        if labels and _output(model, arguments | labels) is None:
            labels = {}
        refused = unsupported(
            f"{name} as a whole does not run with streams, which are mixed in {type(state.backbone).__name__} ({{}}): "
            "use another class of this architecture, such as its base model (AutoModel)."
        )
        # so that no kernel is compiled for a text this short
        with refused, state.calls.choosing(streams), replaced(state, "kernels", "reference"):
            mixed = _disturbed(state, arguments | labels)
    expected, found = _tensors(plain), _tensors(mixed)
    for key, tensor in expected.items():
        if key in found and found[key].shape != tensor.shape:
            raise UnsupportedModelError(
                f"{name} with streams returns {key} of the shape {tuple(found[key].shape)} for {tuple(tensor.shape)}: "
                f"something in it does not go through {type(state.backbone).__name__}, where streams are mixed. Use "
                "another class of this architecture, such as its base model (AutoModel)."
            )
    unmoved = {key: torch.equal(found[key], x) for key, x in expected.items() if key in found and _RESULTS.search(key)}
    if any(unmoved.values()) and not all(unmoved.values()) and not model.can_generate():
        raise UnsupportedModelError(
            f"{name} has a part that streams do not reach: {', '.join(key for key in unmoved if unmoved[key])} would "
            f"stay the plain model's. Wrap its parts one by one instead, such as {type(state.backbone).__name__}."
        )


def _output(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """What the plain model returns; `None` if it does not accept these inputs."""
    try:
        return model(**arguments)
    except Exception as error:
        if is_machine_error(error):
            raise
        return None


def _disturbed(state: ParScaleState, arguments: dict[str, Any]) -> Any:
    """The model's output with noise added to the mixed states: every output that depends on them changes."""

    def disturb(module: object, args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + torch.randn_like(output[0]), *output[1:])
        for name in ("last_hidden_state", "pooler_output"):
            if isinstance(getattr(output, name, None), torch.Tensor):
                output[name] = output[name] + torch.randn_like(output[name])
        return output

    with contextlib.ExitStack() as hooks:
        for part in state.mixed:
            hooks.enter_context(part.register_forward_hook(in_this_thread(disturb)))
        return state.model(**arguments)


def _inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Small inputs of the kinds that the model's signature names, smallest first."""
    device, names = input_device(model), {model.main_input_name, *argument_names(model)}
    options = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in names}
    pieces: dict[str, torch.Tensor] = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and main_input(part) in names - pieces.keys():
            with contextlib.suppress(UnsupportedModelError, StopIteration):
                pieces |= input_of(part, ROWS, device)
    others = {name: value for name, value in pieces.items() if name != TEXT}
    kinds = [others] if others else []
    if TEXT in pieces:
        text = {TEXT: _ids(model, pieces[TEXT])}
        images = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
        number = getattr(model.config, "num_query_tokens", None)
        kinds = [text, text | others, *kinds]
        if isinstance(images, int) and isinstance(number, int):  # a token for each query of an image (BLIP-2)
            places = torch.full((ROWS, number), images, device=device)
            kinds.append({TEXT: torch.cat([places, text[TEXT]], dim=1)} | others)
        kinds.append({TEXT: text[TEXT][:, None]})  # multiple choice, with one choice
        kinds.append({TEXT: text[TEXT][:1]})  # one row, for models without a padding token
    for kind in kinds:
        if "decoder_input_ids" in names:
            yield kind | options | {"decoder_input_ids": torch.zeros(ROWS, 2, dtype=torch.long, device=device)}
        yield kind | options


def _ids(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Token ids `(ROWS, 2)`: an ordinary token, neither padding nor image, and the end-of-text token."""
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = torch.full_like(ids, *ordinary_tokens(model, 1))
    if isinstance(end, int):
        ids[:, -1] = end
    return ids


def _labels(model: Any, plain: Any) -> dict[str, torch.Tensor]:
    """Labels for the logits of the plain model, by their names in its signature."""
    names, logits = argument_names(model), plain.get("logits")
    if "start_positions" in names and "start_logits" in plain:
        zeros = torch.zeros(plain["start_logits"].shape[0], dtype=torch.long, device=plain["start_logits"].device)
        return {"start_positions": zeros, "end_positions": zeros}
    if "labels" not in names or not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3):
        return {}
    dtype = logits.dtype if logits.shape[-1] == 1 else torch.long  # regression with one output
    return {"labels": torch.zeros(logits.shape[:-1], dtype=dtype, device=logits.device)}


def _tensors(output: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of an output by name, including those of nested outputs."""
    found: dict[str, torch.Tensor] = {}
    for name, value in output.items():
        if _INSIDE.search(name):
            continue
        if isinstance(value, torch.Tensor):
            found[path + name] = value
        elif isinstance(value, ModelOutput):
            found |= _tensors(value, f"{path}{name}.")
        elif isinstance(value, tuple | list):
            found |= {f"{path}{name}.{i}": x for i, x in enumerate(value) if isinstance(x, torch.Tensor)}
    return found
