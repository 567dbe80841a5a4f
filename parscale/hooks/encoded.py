"""The output of a wrapped encoder: P rows for each source, with a mark that says so.

A decoder receives the encoder's output in several ways: directly, from `generate` with its rows repeated for beams,
or from a user who encodes once and decodes several times. The number of rows does not tell whether they are streams.
So the tensors that a wrapped encoder returns are `EncodedRows`, which carry the name of the set and P.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

SEQUENCES = (tuple, list)  # torch 2.9 cannot trace isinstance(x, tuple | list)


@dataclasses.dataclass(frozen=True)
class Mark:
    """Which streams made the rows of a tensor.

    Attributes:
        name: the name of the set of streams.
        num_streams: P.
        by_source: the tensor is `(B, S, P, ...)`, one entry for each source; otherwise `(P*B, S, ...)`, stream-major.
        ordered: whether it is known which stream each row belongs to.
    """

    name: str
    num_streams: int
    by_source: bool = False
    ordered: bool = True


class EncodedRows(torch.Tensor):
    """A tensor of a wrapped encoder's output, `(P*B, S, ...)`, stream-major, or a tensor computed from it.

    What is written into the tensor itself, in place or as `out`, changes its mark. Writing into a view of it, assigning
    its `data`, or writing inside a function that torch.compile has compiled does not.

    Attributes:
        mark: which streams made it.
    """

    mark: Mark

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func` and marks its results too, and what it writes into."""
        kwargs = kwargs or {}
        if func is torch.Tensor.view_as:  # how plain() removes the mark; torch.compile can trace view_as
            return torch.Tensor.__torch_function__(func, (torch.Tensor,), args, kwargs)
        result = super().__torch_function__(func, (cls,), args, kwargs)
        sources = _all_marked((*args, *(value for name, value in kwargs.items() if name != "out")))
        written = _all_marked((args[:1] if getattr(func, "__name__", "") in _IN_PLACE else (), kwargs.get("out")))
        if not sources:  # as in torch.cat(others, out=x)
            for x in written:
                x.mark = dataclasses.replace(x.mark, ordered=False)
            return result
        for x in (*(result if isinstance(result, SEQUENCES) else (result,)), *written):
            if isinstance(x, EncodedRows) and (written or x is not sources[0]):
                x.mark = _mark_of_result(func, sources, args, kwargs, x)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedRows:
        return marked(copy.deepcopy(plain(self), memo), self.mark)


# Encoder outputs can be saved, and read again by torch.load as it is.
torch.serialization.add_safe_globals([EncodedRows, Mark])

# Functions of torch, Tensor and torch.nn.functional after which it is known where the rows are; others may move them.
_RESHAPES = frozenset({"flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"})
_ONE_BY_ONE = """
    __rdiv__ __rpow__ __rsub__ abs add addcdiv addcmul bfloat16 celu clamp clamp_max clamp_min clone contiguous copy
    cos cpu cuda detach div divide double dropout elu eq erf exp expand expand_as fill float ge gelu gt half hardtanh
    isfinite isinf isnan layer_norm le leaky_relu lerp log lt masked_fill maximum minimum mish mul multiply nan_to_num
    ne neg pow reciprocal relu relu6 repeat requires_grad rms_norm rsqrt selu share_memory sigmoid sign silu sin
    softplus sqrt square sub subtract tanh to true_divide type type_as where zero
"""
_EACH_ROW = frozenset(each for name in _ONE_BY_ONE.split() for each in (name, f"{name}_"))
_PRODUCTS = frozenset({"linear", "matmul"})
# of functions along dimensions: where these stand among the arguments
_ALONG = {"cat": 1, "chunk": 2, "flip": 1, "index_select": 1, "repeat_interleave": 2, "roll": 2, "split": 2}
# Functions that write into their first argument: a set, since torch.compile cannot look into a function's name.
_NAMES = {name for place in (torch, torch.Tensor, torch.nn.functional) for name in dir(place)}
_IN_PLACE = frozenset({"__setitem__", *(name for name in _NAMES if name.endswith("_") and not name.endswith("__"))})


