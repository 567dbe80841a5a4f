"""The versions of the software that a result depends on."""

from __future__ import annotations

import platform

import torch
import transformers

from parscale import __version__


def versions() -> dict[str, str]:
    """The versions of the software that a run's result depends on."""
    return {
        "parscale": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
