"""bitsandbytes: its layers of 4 bits on a CPU, differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from parscale.compat.names import missing, needed_module

_HAS_BFLOAT16, _PACK = "has_avx512bf16", "_convert_weight_packed_for_cpu"


@contextlib.contextmanager
def four_bits_with_gradients() -> Iterator[None]:
    """In this block bitsandbytes makes layers that can be differentiated on a CPU.

    By itself it packs a layer's weights anew, where the processor has bfloat16 instructions, when the layer first runs
    in eval mode. From then on the layer has no gradient, also in train mode, and no error says so (0.50). A layer asks
    for the instructions once, when it is made, by a function that this block replaces; the layers are made inside
    `from_pretrained`, and a wrapped model runs there for the first time, so that nothing later is early enough.
    A version that packs nothing (0.48) is left as it is.

    Raises:
        IncompatibleVersionError: this version packs weights, and asks for the instructions in another way.
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
