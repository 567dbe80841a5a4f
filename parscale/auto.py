"""Makes ``AutoConfig`` and ``AutoModel...`` read full checkpoints; importing this module is enough.

A full checkpoint of a Llama says ``model_type: llama_parscale``. Under that name, and the like for every model that
transformers knows, a recipe is registered; the configuration class that it stands for, a subclass of the backbone's, is
made when the first such checkpoint is read. The model that comes out is of the backbone's own class, and wrapped.

Which class that is, ``architectures`` says: ``BertForMaskedLM`` with streams is ``BertParScaleForMaskedLM``. All causal
language models end in ``ParScaleForCausalLM``, as the released ones do, and the class is transformers' choice.
"""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from parscale.compat.transformers import (
    auto_classes,
    class_names,
    model_mapping,
    share_conversion,
    show_class,
    without_own_arguments,
)
from parscale.format.folders import CAUSAL_LM, HUB_ARGUMENTS, INFIX, TYPE_SUFFIX
from parscale.format.pretrained import read_pretrained
from parscale.format.values import check_values, configuration_of

AUTO_CLASSES = auto_classes()


class Recipe:
    """Stands for the configuration class of one backbone's full checkpoints, which is made when it is needed.

    Subclasses are made by :func:`register_backbone`.
    """

    backbone_type = ""

    def __new__(cls, **kwargs: Any) -> Any:  # noqa: D102  for AutoConfig.for_model
        return config_class(cls.backbone_type)(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As ``PreTrainedConfig.from_dict``, of :func:`config_class`.

        In memory ``model_type`` is the backbone's, by which transformers finds tokenizers and much else; the class, and
        what it writes, has the checkpoint's.
        """
        check_values("a checkpoint", config_dict, None)
        names = config_dict.get("architectures")
        register_architecture(names[0] if isinstance(names, list) and names else None)
        with configuration_of("a checkpoint"):
            return config_class(cls.backbone_type).from_dict(config_dict | {"model_type": cls.backbone_type}, **kwargs)


def register_backbone(model_type: str) -> None:
    """Lets transformers read full checkpoints with a backbone of this ``model_type``."""
    name = model_type + TYPE_SUFFIX
    if name in CONFIG_MAPPING:
        return
    CONFIG_MAPPING.register(name, type(f"{model_type}_recipe", (Recipe,), {"backbone_type": model_type}))
    share_conversion(model_type, name)  # the backbone's own class reads the backbone of such a checkpoint too


def register_architecture(name: Any) -> None:
    """Lets ``getattr(transformers, name).from_pretrained(folder)`` read full checkpoints of this architecture.

    Args:
        name: as a checkpoint says it, ``"Qwen2ParScaleForCausalLM"``; anything else is passed over.
    """
    if isinstance(name, str) and INFIX in name:
        show_class(name, ParScaleForCausalLM if name.endswith(CAUSAL_LM) else ParScaleModel)


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of full checkpoints with a backbone of this ``model_type``: a subclass of the backbone's.

    Raises:
        ValueError: transformers knows no backbone of this type.
    """
    if model_type not in _CLASSES:
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"transformers knows no model_type {model_type!r}: a newer version of it may, or the class of this "
                "backbone has to be registered first (AutoConfig.register and AutoModelForCausalLM.register)."
            )
        backbone = CONFIG_MAPPING[model_type]
        class_name = f"{backbone.__name__.removesuffix('Config')}ParScaleConfig"
        body = {"model_type": model_type + TYPE_SUFFIX, "__module__": __name__, "__reduce__": _reduce}
        made: Any = type(class_name, (backbone,), body)
        for name, auto in AUTO_CLASSES.items():
            if _classes(auto, backbone) or auto is AutoModelForCausalLM:
                auto.register(made, _READERS[name], exist_ok=True)
        if backbone in TOKENIZER_MAPPING:
            TOKENIZER_MAPPING.register(made, TOKENIZER_MAPPING[backbone], exist_ok=True)
        _CLASSES[model_type] = made
    return _CLASSES[model_type]


def _reduce(config: Any) -> tuple[Any, ...]:
    """How pickle writes a configuration: its class is made anew where it is read, which may be another process."""
    backbone: Any = type(config).__mro__[1]
    return _new_config, (backbone.model_type,), vars(config)


def _new_config(model_type: str) -> Any:
    cls = config_class(model_type)
    return cls.__new__(cls)


def backbone_config(config: Any) -> Any:
    """The backbone's own configuration in that of a full checkpoint: a copy, without what the streams added."""
    plain: Any
    if type(config) in _CLASSES.values():
        cls: Any = type(config).__mro__[1]
        plain = cls.__new__(cls)  # as a copy is made, without reading the fields again
        vars(plain).update(copy.deepcopy(vars(config)))
        plain.model_type = cls.model_type
    else:
        plain = copy.deepcopy(config)
    for field in [name for name in vars(plain) if name.startswith("parscale_") or name == "auto_map"]:
        delattr(plain, field)
    return plain


