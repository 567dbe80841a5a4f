"""The code that `trust_remote_code=True` runs for a checkpoint with parallel streams (ParScale): the installed package.

This file is part of every full checkpoint that parscale saves.
"""

try:
    from parscale.auto import ParScaleForCausalLM, ParScaleModel, ParScaleModelConfig
except ImportError as error:
    raise ImportError(
        "This checkpoint has parallel streams (ParScale), which the Python package parscale reads. "
        "Install it, or a newer version of it, from a clone of its repository: pip install ."
    ) from error

__all__ = ["ParScaleForCausalLM", "ParScaleModel", "ParScaleModelConfig"]
