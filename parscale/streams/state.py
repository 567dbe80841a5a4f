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
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from parscale.attention.caches import fit_rows
from parscale.attention.masks import extend_block_mask, extend_dense_mask
from parscale.attention.registered import AttentionLayer
from parscale.compat.arguments import CACHES, NOISE
from parscale.compat.torch import replicate, watch_replicas
from parscale.config import DEFAULT_SET, ParScaleConfig
from parscale.distributed.parallel import gather_heads
from parscale.hooks.encoded import mark_output
from parscale.hooks.recomputation import recompute_with_own_streams
from parscale.hooks.rows import check_plain, copy_rows, first_input
from parscale.kernels.dispatch import Impl
from parscale.streams.aggregator import Aggregator
from parscale.streams.backbones import Hidden, find_parts, masking_noise
from parscale.streams.calls import Block, Blocks, Call, Calls, innermost_block, opened
from parscale.streams.naming import COPY
from parscale.streams.trainability import use_outside_of_blocks
from parscale.transforms import make_transform
from parscale.transforms.lora import Linear
from parscale.transforms.prompt import is_empty

if TYPE_CHECKING:
    from parscale.integrations.peft.copies import AdapterStreams


DEFAULT = DEFAULT_SET
REPLICA = "parscale_replica"  # on nn.DataParallel's copy of a backbone or an encoder: its original, and the set


