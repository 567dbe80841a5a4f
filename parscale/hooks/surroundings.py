"""Settings of the caller's code that must not affect the tensors that streams create."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """In this block new parameters can be trained later, and get the device and dtype that they ask for.

    Inference mode, autocast and a default device (`torch.set_default_device` or `with torch.device(...):`) have no
    effect in it. Whether gradients are recorded does not change.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        yield
