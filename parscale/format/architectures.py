"""What a full checkpoint calls its architecture, and the configuration classes by which transformers reads it.

A full checkpoint of a Llama says `model_type: llama_parscale`. Under that name, and the like for every model that
transformers knows, a recipe is registered; the configuration class that it stands for, a subclass of the backbone's, is
made when the first such checkpoint is read. `parscale.auto` registers what makes models of these classes.

Which class the model is of, `architectures` says: `BertForMaskedLM` with streams is `BertParScaleForMaskedLM`.
All causal language models end in `ParScaleForCausalLM`, as the released ones do, and the class is transformers'
choice.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from parscale.compat.transformers import auto_classes, class_names, model_mapping, share_conversion
from parscale.format.folders import CAUSAL_LM, INFIX, TYPE_SUFFIX
from parscale.format.values import check_values, configuration_of

AUTO_CLASSES = auto_classes()
READER = f"{INFIX}Model"  # what stands for an AutoModel... in an `auto_map`, but for that of causal language models

ClassListener = Callable[[type[PreTrainedConfig], type[PreTrainedConfig]], None]  # the class made, the backbone's
ArchitectureListener = Callable[[Any], None]  # what a checkpoint that is read says

_CLASSES: dict[str, type[PreTrainedConfig]] = {}  # those made, by the backbone's model_type
_CLASS_LISTENERS: list[ClassListener] = []
_ARCHITECTURE_LISTENERS: list[ArchitectureListener] = []


def listen(to_class: ClassListener, to_architecture: ArchitectureListener) -> None:
    """Calls `to_class` for each configuration class, also those made before, and `to_architecture` when one reads.

    Args:
        to_class: takes the class and the backbone's own.
        to_architecture: takes the first of a checkpoint's `architectures`, whatever that is, or `None`.
    """
    _CLASS_LISTENERS.append(to_class)
    _ARCHITECTURE_LISTENERS.append(to_architecture)
    for made in _CLASSES.values():
        to_class(made, _backbone_of(made))


def _backbone_of(made: Any) -> Any:
    return made.__mro__[1]


class Recipe:
    """Stands for the configuration class of one backbone's full checkpoints, which is made when it is needed.

    Subclasses are made by `register_backbone`.
    """

    backbone_type = ""

    def __new__(cls, **kwargs: Any) -> Any:  # noqa: D102  for AutoConfig.for_model
        return config_class(cls.backbone_type)(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`, of `config_class`.

        In memory `model_type` is the backbone's, by which transformers finds tokenizers and much else; the class, and
        what it writes, has the checkpoint's.
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
    CONFIG_MAPPING.register(name, type(f"{model_type}_recipe", (Recipe,), {"backbone_type": model_type}))
    share_conversion(model_type, name)  # the backbone's own class reads the backbone of such a checkpoint too


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of full checkpoints with a backbone of this `model_type`: a subclass of the backbone's.

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
        body = {"model_type": model_type + TYPE_SUFFIX, "__module__": __name__}
        made: Any = type(class_name, (backbone,), body)
        if backbone in TOKENIZER_MAPPING:
            TOKENIZER_MAPPING.register(made, TOKENIZER_MAPPING[backbone], exist_ok=True)
        _CLASSES[model_type] = made
        for listener in _CLASS_LISTENERS:
            listener(made, backbone)
    return _CLASSES[model_type]


def backbone_config(config: Any) -> Any:
    """The backbone's own configuration in that of a full checkpoint: a copy, without what the streams added."""
    plain: Any = copy.deepcopy(config)
    if type(config) in _CLASSES.values():
        cls, fields = _backbone_of(type(config)), vars(plain)
        plain = cls.__new__(cls)
        vars(plain).update(fields, model_type=cls.model_type)
    for field in [name for name in vars(plain) if name.startswith("parscale_") or name == "auto_map"]:
        delattr(plain, field)
    return plain


def class_in_checkpoints(model: PreTrainedModel) -> tuple[str, dict[str, str]]:
    """What a full checkpoint calls the model's class, and by which of transformers' `AutoModel...` it is read.

    Returns:
        `BertParScaleForMaskedLM`, and of the `AutoModel...` the class that stands for it in `parscale.auto`.
    """
    cls, config = type(model), type(model.config)
    name = cls.__name__.removeprefix("FSDP")
    cls = next((base for base in cls.__mro__ if base.__name__ == name), cls)
    autos = readers(cls, config)
    if "AutoModelForCausalLM" in autos or not autos:
        return causal_lm_in_checkpoints(name), {"AutoModelForCausalLM": CAUSAL_LM}
    return _with_infix(name), dict.fromkeys(autos, READER)


def causal_lm_in_checkpoints(class_name: str) -> str:
    """What a full checkpoint calls a causal language model: `Qwen2ForCausalLM` is `Qwen2ParScaleForCausalLM`."""
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
        plain: the backbone's own, as `backbone_config` gives it.

    Raises:
        ValueError: transformers knows none.
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


def class_named(name: Any) -> Any:
    """A model class of transformers by its name; `None` if there is none."""
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def class_read_by(reader: Any, config: Any) -> Any:
    """The class of the model that an `AutoModel...`, or a class itself, makes of a configuration; `None`: none."""
    if model_mapping(reader) is None:
        return reader
    classes = {cls.__name__: cls for cls in classes_of(reader, type(config))}
    named = [name for name in getattr(config, "architectures", None) or () if name in classes]
    return classes[named[0]] if named else next(iter(classes.values()), None)


def readers(cls: Any, config: type[PreTrainedConfig]) -> list[str]:
    """The names of the `AutoModel...` that make a class of its configuration."""
    return [name for name, auto in AUTO_CLASSES.items() if cls in classes_of(auto, config)]


def classes_of(auto: Any, config: type[PreTrainedConfig]) -> tuple[Any, ...]:
    """The classes that an `AutoModel...` may make of a configuration."""
    mapping = model_mapping(auto)
    if mapping is None or config not in mapping:
        return ()
    classes = mapping[config]
    return tuple(classes) if isinstance(classes, tuple | list) else (classes,)


for _model_type in list(CONFIG_MAPPING):  # of parts too: Emu3's causal language model has its text part's type
    register_backbone(_model_type)
