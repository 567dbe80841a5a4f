"""Checks that the numbers in a configuration are possible for a model, before anything of that size is built.

The configuration classes of transformers build lists and dictionaries as long as a number says: of layers (and of
depths, blocks, repeats) and of labels. Model classes build as many modules, and tensors of such sizes.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from parscale.errors import RefusedCheckpointError
from parscale.format.folders import CONFIG
from parscale.format.headers import StoredTensor
from parscale.format.untrusted import brief
from parscale.streams.brief_runs import is_machine_error

# Upper limits of a number if the files do not hold more.
_MOST_PARTS, _MOST_LABELS, _MOST_NUMBERS = 2**10, 2**17, 2**24
_PARTS = re.compile(r"^(?!.*(size|dim)).*layer|(^|_)depths?$|_blocks?$|_repeats$")
_LABELS = re.compile(r"(^|_)num_(labels|classes)$")
_NUMBERS = re.compile(r"^(num|n|d)_|_(size|dim)$")
_NEVER_NEGATIVE = re.compile(
    r"(layers|heads|experts|labels|depths?|blocks)$|^d_|_dim$|(vocab|hidden|intermediate|embedding|head|patch)_size$"
    r"|^n_(embd|head|inner|layer|positions)$|max_position_embeddings$"
)
_EPSILON = re.compile(r"(^|_)eps(ilon)?$")
_MAY_BE_INFINITE = re.compile(r"limit$")  # Mamba's time_step_limit


def check_values(checkpoint: object, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor] | None) -> None:
    """Raises an error for numbers that no model has, before a configuration class or a model uses them.

    Args:
        checkpoint: a full checkpoint or a plain backbone, for the error message.
        fields: of its `config.json`, or the attributes of a configuration.
        tensors: in the checkpoint's files; `None` if unknown.

    Raises:
        ValueError: a number is impossible; the message names the field.
    """
    tensors = tensors or {}
    held, parts = sum(tensor.numel for tensor in tensors.values()), len(tensors)
    for key, value in _numbers(fields):
        problem = _problem(key, value, held, parts)
        if problem:
            raise ValueError(f"{CONFIG} of {checkpoint} says {brief(key)} = {value}, {problem}: it is damaged.")


def _problem(key: str, value: float, held: int, parts: int) -> str:
    """What is wrong with the number of a field; empty if it is possible."""
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not _MAY_BE_INFINITE.search(key))):
        return "which is not finite"
    if _EPSILON.search(key) and not 0 <= value <= 1:
        return "which should lie between 0 and 1"
    if value < 0 and _NEVER_NEGATIVE.search(key):
        return "which cannot be negative"
    if isinstance(value, int) and value > max(_most(key), parts if _PARTS.search(key) else held):
        return f"and its files hold {held} numbers in {parts} tensors" if parts else "more than any model has"
    return ""


def _most(key: str) -> float:
    if _PARTS.search(key):
        return _MOST_PARTS
    if _LABELS.search(key):
        return _MOST_LABELS
    return _MOST_NUMBERS if _NUMBERS.search(key) else math.inf


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a configuration, also in its lists and parts, each with the name of its field."""
    waiting = [(str(key), value) for key, value in fields.items()]  # labels have numbers as names
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, PreTrainedConfig):
            value = vars(value)
        if isinstance(value, Mapping):
            if value.keys() == {"__float__"}:  # transformers' form for values that JSON does not support
                with contextlib.suppress(TypeError, ValueError):
                    yield key, float(value["__float__"])
            waiting += [(str(inner), each) for inner, each in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(key, each) for each in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


@contextmanager
def configuration_of(checkpoint: object, faults: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """In this block a class reads a configuration: errors there are blamed on the configuration.

    Args:
        checkpoint: the owner of the configuration.
        faults: errors that a configuration can cause; errors of the machine are excluded.
    """
    try:
        yield
    except (OSError, ImportError, RefusedCheckpointError):
        raise
    except faults as error:
        if is_machine_error(error):
            raise
        raise ValueError(
            f"{CONFIG} of {checkpoint} does not describe a model: it is damaged, or needs another version of "
            f"transformers ({type(error).__name__}: {brief(error)})."
        ) from error
