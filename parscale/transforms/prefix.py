"""`prefix`: learned keys and values before those of each attention layer (Chen et al., arXiv 2505.10475).

`parscale.attention` adds them. To start from texts, the backbone reads the texts, and the keys and values in its
attention become the prefixes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from parscale.attention.discovery import has_layers_without_keys
from parscale.attention.rotary import RotaryTable, rotary_tables, rotation_moved, tables_moved
from parscale.compat.deepspeed import is_partitioned
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import generates_text, has_learned_positions
from parscale.streams.brief_runs import examining
from parscale.streams.layer_specs import ParameterSpec
from parscale.transforms.base import CountingTransform, difference

AFTERWARDS = 8  # tokens on which a stream that starts from a text is compared with the backbone after that text
STACKLEVEL = 8  # number of frames from a warning here to the caller of wrap or add_streams


class PrefixTransform(CountingTransform):
    """`prefix_k` and `prefix_v` `(P, G, T, D)` on each attention layer."""

    def parameter_specs(self) -> list[ParameterSpec]:
        """Two parameters on each attention layer that has its own keys and values."""
        P, T = self.streams.config.num_transformed, self.streams.config.prefix_length
        if not self.state.layers:
            raise UnsupportedModelError(f"{self.state.without_layers} transform='prompt' and 'lora' work without it.")
        for part in self.state.mixed if len(self.state.mixed) > 1 else ():
            inside = set(part.modules())
            if not any(layer.module in inside for layer in self.state.layers):
                raise UnsupportedModelError(
                    f"No attention was found in {type(part).__name__} of {type(self.state.model).__name__}, so its "
                    "streams would not differ: use transform='lora', or wrap the other encoder by itself."
                )
        return [
            ParameterSpec(
                layer.module_name, layer.module, name, (P, layer.key_heads, T, size), layer.dtype, layer.device
            )
            for layer in self.state.layers
            for name, size in (("prefix_k", layer.key_size), ("prefix_v", layer.value_size))
        ]

    def try_out(self) -> None:
        """Tests only models with their own pooling or decoding."""
        if not generates_text(self.state.model):
            super().try_out()

    def before(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """Adds the positions of each row's tokens, if the caller passes none."""
        return self._row_positions.of_rows(part, arguments, self.streams.num_streams)

    def longest_text(self) -> int | None:
        """The number of positions; a table that rotates keys needs one more, for the first token of the input."""
        tables = [len(getattr(module, name)) - 1 for module, name in rotary_tables(self.state)]
        return min(tables) if tables else super().longest_text()

    def read(self, texts: torch.Tensor) -> None:
        """Reads the texts with the backbone, at positions -T..-1, and stores the keys and values in its attention."""
        backbone, T = self.state.backbone, self.streams.config.prefix_length
        tables = rotary_tables(self.state)
        learned = not tables and has_learned_positions(backbone)
        positions = torch.arange(T) if tables or learned else torch.arange(-T, 0)
        layers = self._keep_keys_and_values(texts, positions, tables)
        if not all(prefix.isfinite().all() for prefix in self.parameters()):
            # queries scaled by the logarithm of their position (Ministral 3, Llama 4): only the rotation may see
            # negative positions
            with rotation_moved(backbone, -T):
                layers = self._keep_keys_and_values(texts, positions + T, tables)
        reason = self._why_approximate(texts, layers, learned)
        if reason:
            warnings.warn(reason, stacklevel=STACKLEVEL)

    def _keep_keys_and_values(
        self, texts: torch.Tensor, positions: torch.Tensor, tables: list[RotaryTable]
    ) -> list[nn.Module]:
        """Reads the texts at these positions `(T,)`, and stores the keys and values in attention as prefixes.

        Args:
            texts: token ids `(P, T)`.
            positions: of the tokens.
            tables: tables that rotate keys, from `parscale.attention.rotary.rotary_tables`.

        Returns:
            The attention layers in the order in which they ran.
        """
        state, streams, T = self.state, self.streams, self.streams.config.prefix_length
        layers: list[nn.Module] = []

        def keep(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
            if key.shape[2] != T:
                raise ValueError(
                    f"{type(state.model).__name__} attends to keys that do not stand for one token each, so "
                    f"init={streams.config.init!r} cannot keep them as a prefix: use init='random'."
                )
            layers.append(module)
            for own, states in ((streams.key_name, key), (streams.value_name, value)):
                prefix = getattr(module, own, None)
                if prefix is not None:  # a layer that uses another's keys has none
                    prefix.copy_(states[..., : prefix.shape[-1]])  # (P, G, T, D)

        rows = positions.to(texts.device).expand_as(texts)  # some models look up the row's positions (Qwen4, XLM)
        with examining(state), tables_moved(tables, T), state.calls.recording(keep):
            state.backbone(input_ids=texts, position_ids=rows, use_cache=False)
        return layers

    def _why_approximate(self, texts: torch.Tensor, layers: list[nn.Module], learned: bool) -> str:
        """Why a stream only approximates the backbone after its text; empty if it is exact.

        Args:
            texts: the texts `(P, T)`.
            layers: the attention layers in the order in which they ran.
            learned: whether the backbone has learned positions.
        """
        init, name = self.streams.config.init, type(self.state.model).__name__
        reason = self._expected_approximation(layers, learned)
        error = None if learned else self._error_alone(texts)
        if error is None:
            return reason
        if error <= self.tolerance:
            return ""
        return reason or (
            f"init={init!r} is an approximation for {name}: after the text, the hidden states of a stream differ "
            f"by {error:.0%} from those of the backbone that reads it (it does not keep all of a text in its keys "
            "and values, has positions that are not relative, or a window that ends within the text)."
        )

    def _expected_approximation(self, layers: list[nn.Module], learned: bool) -> str:
        """The property of the backbone that makes a start from texts approximate; arguments of `_why_approximate`."""
        init, name, T = self.streams.config.init, type(self.state.model).__name__, self.streams.config.prefix_length
        if len(layers) > len(set(layers)):
            return (
                f"{name} runs some attention layers more than once, with one prefix for all runs: init={init!r} is an "
                "approximation."
            )
        if learned:
            return (
                f"{name} has learned positions, so init={init!r} is an approximation: the texts are read at positions "
                f"0..{T - 1}, where the input's own tokens stand too."
            )
        if has_layers_without_keys(self.state):
            return (
                f"{name} has layers without keys and values, which forget the texts: init={init!r} is an approximation."
            )
        return ""

    def _error_alone(self, texts: torch.Tensor) -> float | None:
        """The error of each stream alone against the backbone after its text, on the following tokens.

        Returns:
            The largest difference of hidden states, relative to the largest value; `None` if the prefixes cannot run
            yet, since the layers' heads or their values are spread over devices.
        """
        state = self.state
        if any(layer.mesh is not None for layer in state.layers) or any(map(is_partitioned, state.model.parameters())):
            return None
        P, T = texts.shape
        tokens = texts.roll(1, dims=0)[:, :AFTERWARDS]  # (P, S)
        with examining(state):
            both = torch.cat([texts, tokens], dim=1)
            read = state.backbone(input_ids=both, use_cache=False)[0][:, T:]  # (P, S, H)
            with state.calls.choosing(self.streams), state.calls.unmixed():
                alone = state.backbone(input_ids=tokens, use_cache=False)[0]  # (P*P, S, H)
        each = torch.arange(P, device=alone.device)
        alone = alone.unflatten(0, (P, P))[each, each]  # stream p on row p
        return difference(alone, read)
