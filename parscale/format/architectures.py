"""The architecture names of full checkpoints, and the configuration classes by which transformers reads them.

A full checkpoint of a Llama has `model_type: llama_parscale`. For this name, and the one of every other model in
transformers, a `LazyConfig` is registered. It stands for a configuration class, a subclass of the backbone's, which is
made when the first such checkpoint is read. `parscale.auto` registers the classes that make models from it.

`architectures` names the model's class: `BertForMaskedLM` with streams is `BertParScaleForMaskedLM`. All causal
language models end in `ParScaleForCausalLM`, as the released ones do, and transformers chooses the class.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from parscale.compat.conversion import share_conversion
from parscale.compat.transformers import auto_classes, class_names, model_mapping
from parscale.format.folders import CAUSAL_LM, INFIX, TYPE_SUFFIX
from parscale.format.values import check_values, configuration_of

AUTO_CLASSES = auto_classes()
READER = f"{INFIX}Model"  # in an `auto_map`, for each AutoModel... but that of causal language models

ClassListener = Callable[[type[PreTrainedConfig], type[PreTrainedConfig]], None]  # the new class, the backbone's class
ArchitectureListener = Callable[[Any], None]  # the architecture of a checkpoint that is read

_CLASSES: dict[str, type[PreTrainedConfig]] = {}  # by the backbone's model_type
_CLASS_LISTENERS: list[ClassListener] = []
_ARCHITECTURE_LISTENERS: list[ArchitectureListener] = []


def listen(to_class: ClassListener, to_architecture: ArchitectureListener) -> None:
    """Calls `to_class` for each configuration class, also existing ones, and `to_architecture` when one is read.

    Args:
        to_class: takes the class and the backbone's own class.
        to_architecture: takes the first entry of a checkpoint's `architectures`, of any type, or `None`.
    """
    _CLASS_LISTENERS.append(to_class)
    _ARCHITECTURE_LISTENERS.append(to_architecture)
    for made in _CLASSES.values():
        to_class(made, _backbone_of(made))


def _backbone_of(made: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    return made.__mro__[1]


class LazyConfig:
    """A placeholder for the configuration class of one backbone's full checkpoints, which is made when needed.

    `register_backbone` makes its subclasses.
    """

    backbone_type = ""

    def __new__(cls, **kwargs: Any) -> Any:  # noqa: D102  for AutoConfig.for_model
        return config_class(cls.backbone_type)(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Calls `PreTrainedConfig.from_dict` of `config_class`.

        In memory `model_type` is the backbone's, which transformers uses to find tokenizers and more; the class and
        saved files have that of the checkpoint.
        """
        check_values("a checkpoint", config_dict, None)
        names = config_dict.get("architectures")
        for listener in _ARCHITECTURE_LISTENERS:
            listener(names[0] if isinstance(names, list) and names else None)
        with configuration_of("a checkpoint"):
            return config_class(cls.backbone_type).from_dict(config_dict | {"model_type": cls.backbone_type}, **kwargs)


def register_backbone(model_type: str) -> None:
    """Lets transformers read full checkpoints with a backbone of this `model_type`."""
    name = model_type + TYPE_SUFFIX
    if name in CONFIG_MAPPING:
        return
    CONFIG_MAPPING.register(name, type(f"{name}_config", (LazyConfig,), {"backbone_type": model_type}))
    share_conversion(model_type, name)  # the backbone's own class reads the backbone of such a checkpoint too


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of full checkpoints with a backbone of this `model_type`: a subclass of the backbone's.

    Raises:
        ValueError: transformers has no backbone of this type.
    """
    if model_type not in _CLASSES:
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"transformers knows no model_type {model_type!r}: a newer version of it may, or the class of this "
                "backbone has to be registered first (AutoConfig.register and AutoModelForCausalLM.register)."
            )
        backbone = CONFIG_MAPPING[model_type]
        class_name = f"{backbone.__name__.removesuffix('Config')}ParScaleConfig"
        body = {"model_type": model_type + TYPE_SUFFIX, "__module__": __name__}
        made: Any = type(class_name, (backbone,), body)
        if backbone in TOKENIZER_MAPPING:
            TOKENIZER_MAPPING.register(made, TOKENIZER_MAPPING[backbone], exist_ok=True)
        _CLASSES[model_type] = made
        for listener in _CLASS_LISTENERS:
            listener(made, backbone)
    return _CLASSES[model_type]


def backbone_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The backbone's own configuration from that of a full checkpoint: a copy, without the fields of the streams."""
    plain: Any = copy.deepcopy(config)
    if type(config) in _CLASSES.values():
        cls, fields = _backbone_of(type(config)), vars(plain)
        plain = cls.__new__(cls)
        vars(plain).update(fields, model_type=cls.model_type)
    for field in [name for name in vars(plain) if name.startswith("parscale_") or name == "auto_map"]:
        delattr(plain, field)
    return plain


