"""TRL: the two functions with which its trainers make a reference model.

A trainer that is given no `ref_model` asks `get_config_model_id` for the name of the model's folder and hands it to
`create_model_from_path`. No hook lies between the two, and neither sees the model. Importing TRL takes seconds, so
that its module is watched for instead: the functions are extended once somebody imports it.
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
    """Extends the two functions, where TRL is installed and once it is imported.

    Where the installed version lacks one, neither is extended, and a warning says so: it is not known then whether a
    trainer makes a reference at all.

    Args:
        name: for `get_config_model_id(config)`.
        create: for `create_model_from_path(model_id, ...)`.
    """

    def act(module: ModuleType) -> None:
        try:
            for function in (NAME, CREATE):
                needed(module, function)
        except IncompatibleVersionError as error:
            warnings.warn(f"{error} Until then give TRL's trainers ref_model= for a model with streams.", stacklevel=2)
            return
        extend_everywhere(module, NAME, name)
        extend_everywhere(module, CREATE, create)

    if is_installed("trl"):
        when_imported(MODULE, act)
