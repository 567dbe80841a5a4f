"""``prefix``: learned keys and values in front of those of each attention layer (Chen et al., arXiv 2505.10475).

:mod:`parscale.attention` puts them there. To start from texts, the backbone reads them, and the keys and values that
its attention sees are kept.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from parscale.backbones import backbone_only
from parscale.cache_seam import rotary_tables, tables_moved
from parscale.errors import UnsupportedModelError
from parscale.layers import has_learned_positions, number_of_attention_layers
from parscale.transforms.base import Place, Transform

USER = 5  # frames from a warning here to the caller of wrap or add_streams


class PrefixTransform(Transform):
    """``prefix_k`` and ``prefix_v`` ``(P, G, T, D)`` on each attention layer."""

    def places(self) -> list[Place]:
        """Two on each attention layer that has keys and values of its own."""
        P, T = self.streams.config.num_streams, self.streams.config.prefix_length
        if not self.state.layers:
            raise UnsupportedModelError(f"{self.state.without_layers} transform='prompt' and 'lora' work without it.")
        return [
            Place(layer.name, layer.module, name, (P, layer.key_heads, T, size), layer.dtype, layer.device)
            for layer in self.state.layers
            for name, size in (("prefix_k", layer.key_size), ("prefix_v", layer.value_size))
        ]

    def longest_text(self) -> int | None:
        """As many tokens as there are positions; a table that rotates keys has to hold the first token's too."""
        tables = [len(held[name]) - 1 for held, name in rotary_tables(self.state)]
        return min(tables) if tables else super().longest_text()

    def read(self, texts: torch.Tensor) -> None:
        """Reads the texts with the backbone, at positions -T..-1, and keeps the keys and values that attention sees."""
        state, streams, T = self.state, self.streams, self.streams.config.prefix_length
        init, name = streams.config.init, type(state.model).__name__
        config = state.model.config.get_text_config()
        positions = torch.arange(-T, 0)[None]
        tables = rotary_tables(state)
        if tables:
            positions = positions + T
        elif has_learned_positions(state.backbone):
            warnings.warn(
                f"{name} has learned positions, so init={init!r} is an approximation: the texts "
                f"are read at positions 0..{T - 1}, where the input's own tokens stand too.",
                stacklevel=USER,
            )
            positions = (positions + T).expand(streams.num_streams, -1)  # XLM wants them for each row
        elif number_of_attention_layers(state) < config.num_hidden_layers:
            warnings.warn(
                f"{name} has layers without keys and values, which forget the texts: init={init!r} "
                "is an approximation.",
                stacklevel=USER,
            )
        recorded: list[nn.Module] = []

        def record(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
            if key.shape[2] != T:
                raise ValueError(
                    f"{name} attends to keys that do not stand for one token each, so init={init!r} cannot keep them "
                    "as a prefix: use init='random'."
                )
            recorded.append(module)
            for own, states in ((streams.key_name, key), (streams.value_name, value)):
                prefix = module._parameters.get(own)
                if prefix is not None:  # a layer that borrows its keys has none
                    prefix.copy_(states[..., : prefix.shape[-1]])  # (P, G, T, D)

        def run(positions: torch.Tensor) -> None:
            with backbone_only(state), tables_moved(tables, T):
                state.recorder = record
                try:
                    state.backbone(input_ids=texts, position_ids=positions.to(texts.device), use_cache=False)
                finally:
                    state.recorder = None

        run(positions)
        if not all(prefix.isfinite().all() for prefix in self.parameters()):
            # queries scaled by the logarithm of their position (Ministral 3, Llama 4): only the rotation may see a
            # negative one
            recorded.clear()
            with _rotation_moved(state.backbone, -T):
                run(positions + T)
        if len(recorded) > len(set(recorded)):
            warnings.warn(
                f"{name} runs some attention layers more than once, with one prefix for all runs: init={init!r} is an "
                "approximation.",
                stacklevel=USER,
            )


@contextlib.contextmanager
def _rotation_moved(backbone: nn.Module, by: int) -> Iterator[None]:
    """Rotary embeddings see positions that are further on than the rest of the backbone does."""

    def move(x: Any) -> Any:
        return x + by if isinstance(x, torch.Tensor) and x.dtype in (torch.int32, torch.int64) else x

    def moved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}

    rotary = [module for module in backbone.modules() if "Rotary" in type(module).__name__]
    hooks = [module.register_forward_pre_hook(moved, with_kwargs=True) for module in rotary]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