def class_in_checkpoints(model: PreTrainedModel) -> tuple[str, dict[str, str]]:
    """The name of the model's class in a full checkpoint, and the `AutoModel...` classes of transformers that read it.

    Returns:
        A name such as `BertParScaleForMaskedLM`, and for each `AutoModel...` the class in `parscale.auto`.
    """
    cls, config = type(model), type(model.config)
    name = cls.__name__.removeprefix("FSDP")
    cls = next((base for base in cls.__mro__ if base.__name__ == name), cls)
    autos = readers(cls, config)
    if "AutoModelForCausalLM" in autos or (not autos and class_named(name) is not cls):
        return causal_lm_in_checkpoints(name), {"AutoModelForCausalLM": CAUSAL_LM}
    return _with_infix(name), dict.fromkeys(autos, READER)


def causal_lm_in_checkpoints(class_name: str) -> str:
    """The class name of a causal language model in full checkpoints, such as `Qwen2ParScaleForCausalLM`."""
    return re.sub(r"(LMHeadModel|ForCausalLM|ForConditionalGeneration)$", "", class_name) + CAUSAL_LM


def _with_infix(class_name: str) -> str:
    return re.sub(r"(EncoderModel|Model|For[A-Z]\w*)?$", rf"{INFIX}\1", class_name, count=1)


def architectures_in_checkpoints() -> set[str]:
    """The names in full checkpoints of all classes in transformers."""
    found: set[str] = set()
    for auto_name, auto in AUTO_CLASSES.items():
        name = causal_lm_in_checkpoints if auto_name == "AutoModelForCausalLM" else _with_infix
        found.update(map(name, class_names(auto)))
    return found


def backbone_class(config: object, plain: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a full checkpoint's backbone.

    Args:
        config: the checkpoint's configuration.
        plain: the backbone's own, as returned by `backbone_config`.

    Raises:
        ValueError: transformers has no such class.
    """
    names = getattr(config, "architectures", None)
    name = str(names[0]) if isinstance(names, list) and names else ""
    causal = classes_of(AutoModelForCausalLM, type(plain))
    if causal and (name.endswith(CAUSAL_LM) or not name):
        return causal[0]
    cls = class_named(name.replace(INFIX, "", 1))
    if cls is None or cls.config_class is not type(plain):
        raise ValueError(f"transformers knows no class for model_type {plain.model_type!r} and architecture {name!r}.")
    return cls


def class_named(name: object) -> Any:
    """A model class of transformers by its name; `None` if there is none."""
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def class_read_by(reader: object, config: PreTrainedConfig) -> Any:
    """The class of the model that an `AutoModel...`, or a class itself, makes from a configuration; `None` if none."""
    if model_mapping(reader) is None:
        return reader
    classes = {cls.__name__: cls for cls in classes_of(reader, type(config))}
    named = [name for name in getattr(config, "architectures", None) or () if name in classes]
    return classes[named[0]] if named else next(iter(classes.values()), None)


def readers(cls: object, config: type[PreTrainedConfig]) -> list[str]:
    """The names of the `AutoModel...` that make a class from its configuration."""
    return [name for name, auto in AUTO_CLASSES.items() if cls in classes_of(auto, config)]


def classes_of(auto: object, config: type[PreTrainedConfig]) -> tuple[Any, ...]:
    """The classes that an `AutoModel...` can make from a configuration."""
    mapping = model_mapping(auto)
    if mapping is None or config not in mapping:
        return ()
    classes = mapping[config]
    return tuple(classes) if isinstance(classes, tuple | list) else (classes,)


for _model_type in list(CONFIG_MAPPING):  # also of parts: Emu3's causal language model has the type of its text part
    register_backbone(_model_type)
