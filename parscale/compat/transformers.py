"""transformers: attention, configurations, auto classes, loading, generation and training.

Documented and used directly: `AttentionInterface`, `AttentionMaskInterface`, `CONFIG_MAPPING`, the `Auto...`
classes, `get_decoder`, `register_for_auto_class`, `output_loading_info` and so on.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
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
from packaging.version import Version
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel

from parscale.compat.names import missing, needed, needed_module
from parscale.compat.patching import extend, extend_everywhere, replaced

# -- attention

# The attention functions of all models and the functions that make their masks, by implementation name, without
# "eager". Every instance of the documented classes is a view of the same table.
ATTENTION_FUNCTIONS, MASK_FUNCTIONS = AttentionInterface(), AttentionMaskInterface()


def is_flash(implementation: str) -> bool:
    """Whether an implementation is flash-attention or has its interface: a padding mask or none.

    The name does not tell, since a kernel from the Hub is called by its repository. The function that makes its mask is
    that of flash-attention.
    """
    return implementation in MASK_FUNCTIONS and MASK_FUNCTIONS[implementation] is MASK_FUNCTIONS["flash_attention_2"]


def attn_implementation(config: Any) -> str:
    """The name of a configuration's attention implementation; `"eager"` if it names none.

    transformers documents how to set it (`attn_implementation=`, `set_attn_implementation`), but not how to read it.
    """
    name: str | None = getattr(config, "_attn_implementation", "")
    return "eager" if name is None else name or needed(config, "_attn_implementation") or "eager"


def use_eager(config: PreTrainedConfig) -> None:
    """Makes models of a configuration use attention in plain torch, the one implementation without extra packages.

    `set_attn_implementation` needs a model, and there is none yet.
    """
    config._attn_implementation = "eager"


class ConfigView:
    """A live view of a configuration with another attention implementation.

    A layer reads `config._attn_implementation` at each call and looks up the name; there is no documented hook between
    the two. All other attributes are read from and written to the configuration.

    Args:
        config: the configuration.
        **own: attributes of the view itself.
    """

    def __init__(self, config: PreTrainedConfig, **own: Any) -> None:
        vars(self).update(own, original=config)

    def implementation(self) -> str:
        """The name that the layer sees."""
        raise NotImplementedError

    @property
    def _attn_implementation(self) -> str:
        return self.implementation()

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # during unpickling, before the attributes are set
            raise AttributeError(name)
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.original, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self),), dict(vars(self))  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def looks_up_attention(cls: type) -> bool:
    """Whether layers of this class look up their attention function in the table of all models.

    The file of such a layer imports the table under this name, as all files and templates of transformers do.
    """
    return any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in _modules_of(cls))


def eager_attention(cls: type) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None:
    """The function in a layer's own file that runs as `"eager"`, which is in no table; `None` if there is none."""
    return _function_of(cls, "eager_attention_forward")


def alibi_function(cls: type) -> Callable[..., torch.Tensor]:
    """The function in a layer's own file that makes distance biases (BLOOM, Falcon).

    Raises:
        IncompatibleVersionError: there is none.
    """
    function = _function_of(cls, "build_alibi_tensor")
    if function is None:
        raise missing(sys.modules[cls.__module__], "build_alibi_tensor")
    return function


def _modules_of(cls: type) -> list[ModuleType]:
    """The modules that define a class and its base classes."""
    found = (sys.modules.get(base.__module__) for base in cls.__mro__)
    return [module for module in found if module is not None]


def _function_of(cls: type, name: str) -> Any:
    return next((vars(module)[name] for module in _modules_of(cls) if name in vars(module)), None)


@functools.cache
def compares_implementation(cls: type) -> bool:
    """Whether a layer of this class behaves differently under `"sdpa"` than under a name that it does not know.

    Such a layer (DeepSeek-V3.2, GLM-MoE-DSA, MiniMax-M3) makes its own mask
    `if self.config._attn_implementation in ("eager", "sdpa")`. Only its source shows this. The source is parsed, not
    searched, so comments and strings do not count. Comparisons with `"eager"` alone are ignored: an unknown name is not
    eager, and neither is `"sdpa"`.
    """
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # defined in an interactive session
            continue
        if any(map(_names_sdpa, ast.walk(tree))):
            return True
    return False


