"""New tokens per second on a CPU: ONNX Runtime beside PyTorch, for P = 1, 2, 4, own and shared keys.

A Qwen2 with random weights is exported with each kind of streams in each dtype. All write the same number of tokens
after the same prompt, one row, in turns; the time is that of the prompt and of all steps. The fastest of the
repetitions counts, since whatever else a machine does only adds time. Both runtimes have as many threads as torch
takes; those of ONNX Runtime wait for work only within a step, so that they take no time from PyTorch's turn.

    python benchmarks/onnx_runtime.py --output benchmarks/results/onnx_runtime.json
    python benchmarks/onnx_runtime.py --table benchmarks/results/onnx_runtime.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from machine import load_average, processor
from overhead import SHAPE
from transformers import Qwen2Config, Qwen2ForCausalLM

from parscale import wrap
from parscale.export.onnx import export_onnx

Step = Callable[[], Any]
DTYPES = ("float32", "int8", "int4")
TORCH = "torch float32"


def build(P: int, kv: str) -> Any:
    """A Qwen2 with P streams, and one that ends no text."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, bos_token_id=None, eos_token_id=None)).eval()
    if P > 1:
        wrap(model, P, init="random", seed=0, kv=kv)
    return model


def by_torch(model: Any, ids: torch.Tensor, tokens: int) -> Step:
    """Writes tokens by `generate`."""
    return lambda: model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def by_onnx(folder: Path, ids: torch.Tensor, tokens: int) -> Step:
    """Writes tokens by a loop over ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    caches = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
    empty = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in caches}

    def decode() -> None:
        new, mask, cache = ids.numpy(), np.ones_like(ids.numpy()), empty
        for _ in range(tokens):
            logits, *kept = session.run(None, {"input_ids": new, "attention_mask": mask, **cache})
            cache = dict(zip(empty, kept, strict=True))
            new = logits[:, -1:].argmax(-1)
            mask = np.concatenate([mask, np.ones_like(new)], axis=1)

    return decode


def rates(steps: dict[str, Step], tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second of each, the fastest of `repeats` in turns; a first run of each is not timed."""
    for step in steps.values():
        step()
    fastest = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    return {name: round(tokens / seconds, 2) for name, seconds in fastest.items()}


def measure(P: int, kv: str, ids: torch.Tensor, tokens: int, repeats: int) -> dict[str, Any]:
    """The rates of one kind of streams, and the bytes of its folders."""
    model = build(P, kv)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "source")
        model.save_pretrained(source)
        steps, sizes = {TORCH: by_torch(model, ids, tokens)}, {}
        for dtype in DTYPES:
            folder = Path(temporary, dtype)
            sizes[dtype] = export_onnx(str(source), folder, dtype=dtype)["bytes"]
            steps[f"onnx {dtype}"] = by_onnx(folder, ids, tokens)
        found = rates(steps, tokens, repeats)
    return {"num_streams": P, "kv": kv, "tokens_per_second": found, "bytes": sizes}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: tokens per second, and the size of each folder."""
    names = [f"ONNX {dtype}" for dtype in DTYPES]
    lines = [f"| P | `kv` | PyTorch float32 | {' | '.join(names)} | MB: {' | '.join(DTYPES)} |", "|---" * 9 + "|"]
    for row in rows:
        found, sizes = row["tokens_per_second"], row["bytes"]
        cells = [f"{found[name]:.1f}" for name in (TORCH, *(f"onnx {dtype}" for dtype in DTYPES))]
        cells += [f"{sizes[dtype] / 1e6:.0f}" for dtype in DTYPES]
        lines.append(f"| {row['num_streams']} | {row['kv'] if row['num_streams'] > 1 else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4], metavar="P")
    parser.add_argument("--kv", choices=["own", "shared"], nargs="+", default=["own", "shared"])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a results file, and no more")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))["rows"]))
        return

    ids = torch.randint(SHAPE["vocab_size"], (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    kinds = [(P, kv) for P in args.streams for kv in (args.kv if P > 1 else args.kv[:1])]
    where = {"processor": processor(), "threads": torch.get_num_threads()}
    where |= {"load_average": load_average()}
    where |= {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "shape": SHAPE}
    rows = []
    for P, kv in kinds:
        rows.append(measure(P, kv, ids, args.tokens, args.repeats))
        rate = ", ".join(f"{name} {rate:.1f}/s" for name, rate in rows[-1]["tokens_per_second"].items())
        print(f"P = {P}, {kv}: {rate}", flush=True)
    if args.output is not None:
        settings = {name: getattr(args, name) for name in ("prompt_tokens", "tokens", "repeats")}
        args.output.write_text(json.dumps(where | settings | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
