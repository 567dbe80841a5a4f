"""huggingface_hub: what its HTTP client raises where there is no answer; the client changes with the version."""

from __future__ import annotations

from typing import cast

from huggingface_hub.errors import HfHubHTTPError

NO_ANSWER = cast(type[Exception], next(base for base in HfHubHTTPError.__bases__ if not issubclass(base, OSError)))
"""The client's own base class of errors; those of the Hub's answers are `OSError` too."""