def _names_sdpa(node: ast.AST) -> bool:
    """Whether a node of the source compares the name of an implementation with `"sdpa"`."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [inner for side in (node.left, *node.comparators) for inner in ast.walk(side)]
    reads = any(isinstance(inner, ast.Attribute) and inner.attr == "_attn_implementation" for inner in sides)
    return reads and any(isinstance(inner, ast.Constant) and inner.value == "sdpa" for inner in sides)


def flash_dtype(query: torch.Tensor, layer: nn.Module) -> torch.dtype:
    """The dtype in which flash-attention computes: half precision where float32 queries meet half-precision weights.

    A function that replaces flash-attention for a layer computes in the same dtype.
    """
    module = needed_module("transformers.integrations.flash_attention")
    return needed(module, "get_target_dtype")(query, layer) or query.dtype


# -- parts of a model


def experts_without_data_dependence(config: PreTrainedConfig) -> contextlib.AbstractContextManager[None]:
    """In this block a mixture of experts runs in the form whose shapes do not depend on the routing.

    Nothing is routed on the meta device. The documented way is an argument at the making of a model; this one exists.
    """
    if getattr(config, "_experts_implementation", None) is None:  # no experts
        return contextlib.nullcontext()
    return replaced(config, "_experts_implementation", "batched_mm")


def checkpointing_function(layer: nn.Module) -> Callable[..., Any] | None:
    """The function that recomputes a layer in the backward pass; `None` without gradient checkpointing.

    transformers stores it in each layer, FSDP's `activation_checkpointing` in a module around each; neither has a hook.
    """
    return vars(layer).get(_name_in(layer))


def set_checkpointing_function(layer: nn.Module, function: Callable[..., Any]) -> None:
    """Replaces that function."""
    setattr(layer, _name_in(layer), function)


def _name_in(layer: nn.Module) -> str:
    return "checkpoint_fn" if type(layer).__name__ == "CheckpointWrapper" else "_gradient_checkpointing_func"


def show_on_models(name: str, descriptor: object) -> None:
    """Adds a computed attribute to all models.

    Python looks up a computed attribute on the class, not on the object. A wrapped model keeps its class, so the
    attribute is added to the base class of all models. It stays for the rest of the process: on a model that is not
    wrapped it behaves as if it did not exist.
    """
    if name not in vars(PreTrainedModel):
        setattr(PreTrainedModel, name, descriptor)


# -- auto classes


def model_mapping(auto: object) -> Mapping[Any, Any] | None:
    """The model classes of an `AutoModel...` by configuration class; `None` for other classes.

    `register` is documented, but nothing that reads the registered classes.
    """
    mapping = getattr(auto, "_model_mapping", None)
    return mapping if isinstance(mapping, Mapping) else None


def class_names(auto: object) -> list[str]:
    """The names of all classes that an `AutoModel...` of transformers can make, without importing them."""
    found = needed(needed(auto, "_model_mapping"), "_model_mapping").values()
    return [name for names in found for name in ([names] if isinstance(names, str) else names)]


def auto_classes() -> dict[str, Any]:
    """transformers' `AutoModel...` classes by name."""
    modeling_auto = needed_module("transformers.models.auto.modeling_auto")
    found = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    return {name: auto for name, auto in found.items() if model_mapping(auto) is not None}


