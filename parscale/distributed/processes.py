"""The processes that a launcher, such as torchrun, has started beside this one."""

from __future__ import annotations

import os


def number_of_processes() -> int:
    """How many processes a launcher says there are, this one included; 1 if it says nothing."""
    return int(os.environ.get("WORLD_SIZE") or 1)
