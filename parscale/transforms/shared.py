"""`kv="shared"`: all streams attend to the keys and values of stream 0, which is the backbone without a prefix.

    layer, stream p:   q_p = W_q h_p      keys, values: [prefix_p | W_k h_0, W_v h_0 of the tokens 0..t]

Everything after it is as with keys of their own: residual stream, MLP, final norm, aggregator. Streams that differ by
low-rank differences in place of prefixes have them on all linear layers but those that make nothing but keys and
values. What follows from it:

- The cache is that of the plain backbone: same rows, same values. A text that the backbone has read can be continued
  with streams, and vice versa.
- No token's cache depends on streams 1 to P - 1, so they run only where their prediction is needed: at the last
  positions of a prompt (`parscale.hooks.two_passes`), or at tokens where stream 0 is uncertain.
- A step reads the cache once for all streams.

A start from texts is an approximation: a stream sees its text before keys that have not seen it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from parscale.attention.discovery import has_layers_without_keys
from parscale.attention.projections import SharedHooks, find_projections
from parscale.attention.registered import registered_layers
from parscale.compat.transformers import carries_state
from parscale.config import PREFIX
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import cache_argument, generates_text, input_device, ordinary_tokens, takes_argument
from parscale.streams.brief_runs import examining, unsupported
from parscale.streams.layer_specs import Linear
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState
from parscale.transforms.base import ModelTransform, difference
from parscale.transforms.lora import LoraTransform
from parscale.transforms.prefix import PrefixTransform

INSTEAD = "Use kv='own'."
TRIED = 0.1  # size of the differences with which a set is tried out


class SharedTransform(ModelTransform):
    """What streams that share keys add to a transform: hooks on attention layers, and a trial of both ways to run."""

    def __init__(self, state: ParScaleState, streams: StreamSet) -> None:
        super().__init__(state, streams)
        self._shared = SharedHooks(state, streams)
        # without layers, `parameter_specs` says why there is no prefix
        if streams.num_streams > 1 and (state.layers or streams.config.transform != PREFIX):
            check_can_share(state)

    def add_hooks(self) -> None:
        """Also hooks on each attention layer, and on its projections of keys and values."""
        super().add_hooks()
        self._shared.attach(self.key_projections())

    def detach(self) -> None:
        """Removes the hooks."""
        super().detach()
        self._shared.detach()

    def key_projections(self) -> dict[nn.Module, bool]:
        """The linear layers of which only stream 0's rows are read, as `find_projections` finds them."""
        if self.state.key_projections is None:
            self.state.key_projections = find_projections(self.state, self.streams)
        return self.state.key_projections

    def try_out(self) -> None:
        """Compares three ways to read three tokens: at once, two and one with a cache, and the last one by two passes.

        Raises:
            UnsupportedModelError: the backbone fails with streams, or the results differ.
        """
        state, name = self.state, type(self.state.model).__name__
        device = input_device(state.model)
        if device.type == "meta":
            return
        ids = torch.tensor(ordinary_tokens(state.model, 6), device=device).view(2, 3)
        cache_name = cache_argument(state.backbone)
        assert cache_name is not None
        refused = unsupported(
            f"{name} does not run where keys have fewer rows than queries, as with kv='shared' ({{}}). {INSTEAD}"
        )
        with refused, examining(state), state.calls.choosing(self.streams):
            whole = state.backbone(input_ids=ids, use_cache=False)[0][:, -1:]
            cache = {cache_name: DynamicCache(config=state.backbone.config)}
            state.backbone(input_ids=ids[:, :2], use_cache=True, **cache)
            last = state.backbone(input_ids=ids[:, 2:], use_cache=True, **cache)[0]
            error = difference(last, whole)
            generator = state.generators[-1]
            if generates_text(generator) and takes_argument(generator, "logits_to_keep"):
                logits = generator(input_ids=ids, use_cache=False).logits[:, -1:]
                by_passes = generator(input_ids=ids, logits_to_keep=1).logits
                error = max(error, difference(by_passes, logits))
        if not whole.isfinite().all():
            raise UnsupportedModelError(
                f"The states of {name} are not finite, so whether its streams can share keys cannot be tried: load or "
                "initialise its weights first."
            )
        if not error <= self.tolerance:
            raise UnsupportedModelError(
                f"{name} gives something else with a cache than without ({error:.0%}) where streams share keys: a "
                f"layer keeps more than keys and values. {INSTEAD}"
            )


