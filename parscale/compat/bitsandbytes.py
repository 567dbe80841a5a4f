"""bitsandbytes: its 4-bit layers keep their gradients on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from parscale.compat.names import needed, needed_module
from parscale.compat.patching import replaced

_HAS_BFLOAT16, _PACK = "has_avx512bf16", "_convert_weight_packed_for_cpu"
_PACKS = "support_avx512bf16_for_cpu"  # of a layer: whether it will


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
    needed(modules, _HAS_BFLOAT16)
    with replaced(modules, _HAS_BFLOAT16, lambda: False):
        yield


@contextlib.contextmanager
def four_bits_unpacked(model: nn.Module) -> Iterator[None]:
    """In this block no 4-bit layer of a model repacks its weights, which would cost it its gradients.

    `wrap` runs the model in eval mode, where the caller may go on to train it.
    """
    with contextlib.ExitStack() as unpacked:
        for layer in model.modules():
            if getattr(layer, _PACKS, False):
                unpacked.enter_context(replaced(layer, _PACKS, False))
        yield
