"""The states of constant size that layers keep in place of keys and values, or beside them."""

from __future__ import annotations

import dataclasses

from parscale.scaling_laws.fields import Reader
from parscale.scaling_laws.shapes import Attention

# Families with short convolutions of keys, of values and of the outputs of attention and MLP, all of them in float32.
CONVOLVED = {"inkling_text", "inkling2_text"}


def with_state(number: Reader, kind: str, attention: Attention) -> Attention:
    """A layer with the state that a row keeps in it, as transformers' own caches hold it.

    Args:
        number: reads the fields of this layer.
        kind: of the layer, as `layer_kinds` gives it.
        attention: its attention; a layer without keys has one head, of the width of its projections.

    Returns:
        The layer; without a state if it keeps none, or if no field says how large it is.
    """
    state, float32_state = _elements(number, kind, attention)
    return dataclasses.replace(attention, state=state, float32_state=float32_state)


def _elements(number: Reader, kind: str, attention: Attention) -> tuple[float, float]:
    """Elements in the dtype of the cache, and in float32."""
    keys, values = attention.head_dim, attention.value_dim
    if number.model in CONVOLVED:
        kernel = number.optional("conv_kernel_size", "sconv_kernel_size") or 4
        return 0, kernel * (attention.kv_per_token + 2 * number.needed("hidden"))
    if number.model == "zaya":  # two convolutions of queries and keys, and half of the last token's values
        kernel = (number.optional("cca_time0") or 2) + (number.optional("cca_time1") or 2) - 2
        return kernel * (attention.query + attention.kv_heads * keys) + attention.kv_heads * values / 2, 0
    if kind == "conv":
        return number.optional("conv_L_cache") * values, 0
    if kind == "recurrent":
        channels, kernel, size = values, number.optional("conv1d_width") - 1, 1
    elif kind not in ("mamba", "linear_attention"):
        return 0, 0
    elif number.model == "minimax":  # a matrix for each head, of its size in both directions
        return keys * values / number.needed("heads"), 0
    elif size := number.optional("linear_key_head_dim", "linear_head_dim"):
        channels, kernel = 2 * keys + values, number.optional("linear_conv_kernel_dim")
    else:
        size = number.optional("mamba_d_state")
        channels, kernel = values + 2 * number.optional("mamba_n_groups") * size, number.optional("mamba_d_conv")
    return (kernel * channels, size * values) if kernel > 0 and size else (0, 0)
