"""Errors that parscale raises on its own account."""


class IncompatibleVersionError(ImportError):
    """A library is installed in a version that lacks a name which parscale needs; says which version to install."""


class RefusedCheckpointError(ValueError):
    """A checkpoint asks for what it is not given: to run code of its own, or a package that is not installed."""


class UnsupportedModelError(ValueError):
    """The model cannot carry streams: it is no Hugging Face model, or has no place for what makes them differ."""
