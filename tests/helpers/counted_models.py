"""What is counted of a model, and what it holds: small models of transformers, their configurations and caches."""

import dataclasses
import json

import torch
from scripts import load_script

from parscale.scaling_laws import cost, read_shape

tiny_models = load_script("tiny_models")

TOKENS = 40


def fields_of(config):
    """The contents of its `config.json`."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def cached_bytes(model):
    """Of the keys and values of all layers and the keys of their indexers, and how many layers have some."""
    with torch.no_grad():
        cache = model(torch.randint(3, tiny_models.FIRST_SPECIAL, (1, TOKENS)), use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    kept = [getattr(layer, name, None) for layer in layers for name in ("keys", "values", "indexer_keys")]
    return sum(tensor.nbytes for tensor in kept if tensor is not None), len(layers)


def kept_states(model, cache):
    """The tensors of the states of constant size that all layers keep; Recurrent Gemma has them in its modules."""
    holders = [*getattr(cache, "layers", []), *model.modules()]
    names = ("conv_states", "recurrent_states", "conv1d_state")
    found = [getattr(holder, name, None) for holder in holders for name in names]
    found += getattr(cache, "linear_cache", [])  # MiniMax; empty for layers that keep keys
    each = [tensor for item in found for tensor in (item.values() if isinstance(item, dict) else [item])]
    return [tensor for tensor in each if isinstance(tensor, torch.Tensor)]


def counted_bytes(fields):
    """Of a cache that keeps one token less than a window has, as transformers' does: it sees the new one beside it."""
    shape = read_shape(fields)
    kinds = [dataclasses.replace(kind, window=max(0, kind.window - 1)) for kind in shape.attention]
    shape = dataclasses.replace(shape, attention=tuple(kinds))
    work = {"batch_size": 1, "input_length": TOKENS, "output_length": 1, "dtype": "float32"}
    return cost(shape, num_streams=1, **work).memory["kv_cache"]


def window_layers(shape):
    """The number of layers with a sliding window."""
    return sum(kind.layers for kind in shape.attention if kind.window)
