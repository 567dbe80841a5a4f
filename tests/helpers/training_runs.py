"""What tests of training share: what a run wrote, the same run written out, and runs that stop."""

import contextlib
import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from parscale import load
from parscale.checkpoints.training.callbacks import Interruption
from parscale.checkpoints.training.packing import Blocks, Encoder, Shuffled, pack

S, BATCH = 16, 4


def losses_of(folder):
    """Of each step of a run, from its metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def is_of_streams(name):
    """Whether a parameter belongs to the streams, whatever makes them differ."""
    return any(part in name for part in ("prefix_", "prompt", "stream_", "aggregate_layer"))


def run_by_hand(checkpoint, text_file, *, frozen, factors, streams_rate, aggregator_rate=1e-3, rate=1e-2):
    """Losses, and the parameters at the end, of a run written out.

    It has a step for each of the factors of its learning rates, on `BATCH` sequences of `S` tokens.
    """
    model = load(checkpoint, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encoded = Encoder(tokenizer, 257)([("text", text_file.read_text())])
    rows = Shuffled(Blocks(pack(encoded, S), S), len(factors) * BATCH, seed=0)
    named = {name: p for name, p in model.named_parameters() if is_of_streams(name) or not frozen}
    rates = {name: aggregator_rate if "aggregate_layer" in name else streams_rate for name in named}
    rates |= {name: rate for name in named if not is_of_streams(name)}
    groups = [{"params": [p], "lr": rates[name]} for name, p in named.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step, factor in enumerate(factors):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch = [rows[step * BATCH + row] for row in range(BATCH)]
        inputs = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


@contextlib.contextmanager
def stopped_after(steps):
    """In this block a run stops after so many steps, as it does on a signal."""
    step_end = Interruption.on_step_end

    def asked(self, args, state, control, **more):
        self.asked = self.asked or state.global_step == steps
        step_end(self, args, state, control, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Interruption, "on_step_end", asked)
        yield
