"""Streams under PEFT: adding an adapter freezes the backbone, not the streams."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


def keep_streams_trainable() -> None:
    """Makes PEFT's tuners leave the streams' parameters as they are.

    ``get_peft_model`` freezes every parameter that no adapter owns, and asks the model nothing about it; so, where PEFT
    is installed, its method for that is extended, once, for models that parscale wrapped.
    """
    if importlib.util.find_spec("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTuner

    freeze = BaseTuner._mark_only_adapters_as_trainable
    if getattr(freeze, "keeps_streams", False):
        return

    @functools.wraps(freeze)
    def freeze_but_streams(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        state = getattr(model, "parscale", None)
        streams = {} if state is None else state.trainability()
        freeze(tuner, model, *args, **kwargs)
        for parameter, trains in streams.items():
            parameter.requires_grad_(trains)

    freeze_but_streams.keeps_streams = True  # type: ignore[attr-defined]
    setattr(BaseTuner, "_mark_only_adapters_as_trainable", freeze_but_streams)  # noqa: B010
