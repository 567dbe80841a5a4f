"""Makes ``AutoConfig`` and ``AutoModelForCausalLM`` read full checkpoints; importing this module is enough.

A full checkpoint of a Llama says ``model_type: llama_parscale``. Under that name, and the like for every causal
language model that transformers knows, a recipe is registered; the configuration class that it stands for, a subclass
of the backbone's, is made when the first such checkpoint is read. The model that comes out is of the backbone's own
class, and wrapped.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from parscale.folders import TYPE_SUFFIX


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
        return config_class(cls.backbone_type).from_dict(config_dict | {"model_type": cls.backbone_type}, **kwargs)


def register_backbone(model_type: str) -> None:
    """Lets transformers read full checkpoints with a backbone of this ``model_type``."""
    name = model_type + TYPE_SUFFIX
    if name not in CONFIG_MAPPING:
        CONFIG_MAPPING.register(name, type(f"{model_type}_recipe", (Recipe,), {"backbone_type": model_type}))


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
        name = f"{backbone.__name__.removesuffix('Config')}ParScaleConfig"
        made: Any = type(name, (backbone,), {"model_type": model_type + TYPE_SUFFIX, "__module__": __name__})
        globals()[name] = made  # where pickle looks for it
        AutoModelForCausalLM.register(made, ParScaleForCausalLM, exist_ok=True)
        if backbone in TOKENIZER_MAPPING:
            TOKENIZER_MAPPING.register(made, TOKENIZER_MAPPING[backbone], exist_ok=True)
        _CLASSES[model_type] = made
    return _CLASSES[model_type]


def backbone_config(config: Any) -> Any:
    """The backbone's own configuration in that of a full checkpoint: a copy, without what the streams added."""
    plain = copy.deepcopy(config)
    if type(config) in _CLASSES.values():
        plain.__class__ = type(config).__mro__[1]
        plain.model_type = type(plain).model_type
    for field in [name for name in vars(plain) if name.startswith("parscale_") or name == "auto_map"]:
        delattr(plain, field)
    return plain


class ParScaleModelConfig:
    """What a full checkpoint's ``auto_map`` names as its configuration; reads any of them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As ``AutoConfig.from_pretrained``."""
        kwargs.pop("_from_auto", None)
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: this class is never saved as code."""


class ParScaleForCausalLM:
    """What ``AutoModelForCausalLM`` finds for a full checkpoint; makes a wrapped model of the backbone's own class."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As the backbone's own ``from_pretrained``, with all its arguments."""
        from parscale.loading import load_full

        if config is None:
            return AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        return load_full(pretrained_model_name_or_path, config, *model_args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with new weights and streams, as ``AutoModelForCausalLM.from_config`` asks for."""
        from parscale.config import ParScaleConfig
        from parscale.wrapping import wrap

        streams = ParScaleConfig.from_fields(vars(config))
        streams.init = "random"  # new weights have nothing to say
        return wrap(AutoModelForCausalLM.from_config(backbone_config(config), **kwargs), streams)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: this class is never saved as code."""


_CLASSES: dict[str, type[PreTrainedConfig]] = {}
for _model_type in list(CONFIG_MAPPING):  # of parts too: Emu3's causal language model has its text part's type
    register_backbone(_model_type)
