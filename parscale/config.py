"""The configuration of a set of streams: fields of `config.json` and arguments of `parscale.wrap`."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

TEXT_INITS = ("context", "documents")  # inits that read a text for each stream
INITS = (*TEXT_INITS, "random")
PREFIX, PROMPT, LORA = "prefix", "prompt", "lora"
TRANSFORMS = (PREFIX, PROMPT, LORA)
FROM_TEXTS = (PREFIX, PROMPT)  # transforms whose streams can start from texts
SHARING = (PREFIX, LORA)  # transforms whose streams can share keys and values
OWN, SHARED = "own", "shared"
KVS = (OWN, SHARED)
LARGEST_COUNT = 10**15  # of any number of things; torch counts bytes with 64 bits

# Field names in a `config.json`. The first three are those of the released checkpoints; a released config without the
# smoothing means 0.01, the default of the released code.
NUM_STREAMS, PREFIX_LENGTH, SMOOTHING = "parscale_n", "parscale_n_tokens", "parscale_attn_smooth"
INIT, SEED = "parscale_init", "parscale_seed"
TRANSFORM, RANK = "parscale_transform", "parscale_rank"  # without the first, "prefix"
KV = "parscale_kv"  # without it, "own"
FIELDS = (NUM_STREAMS, PREFIX_LENGTH, SMOOTHING, INIT, SEED, TRANSFORM, RANK, KV)
# In full checkpoints only: the active set's name, if not "default" (null: no set is active), and the other sets.
SET_NAME, SETS = "parscale_name", "parscale_sets"
# Likewise: the version of parscale that wrote it, and the name on the Hub of the backbone that it was made from.
VERSION, MADE_FROM = "parscale_version", "parscale_backbone"
DEFAULT_SET = "default"
SET_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]*"
STREAMS_OFF = "off"  # in place of a set's name, on the command line: the plain backbone
RELEASED_SMOOTHING = 0.01
RELEASED_PREFIX_LENGTH = 48

A = ParamSpec("A")
R = TypeVar("R")


@dataclasses.dataclass
class ParScaleConfig:
    """One set of P streams (Chen et al., arXiv 2505.10475).

    A transform makes the streams differ: it adds keys and values to each attention layer, embeddings to the input, or a
    low-rank difference to each linear layer. A stream that starts from a text begins with the keys and values, or the
    embeddings, of its tokens; at random, they come from a normal distribution, and low-rank differences are zero. If
    streams share keys and values, all attend to those of stream 0, which is the plain backbone.

    Attributes:
        num_streams: P, the number of parallel streams: copies of the input that run through the backbone. 1 is the
            plain backbone, without a prefix.
        prefix_length: T, tokens of each stream's prefix or prompt: learned key/value pairs before the keys of each
            attention layer (`prefix`), or learned embeddings before the input (`prompt`). `lora` has none. At most the
            model's number of positions if the streams start from texts.
        smoothing: Smoothing of the aggregation weights: epsilon in `w * (1 - epsilon) + epsilon / P`, between 0 and 1.
        init: How the streams start: `documents` (from complete texts), `context` (from texts as they are) or `random`.
            Default: `documents` where the model generates text and streams can start from it, else `random`.
        seed: Seed of random choices, which makes them repeatable. Default: torch's global generator.
        transform: How the streams differ: `prefix`, `prompt` (also for models without keys and values) or
            `lora`.
        rank: Rank of the low-rank matrices of `lora`.
        kv: Keys and values that a stream attends to: `own` (its own, as published) or `shared` (those of stream 0,
            which is the backbone without a prefix; not with `prompt`).

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    num_streams: int = 4
    prefix_length: int = 48
    smoothing: float = 0.1
    init: str | None = None
    seed: int | None = None
    transform: str = PREFIX
    rank: int = 8
    kv: str = OWN

    def __post_init__(self) -> None:
        self.num_streams = _integer("num_streams", self.num_streams, minimum=1, maximum=LARGEST_COUNT)
        self.prefix_length = _integer("prefix_length", self.prefix_length, minimum=1, maximum=LARGEST_COUNT)
        if isinstance(self.smoothing, bool) or not isinstance(self.smoothing, numbers.Real):
            raise ValueError(f"smoothing must be a number between 0 and 1, got {self.smoothing!r}.")
        self.smoothing = float(self.smoothing)
        if not 0.0 <= self.smoothing <= 1.0:  # also true for NaN
            raise ValueError(f"smoothing must be between 0 and 1, got {self.smoothing}; the paper uses 0.1.")
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform must be one of {', '.join(map(repr, TRANSFORMS))}, got {self.transform!r}.")
        self.rank = _integer("rank", self.rank, minimum=1, maximum=LARGEST_COUNT)
        if self.kv not in KVS:
            raise ValueError(f"kv must be one of {', '.join(map(repr, KVS))}, got {self.kv!r}.")
        if self.kv == SHARED and self.transform not in SHARING:
            allowed = " or ".join(map(repr, SHARING))
            raise ValueError(f"kv={SHARED!r} takes transform={allowed}, got {self.transform!r}: leave one out.")
        if self.init is not None and self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {self.init!r}.")
        if self.init in TEXT_INITS and self.transform not in FROM_TEXTS:
            raise ValueError(
                f"init={self.init!r} starts from texts, which transform={self.transform!r} cannot do: omit it."
            )
        if self.seed is not None:
            self.seed = _integer("seed", self.seed, minimum=0)
            if self.seed >= 2**64:
                raise ValueError(f"seed must be below 2**64, got {self.seed}.")

    @property
    def num_transformed(self) -> int:
        """The number of streams with a prefix (or what else the transform adds): all, or all but stream 0."""
        return self.num_streams - 1 if self.kv == SHARED else self.num_streams

    def to_fields(self) -> dict[str, Any]:
        """The fields to write into a `config.json`, under the released names."""
        fields = {
            NUM_STREAMS: self.num_streams,
            PREFIX_LENGTH: self.prefix_length,
            SMOOTHING: self.smoothing,
            INIT: self.init,
            SEED: self.seed,
        }
        if self.transform != PREFIX:  # which a released checkpoint does not name
            fields[TRANSFORM] = self.transform
        if self.transform == LORA:
            fields[RANK] = self.rank
        if self.kv != OWN:  # nor this
            fields[KV] = self.kv
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ParScaleConfig:
        """Reads the fields that `to_fields` or the released code wrote.

        Args:
            fields: contents of a `config.json`; other keys are ignored, but an unknown `parscale_*` key warns, since a
                newer version may have written it.

        Returns:
            The configuration.

        Raises:
            ValueError: `parscale_n` is missing, or a field has the wrong type or is out of range.
        """
        if NUM_STREAMS not in fields:
            raise ValueError(f"The config has no {NUM_STREAMS!r}: it does not describe a ParScale model.")
        known = {*FIELDS, SET_NAME, SETS, VERSION, MADE_FROM}
        unknown = sorted(key for key in fields if key.startswith("parscale_") and key not in known)
        if unknown:
            warnings.warn(
                f"Ignoring unknown fields {', '.join(unknown)} of the config: "
                "a newer version of parscale may have written them.",
                stacklevel=2,
            )
        return cls(
            num_streams=fields[NUM_STREAMS],
            prefix_length=fields.get(PREFIX_LENGTH, RELEASED_PREFIX_LENGTH),
            smoothing=fields.get(SMOOTHING, RELEASED_SMOOTHING),
            init=fields.get(INIT, "random"),
            seed=fields.get(SEED),
            transform=fields.get(TRANSFORM, PREFIX),
            rank=fields.get(RANK, cls.rank),
            kv=fields.get(KV, OWN),
        )


