"""transformers: attention, configurations, auto classes, loading, generation and training.

Documented and used directly: `AttentionInterface`, `AttentionMaskInterface`, `CONFIG_MAPPING`, the `Auto...`
classes, `get_decoder`, `register_for_auto_class`, `output_loading_info` and so on.
"""

from __future__ import annotations

import ast
import contextlib
import copyreg
import functools
import inspect
import logging
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from parscale.compat.names import missing, needed, needed_module

# -- attention


def attention_functions() -> AttentionInterface:
    """The attention functions of all models, by the names of implementations; `"eager"` is none of them.

    Every instance of the documented class is a view of the one table.
    """
    return _ATTENTION


def mask_functions() -> AttentionMaskInterface:
    """The functions that make the masks for `attention_functions`, by the same names."""
    return _MASKS


_ATTENTION, _MASKS = AttentionInterface(), AttentionMaskInterface()


def is_flash(implementation: str) -> bool:
    """Whether an implementation is flash-attention or keeps its contract: a mask of padding or none.

    The names do not say so, since a kernel from the Hub goes by its repository. The function that makes its mask is
    flash-attention's own.
    """
    return implementation in _MASKS and _MASKS[implementation] is _MASKS["flash_attention_2"]


def attn_implementation(config: Any) -> str:
    """The name of the implementation that a configuration asks for; `"eager"` where it names none.

    transformers documents how it is set (`attn_implementation=`, `set_attn_implementation`), not how it is read.
    """
    name: str | None = config._attn_implementation
    return name or "eager"


def use_eager(config: Any) -> None:
    """Makes models of a configuration attend by plain torch, the one implementation that needs nothing installed.

    `set_attn_implementation` is of models, and there is none yet.
    """
    config._attn_implementation = "eager"


class ConfigView:
    """A live view of a configuration that answers with another implementation of attention.

    A layer reads `config._attn_implementation` at each call and looks the name up; nothing documented stands between
    the two. Other attributes are the configuration's own, to be read and set.

    Args:
        config: the configuration.
        **own: attributes of the view itself.
    """

    def __init__(self, config: Any, **own: Any) -> None:
        vars(self).update(own, backbone=config)

    def implementation(self) -> str:
        """What the layer is told."""
        raise NotImplementedError

    @property
    def _attn_implementation(self) -> str:
        return self.implementation()

    def __getattr__(self, name: str) -> Any:
        if name == "backbone":  # before the state of an unpickled object is set
            raise AttributeError(name)
        return getattr(self.backbone, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.backbone, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self),), dict(vars(self))  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def looks_up_attention(cls: type) -> bool:
    """Whether a layer of this class takes its attention function from the table of all models.

    Its file then has that table under this name, as every file of transformers' own and of its templates has.
    """
    return any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in _modules_of(cls))


def eager_attention(cls: type) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None:
    """The function of a layer's own file that runs under `"eager"`, which is in no table; `None`: there is none."""
    return _function_of(cls, "eager_attention_forward")


def alibi_function(cls: type) -> Callable[..., torch.Tensor]:
    """The function by which a layer's own file makes biases of distances (BLOOM, Falcon).

    Raises:
        IncompatibleVersionError: there is none.
    """
    function = _function_of(cls, "build_alibi_tensor")
    if function is None:
        raise missing(sys.modules[cls.__module__], "build_alibi_tensor")
    return function


def _modules_of(cls: type) -> list[ModuleType]:
    """The files of a class and of those that it inherits from."""
    found = (sys.modules.get(base.__module__) for base in cls.__mro__)
    return [module for module in found if module is not None]


def _function_of(cls: type, name: str) -> Any:
    return next((vars(module)[name] for module in _modules_of(cls) if name in vars(module)), None)


@functools.cache
def compares_implementation(cls: type) -> bool:
    """Whether a layer of this class does something else under `"sdpa"` than under a name that it does not know.

    Such a layer (DeepSeek-V3.2, GLM-MoE-DSA, MiniMax-M3) makes a mask of its own `if
    self.config._attn_implementation in ("eager", "sdpa")`. Nothing but its source says so. The source is parsed and
    not searched, so that a comment or a string means nothing. Comparisons with `"eager"` alone are left out: a name
    that is not known is not eager, and neither is `"sdpa"`.
    """
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # typed into an interpreter
            continue
        if any(map(_names_sdpa, ast.walk(tree))):
            return True
    return False


