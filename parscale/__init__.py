"""Parallel streams for Hugging Face models.

    from parscale import wrap

    model = wrap(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B"), num_streams=4)

Importing this package imports neither torch nor transformers: each name below is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from parscale.version import __version__

if TYPE_CHECKING:
    from parscale.config import ParScaleConfig
    from parscale.errors import IncompatibleVersionError, RefusedCheckpointError, UnsupportedModelError
    from parscale.loading import load
    from parscale.wrapping import unwrap, wrap

# Python started in a clone finds this folder before what is installed; three sub-packages lie beside it there.
__path__.extend(str(folder) for folder in Path(__file__).parents[1:2] if (folder / "pyproject.toml").exists())

__all__ = [
    "IncompatibleVersionError",
    "ParScaleConfig",
    "RefusedCheckpointError",
    "UnsupportedModelError",
    "__version__",
    "load",
    "unwrap",
    "wrap",
]

_HOMES = {
    "IncompatibleVersionError": "parscale.errors",
    "ParScaleConfig": "parscale.config",
    "RefusedCheckpointError": "parscale.errors",
    "UnsupportedModelError": "parscale.errors",
    "load": "parscale.loading",
    "unwrap": "parscale.wrapping",
    "wrap": "parscale.wrapping",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("load", "wrap"):
        import_module("parscale.auto")  # from now on AutoModel... reads the folders of wrapped models
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
