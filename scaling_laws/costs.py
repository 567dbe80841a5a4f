"""The cost of generation: memory and time, split by operation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from parscale.scaling_laws import paper, roofline
from parscale.scaling_laws.arguments import require_count, require_known
from parscale.scaling_laws.configs import Config, read_shape
from parscale.scaling_laws.hardware import Hardware, find_hardware
from parscale.scaling_laws.roofline import Workload
from parscale.scaling_laws.shapes import ModelShape

METHODS = ("roofline", "paper")
KVS = ("own", "shared")
DTYPES = {
    "float32": (32, 32),
    "bfloat16": (16, 16),
    "float16": (16, 16),
    "int8": (16, 8),
    "fp8": (16, 8),
    "int4": (16, 4.5),
}
"""Bits of activations and cache, and of weights; 4-bit weights include scales. 8 and 4 bits are for the matrices of the
layers only: the rest has 16."""

MOST = 10**9
"""The upper limit of streams, prompts and prompt tokens."""
MOST_STEPS = 1 << 20
"""The upper limit of tokens to generate, whose steps are counted one by one."""


@dataclass(frozen=True)
class Cost:
    """Memory and time of generating for one batch."""

    memory_bytes: float
    """Peak memory, in bytes."""
    seconds: float
    """Time from the prompts to the last token, in seconds."""
    memory: dict[str, float]
    """`memory_bytes`, split by content, in bytes."""
    time: dict[str, float]
    """`seconds`, split by operation."""
    prefill_seconds: float
    """Time until the first token: the prefill."""
    decode_seconds: float
    """Time of all other steps."""
    params: float
    """N, non-embedding parameters including those of the streams."""
    fits: bool
    """Whether it fits into the memory of the device."""
    hardware: str
    """The name of the device."""
    method: str
    """`"roofline"` or `"paper"`."""
    notes: tuple[str, ...] = ()
    """Approximations in the count, as sentences."""

    def to_dict(self) -> dict[str, Any]:
        """All fields in types that JSON supports."""
        return asdict(self) | {"notes": list(self.notes)}


def cost(
    config: Config,
    *,
    num_streams: int,
    batch_size: int,
    input_length: int,
    output_length: int,
    hardware: str | Hardware = "a100-80gb",
    method: str = "roofline",
    dtype: str = "bfloat16",
    overhead: float = 0.0,
    kv: str = "own",
) -> Cost:
    """The memory and time to generate a number of tokens for a batch of prompts.

    Args:
        config: a `config.json`'s path, its folder's, its contents, or a `ModelShape`; any architecture with attention
            that has no parts which are not counted; the error names them.
        num_streams: P.
        batch_size: B, prompts in a batch.
        input_length: tokens of each prompt.
        output_length: tokens to generate for each.
        hardware: a name in `known_hardware()`, or a `Hardware`.
        method: `"roofline"` counts what this package runs (see `roofline`); `"paper"` counts as arXiv 2505.10475 did,
            with its efficiencies and its omissions (see `paper`), in 16 bits and without `overhead`.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`; or `"int8"`, `"fp8"`, `"int4"` of the layers' matrices, with 16
            bits for all else.
        overhead: seconds for each layer of each step that are neither arithmetic nor memory traffic, such as kernel
            launches; 0 is the ideal.
        kv: `"own"`, keys and values for each stream, as published; or `"shared"`, those of stream 0 for all, which a
            model with states does not support.

    Returns:
        Memory in bytes and time in seconds, both split.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: a number is out of range, a name is unknown, the configuration lacks a required size, streams of
            the model cannot share keys and values, or it has parts whose cost is not counted.
    """
    counts = {"num_streams": num_streams, "batch_size": batch_size, "input_length": input_length}
    for name, value in counts.items():
        require_count(name, value, MOST)
    require_count("output_length", output_length, MOST_STEPS)
    require_known("method", method, METHODS)
    require_known("dtype", dtype, DTYPES)
    require_known("kv", kv, KVS)
    if not 0 <= overhead < float("inf"):
        raise ValueError(f"overhead is {overhead!r}; it must be at least 0 seconds")
    device = find_hardware(hardware)
    shape = read_shape(config)
    bits, weight_bits = DTYPES[dtype]
    work = Workload(num_streams, batch_size, input_length, output_length, bits, weight_bits, kv)
    if work.shares and shape.state_elements:
        raise ValueError(
            f"layers of {shape.name!r} keep a state, of which each stream needs its own, so that its streams do not "
            'support kv="shared"; use kv="own"'
        )
    if method == "paper":
        if work.shares:
            raise ValueError('the paper\'s count supports kv="own" only, not kv="shared"; use method="roofline"')
        _require_countable_by_paper(shape, dtype, overhead)
        memory, (time, prefill, decode) = paper.memory(shape, work), paper.seconds(shape, work, device)
    else:
        memory, (time, prefill, decode) = roofline.memory(shape, work), roofline.seconds(shape, work, device, overhead)
    total = sum(memory.values())
    return Cost(
        memory_bytes=total,
        seconds=sum(time.values()),
        memory=memory,
        time=time,
        prefill_seconds=prefill,
        decode_seconds=decode,
        params=shape.params(num_streams, kv),
        fits=total <= device.memory_gb * 1e9,
        hardware=device.name,
        method=method,
        notes=_notes(shape),
    )


def _require_countable_by_paper(shape: ModelShape, dtype: str, overhead: float) -> None:
    of_hidden = math.isclose(shape.attention[0].query, shape.hidden)  # a quotient of the two may be rounded
    if shape.experts or not shape.has_equal_layers or not shape.gated or not of_hidden:
        raise ValueError(
            "the paper's count is for dense models with a gated MLP and heads of hidden size / heads, in every layer, "
            f'and {shape.name!r} is not one; use method="roofline"'
        )
    if dtype not in ("bfloat16", "float16") or overhead:
        raise ValueError(
            f"the paper's count supports 16 bits and no overhead, not dtype {dtype!r} and overhead {overhead:g}; use "
            'method="roofline"'
        )


def _notes(shape: ModelShape) -> tuple[str, ...]:
    notes = []
    uncounted = (kind for kind in shape.attention if kind.keys == "none" and not kind.state_elements)
    if layers := sum(kind.layers for kind in uncounted):
        notes.append(
            f"{layers} of {shape.layers} layers keep no keys and values: their weights are counted; what they read of "
            "images, and states whose size the configuration does not say, are not."
        )
    if shape.other_parts:
        notes.append(
            f"counted is the language model alone, without what {', '.join(shape.other_parts)} describe"
            f"{'s' * (len(shape.other_parts) == 1)}."
        )
    if shape.zero_experts:
        notes.append(
            f"of the {shape.active_experts} experts that a token passes, {shape.used_experts:.3g} have parameters: the "
            "average of routers that choose evenly among these and the zero experts."
        )
    return tuple(notes)
