"""Post-training: streams, or a whole model, are trained on blocks of tokens with the Hugging Face Trainer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from parscale.checkpoints.divergence import DivergedError, StopWhenDiverged, first_not_finite
from parscale.checkpoints.trainer import OneDeviceArguments
from parscale.streams.naming import part_of


@dataclass(frozen=True)
class Recipe:
    """How to post-train.

    Attributes:
        tokens: how many to train on; rounded down to whole steps.
        batch_size: blocks in a step.
        streams_learning_rate: of the streams, at its peak. They want a far higher one than the backbone.
        backbone_learning_rate: of everything else that trains, at its peak. A backbone whose own training ended with a
            small one is set back for a while by a large one.
        warmup: the share of the run in which the learning rate rises; after it, it falls in a straight line to zero.
        seconds: how long it may take. Where this ends the run before all tokens are seen, the learning rate has
            followed the clock, and is zero then too.
        seed: of the order of the blocks.
    """

    tokens: int
    batch_size: int = 4
    streams_learning_rate: float = 3e-2
    backbone_learning_rate: float = 3e-5
    warmup: float = 0.05
    seconds: float = float("inf")
    seed: int = 0


@dataclass(frozen=True)
class TrainingRun:
    """What happened: the loss of each step in nats per token, the tokens trained on, and the seconds it took."""

    losses: tuple[float, ...]
    tokens: int
    seconds: float


class _Schedule(TrainerCallback):
    """The learning rate's factor: it rises with the steps, and falls with the steps, or the clock if that is ahead."""

    def __init__(self, steps: int, recipe: Recipe, on_step: Callable[[float], None] | None) -> None:
        self.steps, self.recipe, self.on_step = steps, recipe, on_step
        self.start = time.perf_counter()

    def __call__(self, step: int) -> float:
        rise = max(1, round(self.recipe.warmup * self.steps))  # steps
        fall = (1 - self.share(step)) / (1 - rise / self.steps) if rise < self.steps else 1.0
        return max(0.0, min((step + 1) / rise, fall))

    def share(self, step: int) -> float:
        """How much of the run is over, in steps or in time."""
        return max(step / self.steps, (time.perf_counter() - self.start) / self.recipe.seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = self.share(state.global_step)
        control.should_training_stop = share >= 1
        if self.on_step is not None:
            self.on_step(min(share, 1.0))


def post_train(
    model: PreTrainedModel,
    blocks: np.ndarray,
    recipe: Recipe,
    *,
    bf16: bool = False,
    on_step: Callable[[float], None] | None = None,
) -> TrainingRun:
    """Train what is trainable in a model, in place; it stays on the device that the Trainer puts it on.

    Args:
        model: wrapped or plain, in float32. `freeze_backbone()` before leaves the streams to train.
        blocks: token ids `(n, sequence_length)`, as `parscale.checkpoints.text.pack` makes them; they are shuffled,
            and shuffled anew when all have been seen.
        recipe: how much, how fast and in which order.
        bf16: compute in bfloat16 under autocast; the weights stay in float32.
        on_step: called after each step with the share of the run that is over, up to 1.

    Raises:
        ValueError: there are fewer tokens or blocks than one step takes.
        DivergedError: a loss or a gradient is not finite.
    """
    per_step = recipe.batch_size * blocks.shape[1]
    steps = recipe.tokens // per_step
    if steps < 1 or len(blocks) < recipe.batch_size:
        raise ValueError(
            f"A step takes {recipe.batch_size} blocks of {blocks.shape[1]} tokens, and the recipe allows "
            f"{recipe.tokens} tokens of {len(blocks)} blocks; give more of them, or a smaller batch."
        )
    rows = [{"input_ids": row, "labels": row} for row in torch.from_numpy(blocks)]
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe), betas=(0.9, 0.99), weight_decay=0.0)
    schedule = _Schedule(steps, recipe, on_step)
    with tempfile.TemporaryDirectory() as folder:  # the Trainer makes its output folder, and here writes nothing to it
        settings = OneDeviceArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=recipe.batch_size,
            max_grad_norm=1.0,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            seed=recipe.seed,
        )
        trainer = Trainer(
            model,
            settings,
            train_dataset=rows,
            callbacks=[StopWhenDiverged(), schedule],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        try:
            trainer.train()
        finally:  # accelerate leaves autocast on the model's forward, which would then be used in evaluation too
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        seconds = time.perf_counter() - start
    if (name := first_not_finite(model.named_parameters())) is not None:
        raise DivergedError(f"After the last step, {name} holds values that are not finite; lower the learning rate.")
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return TrainingRun(losses, trainer.state.global_step * per_step, seconds)


def _parameter_groups(model: PreTrainedModel, recipe: Recipe) -> list[dict[str, Any]]:
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_streams = part_of(name) is not None
            rate = recipe.streams_learning_rate if of_streams else recipe.backbone_learning_rate
            groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def faster_in_bf16(device: torch.device) -> bool:
    """Whether products of a small model's size are much faster in bfloat16 here; not every processor has it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (torch.ones(shape, dtype=dtype, device=device) for shape in ((2048, 256), (256, 576)))
        times = []
        for _ in range(10):
            start = time.perf_counter()
            (x @ weight).sum().item()
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]
