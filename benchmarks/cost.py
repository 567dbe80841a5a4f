"""What generation really costs beside what the cost model counts: ParScale against the plain model of equal loss.

For each P, three random models: the backbone, the backbone with P streams, and a wider plain model that the published
law gives the same loss. Each generates for each batch size, in turns within one process, so that a busy machine slows
all; the median of the ratios of neighbouring turns counts. Weights and cache are weighed as tensors, on a GPU also the
peak. The device's own matrix product and copy are timed first: with these as its hardware the cost model predicts the
same ratios.

    python benchmarks/cost.py
    python benchmarks/cost.py --batch-sizes 1 4 16 64 --device cuda --dtype bfloat16 --size 0.5B
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import device_name, is_gpu, load_average, seconds

from parscale import wrap
from parscale.scaling_laws import Cost, Hardware, cost, dense_equivalent, fit, published, published_models, read_shape

SMALL = {
    "model_type": "qwen2",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MODELS = ("plain", "streams", "dense")
Config = dict[str, Any]


def dense_config(config: Config, streams: int) -> Config:
    """The plain model of equal predicted loss: heads of an even width, then the MLP as wide as the size asks."""
    shape = dense_equivalent(fit(*published("stack")), config, streams)
    wanted = shape.backbone_params
    heads = config["num_attention_heads"]
    hidden = heads * 2 * round(shape.hidden / heads / 2)
    dense = config | {"hidden_size": hidden, "intermediate_size": 1}
    left = wanted - read_shape(dense).backbone_params
    dense["intermediate_size"] = 1 + round(left / (3 * hidden * config["num_hidden_layers"]))
    return dense


def build(config: Config, streams: int, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields, bos_token_id=None, eos_token_id=None))
    model = wrap(model.to(dtype), streams, init="random", seed=0)
    return model.to(device).eval()


def generation(model: Any, ids: torch.Tensor, tokens: int) -> Callable[[], Any]:
    """One call of generate that makes exactly `tokens` tokens; returns its cache."""

    def step() -> Any:
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
            )
        return output.past_key_values

    return step


def weigh(model: Any, cache: Any) -> dict[str, int]:
    """Bytes of what `cost` splits memory into, counted on the tensors themselves."""
    parts = {"weights": 0, "prefixes": 0, "aggregator": 0}
    for name, parameter in model.named_parameters():
        part = "prefixes" if "prefix_" in name else "aggregator" if "aggregate_layer" in name else "weights"
        parts[part] += parameter.numel() * parameter.element_size()
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return parts | {"kv_cache": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}


def peak(step: Callable[[], Any], device: str) -> int | None:
    """Peak bytes of one call; None where torch does not count them."""
    if not is_gpu(device):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return int(torch.cuda.max_memory_allocated(device))


def hardware_of(device: str, dtype: torch.dtype) -> Hardware:
    """What this device reaches: a matrix product of 2048 and a copy of 256 MB, the best of several."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    tflops, bandwidth = 2 * 2048**3 / product / 1e12, 2 * source.numel() * 4 / copy / 1e9
    return Hardware("measured", "this device", 1e6, bandwidth, tflops, tflops, 1.0, 1.0)


def measure(config: Config, streams: int, batch: int, options: argparse.Namespace, device: Hardware) -> dict[str, Any]:
    """One row: measured and counted seconds and memory of the three models."""
    dtype = getattr(torch, options.dtype)
    configs = {"plain": (config, 1), "streams": (config, streams), "dense": (dense_config(config, streams), 1)}
    ids = torch.randint(config["vocab_size"], (batch, options.input_length), device=options.device)
    models = {name: build(*configs[name], options.device, dtype) for name in MODELS}
    steps = {name: generation(models[name], ids, options.output_length) for name in MODELS}
    memory: dict[str, Any] = {name: weigh(models[name], steps[name]()) for name in MODELS}  # this also warms up
    turns = []
    for turn in range(options.repeats):
        order = MODELS if turn % 2 == 0 else MODELS[::-1]
        times = {name: seconds(steps[name], options.device) for name in order}
        turns.append(times)
    counted: dict[str, Cost] = {
        name: cost(
            configs[name][0],
            num_streams=configs[name][1],
            batch_size=batch,
            input_length=options.input_length,
            output_length=options.output_length,
            hardware=device,
            dtype=options.dtype,
        )
        for name in MODELS
    }
    return {
        "streams": streams,
        "batch_size": batch,
        "params": {name: counted[name].params for name in MODELS},
        "seconds": {name: statistics.median(times[name] for times in turns) for name in MODELS},
        "streams_to_dense": statistics.median(times["streams"] / times["dense"] for times in turns),
        "streams_to_plain": statistics.median(times["streams"] / times["plain"] for times in turns),
        "counted_seconds": {name: counted[name].seconds for name in MODELS},
        "counted_streams_to_dense": counted["streams"].seconds / counted["dense"].seconds,
        "counted_streams_to_plain": counted["streams"].seconds / counted["plain"].seconds,
        "memory": memory,
        "counted_memory": {name: counted[name].memory for name in MODELS},
        "peak_bytes": {name: peak(steps[name], options.device) for name in MODELS},
    }


def machine(device: str) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cost.json")
    parser.add_argument("--size", choices=list(published_models()), help="a published model; default: 26M parameters")
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--input-length", type=int, default=128)
    parser.add_argument("--output-length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    config = published_models()[options.size] if options.size else SMALL
    device = hardware_of(options.device, getattr(torch, options.dtype))
    results: dict[str, Any] = {"machine": machine(options.device), "config": config}
    results["hardware"] = {"bandwidth_gbs": device.bandwidth_gbs, "tflops": device.tflops_32bit}
    results["lengths"] = {"input": options.input_length, "output": options.output_length}
    results["rows"] = []
    for streams in options.streams:
        for batch in options.batch_sizes:
            row = measure(config, streams, batch, options, device)
            results["rows"].append(row)
            line = f"P={streams} B={batch}: {row['streams_to_dense']:.2f} of the dense model's time "
            print(line + f"(counted {row['counted_streams_to_dense']:.2f})", file=sys.stderr)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(options.output)


if __name__ == "__main__":
    main()