class StreamSet:
    """One named set of streams. Its tensors are parameters of the backbone's modules, under names of its own.

    Args:
        state: of the model.
        name: ``"default"`` keeps the released names; another set adds ``@name`` to each.
        config: its numbers.
        copy: number of a copy of the set that belongs to an adapter; 0 is the set itself.
    """

    def __init__(self, state: ParScaleState, name: str, config: ParScaleConfig, copy: int = 0) -> None:
        self.name = name
        self.config = config
        self.copy = copy
        self.key_name, self.value_name = self.own_name("prefix_k"), self.own_name("prefix_v")
        self.aggregator_name = self.own_name("aggregate_layer")
        self.transform = make_transform(state, self)

    def own_name(self, released: str) -> str:
        """What the set calls a parameter, or the aggregator, in the module that holds it."""
        name = released if self.name == DEFAULT else f"{released}@{self.name}"
        return f"{name}{COPY}{self.copy}" if self.copy else name

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
        parts = find_parts(model)
        self.backbone, self.encoder = parts.backbone, parts.encoder
        self.mixed = [parts.backbone, *parts.towers]
        names = {module: name for name, module in model.named_modules()}
        self.backbone_name = names[self.backbone]
        self.roots = [f"{names[part]}." if names[part] else "" for part in self.mixed]
        self.kernels = kernels
        self.layers: list[AttentionLayer] = []
        self.without_layers = ""  # why there are none
        self.linears: list[Linear] = []  # found when a set asks for them
        self.sets: dict[str, StreamSet] = {}
        self.default: StreamSet | None = None  # the set that is active where no block chose one; None: the backbone
        self.adapters: AdapterStreams | None = None  # while PEFT has adapters on the model
        self.blocks = Blocks()
        self.calls = Calls()
        self.hidden: list[Hidden] = []  # states of each part that is mixed
        self.measured: list[tuple[torch.dtype, torch.device]] = []  # the weights when these were looked up
        self.positional = {part: list(inspect.signature(part.forward).parameters) for part in self.parts}
        for part in self.parts:
            watch_replicas(part, functools.partial(self._replicate, part))
        self.hooks = [model.register_forward_hook(self._join_router_logits)]
        for part in self.mixed:
            self.hooks.append(part.register_forward_pre_hook(self._copy_to_streams, with_kwargs=True))
            self.hooks.append(part.register_forward_hook(self._mix_streams))
            pooler = getattr(part, "pooler", None)
            if isinstance(pooler, nn.Module):
                self.hooks.append(pooler.register_forward_pre_hook(self._mix_before_pooling))
        if self.encoder is not None:
            self.hooks.append(self.encoder.register_forward_pre_hook(self._copy_to_streams, with_kwargs=True))
            self.hooks.append(self.encoder.register_forward_hook(self._mark_encoded))
        ALIVE.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the set that is active here."""
        return self.__dict__ | {"default": self.active}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """A copy of a model is one too."""
        self.__dict__.update(attributes)
        ALIVE.add(self)

    @property
    def parts(self) -> list[Any]:
        """The encoder before the backbone, if there is one, the backbone, and the towers beside it."""
        return self.mixed if self.encoder is None else [self.encoder, *self.mixed]

    # -- tensors

    def in_use(self, streams: StreamSet) -> StreamSet:
        """The set, or the copy of it that runs with PEFT's adapters as they are."""
        return streams if self.adapters is None else self.adapters.in_use(streams)

    def of_active_adapter(self, streams: StreamSet) -> StreamSet:
        """The set, or the copy of it that the active one of PEFT's adapters has."""
        return streams if self.adapters is None else self.adapters.of_active(streams)

    def tensors(self, streams: StreamSet) -> dict[str, nn.Parameter]:
        """The set's parameters by their released names in the model, whatever the set is called."""
        return {name: getattr(module, own) for name, (module, own) in self.holders(streams).items()}

    def holders(self, streams: StreamSet) -> dict[str, tuple[nn.Module, str]]:
        """For each of the set's parameters, by its released name, the module that has it, and its name in that."""
        streams = self.of_active_adapter(streams)
        if streams.num_streams == 1:
            return {}
        places = streams.transform.places()
        holders = {place.released_name: (place.module, streams.own_name(place.name)) for place in places}
        for root, part in zip(self.roots, self.mixed, strict=True):
            aggregator = getattr(part, streams.aggregator_name)
            for name in tensors_of(aggregator):
                path, _, leaf = name.rpartition(".")
                holders[f"{root}aggregate_layer.{name}"] = (aggregator.get_submodule(path), leaf)
        return holders

    def names(self, streams: StreamSet) -> dict[str, str]:
        """The set's names in the model's ``state_dict`` by the released ones."""
        streams = self.of_active_adapter(streams)
        if streams.num_streams == 1:
            return {}
        names = {}
        for place in streams.transform.places():
            path = f"{place.path}." if place.path else ""
            names[place.released_name] = f"{path}{streams.own_name(place.name)}"
        for root in self.roots:
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

    def aggregators(self, streams: StreamSet) -> list[Aggregator]:
        """The aggregators that run with the set, one for each part that is mixed."""
        name = self.in_use(streams).aggregator_name
        return [getattr(part, name) for part in self.mixed]

    def aggregator(self, streams: StreamSet) -> Aggregator:
        """The one of the backbone."""
        return self.aggregators(streams)[0]

    def trainability(self) -> dict[nn.Parameter, bool]:
        """Whether each parameter of each set trains."""
        return {p: p.requires_grad for streams in self.sets.values() for p in self.tensors(streams).values()}

    def record(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        """Shows the recorder an attention layer's keys and values, those of all devices."""
        recorder = self.call.recorder
        assert recorder is not None
        mesh = next((layer.mesh for layer in self.layers if layer.module is module), None)
        if mesh is not None:
            key, value = gather_heads(key, mesh), gather_heads(value, mesh)
        recorder(module, key, value)

    # -- copies on other devices

    def _replicate(self, part: Any) -> Any:
        """A copy for ``nn.DataParallel``, whose threads do not know of a block around their caller."""
        replica = replicate(part)
        replica.__dict__[REPLICA] = (part, self.active)
        return replica

    def running_copy(self, module: Any) -> Any:
        """Of a module of the backbone, the one in the replica that this thread runs; itself where there is none."""
        part, running = self.call.part, self.call.running
        if running is part:
            return module
        name = next(name for name, other in part.named_modules() if other is module)
        return running.get_submodule(name)

    # -- which set runs

    @property
    def active(self) -> StreamSet | None:
        """The set that a call runs with from here: the innermost block's, else the model's; None: the backbone."""
        block = innermost_block(self)
        return self.default if block is None else block.chosen

    @property
    def call(self) -> Call:
        """The forward pass under way in this thread."""
        return self.calls.call

    @property
    def in_flight(self) -> StreamSet | None:
        """The set that the pass under way (or recomputed under checkpointing) runs with. None: the backbone."""
        streams: StreamSet | None = self.call.in_flight
        return streams

    @contextlib.contextmanager
    def choosing(self, streams: StreamSet | None) -> Iterator[None]:
        """Calls in this block run with ``streams``. Which parameters train stays as it is."""
        with opened(Block(self, streams)):
            yield

    @contextlib.contextmanager
    def recording(self, recorder: Callable[[nn.Module, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
        """Calls in this block show ``recorder`` the keys and values of each attention layer."""
        with self._set_for_calls("recorder", recorder):
            yield

    @contextlib.contextmanager
    def unmixed(self) -> Iterator[None]:
        """Calls in this block give the final hidden states of all streams, ``(P*B, S, H)``."""
        with self._set_for_calls("aggregating", False):
            yield

    @contextlib.contextmanager
    def _set_for_calls(self, name: str, value: Any) -> Iterator[None]:
        call = self.call
        before = getattr(call, name)
        setattr(call, name, value)
        try:
            yield
        finally:
            setattr(call, name, before)

    # -- the way of the data

    def _copy_to_streams(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the backbone, or its encoder: every row P times, stream-major (row ``p*B + b``)."""
        call, (part, streams) = self.call, module.__dict__.get(REPLICA) or (module, self.active)
        call.masks.clear()
        call.pooled = None
        if streams is not None:
            streams = self.in_use(streams) if streams.num_streams > 1 else None
        call.in_flight = streams
        if part is not self.encoder:
            call.part, call.running = part, module
        if torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                use_outside_of_blocks(self)
            if module.training:
                recompute_with_own_streams(self, module)
        arguments = dict(zip(self.positional[part][: len(args)], args, strict=True)) | kwargs
        for name in CACHES:
            self._check_cache(arguments.get(name))
        if streams is None:
            check_plain(module, arguments)
            return None
        rows = first_input(module, arguments)
        if rows is None:  # the backbone says what it misses
            return None
        if isinstance(arguments.get("state"), list) and rows.shape[1] == 1:
            raise ValueError(
                f"transformers' {type(module).__name__} goes on from its state with one row only, and "
                f"{streams.num_streams} streams are as many rows: use_cache=False."
            )
        fit_rows(arguments.get("past_key_values"), rows.shape[0], streams.num_streams)
        if NOISE in self.positional[part] and arguments.get(NOISE) is None:
            arguments[NOISE] = masking_noise(module, rows)
        arguments = copy_rows(module, arguments, streams.name, streams.num_streams, rows.shape[0])
        return (), streams.transform.before(part, arguments)

    def _mark_encoded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the encoder: its output says which streams made its P*B rows."""
        streams = self.in_flight
        return output if streams is None else mark_output(output, streams.name, streams.num_streams)

    def _mix_before_pooling(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a pooler inside the backbone: it gets ``(B, S, H)``, or the mixed states of one token, ``(B, H)``."""
        call, states = self.call, args[0]
        streams: StreamSet | None = call.in_flight
        if streams is None or not call.aggregating:
            return None
        size = self.hidden[self.mixed.index(call.part)].size
        if states.ndim == 3 and states.shape[1] == size != states.shape[2]:  # (P*B, H, S), of Swin
            mixed = self._mixture(streams, streams.transform.before_pooling(states.mT)).mT
        else:
            mixed = self._mixture(streams, streams.transform.before_pooling(states))
            call.pooled = (states, mixed)
        return (mixed, *args[1:])

    def _mix_streams(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the backbone: ``(P*B, S, H)`` to ``(B, S, H)``, in ``hidden_states[-1]`` and what heads take too."""
        call = self.call
        call.masks.clear()
        streams: StreamSet | None = call.in_flight
        if streams is None:
            return output
        unpooled, output = output[0], streams.transform.after(output)
        if getattr(output, "router_logits", None):
            output.router_logits = _router_logits_by_stream(output.router_logits, streams.num_streams)
        if not call.aggregating:
            return output
        last = output[0]
        if call.pooled is not None and call.pooled[0] is unpooled:
            mixed = call.pooled[1]
        else:
            mixed = self._mixture(streams, last)
        call.pooled = None

        def with_mixed(states: Any) -> Any:
            """The layers' hidden states with the last of them mixed, unless the caller did not choose it."""
            if isinstance(states, tuple) and states and getattr(states[-1], "shape", None) == last.shape:
                return (*states[:-1], mixed)
            shape: tuple[int, ...] = getattr(states, "shape", ())
            if NOISE in self.positional[call.part] and len(shape) == 2:  # of patches, the same for all streams
                return states[: shape[0] // streams.num_streams]
            if shape == (last.shape[0], last.shape[2]):  # those of one token, as they are
                return self._mixture(streams, streams.transform.before_pooling(states))
            if len(shape) == 3 and shape[::2] == (last.shape[0], last.shape[2]):  # those that foresee (ProphetNet)
                return self._mixture(streams, states)
            return states

        if isinstance(output, tuple):
            return (mixed, *map(with_mixed, output[1:]))
        output.last_hidden_state = mixed
        for name in ("hidden_states", "pooler_output", "last_hidden_state_ngram", "mask", "ids_restore"):
            if getattr(output, name, None) is not None:
                output[name] = with_mixed(output[name])
        return output

    def _mixture(self, streams: StreamSet, hidden: torch.Tensor) -> torch.Tensor:
        """``(P*B, S, H)`` to ``(B, S, H)``, or ``(P*B, H)`` to ``(B, H)``."""
        aggregator = getattr(self.call.running, streams.aggregator_name)
        if hidden.ndim == 2:
            return aggregator(hidden[:, None], impl=self.kernels)[:, 0]
        return aggregator(hidden, impl=self.kernels)

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
        masks = self.call.masks
        entry = masks.get(id(mask))
        if entry is None:
            if isinstance(mask, BlockMask):
                extended: Any = extend_block_mask(mask, prefix_length, num_rows)
            else:
                extended = extend_dense_mask(mask, prefix_length)
            entry = masks[id(mask)] = (mask, extended)  # holds the mask, so that its id stays its own
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


ALIVE: weakref.WeakSet[ParScaleState] = weakref.WeakSet()  # of all models, wrapped or copied


def tensors_of(module: nn.Module, *, recurse: bool = True) -> dict[str, Any]:
    """A module's parameters by name; its buffers too, which an adapter's copy that never trains has in their place."""
    return dict(module.named_parameters(recurse=recurse)) | dict(module.named_buffers(recurse=recurse))


def _router_logits_by_stream(layers: tuple[torch.Tensor, ...], P: int) -> tuple[torch.Tensor, ...]:
    """Each layer's ``(P*B*S, E)`` as P pieces ``(B*S, E)``.

    The load-balancing loss is taken with the caller's mask, which has B rows. It sums over layers and tokens alike, so
    that it takes the pieces for as many layers, and counts the real tokens of all streams.
    """
    return tuple(piece for logits in layers for piece in logits.unflatten(0, (P, -1)).unbind(0))
