"""The number of parameters of a quantized model: that of the original model, not of its packed tensors.

Packed integers hold several parameters each; scales and zero points are not parameters. Each library has its own way to
store which tensors are packed, and their original shapes:

Library: in memory; in files.

- bitsandbytes, 4 bit: `Params4bit`; `weight` with `weight.quant_state...`
- HQQ: `W_q` and its `meta`
- GPTQ, AWQ: `qweight` and the number of features; `qweight` and the configuration's bits
- compressed-tensors: `weight_packed`; the same, and the configuration's bits
- MXFP4 (GPT-OSS): `..._blocks`; the same
- torchao, quanto: tensors with their true shapes; `..._qdata` (torchao)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from parscale.format.headers import StoredTensor

PACKED = re.compile(r"(^|\.)(qweight|weight_packed)$")
BLOCKS = re.compile(r"_proj_blocks$")  # two 4-bit values in a byte
BESIDE = re.compile(
    r"(^|\.)(qzeros|scales|g_idx|weight_(scale|zero_point|shape|g_idx|global_scale|scale_inv)|input_scale)$"
    r"|_proj_scales$|\._weight_(scale|zero_point)$"
)
TWO_IN_A_BYTE = 2


def stored_sizes(tensors: Mapping[str, StoredTensor], quantization: object) -> dict[str, int]:
    """The number of parameters in each tensor of a checkpoint's files; tensors without parameters are omitted.

    Args:
        tensors: in the files, by name.
        quantization: `quantization_config` of the checkpoint's `config.json`, if there is one.
    """
    if not isinstance(quantization, Mapping):
        return {name: tensor.numel for name, tensor in tensors.items()}
    bits = _bits(quantization)
    four_bit = {name.partition(".quant_state.")[0] for name in tensors if ".quant_state." in name}
    sizes = {}
    for name, tensor in tensors.items():
        if BESIDE.search(name) or {name.rpartition(".")[0], name.partition(".quant_state.")[0]} & (four_bit - {name}):
            continue
        if name in four_bit:
            sizes[name] = tensor.numel * tensor.item_size * TWO_IN_A_BYTE
        elif BLOCKS.search(name) and tensor.dtype == "U8":
            sizes[name] = tensor.numel * TWO_IN_A_BYTE
        elif PACKED.search(name) and tensor.dtype in ("I32", "U8") and bits:
            sizes[name] = tensor.numel * tensor.item_size * 8 // bits
        else:
            sizes[name] = tensor.numel
    return sizes


def _bits(quantization: Mapping[str, Any]) -> int | None:
    """Bits of a weight, in the format of GPTQ and AWQ or of compressed-tensors."""
    found = [quantization.get("bits")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found.append(weights.get("num_bits") if isinstance(weights, Mapping) else None)
    return next((bits for bits in found if type(bits) is int and 1 <= bits <= 8), None)