def as_config(num_streams: int | ParScaleConfig, *others: Any) -> ParScaleConfig:
    """The configuration that was given in place of P, or one with P and the other fields, in their order."""
    return num_streams if isinstance(num_streams, ParScaleConfig) else ParScaleConfig(num_streams, *others)


def takes_fields(function: Callable[A, R]) -> Callable[A, R]:
    """Makes a function refuse fields that are given beside a `ParScaleConfig`, whatever their values.

    Args:
        function: takes P or a configuration as `num_streams`, and the other fields by name only.

    Returns:
        The function with this check, under the same signature.
    """

    @functools.wraps(function)
    def checked(*args: A.args, **kwargs: A.kwargs) -> R:
        if any(isinstance(value, ParScaleConfig) for value in (*args, kwargs.get("num_streams"))):
            others = [field.name for field in dataclasses.fields(ParScaleConfig) if field.name != "num_streams"]
            given = ", ".join(f"{name}={kwargs[name]!r}" for name in others if name in kwargs)
            if given:
                raise ValueError(
                    f"A ParScaleConfig sets all fields, so {given} cannot be given beside it: "
                    f"write ParScaleConfig({given}, ...)."
                )
        return function(*args, **kwargs)

    return checked


def _integer(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    number = int(value)
    if maximum is not None and number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {number}.")
    return number
