"""Makes `AutoConfig` and `AutoModel...` read full checkpoints; importing this module is enough.

The configuration classes are those of `parscale.format.architectures`. The loaded model has the backbone's own class
and is wrapped. The names here are those that the remote code in saved checkpoints imports.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from parscale.compat.transformers import show_class, without_own_arguments
from parscale.config import ParScaleConfig
from parscale.format.architectures import (
    AUTO_CLASSES,
    backbone_class,
    backbone_config,
    classes_of,
    config_class,
    listen,
    readers,
)
from parscale.format.folders import CAUSAL_LM, HUB_ARGUMENTS, INFIX
from parscale.format.pretrained import read_pretrained
from parscale.loading import load_full
from parscale.wrapping import wrap


def register_architecture(name: object) -> None:
    """Lets `getattr(transformers, name).from_pretrained(folder)` read full checkpoints of this architecture.

    Args:
        name: as in a checkpoint, such as `"Qwen2ParScaleForCausalLM"`; other names are ignored.
    """
    if isinstance(name, str) and INFIX in name:
        show_class(name, ParScaleForCausalLM if name.endswith(CAUSAL_LM) else ParScaleModel)


class ParScaleModelConfig:
    """The configuration class in a full checkpoint's `auto_map`; reads any full checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `AutoConfig.from_pretrained`."""
        return read_pretrained(AutoConfig, pretrained_model_name_or_path, **without_own_arguments(kwargs))

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> None:
        """Does nothing: this class is never saved as code."""


class ParScaleModel:
    """The class that an `AutoModel...` finds for a full checkpoint; makes a wrapped model of the backbone's class."""

    auto = ""  # the Auto class that it represents; "" for any, as in an `auto_map`

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a model as the backbone's own `from_pretrained` does, with all its arguments."""
        if config is None:
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            config = read_pretrained(AutoConfig, pretrained_model_name_or_path, **hub)
        plain = backbone_config(config)
        backbone = backbone_class(config, plain)
        found = readers(backbone, type(plain)) if cls.auto else []
        if found and cls.auto not in found:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {backbone.__name__} with streams, which {cls.auto} does not "
                f"read: use {' or '.join(found)}. parscale.load(folder).base_model is the model inside it; for another "
                "head, save_streams, then parscale.load(streams, backbone=model), with a model that has that head."
            )
        return load_full(pretrained_model_name_or_path, config, *model_args, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """A model with new weights and streams, for the `from_config` of an `AutoModel...`."""
        plain = backbone_config(config)
        auto = cls.auto or readers(backbone_class(config, plain), type(plain))[0]
        streams = ParScaleConfig.from_fields(vars(config))
        streams.init = "random"  # a text has no meaning to new weights
        return wrap(AUTO_CLASSES[auto].from_config(plain, **kwargs), streams)

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> None:
        """Does nothing: this class is never saved as code."""


class ParScaleForCausalLM(ParScaleModel):
    """The class for `AutoModelForCausalLM`."""

    auto = "AutoModelForCausalLM"


_READERS = {
    name: type(f"{INFIX}{name.removeprefix('Auto')}", (ParScaleModel,), {"auto": name, "__module__": __name__})
    for name in AUTO_CLASSES
} | {"AutoModelForCausalLM": ParScaleForCausalLM}


def register_readers(made: type[PreTrainedConfig], backbone: type[PreTrainedConfig]) -> None:
    """Lets each `AutoModel...` that accepts the backbone's configuration make a wrapped model from `made`."""
    for name, auto in AUTO_CLASSES.items():
        if classes_of(auto, backbone) or auto is AutoModelForCausalLM:
            auto.register(made, _READERS[name], exist_ok=True)
    made.__module__ = __name__  # where unpickling looks it up
    made.__reduce__ = _reduce  # type: ignore[assignment, method-assign]


def _reduce(config: object) -> tuple[Any, ...]:
    """How pickle stores a configuration: its class is made again when it is read, possibly in another process."""
    backbone: Any = type(config).__mro__[1]
    return _new_config, (backbone.model_type,), vars(config)


def _new_config(model_type: str) -> Any:
    cls = config_class(model_type)
    return cls.__new__(cls)


listen(register_readers, register_architecture)
