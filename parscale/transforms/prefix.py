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

from parscale.attention.cache_seam import rotary_tables, tables_moved
from parscale.attention.discovery import has_learned_positions, number_of_attention_layers
from parscale.attention.positions import RowPositions
from parscale.compat.deepspeed import is_partitioned
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import backbone_only, writes_text
from parscale.transforms.base import Place, Transform

AFTERWARDS = 8  # tokens on which a stream that starts as a text is compared with the backbone that reads the text
EXACT, FEW_BITS = 1e-3, 5e-2  # up to there they are the same: in float32, in the shorter formats
USER = 6  # frames from a warning here to the caller of wrap or add_streams


class PrefixTransform(Transform):
    """``prefix_k`` and ``prefix_v`` ``(P, G, T, D)`` on each attention layer."""

    def __init__(self, state: Any, streams: Any) -> None:
        super().__init__(state, streams)
        self._row_positions = RowPositions(state)

    def places(self) -> list[Place]:
        """Two on each attention layer that has keys and values of its own."""
        P, T = self.streams.config.num_streams, self.streams.config.prefix_length
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
            Place(layer.name, layer.module, name, (P, layer.key_heads, T, size), layer.dtype, layer.device)
            for layer in self.state.layers
            for name, size in (("prefix_k", layer.key_size), ("prefix_v", layer.value_size))
        ]

    def attach(self) -> None:
        """Hooks what is around the backbone, and tries a model that pools or decodes in ways of its own."""
        self._row_positions.attach()
        if not writes_text(self.state.model):
            self.try_out()

    def detach(self) -> None:
        """Removes the hooks."""
        self._row_positions.detach()

    def before(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """With the positions of each row's tokens, where the caller gives none."""
        return self._row_positions.of_rows(part is self.state.backbone, arguments, self.streams.num_streams)

    def longest_text(self) -> int | None:
        """As many tokens as there are positions; a table that rotates keys has to hold the first token's too."""
        tables = [len(getattr(module, name)) - 1 for module, name in rotary_tables(self.state)]
        return min(tables) if tables else super().longest_text()

    def read(self, texts: torch.Tensor) -> None:
        """Reads the texts with the backbone, at positions -T..-1, and keeps the keys and values that attention sees."""
        state, streams, T = self.state, self.streams, self.streams.config.prefix_length
        init, name = streams.config.init, type(state.model).__name__
        positions = torch.arange(-T, 0)
        tables = rotary_tables(state)
        learned = not tables and has_learned_positions(state.backbone)
        reason = ""  # why such a start could be an approximation
        if learned:
            reason = (
                f"{name} has learned positions, so init={init!r} is an approximation: the texts are read at positions "
                f"0..{T - 1}, where the input's own tokens stand too."
            )
        elif number_of_attention_layers(state) < state.model.config.get_text_config().num_hidden_layers:
            reason = (
                f"{name} has layers without keys and values, which forget the texts: init={init!r} is an approximation."
            )
        if tables or learned:
            positions = positions + T
        recorded: list[nn.Module] = []

        def record(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
            if key.shape[2] != T:
                raise ValueError(
                    f"{name} attends to keys that do not stand for one token each, so init={init!r} cannot keep them "
                    "as a prefix: use init='random'."
                )
            recorded.append(module)
            for own, states in ((streams.key_name, key), (streams.value_name, value)):
                prefix = getattr(module, own, None)
                if prefix is not None:  # a layer that borrows its keys has none
                    prefix.copy_(states[..., : prefix.shape[-1]])  # (P, G, T, D)

        def run(positions: torch.Tensor) -> None:
            rows = positions.to(texts.device).expand_as(texts)  # some look their row's up (Qwen4, XLM)
            with backbone_only(state), tables_moved(tables, T), state.recording(record):
                state.backbone(input_ids=texts, position_ids=rows, use_cache=False)

        run(positions)
        if not all(prefix.isfinite().all() for prefix in self.parameters()):
            # queries scaled by the logarithm of their position (Ministral 3, Llama 4): only the rotation may see a
            # negative one
            recorded.clear()
            with _rotation_moved(state.backbone, -T):
                run(positions + T)
        if len(recorded) > len(set(recorded)):
            reason = (
                f"{name} runs some attention layers more than once, with one prefix for all runs: init={init!r} is an "
                "approximation."
            )
        error = None if learned else self._error_alone(texts)
        if error is not None and error <= (FEW_BITS if state.hidden[0].dtype.itemsize < 4 else EXACT):
            reason = ""
        elif error is not None and not reason:
            reason = (
                f"init={init!r} is an approximation for {name}: after the text, the hidden states of a stream differ "
                f"by {error:.0%} from those of the backbone that reads it (it does not keep all of a text in its keys "
                "and values, has positions that are not relative, or a window that ends within the text)."
            )
        if reason:
            warnings.warn(reason, stacklevel=USER)

    def _error_alone(self, texts: torch.Tensor) -> float | None:
        """How far each stream by itself is from the backbone that reads its text, on tokens that come after.

        Returns:
            The largest difference of hidden states, in units of the largest; ``None`` where the prefixes cannot run
            yet, since their layers' heads or their values are spread over devices.
        """
        state = self.state
        if any(layer.mesh is not None for layer in state.layers) or any(map(is_partitioned, state.model.parameters())):
            return None
        P, T = texts.shape
        tokens = texts.roll(1, dims=0)[:, :AFTERWARDS]  # (P, S)
        with backbone_only(state):
            both = torch.cat([texts, tokens], dim=1)
            read = state.backbone(input_ids=both, use_cache=False)[0][:, T:]  # (P, S, H)
            with state.choosing(self.streams), state.unmixed():
                alone = state.backbone(input_ids=tokens, use_cache=False)[0]  # (P*P, S, H)
        each = torch.arange(P, device=alone.device)
        alone = alone.unflatten(0, (P, P))[each, each]  # stream p on row p
        return float((alone - read).abs().max() / read.abs().max())


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