def _all_marked(values: Any) -> list[EncodedRows]:
    found = []
    for value in values:
        if isinstance(value, EncodedRows) and hasattr(value, "mark"):
            found.append(value)
        elif isinstance(value, SEQUENCES):  # torch.cat([...])
            found += _all_marked(value)
    return found


def _mark_of_result(func: Any, sources: list[EncodedRows], args: Any, kwargs: Any, result: torch.Tensor) -> Mark:
    """The mark of the result of `func` on `sources`: ordered while rows keep their places or are repeated equally."""
    mark = sources[0].mark
    if mark.by_source:
        ordered = result.ndim > 2 and result.shape[2] == mark.num_streams
    else:
        ordered = _keeps_rows(getattr(func, "__name__", ""), sources[0], args, kwargs, result)
    return dataclasses.replace(mark, ordered=ordered and mark.ordered and all(each.mark == mark for each in sources))


def _keeps_rows(name: str, source: EncodedRows, args: Any, kwargs: Any, result: torch.Tensor) -> bool:
    """Whether the rows of the result of a function are those of `source`, in their order or repeated equally."""
    if name == "repeat_interleave" and 0 in _dimensions(name, source, args, kwargs):
        return isinstance(kwargs.get("repeats", args[1] if len(args) > 1 else None), int)  # not other numbers by row
    if result.shape[:1] != source.shape[:1]:
        return False
    if name == "__setitem__":
        written: Any = source[args[1]]
        return getattr(args[2], "ndim", 0) == 0 or written.mark.ordered  # one number for all, or row by row
    if name == "__getitem__":
        return _index_keeps_rows(args[1], source)
    if name in _ALONG:
        dimensions = _dimensions(name, source, args, kwargs)
        return bool(dimensions) and 0 not in dimensions
    if name in _RESHAPES:
        return True
    if name in _PRODUCTS:
        known = bool(args) and args[0] is source  # a factor on the left mixes rows
    else:
        known = name in _EACH_ROW
    return known and result.ndim == source.ndim  # further dimensions would be in front


def _dimensions(name: str, source: EncodedRows, args: Any, kwargs: Any) -> list[int]:
    """The dimensions that a function of `_ALONG` was given; none if it was called without."""
    given = kwargs.get("dim", kwargs.get("dims", args[_ALONG[name] :]))
    return [number % max(1, source.ndim) for number in _integers(given)]


def _integers(value: Any) -> list[int]:
    if isinstance(value, SEQUENCES):
        return [number for part in value for number in _integers(part)]
    return [value] if isinstance(value, int) else []


def _index_keeps_rows(index: Any, source: EncodedRows) -> bool:
    """Whether an index leaves the first dimension, which has kept its size, as it is."""
    index = index if isinstance(index, tuple) else (index,)
    lists = [each for each in index if not (each is None or each is Ellipsis or isinstance(each, (int, slice)))]
    if index and index[0] is Ellipsis:  # stands for no dimension at all if the others name each
        return not lists and len(index) <= source.ndim
    return bool(index) and isinstance(index[0], slice) and len(lists) <= 1  # several lists may come first in the result


def marked(x: torch.Tensor, mark: Mark) -> EncodedRows:
    """The same tensor with a mark."""
    rows = x.as_subclass(EncodedRows)
    rows.mark = mark
    return rows


def plain(x: EncodedRows) -> torch.Tensor:
    """The same values without the mark."""
    values = x.view_as(x)
    if torch.compiler.is_compiling():
        # A compiled graph passes its inputs to operators as they are, and some operators take no subclass of Tensor. So
        # the compiler must see a copy, which is a plain tensor.
        values = values.flip(0).flip(0)
    return values


