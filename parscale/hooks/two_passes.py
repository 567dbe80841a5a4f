"""Calls that run stream 0 alone first, and the other streams only at the positions that need them.

Streams that share stream 0's keys and values store nothing: what a token adds to the cache does not depend on streams
1 to P - 1. So a call without gradients takes two passes of the backbone:

1. it runs as it is, on B rows, and what its attention layers attend to is stored;
2. it runs at the chosen positions only, with (P - 1)*b rows that attend to the stored keys, and the streams are mixed.

The chosen positions are the last ones, where the caller keeps fewer logits than there are new tokens
(`logits_to_keep`, as `generate` does with a prompt): the second pass then follows inside the first one's hook, and the
model computes logits once. In an adaptive call they are those where the entropy of stream 0's prediction is above a
threshold, and b counts the rows that have any: there the second pass waits for stream 0's logits. Every other call runs
all streams in one batch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from parscale.attention.flash import packed_documents
from parscale.attention.shared import SeenTokens, can_slice
from parscale.compat.arguments import ANY_ROWS, CACHES, NOT_COPIED, POSITIONS, by_name, given_cache
from parscale.compat.transformers import attn_implementation, is_flash
from parscale.hooks.rows import by_part, copy_rows
from parscale.streams.backbones import argument_names, cache_argument
from parscale.streams.passes import Adaptive, TwoPasses
from parscale.streams.state import ParScaleState

KEPT = "logits_to_keep"
ROUTER_LOGITS = "output_router_logits"
INNER = ("output_hidden_states", "output_attentions", ROUTER_LOGITS)  # they need all streams in one batch


class TwoPassHooks:
    """Hooks that plan the two passes of a call, and run the second one of an adaptive call.

    They are on the innermost model with logits: the whole model, unless a model inside it generates (BLIP-2).

    Args:
        state: the model's state.
    """

    def __init__(self, state: ParScaleState) -> None:
        self.state = state
        self.generator = state.generators[-1]
        self.parameters = argument_names(self.generator)

    def attach(self) -> list[Any]:
        """Registers the hooks and returns their handles."""
        model = self.generator
        if self.state.backbone is model:  # a backbone alone has no logits
            return []
        return [
            model.register_forward_pre_hook(self._plan, with_kwargs=True),
            model.register_forward_hook(self._finish, with_kwargs=True, always_call=True),
        ]

    def _plan(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, call = self.state, self.state.call
        call.passes = None
        streams = state.active
        if streams is None or not streams.shares_keys or streams.num_streams == 1:
            return
        arguments = self._arguments(args, kwargs)
        kept, adaptive = arguments.get(KEPT), call.adaptive
        kept = kept if isinstance(kept, int) and kept > 0 else None
        obstacle = self._obstacle(arguments)
        if obstacle is not None and adaptive is not None:
            raise ValueError(f"Streams run on chosen tokens (adaptive) in calls for logits alone, and {obstacle}.")
        if obstacle is None and (adaptive is not None or (kept is not None and not self._wants_more(arguments))):
            call.passes = TwoPasses(state.in_use(streams), kept, adaptive)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return by_name(self.parameters, args[: len(self.parameters)], kwargs)  # the model itself refuses more

    def _obstacle(self, arguments: dict[str, Any]) -> str | None:
        """Why a call must run all streams in one batch; `None` if nothing prevents two passes."""
        call = self.state.call
        if torch.compiler.is_compiling():
            return (
                "this one is compiled: call the model that is not compiled, or in place of model.compile() set "
                "model.forward = torch.compile(model.forward)"
            )
        if torch.is_grad_enabled():
            return "this one records gradients: call it under torch.no_grad()"
        if arguments.get("labels") is not None:
            return "this one has labels: compute the loss from the logits"
        if call.one_batch or not call.aggregating:
            return "this one needs all streams in one batch: leave out adaptive"
        if call.adaptive is not None and (name := self._wants_more(arguments)) is not None:
            by = f"{name}=True" if arguments.get(name) is not None else f"config.{name} is True"
            return f"this one asks for hidden states, attentions or router logits ({by}): pass {name}=False"
        return None

    def _wants_more(self, arguments: dict[str, Any]) -> str | None:
        """Which of `INNER` a call asks for, by itself or by the model's configuration."""
        config = self.generator.config
        wanted = (
            name for name in INNER if (getattr(config, name, False) if arguments.get(name) is None else arguments[name])
        )
        return next(wanted, None)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the call: if it is adaptive, runs the second pass where stream 0 is uncertain."""
        call = self.state.call
        passes, call.passes = call.passes, None
        if passes is None or passes.adaptive is None or passes.arguments is None or output is None:
            return output  # without arguments or output the call failed, or did not reach the backbone
        logits: torch.Tensor = output[0] if isinstance(output, tuple) else output.logits  # (B, n, V)
        where = _choose(passes, passes.adaptive, logits)
        if not where.any():
            return output
        arguments = self._arguments(args, kwargs)
        mixed = self._run_second(module, passes, arguments.get(KEPT)).to(logits.device)  # (b, n, V)
        if passes.chosen is not None:
            mixed = logits.index_copy(0, passes.chosen, mixed)
        mixed = torch.where(where[..., None], mixed, logits)
        if isinstance(output, tuple):
            return (mixed, *output[1:])
        output.logits = mixed
        return output

    def _run_second(self, module: Any, passes: TwoPasses, kept: object) -> torch.Tensor:
        """The logits `(b, n, V)` of all streams. The ids have no effect: the backbone uses those of the first pass."""
        call = self.state.call
        b = passes.rows if passes.chosen is None else len(passes.chosen)
        assert passes.hidden is not None
        ids = torch.zeros(b, passes.positions, dtype=torch.long, device=passes.hidden.device)
        options = {} if kept is None else {KEPT: kept}
        passes.is_second, call.passes = True, passes
        try:
            logits: torch.Tensor = module.forward(input_ids=ids, return_dict=True, **options).logits
        finally:
            call.passes = None
        return logits


def _choose(passes: TwoPasses, adaptive: Adaptive, logits: torch.Tensor) -> torch.Tensor:
    """Where stream 0 is uncertain, `(B, n)`; also stores which rows take part in the second pass."""
    where = torch.stack([_entropy(row) for row in logits]) > adaptive.threshold
    adaptive.chosen = where
    adaptive.ran += int(where.sum())
    adaptive.tokens += where.numel()
    rows = where.any(dim=1)
    if not bool(rows.all()) and not passes.is_packed and not _is_block_mask(passes):
        passes.chosen = rows.nonzero().flatten()
    return where


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """The entropy in nats, `(n,)`, of predictions `(n, V)`, in at least float32."""
    return torch.special.entr(torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))).sum(-1)


def _is_packed(implementation: str, arguments: dict[str, Any], B: int, S: int) -> bool:
    """Whether rows hold image tokens, or documents for flash-attention, so that nothing can be cut off them."""
    if any(arguments.get(name) is not None for name in ANY_ROWS):
        return True
    return S > 1 and is_flash(implementation) and packed_documents({}, arguments, B, S, S) is not None


def _is_block_mask(passes: TwoPasses) -> bool:
    """Whether a layer was given a mask of FlexAttention, which cannot be cut to some rows."""
    masks = [mask for calls in passes.keys.values() for _, _, mask in calls]
    return any(mask is not None and not isinstance(mask, torch.Tensor) for mask in masks)


# -- in the backbone's hooks


def arguments_of_pass(
    state: ParScaleState, module: nn.Module, part: nn.Module, arguments: dict[str, Any], rows: torch.Tensor
) -> dict[str, Any] | None:
    """Before the backbone: its arguments for the current pass; `None` if all streams run in one batch after all.

    Args:
        state: the model's state.
        module: the backbone, or its replica.
        part: the backbone itself.
        arguments: by name, of B rows.
        rows: the first input, `(B, S, ...)`.
    """
    call = state.call
    passes = call.passes
    assert passes is not None
    if passes.is_second:
        return _last_positions(module, passes)
    if passes.arguments is not None:
        raise RuntimeError(f"{type(state.model).__name__} calls its backbone twice: streams support one call.")
    B, S = rows.shape[:2]
    positions = S if passes.kept is None else min(passes.kept, S)
    implementation = attn_implementation(state.backbone.config)
    passes.is_packed = _is_packed(implementation, arguments, B, S)
    if passes.is_packed or not can_slice(implementation):
        positions = S
    if passes.adaptive is None and positions == S:
        call.passes = None
        return None
    call.begin(None)
    passes.arguments = passes.streams.transform.before_alone(part, arguments)
    cache = given_cache(arguments)
    passes.rows, passes.length, passes.positions = B, S, positions
    passes.seen = 0 if cache is None else int(cache.get_seq_length())
    return passes.arguments


def after_pass(state: ParScaleState, module: nn.Module, output: Any) -> Any:
    """After the backbone: in the first pass stores stream 0's final hidden states, in the second puts them in front.

    If the call is not adaptive, the second pass follows the first at once.

    Args:
        state: the model's state.
        module: the backbone, or its replica.
        output: the backbone's. In the second pass `(P - 1)*b` rows.

    Returns:
        The output with `(B, S, H)` whose last positions are mixed; of the second pass `(P*b, n, H)`, which are not.
    """
    passes = state.call.passes
    assert passes is not None
    if not passes.is_second:
        passes.hidden = output[0][:, -passes.positions :]  # (B, n, H)
        if passes.adaptive is not None:
            return output
        return _with_states(output, torch.cat([output[0][:, : -passes.positions], _second_pass(state, module)], 1))
    assert passes.hidden is not None
    hidden = passes.hidden if passes.chosen is None else passes.hidden[passes.chosen.to(passes.hidden.device)]
    if getattr(output, "router_logits", None) is not None:
        output.router_logits = None  # the caller gets those of the first pass
    joined = torch.cat([hidden, output[0]])  # (P*b, n, H)
    return (joined,) if isinstance(output, tuple) else _with_states(output, joined)


def _second_pass(state: ParScaleState, module: nn.Module) -> torch.Tensor:
    """Runs the backbone again, at the last positions: the mixed states `(B, n, H)`."""
    call = state.call
    passes = call.passes
    assert passes is not None
    assert passes.arguments is not None
    passes.is_second = True
    mixed: torch.Tensor = module(**passes.arguments)[0]
    call.passes = None
    call.begin(None)  # what follows in this call is stream 0's, as in the first pass
    return mixed


def _with_states(output: Any, states: torch.Tensor) -> Any:
    """The backbone's output with other final hidden states."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    output.last_hidden_state = states
    return output