def class_in_checkpoints(model: PreTrainedModel) -> tuple[str, dict[str, str]]:
    """What a full checkpoint calls the model's class, and by which of transformers' ``AutoModel...`` it is read.

    Returns:
        ``BertParScaleForMaskedLM``, and of the ``AutoModel...`` the class that stands for it in this module.
    """
    cls, config = type(model), type(model.config)
    name = cls.__name__.removeprefix("FSDP")
    cls = next((base for base in cls.__mro__ if base.__name__ == name), cls)
    autos = _readers(cls, config)
    if "AutoModelForCausalLM" in autos or not autos:
        return causal_lm_in_checkpoints(name), {"AutoModelForCausalLM": ParScaleForCausalLM.__name__}
    return _with_infix(name), dict.fromkeys(autos, ParScaleModel.__name__)


def causal_lm_in_checkpoints(class_name: str) -> str:
    """What a full checkpoint calls a causal language model: ``Qwen2ForCausalLM`` is ``Qwen2ParScaleForCausalLM``."""
    return re.sub(r"(LMHeadModel|ForCausalLM|ForConditionalGeneration)$", "", class_name) + CAUSAL_LM


def _with_infix(class_name: str) -> str:
    return re.sub(r"(EncoderModel|Model|For[A-Z]\w*)?$", rf"{INFIX}\1", class_name, count=1)


def architectures_in_checkpoints() -> set[str]:
    """What full checkpoints call the classes that transformers knows."""
    found: set[str] = set()
    for auto_name, auto in AUTO_CLASSES.items():
        name = causal_lm_in_checkpoints if auto_name == "AutoModelForCausalLM" else _with_infix
        found.update(map(name, class_names(auto)))
    return found


def backbone_class(config: Any, plain: Any) -> Any:
    """The class of a full checkpoint's backbone.

    Args:
        config: the checkpoint's.
        plain: the backbone's own, as :func:`backbone_config` gives it.

    Raises:
        ValueError: transformers knows none.
    """
    names = getattr(config, "architectures", None)
    name = str(names[0]) if isinstance(names, list) and names else ""
    causal = _classes(AutoModelForCausalLM, type(plain))
    if causal and (name.endswith(CAUSAL_LM) or not name):
        return causal[0]
    cls = class_named(name.replace(INFIX, "", 1))
    if cls is None or cls.config_class is not type(plain):
        raise ValueError(f"transformers knows no class for model_type {plain.model_type!r} and architecture {name!r}.")
    return cls


def class_named(name: Any) -> Any:
    """A model class of transformers by its name; ``None`` if there is none."""
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def class_read_by(reader: Any, config: Any) -> Any:
    """The class of the model that an ``AutoModel...``, or a class itself, makes of a configuration; ``None``: none."""
    if model_mapping(reader) is None:
        return reader
    classes = {cls.__name__: cls for cls in _classes(reader, type(config))}
    named = [name for name in getattr(config, "architectures", None) or () if name in classes]
    return classes[named[0]] if named else next(iter(classes.values()), None)


def _classes(auto: Any, config: type[PreTrainedConfig]) -> tuple[Any, ...]:
    """The classes that an ``AutoModel...`` may make of a configuration."""
    mapping = model_mapping(auto)
    if mapping is None or config not in mapping:
        return ()
    classes = mapping[config]
    return tuple(classes) if isinstance(classes, tuple | list) else (classes,)


def _readers(cls: Any, config: type[PreTrainedConfig]) -> list[str]:
    """The names of the ``AutoModel...`` that make a class of its configuration."""
    return [name for name, auto in AUTO_CLASSES.items() if cls in _classes(auto, config)]


class ParScaleModelConfig:
    """What a full checkpoint's ``auto_map`` names as its configuration; reads any of them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As ``AutoConfig.from_pretrained``."""
        return read_pretrained(AutoConfig, pretrained_model_name_or_path, **without_own_arguments(kwargs))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: this class is never saved as code."""


class ParScaleModel:
    """What an ``AutoModel...`` finds for a full checkpoint; makes a wrapped model of the backbone's own class."""

    auto = ""  # the name of the one that it stands in; "" for any, as in an ``auto_map``

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As the backbone's own ``from_pretrained``, with all its arguments."""
        from parscale.loading import load_full

        if config is None:
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            config = read_pretrained(AutoConfig, pretrained_model_name_or_path, **hub)
        plain = backbone_config(config)
        backbone = backbone_class(config, plain)
        readers = _readers(backbone, type(plain)) if cls.auto else []
        if readers and cls.auto not in readers:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {backbone.__name__} with streams, which {cls.auto} does not "
                f"read: use {' or '.join(readers)}."
            )
        return load_full(pretrained_model_name_or_path, config, *model_args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: this class is never saved as code."""


class ParScaleForCausalLM(ParScaleModel):
    """The same for ``AutoModelForCausalLM``."""

    auto = "AutoModelForCausalLM"

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with new weights and streams, as ``AutoModelForCausalLM.from_config`` asks for."""
        from parscale.config import ParScaleConfig
        from parscale.wrapping import wrap

        streams = ParScaleConfig.from_fields(vars(config))
        streams.init = "random"  # new weights have nothing to say
        return wrap(AutoModelForCausalLM.from_config(backbone_config(config), **kwargs), streams)


_CLASSES: dict[str, type[PreTrainedConfig]] = {}
_READERS = {
    name: type(f"{INFIX}{name.removeprefix('Auto')}", (ParScaleModel,), {"auto": name, "__module__": __name__})
    for name in AUTO_CLASSES
} | {"AutoModelForCausalLM": ParScaleForCausalLM}
for _model_type in list(CONFIG_MAPPING):  # of parts too: Emu3's causal language model has its text part's type
    register_backbone(_model_type)
