"""bitsandbytes: gradients through its 4-bit layers on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from parscale.compat.names import missing, needed_module

_HAS_BFLOAT16, _PACK = "has_avx512bf16", "_convert_weight_packed_for_cpu"


@contextlib.contextmanager
def four_bits_with_gradients() -> Iterator[None]:
    """In this block bitsandbytes makes layers that support gradients on a CPU.

    By default it repacks a layer's weights when the layer first runs in eval mode, on processors with bfloat16
    instructions. From then on the layer silently has no gradient, even in train mode (0.50). A layer checks for the
    instructions once, when it is made, with a function that this block replaces. The layers are made inside
    `from_pretrained`, and a wrapped model runs there for the first time, so it must happen there. Versions that do not
    repack (0.48) are not changed.

    Raises:
        IncompatibleVersionError: this version repacks weights, but checks for the instructions in another way.
    """
    modules = needed_module("bitsandbytes.nn.modules")
    if not hasattr(modules, _PACK):
        yield
        return
    own = getattr(modules, _HAS_BFLOAT16, None)
    if own is None:
        raise missing(modules, _HAS_BFLOAT16)
    setattr(modules, _HAS_BFLOAT16, lambda: False)
    try:
        yield
    finally:
        setattr(modules, _HAS_BFLOAT16, own)
