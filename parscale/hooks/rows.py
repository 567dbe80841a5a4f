"""Which arguments of a backbone have one row for each sequence, and how they are copied to the streams.

The first input that is given defines the number of rows, B. An argument whose first dimension is B has one row for
each of them and is copied P times, stream-major (row `p*B + b`). An argument whose first dimension is 1 is shared by
all rows and stays. This holds for every argument, except for those that `parscale.compat.arguments` names. Any other
shape is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from parscale.compat.arguments import ANY_ROWS, ENCODED, INPUTS, NOT_COPIED, POSITIONS, UNUSED_ARGUMENTS
from parscale.hooks.encoded import EncodedRows, rows_of_streams


def first_input(part: object, arguments: dict[str, Any]) -> torch.Tensor | None:
    """The first given input of a backbone or its encoder, which defines the number of rows; `None` without one."""
    names = (*INPUTS, getattr(part, "main_input_name", INPUTS[0]))
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def refuse_encoded_rows(part: object, arguments: dict[str, Any]) -> None:
    """Before a pass of the plain backbone: raises an error for rows that streams encoded.

    Raises:
        ValueError: as in `parscale.hooks.encoded.rows_of_streams`.
    """
    for name in ENCODED:
        if isinstance(arguments.get(name), EncodedRows):
            rows_of_streams(part, name, arguments[name], None, 1, 1)


def copy_rows(part: object, arguments: dict[str, Any], set_name: str, P: int, B: int) -> dict[str, Any]:
    """The arguments of a backbone or its encoder, with every row repeated P times, stream-major.

    Args:
        part: the backbone or the encoder, for messages.
        arguments: by name.
        set_name: name of the active set.
        P: its number of streams.
        B: rows.

    Raises:
        ValueError: a tensor has neither B rows nor one row, or an encoder with other streams made it.
    """
    return {
        name: value if name in NOT_COPIED else by_part(functools.partial(_copied, part, name, set_name, P, B), value)
        for name, value in arguments.items()
    }


def by_part(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of an argument, or of each part of a dictionary (masks by layer type), a list or a tuple."""
    if isinstance(value, dict):
        return {key: by_part(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(by_part(function, item) for item in value)
    return function(value)


def _copied(part: object, name: str, set_name: str, P: int, B: int, value: Any) -> Any:
    """An argument that is no container, as in `copy_rows`."""
    if isinstance(value, EncodedRows):
        return rows_of_streams(part, name, value, set_name, P, B)
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in UNUSED_ARGUMENTS.get(type(part).__name__, ()):
        return value
    if name in ANY_ROWS:
        return torch.cat([value] * P)
    if name == POSITIONS and value.ndim == 1:  # the same positions for all rows
        return value
    # multimodal positions are (3, B, S)
    dim = 1 if name == POSITIONS and value.ndim == 3 and value.shape[1] in (1, B) else 0
    if value.shape[dim] == B:
        return torch.cat([value] * P, dim=dim)
    if value.shape[dim] == 1:  # one row for all
        return value.expand(P * B, *value.shape[1:]) if name == "encoder_hidden_states" else value
    if name in ENCODED and value.shape[0] == P * B:  # an encoder's output that could not be marked
        return value
    raise ValueError(
        f"{type(part).__name__} was given {name} of the shape {tuple(value.shape)}, with {B} rows of input. With "
        f"streams a tensor needs one row for each of them ({B}, copied {P} times) or one for all (1): here it is "
        "not known which row belongs to which stream. Leave it out, or run the plain backbone "
        "(model.use_streams(None))."
    )
