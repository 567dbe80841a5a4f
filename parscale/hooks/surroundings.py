"""What a caller has chosen for the code around a call, and what must not reach the tensors that streams make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """In this block new parameters can train later, and are where and of which dtype they are asked to be.

    Left outside are inference mode, autocast, and a default device (`torch.set_default_device` or `with
    torch.device(...):`). Whether gradients are recorded stays as it is.
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
