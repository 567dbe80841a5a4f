"""Positions of left-padded texts, for a backbone whose caller passes none.

Without positions, a backbone counts from the first padding token. For rotary attention among tokens that is the same as
counting from the first real token, but a prefix comes right before position 0, and a prompt takes the first positions.
So with a prefix or a prompt, each row is counted from its first real token. A text then gives the same result as alone,
and as in `generate`, which counts in this way. Zeros inside a mask keep their positions, as in the plain backbone, and
the caller's own positions are not changed.

Learned positions are not changed: with them the plain backbone's result depends on the padding, or it reads the mask
itself.

Shapes: R = P*B rows, stream-major; S query tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from parscale.attention.masks import leading_zeros
from parscale.compat.arguments import by_name, given_cache
from parscale.streams.backbones import argument_names, has_learned_positions, takes_argument
from parscale.streams.state import ParScaleState


class RowPositions:
    """Counts each row's positions from its first real token, in each part of the model that takes positions.

    Multimodal models make masks for the layers, and some make positions, before they call the backbone. So the modules
    around the backbone have hooks that store the mask they were given.

    Args:
        state: the streams of the model.

    Attributes:
        counting: the parts that take positions and have no learned embeddings for them.
    """

    def __init__(self, state: ParScaleState) -> None:
        self.counting = {part for part in state.parts if _counts_positions(part)}
        self.hooks: list[Any] = []
        self.state = state

    def attach(self) -> None:
        """Hooks the modules around the backbone."""
        backbone = self.state.backbone
        if backbone not in self.counting:
            return
        for module in self.state.model.modules():
            if module is backbone or not isinstance(module, PreTrainedModel):
                continue
            if module.get_output_embeddings() is None and any(part is backbone for part in module.modules()):
                enter = functools.partial(self._enter, argument_names(module))
                self.hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self.hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Undoes `attach`."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _enter(self, parameters: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = by_name(parameters, args, kwargs)
        mask = arguments.get("attention_mask")
        unaware = arguments.get("position_ids") is None and isinstance(mask, torch.Tensor) and mask.ndim == 2
        self.state.call.mask_around = mask if unaware else None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.state.call.mask_around = None

    def of_rows(self, part: nn.Module, arguments: dict[str, Any], num_streams: int) -> dict[str, Any]:
        """The arguments of a part of the model, with R rows, and with the positions of each row's tokens.

        Args:
            part: one of `state.parts`.
            arguments: by name.
            num_streams: P.
        """
        rows, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        rows = arguments.get("inputs_embeds") if rows is None else rows
        positions = arguments.get("position_ids")
        outer = self.state.call.mask_around if part is self.state.backbone else None
        if rows is None or part not in self.counting or (positions is not None and outer is None):
            return arguments
        padding = leading_zeros(mask)
        if padding is None and mask is not None and outer is not None:  # made from the outer module's mask
            padding = leading_zeros(torch.cat([outer] * num_streams))
        if padding is None and positions is None:
            padding = _hidden_columns(mask)
        if padding is None or (positions is not None and positions.ndim != 2):
            return arguments
        padding, cache, S = padding.to(rows.device)[:, None], given_cache(arguments), rows.shape[1]  # (R, 1)
        start = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            positions = (torch.arange(S, device=rows.device) + start)[None]  # (1, S)
        else:  # the outer module has counted the padding: the last token has the highest position
            padding = padding * (positions[:, -1:] >= start + S - 1)
        return arguments | {"position_ids": (positions - padding).clamp(min=0)}  # (R, S)


def _hidden_columns(mask: object) -> torch.Tensor | None:
    """The number of leading columns that no query of a row sees, `(R,)`, of masks by kind of layer; `None` for others.

    `generate` makes such masks `(R, 1, S, K)` for a static cache, and no positions if the model's `forward` names none.
    Only the mask of full attention hides nothing but padding.
    """
    full = mask.get("full_attention") if isinstance(mask, dict) else None
    if not isinstance(full, torch.Tensor) or full.ndim != 4:
        return None
    visible = full if full.dtype == torch.bool else full == 0
    return leading_zeros(visible.any(dim=1).any(dim=1))


def _counts_positions(part: nn.Module) -> bool:
    """Whether a backbone or its encoder takes positions, and has no learned embeddings for them."""
    return takes_argument(part, "position_ids") and not has_learned_positions(part)
