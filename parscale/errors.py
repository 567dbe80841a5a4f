"""Errors that parscale raises on its own account."""


class UnsupportedModelError(ValueError):
    """The model cannot carry streams: it is no Hugging Face model, or has no place for what makes them differ."""
