"""huggingface_hub: what its HTTP client raises where there is no answer.

The client is another one in some versions, and no documented name says which. The error of an answer derives from the
client's own base class of errors, and so tells.
"""

from __future__ import annotations

from typing import cast

from huggingface_hub.errors import HfHubHTTPError

NO_ANSWER = cast(type[Exception], next(base for base in HfHubHTTPError.__bases__ if not issubclass(base, OSError)))
"""The client's own base class of errors; those of the Hub's answers are `OSError` too."""