def mark_output(output: Any, name: str, P: int) -> Any:
    """An encoder's output, `(P*B, S, ...)` in each of its tensors, with the mark of a set of streams.

    The hidden states of inner layers are not marked: a decoder does not read them.
    """
    last, rows = output[0], output[0].shape[0]

    def with_mark(value: object) -> Any:
        # a distributed or fake tensor keeps its class
        if type(value) is torch.Tensor and value.ndim > 0 and value.shape[0] == rows:
            return marked(value, Mark(name, P))
        return value

    marked_last = with_mark(last)

    def replaced(value: object) -> Any:
        if type(value) is tuple:  # hidden states by layer: the inner ones stay unmarked
            return tuple(marked_last if one is last else one for one in value)
        return marked_last if value is last else with_mark(value)

    return _map_output(replaced, output)


def by_source(encoded: Any) -> Any:
    """Encoder outputs in the form that `generate` takes: `(B, S, P, ...)`, one entry for each source.

    Args:
        encoded: a model's output, a tuple or a tensor; unmarked tensors stay as they are.

    Raises:
        ValueError: rows were selected or joined, so it is not known which stream each belongs to.
    """

    def moved(value: object) -> Any:
        if not isinstance(value, EncodedRows) or value.mark.by_source:
            return value
        _check_ordered(value, f"A tensor {tuple(value.shape)} in encoder_outputs")
        P = value.mark.num_streams
        rows = plain(value).unflatten(0, (P, -1)).movedim(0, 2)  # (P*B, S, ...) -> (B, S, P, ...)
        return marked(rows, dataclasses.replace(value.mark, by_source=True))

    return _map_output(moved, encoded)


def rows_of_streams(part: object, argument: str, value: EncodedRows, name: str | None, P: int, B: int) -> torch.Tensor:
    """The rows that a decoder takes for its own B rows.

    Args:
        part: the decoder, for messages.
        argument: the name of the argument, for messages.
        value: marked rows of an encoder.
        name: of the decoder's set of streams; `None` is the plain backbone.
        P: of that set.
        B: rows of the decoder's input.

    Returns:
        `(P*B, S, ...)`, stream-major, unmarked. A single source is used for all B rows.

    Raises:
        ValueError: another set encoded the rows; rows were selected or joined, so it is not known which stream each
            belongs to; or the number of sources is neither 1 nor B.
    """
    mark = value.mark
    given = f"{argument} {tuple(value.shape)} of {type(part).__name__}"
    _check_ordered(value, given)
    if (mark.name, mark.num_streams) != (name, P):
        active = "the plain backbone is active" if name is None else f"{name!r} with P = {P} is active"
        raise ValueError(
            f"{given} was encoded with streams {mark.name!r}, P = {mark.num_streams}, but {active}: encode again after "
            f"switching, or decode under model.use_streams({mark.name!r})."
        )
    rows = plain(value)
    rows = rows.movedim(2, 0) if mark.by_source else rows.unflatten(0, (P, -1))  # (P, sources, S, ...)
    if rows.shape[1] == 1:
        rows = rows.expand(-1, B, *rows.shape[2:])
    if rows.shape[1] != B:
        raise ValueError(
            f"{given} has {rows.shape[1]} sources with {P} streams each, for {B} rows to decode: give one source, or "
            "one for each row (repeat_interleave(k, dim=0) repeats each source k times)."
        )
    return rows.flatten(0, 1)


def _check_ordered(value: EncodedRows, given: str) -> None:
    if not value.mark.ordered:
        raise ValueError(
            f"{given} was made from an encoder's output of {value.mark.num_streams} streams, (P*B, S, H), by choosing, "
            "moving or joining its rows, or by a function that may do so: their streams are not known. Encode the "
            "sources that you want with model.get_encoder()."
        )


def _map_output(function: Callable[..., Any], output: Any) -> Any:
    """A model's output, a tuple or a tensor, with `function` applied to each part."""
    if isinstance(output, ModelOutput):
        return type(output)(**{key: function(value) for key, value in output.items()})
    if isinstance(output, SEQUENCES):
        return type(output)(map(function, output))
    return function(output)
