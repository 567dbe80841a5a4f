"""What a wrapped model carries: its sets of streams, and the hooks on the backbone that run them.

input_ids (B, S)
  -> copied to P streams, stream-major            (P*B, S)       before the backbone's forward
  -> the backbone, unchanged, sees a batch of P*B                what differs between streams: parscale.transforms
  -> final norm                                   (P*B, S, H)
  -> aggregator                                   (B, S, H)      after it, or before the backbone pools
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from parscale.aggregator import Aggregator
from parscale.attention import AttentionLayer
from parscale.backbones import find_backbone
from parscale.config import ParScaleConfig
from parscale.kernels.dispatch import Impl
from parscale.masks import extend_block_mask, extend_dense_mask
from parscale.parallel import gather_heads
from parscale.static_caches import fit_rows
from parscale.transforms import make_transform
from parscale.transforms.lora import Linear
from parscale.transforms.prompt import CACHES, is_empty

DEFAULT = "default"

# Arguments of a backbone that have one row for each sequence.
ROW_ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "langs",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "per_layer_inputs",
    "ple_input_ids",
    "visual_pos_masks",
    "pixel_values",
    "bool_masked_pos",
    "input_features",
    "encoder_hidden_states",
    "encoder_attention_mask",
)
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features")  # the first given one counts the rows
# One tensor for each layer, with one row for each image token of the batch, in the order of the rows.
IMAGE_TOKENS = "deepstack_visual_embeds"


class StreamSet:
    """One named set of streams. Its tensors are parameters of the backbone's modules, under names of its own.

    Args:
        state: of the model.
        name: ``"default"`` keeps the released names; another set adds ``@name`` to each.
        config: its numbers.
    """

    def __init__(self, state: ParScaleState, name: str, config: ParScaleConfig) -> None:
        self.name = name
        self.config = config
        self.key_name, self.value_name = self.own_name("prefix_k"), self.own_name("prefix_v")
        self.aggregator_name = self.own_name("aggregate_layer")
        self.transform = make_transform(state, self)

    def own_name(self, released: str) -> str:
        """What the set calls a parameter, or the aggregator, in the module that holds it."""
        return released if self.name == DEFAULT else f"{released}@{self.name}"

    @property
    def num_streams(self) -> int:
        """P."""
        return self.config.num_streams


class ParScaleState:
    """Everything that wrapping adds to a model beside the tensors.

    Args:
        model: the model to wrap.
        kernels: how the operations of :mod:`parscale.kernels` run, their ``impl``.

    Raises:
        UnsupportedModelError: it has no backbone that streams run on.
    """

    def __init__(self, model: Any, kernels: Impl = "auto") -> None:
        self.model = model
        self.backbone: Any
        self.encoder: Any
        self.backbone, self.encoder = find_backbone(model)
        self.backbone_name = next(name for name, module in model.named_modules() if module is self.backbone)
        self.kernels = kernels
        self.layers: list[AttentionLayer] = []
        self.without_layers = ""  # why there are none
        self.linears: list[Linear] = []  # found when a set asks for them
        self.sets: dict[str, StreamSet] = {}
        self.active: StreamSet | None = None
        # The set that the forward pass under way (or recomputed under checkpointing) runs with. None: the backbone.
        self.in_flight: StreamSet | None = None
        self.in_flight_trains: list[tuple[nn.Parameter, bool]] = []  # which of its parameters do, for checkpointing
        self.recorder: Callable[[nn.Module, torch.Tensor, torch.Tensor], None] | None = None
        self.aggregating = True
        self.hidden_size, self.hidden_dtype, self.hidden_device = 0, torch.float32, torch.device("cpu")
        self.measured: list[tuple[torch.dtype, torch.device]] = []  # the backbone's weights when these were looked up
        self.positional = list(inspect.signature(self.backbone.forward).parameters)
        self._masks: dict[int, tuple[Any, Any]] = {}
        self._pooled: tuple[torch.Tensor, torch.Tensor] | None = None  # what a pooler was given, and its mixture
        self.hooks = [
            self.backbone.register_forward_pre_hook(self._copy_to_streams, with_kwargs=True),
            self.backbone.register_forward_hook(self._mix_streams),
            model.register_forward_hook(self._join_router_logits),
        ]
        self._encoder_positional: list[str] = []
        if self.encoder is not None:
            self._encoder_positional = list(inspect.signature(self.encoder.forward).parameters)
            self.hooks.append(self.encoder.register_forward_pre_hook(self._copy_to_streams, with_kwargs=True))
        pooler = getattr(self.backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            self.hooks.append(pooler.register_forward_pre_hook(self._mix_before_pooling))

    @property
    def parts(self) -> list[Any]:
        """The backbone and the encoder before it, if there is one."""
        return [self.backbone] if self.encoder is None else [self.encoder, self.backbone]

    # -- tensors

    def tensors(self, streams: StreamSet) -> dict[str, nn.Parameter]:
        """The set's parameters by their released names in the model, whatever the set is called."""
        if streams.num_streams == 1:
            return {}
        tensors = streams.transform.tensors()
        root = f"{self.backbone_name}." if self.backbone_name else ""
        for name, parameter in self.aggregator(streams).named_parameters():
            tensors[f"{root}aggregate_layer.{name}"] = parameter
        return tensors

    def names(self, streams: StreamSet) -> dict[str, str]:
        """The set's names in the model's ``state_dict`` by the released ones."""
        if streams.num_streams == 1:
            return {}
        names = {}
        for place in streams.transform.places():
            path = f"{place.path}." if place.path else ""
            names[place.released_name] = f"{path}{streams.own_name(place.name)}"
        root = f"{self.backbone_name}." if self.backbone_name else ""
        for leaf in ("0.weight", "0.bias", "2.weight", "2.bias"):
            names[f"{root}aggregate_layer.{leaf}"] = f"{root}{streams.aggregator_name}.{leaf}"
        return names

    def load_into_active(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Before ``load_state_dict``: the released names of a saved checkpoint mean the active set.

        A checkpoint that the Trainer loads back has the set that was active under the released names. A model's own
        ``state_dict()`` has every set under its own, and is left as it is.
        """
        names = {} if self.active is None else self.names(self.active)
        if any(prefix + name in state_dict for name in names.values()):
            return
        for released, name in names.items():
            if prefix + released in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + released)

    def aggregator(self, streams: StreamSet) -> Aggregator:
        """The set's aggregator."""
        return self.backbone._modules[streams.aggregator_name]

    def trainability(self) -> dict[nn.Parameter, bool]:
        """Whether each parameter of each set trains."""
        return {p: p.requires_grad for streams in self.sets.values() for p in self.tensors(streams).values()}

    def record(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        """Shows the recorder an attention layer's keys and values, those of all devices."""
        assert self.recorder is not None
        mesh = next((layer.mesh for layer in self.layers if layer.module is module), None)
        if mesh is not None:
            key, value = gather_heads(key, mesh), gather_heads(value, mesh)
        self.recorder(module, key, value)

    # -- the way of the data

    def _copy_to_streams(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the backbone, or its encoder: every row P times, stream-major (row ``p*B + b``)."""
        self._masks.clear()
        self._pooled = None
        streams = self.active
        if streams is not None and streams.num_streams == 1:
            streams = None
        self.in_flight = streams
        if module.training and torch.is_grad_enabled():
            self._recompute_with_own_set(module)
        positional = self.positional if module is self.backbone else self._encoder_positional
        arguments = dict(zip(positional[: len(args)], args, strict=True)) | kwargs
        for name in CACHES:
            self._check_cache(arguments.get(name))
        if streams is None:
            return None
        rows = next((arguments[name] for name in INPUTS if arguments.get(name) is not None), None)
        if rows is None:  # the backbone says what it misses
            return None
        if isinstance(arguments.get("state"), list) and rows.shape[1] == 1:
            raise ValueError(
                f"transformers' {type(module).__name__} goes on from its state with one row only, and "
                f"{streams.num_streams} streams are as many rows: use_cache=False."
            )
        fit_rows(arguments.get("past_key_values"), rows.shape[0], streams.num_streams)
        for name in ROW_ARGUMENTS:
            if arguments.get(name) is not None:
                arguments[name] = _copy_rows(name, arguments[name], rows.shape[0], streams.num_streams)
        if arguments.get(IMAGE_TOKENS) is not None:
            arguments[IMAGE_TOKENS] = [torch.cat([states] * streams.num_streams) for states in arguments[IMAGE_TOKENS]]
        return (), streams.transform.before(module, arguments)

    def _mix_before_pooling(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a pooler inside the backbone: it gets ``(B, S, H)``, or the mixed states of one token, ``(B, H)``."""
        streams, states = self.in_flight, args[0]
        if streams is None or not self.aggregating:
            return None
        if states.ndim == 3 and states.shape[1] == self.hidden_size != states.shape[2]:  # (P*B, H, S), of Swin
            mixed = self._mixture(streams, streams.transform.before_pooling(states.mT)).mT
        else:
            mixed = self._mixture(streams, streams.transform.before_pooling(states))
            self._pooled = (states, mixed)
        return (mixed, *args[1:])

    def _mix_streams(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the backbone: ``(P*B, S, H)`` to ``(B, S, H)``, in ``hidden_states[-1]`` and what heads take too."""
        self._masks.clear()
        streams = self.in_flight
        if streams is None:
            return output
        unpooled, output = output[0], streams.transform.after(output)
        if getattr(output, "router_logits", None):
            output.router_logits = _router_logits_by_stream(output.router_logits, streams.num_streams)
        if not self.aggregating:
            return output
        last = output[0]
        if self._pooled is not None and self._pooled[0] is unpooled:
            mixed = self._pooled[1]
        else:
            mixed = self._mixture(streams, last)
        self._pooled = None

        def with_mixed(states: Any) -> Any:
            """The layers' hidden states with the last of them mixed, unless the caller did not choose it."""
            if isinstance(states, tuple) and states and getattr(states[-1], "shape", None) == last.shape:
                return (*states[:-1], mixed)
            shape = getattr(states, "shape", ())
            if shape == (last.shape[0], last.shape[2]):  # those of one token, as they are
                return self._mixture(streams, streams.transform.before_pooling(states))
            if len(shape) == 3 and shape[::2] == (last.shape[0], last.shape[2]):  # those that foresee (ProphetNet)
                return self._mixture(streams, states)
            return states

        if isinstance(output, tuple):
            return (mixed, *map(with_mixed, output[1:]))
        output.last_hidden_state = mixed
        for name in ("hidden_states", "pooler_output", "last_hidden_state_ngram"):
            if getattr(output, name, None) is not None:
                output[name] = with_mixed(output[name])
        return output

    def _mixture(self, streams: StreamSet, hidden: torch.Tensor) -> torch.Tensor:
        """``(P*B, S, H)`` to ``(B, S, H)``, or ``(P*B, H)`` to ``(B, H)``."""
        if hidden.ndim == 2:
            return self.aggregator(streams)(hidden[:, None], impl=self.kernels)[:, 0]
        return self.aggregator(streams)(hidden, impl=self.kernels)

    def _join_router_logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the whole model: a mixture of experts' router logits by layer again, ``(P*B*S, E)``."""
        streams = self.in_flight
        if streams is not None and getattr(output, "router_logits", None):
            P, pieces = streams.num_streams, output.router_logits
            output.router_logits = tuple(torch.cat(pieces[i : i + P]) for i in range(0, len(pieces), P))
        return output

    def extended_mask(
        self, mask: torch.Tensor | BlockMask | None, prefix_length: int, num_rows: int
    ) -> torch.Tensor | BlockMask | None:
        """The mask with room for the prefix; made once for all layers that share it."""
        if mask is None:
            return None
        if isinstance(mask, torch.Tensor) and torch.compiler.is_compiling():
            return extend_dense_mask(mask, prefix_length)  # the compiler shares it
        entry = self._masks.get(id(mask))
        if entry is None:
            if isinstance(mask, BlockMask):
                extended: Any = extend_block_mask(mask, prefix_length, num_rows)
            else:
                extended = extend_dense_mask(mask, prefix_length)
            entry = self._masks[id(mask)] = (mask, extended)  # holds the mask, so that its id stays its own
        return entry[1]

    def _check_cache(self, cache: Any) -> None:
        """A cache belongs to the set that filled it."""
        if cache is None or isinstance(cache, (tuple, list)):  # of a model's own kind
            return
        name = None if self.in_flight is None else self.in_flight.name
        filled_by = getattr(cache, "parscale_streams", name)
        if filled_by != name and not is_empty(cache):
            raise ValueError(
                f"This cache was filled with streams {filled_by!r}, but {name!r} are active (None: the plain "
                "backbone). Start with a new cache after switching."
            )
        cache.parscale_streams = name

    # -- checkpointing

    def _recompute_with_own_set(self, module: nn.Module) -> None:
        """Makes layers that are recomputed in the backward pass use the set that their forward pass used."""
        checkpointing = False
        layer: Any
        for layer in module.modules():
            function = layer.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _Checkpoint):
                layer._gradient_checkpointing_func = _Checkpoint(function, self)
            checkpointing |= function is not None
        tensors = self.tensors(self.in_flight) if checkpointing and self.in_flight is not None else {}
        self.in_flight_trains = [(parameter, parameter.requires_grad) for parameter in tensors.values()]

    def stop_checkpointing(self) -> None:
        """Gives the layers their own checkpointing function back."""
        for layer in (layer for part in self.parts for layer in part.modules()):
            function = layer.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, _Checkpoint):
                layer._gradient_checkpointing_func = function.function

    @contextlib.contextmanager
    def running(self, streams: StreamSet | None, trains: list[tuple[nn.Parameter, bool]]) -> Iterator[None]:
        """Attention layers called in this block use ``streams``, whose parameters train as ``trains`` says."""
        previous, self.in_flight = self.in_flight, streams
        changed = [parameter for parameter, trained in trains if parameter.requires_grad is not trained]
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)
        try:
            yield
        finally:
            self.in_flight = previous
            for parameter in changed:
                parameter.requires_grad_(not parameter.requires_grad)


class _Checkpoint:
    """A checkpointing function that carries the set of streams from the forward pass to the recomputation."""

    def __init__(self, function: Callable[..., Any], state: ParScaleState) -> None:
        self.function = function
        self.state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        trains = self.state.in_flight_trains
        if any(flag for _, flag in trains) and not any(getattr(x, "requires_grad", False) for x in args):
            # with nothing to differentiate in its inputs, a reentrant checkpoint would lose the prefix's gradient
            args = tuple(x.detach().requires_grad_() if _is_differentiable(x) else x for x in args)
        run = functools.partial(self._run, self.state.in_flight, trains, function)
        return self.function(run, *args, **kwargs)

    def _run(
        self,
        streams: StreamSet | None,
        trains: list[tuple[nn.Parameter, bool]],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        with self.state.running(streams, trains):
            return function(*args, **kwargs)


def _is_differentiable(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _router_logits_by_stream(layers: tuple[torch.Tensor, ...], P: int) -> tuple[torch.Tensor, ...]:
    """Each layer's ``(P*B*S, E)`` as P pieces ``(B*S, E)``.

    The load-balancing loss is taken with the caller's mask, which has B rows. It sums over layers and tokens alike, so
    that it takes the pieces for as many layers, and counts the real tokens of all streams.
    """
    return tuple(piece for logits in layers for piece in logits.unflatten(0, (P, -1)).unbind(0))


def _copy_rows(name: str, value: Any, B: int, P: int) -> Any:
    if isinstance(value, dict):  # masks by layer type
        return {key: _copy_rows(name, item, B, P) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    dim = 1 if name == "position_ids" and value.ndim == 3 else 0  # multimodal positions are (3, B, S)
    if value.shape[dim] != B:  # one row for all
        return value
    return torch.cat([value] * P, dim=dim)