def _names_sdpa(node: ast.AST) -> bool:
    """Whether a piece of source compares the name of an implementation with `"sdpa"`."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [inner for side in (node.left, *node.comparators) for inner in ast.walk(side)]
    reads = any(isinstance(inner, ast.Attribute) and inner.attr == "_attn_implementation" for inner in sides)
    return reads and any(isinstance(inner, ast.Constant) and inner.value == "sdpa" for inner in sides)


def flash_dtype(query: torch.Tensor, layer: nn.Module) -> torch.dtype:
    """The dtype in which flash-attention computes: a shorter one where float32 meets half-precision weights.

    A layer that runs by another function in its place computes in the same, by the same rule.
    """
    module = needed_module("transformers.integrations.flash_attention")
    return needed(module, "get_target_dtype")(query, layer) or query.dtype


# -- parts of a model


@contextlib.contextmanager
def experts_without_data_dependence(config: Any) -> Iterator[None]:
    """In this block a mixture of experts runs in the form whose shapes do not depend on the routing.

    On the meta device nothing is routed. It is documented as an argument when a model is made; this one is made.
    """
    previous = getattr(config, "_experts_implementation", None)
    if previous is None:  # no experts
        yield
        return
    config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = previous


_CHECKPOINT = "_gradient_checkpointing_func"


def checkpointing_function(layer: nn.Module) -> Callable[..., Any] | None:
    """The function by which a layer is computed again in the backward pass; `None`: it is not.

    transformers puts it into each layer when checkpointing is switched on, and offers nothing around its call.
    """
    return vars(layer).get(_CHECKPOINT)


def set_checkpointing_function(layer: nn.Module, function: Callable[..., Any]) -> None:
    """Puts another function in its place."""
    setattr(layer, _CHECKPOINT, function)


def show_on_models(name: str, descriptor: Any) -> None:
    """Gives all models an attribute that is computed when it is asked for.

    Python asks a class for what computes a value, and not the object. A wrapped model keeps its class, so the attribute
    is of the class of all models. It stays for the rest of the process: a model that is not wrapped answers as if it
    had none.
    """
    if name not in vars(PreTrainedModel):
        setattr(PreTrainedModel, name, descriptor)


# -- auto classes


def model_mapping(auto: Any) -> Mapping[Any, Any] | None:
    """What an `AutoModel...` makes of which configuration class; `None` for any other class.

    `register` is documented, and nothing that says what is registered.
    """
    mapping = getattr(auto, "_model_mapping", None)
    return mapping if isinstance(mapping, Mapping) else None


def class_names(auto: Any) -> list[str]:
    """The names of all classes that an `AutoModel...` of transformers makes, without importing them."""
    found = needed(needed(auto, "_model_mapping"), "_model_mapping").values()
    return [name for names in found for name in ([names] if isinstance(names, str) else names)]


def auto_classes() -> dict[str, Any]:
    """transformers' `AutoModel...` classes by name."""
    modeling_auto = needed_module("transformers.models.auto.modeling_auto")
    found = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    return {name: auto for name, auto in found.items() if model_mapping(auto) is not None}