def without_own_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` without the argument by which an `Auto...` class marks its own calls."""
    return {name: value for name, value in options.items() if name != "_from_auto"}


def show_class(name: str, cls: type) -> None:
    """Makes `getattr(transformers, name)` find a class, unless it already finds one.

    `transformers serve` looks up a checkpoint's class there, by its `architectures`, and uses neither its `auto_map`
    nor the `Auto...` classes (5.23). The package can exist as two objects: `transformers.processing_utils` makes it
    again on import, and modules imported earlier keep the first. The server's module is named here; the others are
    those of `sys.modules` and of this module.
    """
    server = sys.modules.get("transformers.cli.serving.model_manager")
    packages = (transformers, sys.modules.get("transformers"), getattr(server, "transformers", None))
    for package in packages:
        if isinstance(package, ModuleType) and not hasattr(package, name):
            setattr(package, name, cls)


# -- loading


@contextlib.contextmanager
def loading_reports(shown: Callable[[str], str | None]) -> Iterator[None]:
    """In this block `from_pretrained` logs the result of `shown` in place of its tables of tensors that do not fit.

    transformers logs the table before it raises, and has no argument for it. `output_loading_info` returns the same as
    lists, but only if no error was raised. The tables of other threads are not changed.

    Args:
        shown: takes a table and returns the text to log in its place; `None` logs nothing.
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


_NO_ADAPTER = ".no-adapter"  # a sub-folder that does not exist


def without_adapter() -> dict[str, str]:
    """The `adapter_kwargs` with which `from_pretrained` applies no adapter that lies beside a model.

    They name the sub-folder in which to look for one. Before 5.23 transformers looks in a folder itself, whatever
    sub-folder is named, so the function that looks is extended: it finds nothing in this sub-folder.
    """
    if Version(transformers.__version__) < Version("5.23"):
        extend_everywhere(needed_module("transformers.utils.peft_utils"), "find_adapter_config_file", _find_adapter)
    return {"subfolder": _NO_ADAPTER}


def _find_adapter(original: Callable[..., str | None], *args: Any, **kwargs: Any) -> str | None:
    return None if kwargs.get("subfolder") == _NO_ADAPTER else original(*args, **kwargs)


def tensor_parallel(size: int, plan: dict[str, str] | None) -> Any:
    """The `distributed_config` that splits each layer over `size` processes, by a given plan or transformers' own."""
    return needed(needed_module("transformers.distributed"), "DistributedConfig")(tp_size=size, tp_plan=plan)


# -- caches


def carries_state(layer: object) -> bool:
    """Whether a layer of a cache holds a recurrent state (such as Mamba's), alone or with keys.

    The classes of such layers are documented one by one, but not what they have in common.
    """
    module = needed_module("transformers.cache_utils")
    return isinstance(layer, needed(module, "LinearAttentionCacheLayerMixin"))


def answer_by(cache: Cache, answers: Mapping[str, Callable[..., Any]]) -> None:
    """Replaces methods of one cache object by other functions.

    A cache that was filled with a prompt before the text counts the prompt too. `generate`, modules around the backbone
    and users read the number of tokens from it, to know which ids are new and their positions, and they mean the tokens
    of the text. They hold this very object: a view of it for the backbone would not reach them, and another class would
    fail their `isinstance` checks. So the object itself answers differently while no backbone runs; `answer_itself`
    undoes it.
    """
    for name, answer in answers.items():
        needed(type(cache), name)
        setattr(cache, name, answer)


def answer_itself(cache: Cache, names: Iterable[str]) -> None:
    """Undoes `answer_by`."""
    for name in names:
        vars(cache).pop(name, None)


# -- generation: optional methods of a model that generate calls, and what it does with their results

REORDER_CACHE = "_reorder_cache"  # moves a cache's rows with the beams; without it the cache moves them itself
STATIC_CACHE_SHAPE = "_get_static_cache_init_shape"  # of a static cache before it is filled; None: from the first keys
TOKEN_TIMES = "_extract_token_timestamps"  # reads the times of tokens off the columns of cross-attention (Whisper)


@contextlib.contextmanager
def keeping_columns(count: int) -> Iterator[None]:
    """In this block, assisted decoding keeps the columns of attention weights that stand before those of the tokens.

    It splits the weights of several drafted tokens, and cuts those of each to as many columns as there are tokens so
    far. There is no hook in between.

    Args:
        count: columns before those of the tokens, those of a prefix.
    """
    extend(needed_module("transformers.generation.utils"), "_split_model_outputs", _split_behind_columns)
    before = _COLUMNS.set(count)
    try:
        yield
    finally:
        _COLUMNS.reset(before)


_COLUMNS: contextvars.ContextVar[int] = contextvars.ContextVar("parscale_columns", default=0)
_Steps = tuple[tuple[torch.Tensor, ...], ...]  # by token, then by layer


def _split_behind_columns(
    original: Callable[..., _Steps],
    outputs: _Steps,
    layers: tuple[torch.Tensor, ...],
    cur_len: int,
    added: int,
    is_decoder_attention: bool = False,
) -> _Steps:
    count = _COLUMNS.get()
    if not count or not is_decoder_attention:
        return original(outputs, layers, cur_len, added, is_decoder_attention)
    before = original(outputs, tuple(layer[..., :count] for layer in layers), cur_len, added)
    after = original(outputs, tuple(layer[..., count:] for layer in layers), cur_len, added, is_decoder_attention)
    steps = zip(before[len(outputs) :], after[len(outputs) :], strict=True)
    return outputs + tuple(tuple(torch.cat(both, -1) for both in zip(*step, strict=True)) for step in steps)


# -- adapters and training

_HAS_ADAPTER = "_hf_peft_config_loaded"


def has_adapter(model: object) -> bool:
    """Whether a model has an adapter from its own `add_adapter`.

    `active_adapters` raises an error if there is none, or if PEFT is not installed.
    """
    return bool(getattr(model, _HAS_ADAPTER, False))


def counted_as_adapted(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """In this block a model is marked as one with an adapter.

    The Trainer refuses a quantized model without a trainable adapter, and checks only this mark (5.23). Streams train
    on it in the same way, and there is no other way to tell the Trainer.
    """
    return replaced(model, _HAS_ADAPTER, True)


# Methods of the Trainer that a subclass overrides: the sampler, a checkpoint's folder, how it is saved and read.
TRAINER_METHODS = ("_get_train_sampler", "_get_output_dir", "_save_checkpoint", "_save", "_load_from_checkpoint")


def require_trainer_methods(cls: type) -> None:
    """Raises an error for a Trainer without the methods that a subclass overrides.

    They have no documented counterparts. If one had another name, the subclass's method would silently never be called.

    Raises:
        IncompatibleVersionError: one is missing.
    """
    for name in TRAINER_METHODS:
        needed(cls, name)


def reporting_callbacks(names: Iterable[str]) -> list[type]:
    """The Trainer's callbacks that report to trackers, which are named as in `TrainingArguments.report_to`.

    The Trainer looks them up by an undocumented function when a run has begun already.

    Raises:
        ValueError: there is no such tracker.
    """
    module = needed_module("transformers.integrations.integration_utils")
    return needed(module, "get_reporting_integration_callbacks")(list(names))


def forget_deepspeed() -> None:
    """Ends the mode in which loaded models are partitioned over all processes (ZeRO-3)."""
    needed(needed_module("transformers.integrations.deepspeed"), "unset_hf_deepspeed_config")()
