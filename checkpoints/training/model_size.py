"""The configuration of a new model of which only a size is given: a Qwen2 of about so many parameters.

The size counts the parameters of the backbone without its embeddings. Of a fixed list of shapes the nearest is taken,
so that a larger size never makes a smaller model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from parscale.format.folders import CONFIG

SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
SMALLEST, LARGEST = "100K", "1T"
_STEP = 64  # of widths; also the size of a head
_FINE = 1024  # the width up to which each multiple of 64 is one, above it each of 256: key/value heads are a quarter
_UNTIED = 1e9  # from this size on the output has weights of its own
_POSITIONS = 2048


def read_size(text: str) -> float:
    """A number such as 1.6e9, 1600000000 or 1.6B; `ValueError` for other text."""
    letter = text[-1:].upper()
    if letter not in SUFFIXES:
        return float(text)
    return float(f"{float(text[:-1]) * SUFFIXES[letter]:.15g}")  # 4.1M is not 4099999.9999999995


def checked_size(text: str) -> float:
    """The size that a user gave in place of a file.

    Raises:
        ValueError: it is no size, or none that a model can have.
    """
    allowed = f"a size from {SMALLEST} to {LARGEST} such as 20M (parameters without embeddings)"
    try:
        size = read_size(text)
    except ValueError:
        raise ValueError(f"{text} is no file; give the {CONFIG} of a causal language model, or {allowed}.") from None
    if not read_size(SMALLEST) <= size <= read_size(LARGEST):
        raise ValueError(f"A new model cannot have {text} parameters; give {allowed}.")
    return size


@dataclass(frozen=True)
class Shape:
    """What determines the number of parameters of a Qwen2 model, but for its embeddings.

    Attributes:
        width: of the hidden states.
        layers: how many.
        mlp: the width between the two halves of an MLP.
    """

    width: int
    layers: int
    mlp: int

    @property
    def heads(self) -> int:
        """The number of heads of queries."""
        return self.width // _STEP

    @property
    def key_value_heads(self) -> int:
        """A quarter of the heads, or what divides them below that."""
        return next(heads for heads in range(max(1, self.heads // 4), 0, -1) if self.heads % heads == 0)

    @property
    def parameters(self) -> int:
        """The number of parameters without those of the embeddings and the output."""
        width, of_keys = self.width, self.key_value_heads * _STEP
        attention = 2 * width * width + 2 * width * of_keys + width + 2 * of_keys  # all but its output have biases
        return self.layers * (attention + 3 * width * self.mlp + 2 * width) + width


def shape_of(size: float) -> Shape:
    """The shape whose number of parameters is nearest, within 15 % of any size that `checked_size` allows.

    The width is a multiple of 64, above 1024 of 256, with heads of 64. There are `width / 64` layers, at least 2, and
    an MLP of 8/3 of the width, rounded to 64; more layers fill the gap up to the next width, and a wider MLP, by 64s,
    that up to the next layer.
    """
    return min(_shapes(size), key=lambda shape: (abs(shape.parameters - size), shape.parameters))


def configuration(size: float, vocabulary: int, sequence_length: int | None) -> dict[str, Any]:
    """The fields of a `config.json` of a model of about this size.

    Args:
        size: parameters without embeddings.
        vocabulary: the number of tokens.
        sequence_length: the longest that the model has to take, if that is known.
    """
    shape = shape_of(size)
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "max_position_embeddings": max(_POSITIONS, sequence_length or 0),
        "tie_word_embeddings": size < _UNTIED,
    }


def _shapes(size: float) -> Iterator[Shape]:
    """The shapes up to the first width whose smallest is larger than the size."""
    width = _STEP
    while True:
        first = _smallest(width)
        following = width + (_STEP if width < _FINE else 4 * _STEP)
        end = _smallest(following).parameters
        for layers in count(first.layers):
            shape = Shape(width, layers, first.mlp)
            if layers > first.layers and shape.parameters >= end:
                break
            another = Shape(width, layers + 1, first.mlp).parameters
            while shape.parameters < another:
                yield shape
                shape = Shape(width, layers, shape.mlp + _STEP)
        if first.parameters > size:
            return
        width = following


def _smallest(width: int) -> Shape:
    return Shape(width, max(2, width // _STEP), max(1, round(8 * width / 3 / _STEP)) * _STEP)
