"""The speed of training on this machine: the faster dtype, and the time of a step."""

from __future__ import annotations

import copy
import timeit

import torch
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from parscale.checkpoints.training.packing import Blocks


def faster_in_bf16(device: torch.device) -> bool:
    """Whether matrix products of a small model's size are much faster in bfloat16; not every processor has it.

    Args:
        device: where they run.

    Returns:
        Whether bfloat16 is worth it.
    """

    def seconds(dtype: torch.dtype) -> float:
        x, weight = (torch.ones(shape, dtype=dtype, device=device) for shape in ((2048, 256), (256, 576)))
        return min(timeit.repeat(lambda: (x @ weight).sum().item(), number=1, repeat=10))

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def seconds_of_step(model: PreTrainedModel, blocks: Blocks, batch_size: int, *, bf16: bool) -> float:
    """The time of a forward and backward pass on one batch, as the minimum of two runs.

    Args:
        model: in float32, on its device; it is not changed.
        blocks: the training data.
        batch_size: rows in a batch.
        bf16: compute in bfloat16 under autocast.
    """
    model = copy.deepcopy(model).train()
    rows = [blocks[index % len(blocks)] for index in range(batch_size)]
    batch = {name: values.to(model.device) for name, values in default_collate(rows).items()}

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        loss.item()  # waits for a GPU

    return min(timeit.repeat(step, number=1, repeat=2))
