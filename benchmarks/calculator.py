"""The figures of the documentation's calculator: streams beside the plain model and the one of equal loss.

Everything is counted by `parscale.scaling_laws.cost`; nothing is measured. The page `docs/worth.md` shows one cell of
this table at a time.

    python benchmarks/calculator.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from parscale.scaling_laws import (
    ModelShape,
    ParallelScalingLaw,
    cost,
    dense_equivalent,
    fit,
    known_backbones,
    known_hardware,
    published,
    published_models,
    read_shape,
)

OUTPUT = Path(__file__).parent / "results" / "calculator.json"
STREAMS = (2, 4, 8)
KINDS = {"own": "its own, as published", "shared": "those of stream 0"}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (128, 1024, 8192, 32768)
NEW_TOKENS = 256
DEVICES = ("h100", "h200", "a100-80gb", "l40s", "rtx-4090", "mi300x", "apple-m4-max", "cpu-desktop", "cpu-server")
QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def models() -> dict[str, ModelShape]:
    """The models to choose from, by the name that the page shows."""
    configs = {"Qwen2.5-0.5B": QWEN_05B, "1.6B, the paper's": published_models()["1.6B"], **known_backbones()}
    return {name: read_shape(config) for name, config in configs.items()}


def rounded(value: float) -> float:
    """Four digits, which a bar shows no better."""
    return float(f"{value:.4g}")


def figures(shape: ModelShape, device: str, batch: int, prompt: int, streams: int = 1, kv: str = "own") -> list[float]:
    """Memory in GB, and the seconds of prefill and of decoding."""
    counted = cost(
        shape,
        num_streams=streams,
        batch_size=batch,
        input_length=prompt,
        output_length=NEW_TOKENS,
        hardware=device,
        kv=kv,
    )
    seconds = (counted.prefill_seconds, counted.decode_seconds)
    return [rounded(counted.memory_bytes / 1e9), *map(rounded, seconds)]


def cell(shape: ModelShape, twins: list[ModelShape], device: str, batch: int, prompt: int) -> list[list[float]]:
    """The plain model, then for each P the model with streams, of each kind, and the plain one of equal loss."""
    work = (device, batch, prompt)
    rows = [figures(shape, *work)]
    for streams, twin in zip(STREAMS, twins, strict=True):
        rows += [figures(shape, *work, streams, kv) for kv in KINDS] + [figures(twin, *work)]
    return rows


def table(law: ParallelScalingLaw) -> dict[str, Any]:
    """Everything that the page needs; cells in the order of the axes, the last running fastest."""
    shapes = models()
    twins = {name: [dense_equivalent(law, shape, P) for P in STREAMS] for name, shape in shapes.items()}
    devices = {name: known_hardware()[name] for name in DEVICES}
    return {
        "law": {"corpus": "stack", "k": rounded(law.k)},
        "new_tokens": NEW_TOKENS,
        "streams": list(STREAMS),
        "kinds": list(KINDS.values()),
        "batches": list(BATCHES),
        "prompts": list(PROMPTS),
        "devices": [{"name": device.label, "memory": device.memory_gb} for device in devices.values()],
        "models": [
            {
                "name": name,
                "params": rounded(shape.params(1)),
                "twins": [rounded(twin.params(1)) for twin in twins[name]],
            }
            for name, shape in shapes.items()
        ],
        "cells": [
            cell(shape, twins[name], device, batch, prompt)
            for name, shape in shapes.items()
            for device in devices
            for batch in BATCHES
            for prompt in PROMPTS
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    text = json.dumps(table(fit(*published("stack"))), separators=(",", ":"))
    args.output.write_text(text.replace("],[[", "],\n[[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
