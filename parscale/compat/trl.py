"""TRL: the two functions by which its trainers make a reference model.

A trainer without `ref_model` gets the name of the model's folder from `get_config_model_id` and passes it to
`create_model_from_path`. There is no hook between the two, and neither sees the model. Importing TRL takes seconds, so
the functions are extended only when other code imports it.
"""

from __future__ import annotations

import warnings
from types import ModuleType

from parscale.compat.names import is_installed, needed
from parscale.compat.patching import Extension, extend_everywhere, when_imported
from parscale.errors import IncompatibleVersionError

MODULE = "trl.trainer.utils"
NAME, CREATE = "get_config_model_id", "create_model_from_path"


def extend_reference(name: Extension, create: Extension) -> None:
    """Extends the two functions, if TRL is installed, when it is imported.

    If the installed version lacks one of them, neither is extended, and a warning says so: it is then unknown whether a
    trainer makes a reference model at all.

    Args:
        name: for `get_config_model_id(config)`.
        create: for `create_model_from_path(model_id, ...)`.
    """

    def act(module: ModuleType) -> None:
        try:
            for function in (NAME, CREATE):
                needed(module, function)
        except IncompatibleVersionError as error:
            warnings.warn(f"{error} Until then pass TRL ref_model= for models with streams.", stacklevel=2)
            return
        extend_everywhere(module, NAME, name)
        extend_everywhere(module, CREATE, create)

    if is_installed("trl"):
        when_imported(MODULE, act)