def _last_positions(module: nn.Module, passes: TwoPasses) -> dict[str, Any]:
    """The arguments of the second pass: (P - 1)*b rows of the last positions."""
    cache_name = cache_argument(module)
    assert passes.arguments is not None
    assert cache_name is not None
    arguments = {
        name: by_part(functools.partial(_piece, passes, name), value)
        for name, value in passes.arguments.items()
        if name not in CACHES
    }
    arguments[cache_name] = SeenTokens(passes.seen + passes.length - passes.positions)
    b = passes.rows if passes.chosen is None else len(passes.chosen)
    return copy_rows(module, arguments, passes.streams.name, passes.streams.num_streams - 1, b)


def _piece(passes: TwoPasses, name: str, value: Any) -> Any:
    """An argument of the first pass for the last positions of the chosen rows."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in ANY_ROWS:
        return value
    B, S, n = passes.rows, passes.length, passes.positions
    if name == POSITIONS or name == "cache_position":
        value = value[..., -n:]
    elif name in NOT_COPIED:
        return value
    elif name != "attention_mask" and value.ndim > 1 and value.shape[0] in (1, B) and value.shape[1] == S:
        value = value[:, -n:]
    if passes.chosen is None:
        return value
    dim = 1 if name == POSITIONS and value.ndim == 3 else 0
    if value.shape[dim] != B or value.ndim == 1:
        return value
    return value.index_select(dim, passes.chosen.to(value.device))