class SharedPrefixTransform(SharedTransform, PrefixTransform):
    """`prefix_k` and `prefix_v` `(P - 1, G, T, D)` on each attention layer, of streams 1 to P - 1."""

    def before_alone(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """As `before`, for stream 0 alone: B rows."""
        return self._row_positions.of_rows(part, arguments, 1)

    def _error_alone(self, texts: torch.Tensor) -> float | None:
        """Always `None`: no stream equals the backbone after its text."""
        return None


class SharedLoraTransform(SharedTransform, LoraTransform):
    """`stream_down` `(P - 1, r, in)` and `stream_up` `(P - 1, out, r)`, of streams 1 to P - 1.

    On each linear layer of the backbone that runs on whole rows, but for those that make nothing but keys and values.
    """

    def linears(self) -> list[Linear]:
        """The layers that get a difference."""
        return [layer for layer in super().linears() if layer.module not in self.key_projections()]

    def try_out(self) -> None:
        """With random differences: they are zero at the start, which would hide a layer that runs on other rows."""
        ups = [up for name, up in self.tensors().items() if name.endswith("stream_up") and not up.is_meta]
        before, generator = [up.detach().clone() for up in ups], torch.Generator().manual_seed(0)
        with torch.no_grad():
            try:
                for up in ups:
                    up.add_(TRIED * torch.randn(up.shape, generator=generator).to(up))
                super().try_out()
            finally:
                for up, values in zip(ups, before, strict=True):
                    up.copy_(values)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Adds the differences to the rows of streams 1 to P - 1; those of stream 0, if it runs too, stay."""
        call, x = self.state.call, args[0]
        if call.in_flight is not self.streams:
            return output
        first = 0 if call.passes is not None else x.shape[0] // self.streams.num_streams
        difference = self.difference(module, x[first:]).reshape(output[first:].shape)
        return torch.cat([output[:first], output[first:] + difference.to(output.dtype)])


def check_can_share(state: ParScaleState) -> None:
    """Checks that streams of a model can share keys and values.

    Raises:
        UnsupportedModelError: they cannot; the message gives the reason.
    """
    name, layers = type(state.model).__name__, state.layers
    registered = set(registered_layers(state.backbone))
    if state.encoder is not None or len(state.mixed) > 1:
        reason = "it is an encoder with a decoder, or two encoders: streams share the keys of one decoder"
    elif cache_argument(state.backbone) is None:
        reason = "it takes no cache that streams could share"
    elif not all(getattr(x.module, "is_causal", True) for x in layers):
        reason = "it has attention layers that are not causal (is_causal), as an encoder has"
    elif not all(layer.module in registered for layer in layers):
        reason = "its attention does not come from transformers' registry (ALL_ATTENTION_FUNCTIONS)"
    elif has_layers_without_keys(state) or any(map(carries_state, _cache_layers(state))):
        reason = "it has layers without keys of the text, which carry a state that each stream would need for itself"
    elif any(hasattr(layer, "update_indexer") for layer in _cache_layers(state)):
        reason = "its cache holds an index of keys, by which each stream would choose others"
    else:
        return
    raise UnsupportedModelError(f"kv='shared' is not for {name}: {reason}. {INSTEAD}")


def _cache_layers(state: ParScaleState) -> list[Any]:
    """The layers of the cache that transformers makes for the backbone."""
    return [*DynamicCache(config=state.backbone.config).layers]
