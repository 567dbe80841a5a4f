"""A run of the whole model as its users call it, without streams and with them, before `wrap` promises anything.

That the backbone runs with streams does not say that what is around it does: a head may ask for as many rows as the
backbone was given, a second encoder may never meet the streams, a loss may be taken from what was not mixed.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from parscale.compat.arguments import TEXT
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import input_device, input_of, main_input
from parscale.streams.brief_runs import backbone_only, is_of_the_machine, one_line
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState

ROWS = 2
# Outputs that have a row for each stream, or none: states inside the model, caches, those of an encoder before it.
_INSIDE = re.compile(r"hidden_states|attentions|past_key_values|cache|state$|router_logits|encoder_last_hidden_state")
# Outputs of which each depends on what was mixed, but for a model that writes text, which may return its images' too.
_RESULTS = re.compile(r"logits|_embeds$")


def try_whole_model(state: ParScaleState, streams: StreamSet) -> None:
    """Runs the model on the smallest input that it takes, and compares the shapes of what comes out.

    A model that takes none of the inputs that can be made here has to do with the run of its backbone; so has one on
    the meta device.

    Args:
        state: of the model.
        streams: a set that is attached.

    Raises:
        UnsupportedModelError: with streams the model fails, gives other shapes, or a result that they do not reach.
    """
    model, name = state.model, type(state.model).__name__
    if input_device(model).type == "meta":
        return
    with backbone_only(state):
        runs = ((arguments, _output(model, arguments)) for arguments in _inputs(model))
        arguments, plain = next((run for run in runs if isinstance(run[1], ModelOutput)), ({}, None))
        if plain is None:
            return
        labels = _labels(model, plain)
        if labels and _output(model, arguments | labels) is None:
            labels = {}
        try:
            with state.calls.choosing(streams), _by_plain_torch(state):
                mixed = _disturbed(state, arguments | labels)
        except Exception as error:  # whatever the model does with what its backbone now gives
            if is_of_the_machine(error):
                raise
            raise UnsupportedModelError(
                f"{name} as a whole does not run with streams, which are mixed in {type(state.backbone).__name__} "
                f"({type(error).__name__}: {one_line(error)}): use another class of this architecture, such as its "
                "base model (AutoModel)."
            ) from error
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
            f"be the plain model's. Wrap its parts instead, each by itself, such as {type(state.backbone).__name__}."
        )


@contextlib.contextmanager
def _by_plain_torch(state: ParScaleState) -> Iterator[None]:
    """In this block nothing is asked of kernels, which may be chosen for a device that the model is moved to later."""
    kernels, state.kernels = state.kernels, "reference"
    try:
        yield
    finally:
        state.kernels = kernels


def _output(model: Any, arguments: dict[str, Any]) -> Any:
    """What the plain model returns; `None` where this is not an input that it takes."""
    try:
        return model(**arguments)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        return None


def _disturbed(state: ParScaleState, arguments: dict[str, Any]) -> Any:
    """The model's output, where noise was added to what the streams mix to: what depends on it is another."""

    def disturb(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + torch.randn_like(output[0]), *output[1:])
        for name in ("last_hidden_state", "pooler_output"):
            if isinstance(getattr(output, name, None), torch.Tensor):
                output[name] = output[name] + torch.randn_like(output[name])
        return output

    with contextlib.ExitStack() as hooks:
        for part in state.mixed:
            hooks.callback(part.register_forward_hook(disturb).remove)
        return state.model(**arguments)


def _inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Small inputs of the kinds that the model's signature names, the smallest first."""
    device, names = input_device(model), {model.main_input_name, *inspect.signature(model.forward).parameters}
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
        if isinstance(images, int) and isinstance(number, int):  # a place for each query of an image (BLIP-2)
            places = torch.full((ROWS, number), images, device=device)
            kinds.append({TEXT: torch.cat([places, text[TEXT]], dim=1)} | others)
        kinds.append({TEXT: text[TEXT][:, None]})  # one choice of several
        kinds.append({TEXT: text[TEXT][:1]})  # without a token for padding
    for kind in kinds:
        if "decoder_input_ids" in names:
            yield kind | options | {"decoder_input_ids": torch.zeros(ROWS, 2, dtype=torch.long, device=device)}
        yield kind | options


def _ids(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Token ids `(ROWS, 2)`: a word, which stands neither for padding nor for an image, and the end of a text."""
    text = model.config.get_text_config()
    fields = [*vars(model.config).items(), *vars(text).items()]
    special = {value for name, value in fields if "token" in name and isinstance(value, int)}
    end = getattr(text, "eos_token_id", None)
    ids = torch.full_like(ids, next(word for word in range(1, len(special) + 2) if word not in special))
    if isinstance(end, int):
        ids[:, -1] = end
    return ids


def _labels(model: Any, plain: Any) -> dict[str, torch.Tensor]:
    """Labels for the logits that the plain model returned, by their names in its signature."""
    names, logits = inspect.signature(model.forward).parameters, plain.get("logits")
    if "start_positions" in names and "start_logits" in plain:
        zeros = torch.zeros(plain["start_logits"].shape[0], dtype=torch.long, device=plain["start_logits"].device)
        return {"start_positions": zeros, "end_positions": zeros}
    if "labels" not in names or not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3):
        return {}
    dtype = logits.dtype if logits.shape[-1] == 1 else torch.long  # one number is fitted, not chosen
    return {"labels": torch.zeros(logits.shape[:-1], dtype=dtype, device=logits.device)}


def _tensors(output: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of an output by their names, those of its parts included."""
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