def without_own_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` without the one by which an `Auto...` class marks its own call."""
    return {name: value for name, value in options.items() if name != "_from_auto"}


def share_conversion(model_type: str, name: str) -> None:
    """Reads weights of `name` by the rules of `model_type`, if it has any.

    The experts of a mixture are stored one by one, and put together by rules that are found by the type. The functions
    that register rules are public in their module, and no page documents them.
    """
    module = needed_module("transformers.conversion_mapping")
    rules = needed(module, "get_checkpoint_conversion_mapping")(model_type)
    if rules is not None:
        needed(module, "register_checkpoint_conversion_mapping")(name, rules, overwrite=True)


def show_class(name: str, cls: type) -> None:
    """Makes `getattr(transformers, name)` find a class, unless it finds one already.

    `transformers serve` looks a checkpoint's class up there, by its `architectures`, and asks neither its
    `auto_map` nor the `Auto...` classes (5.23). Two objects can be the package: `transformers.processing_utils`
    makes it anew when it is imported, and modules that were imported before keep the first. The server's module is
    named, the others are those of `sys.modules` and of this module.
    """
    server = sys.modules.get("transformers.cli.serving.model_manager")
    packages = (transformers, sys.modules.get("transformers"), getattr(server, "transformers", None))
    for package in packages:
        if isinstance(package, ModuleType) and not hasattr(package, name):
            setattr(package, name, cls)


# -- loading


def stored_name(model: PreTrainedModel, name: str) -> str:
    """What a tensor of a model is called in a file: some classes save their modules under other names."""
    revert = needed(needed_module("transformers.core_model_loading"), "revert_weight_conversion")
    return next(iter(revert(model, {name: torch.empty(0)})))


@contextlib.contextmanager
def loading_reports(shown: Callable[[str], str | None]) -> Iterator[None]:
    """In this block `from_pretrained` says what `shown` makes of its tables of tensors that do not fit.

    transformers logs the table before it raises, and has no argument for it. `output_loading_info` gives the same in
    lists, but only once nothing was raised. Other threads' tables are left alone.

    Args:
        shown: takes a table, and gives what to log in its place; `None`: nothing.
    """
    thread = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if threading.get_ident() != thread or "LOAD REPORT" not in message:
            return True
        text = shown(message)
        record.msg, record.args = text, ()
        return text is not None

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def tensor_parallel(size: int, plan: dict[str, str] | None) -> Any:
    """The `distributed_config` that splits each layer over `size` processes, by a plan or by transformers' own."""
    return needed(needed_module("transformers.distributed"), "DistributedConfig")(tp_size=size, tp_plan=plan)


# -- caches


def carries_state(layer: Any) -> bool:
    """Whether a layer of a cache holds a state that each token changes (Mamba and its like), alone or beside keys.

    The classes of such layers are documented one by one; what they have in common is not.
    """
    module = needed_module("transformers.cache_utils")
    return isinstance(layer, needed(module, "LinearAttentionCacheLayerMixin"))


def answer_by(cache: Cache, answers: Mapping[str, Callable[..., Any]]) -> None:
    """Lets a cache answer by other functions than the methods of its class.

    A cache that was filled behind a prompt holds the prompt too. `generate`, models around the backbone and users ask
    it how many tokens it has read, to know which ids are new and where they stand, and they mean those of the text.
    They ask the very object that they hold: a view of it, which a backbone could be handed, would not reach them, and
    another class of it would no longer be the one that `isinstance` looks for. So the object itself answers
    otherwise, while no backbone runs; `answer_itself` undoes it.
    """
    for name, answer in answers.items():
        needed(type(cache), name)
        setattr(cache, name, answer)


def answer_itself(cache: Cache, names: Iterable[str]) -> None:
    """Undoes `answer_by`."""
    for name in names:
        vars(cache).pop(name, None)


# -- generation: a model's own methods that generate calls if they are there

REORDER_CACHE = "_reorder_cache"  # moves a cache's rows with the beams; without it the cache moves them itself
STATIC_CACHE_SHAPE = "_get_static_cache_init_shape"  # of a static cache before it is filled; None: by the first keys


def own_reorder_cache(cls: type) -> Callable[..., Any] | None:
    """The function of a model's class that moves a cache's rows with the beams; few have one."""
    return getattr(cls, REORDER_CACHE, None)


# -- adapters and training

_HAS_ADAPTER = "_hf_peft_config_loaded"


def has_adapter(model: Any) -> bool:
    """Whether an adapter was put on a model by its own `add_adapter`.

    `active_adapters` raises where there is none, or where PEFT is not installed.
    """
    return bool(getattr(model, _HAS_ADAPTER, False))


@contextlib.contextmanager
def counted_as_adapted(model: Any) -> Iterator[None]:
    """In this block a model counts as one with an adapter.

    The Trainer refuses a quantized model unless an adapter trains on it, by this mark alone (5.23). Streams train on
    it in the same way, and there is no other way to say so.
    """
    before = has_adapter(model)
    setattr(model, _HAS_ADAPTER, True)
    try:
        yield
    finally:
        setattr(model, _HAS_ADAPTER, before)


# Methods of the Trainer that a subclass overrides: which sampler, where a checkpoint goes, how it is written and read.
TRAINER_METHODS = ("_get_train_sampler", "_get_output_dir", "_save_checkpoint", "_save", "_load_from_checkpoint")


def require_trainer_methods(cls: type) -> None:
    """Refuses a Trainer without the methods that a subclass overrides.

    They have no documented counterparts. Under another name the subclass's own would never be called, and no error
    would say so.

    Raises:
        IncompatibleVersionError: one is missing.
    """
    for name in TRAINER_METHODS:
        needed(cls, name)


def forget_deepspeed() -> None:
    """Ends the time in which models that are loaded are shared among all processes, as ZeRO-3 has it."""
    needed(needed_module("transformers.integrations.deepspeed"), "unset_hf_deepspeed_config")()
