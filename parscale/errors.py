"""The errors that parscale defines."""


class IncompatibleVersionError(ImportError):
    """An installed library lacks a name that parscale needs; the message says which version to install."""


class RefusedCheckpointError(ValueError):
    """A checkpoint needs what parscale does not allow: its own code, or a package that is not installed."""


class UnsupportedModelError(ValueError):
    """Streams do not run on the model: it is not a Hugging Face model, or its architecture is not supported."""
