"""What streams cost beside the arithmetic of P rows: ratios to the plain backbone at batch P*B, in one run.

The backbone's `lm_head` and loss run on B rows only, as ParScale's do. Prefill, decoding and training steps of both
models, with the same tensors, alternate in one process, and the fastest of each counts: whatever else a machine does
only adds time, and the ratio at P = 1, where both do the same, shows what is left of it. Peak memory comes from one
process for each model. The released code, where its folder is named, is held against the plain backbone likewise.

    python benchmarks/overhead.py --output benchmarks/results/overhead.json
    python benchmarks/overhead.py --released FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor
from released import released_model

# As wide beside its width and its vocabulary as models are; streams still add five times the share of a real model's
# parameters, since it has a fifth of the layers.
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 2560,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
DECODED_TOKENS = 24
Step = Callable[[], Any]


def build(kind: str, P: int, released: Path | None, device: str, shape: dict[str, Any] = SHAPE) -> Any:
    """A Qwen2 model of `shape`: `"plain"`, `"parscale"` or `"released"`."""
    torch.manual_seed(0)
    if kind == "released":
        assert released is not None
        return released_model(released, shape, P).to(device)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, attn_implementation="sdpa"))
    if kind == "parscale":
        from parscale import wrap

        wrap(model, P, init="random", seed=0)
    return model.to(device)


def share(model: Any, plain: Any) -> None:
    """Gives a model the plain one's tensors: where weights happen to lie in memory moves times by a tenth."""
    tensors = dict(plain.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name in module._parameters:
            if f"{path}.{name}" in tensors:
                module._parameters[name] = tensors[f"{path}.{name}"]


def forward(kind: str, model: Any, ids: torch.Tensor, P: int, cache: Any = None) -> torch.Tensor:
    """Logits of B rows: by streams, or by the plain backbone on P*B rows."""
    if kind != "plain":
        return model(ids, past_key_values=cache, use_cache=cache is not None).logits
    hidden = model.model(ids.repeat(P, 1), past_key_values=cache, use_cache=cache is not None)[0]
    return model.lm_head(hidden[: ids.shape[0]])


def prefill(kind: str, model: Any, ids: torch.Tensor, P: int) -> Step:
    """One forward pass without gradients."""

    def step() -> None:
        with torch.inference_mode():
            forward(kind, model.eval(), ids, P)

    return step


def decode(kind: str, model: Any, ids: torch.Tensor, P: int) -> Step:
    """One token after `ids`; the cache grows with every call."""
    cache: Any = transformers.DynamicCache()
    with torch.inference_mode():
        if kind == "released":  # which makes its own
            cache = model.eval()(ids, use_cache=True).past_key_values
        else:
            forward(kind, model.eval(), ids, P, cache)

    def step() -> None:
        with torch.inference_mode():
            forward(kind, model, ids[:, :1], P, cache)

    return step


def train(kind: str, model: Any, ids: torch.Tensor, P: int) -> Step:
    """Forward and backward, every parameter."""

    def step() -> None:
        model.train().zero_grad()
        logits = forward(kind, model, ids, P)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    return step


STEPS = {"prefill": prefill, "decode": decode, "train": train}


def seconds(step: Step, device: str) -> float:
    """Wall time of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(one: Step, plain: Step, repeats: int, device: str) -> dict[str, float]:
    """Ratio of the fastest steps, whose turns alternate, and both in seconds."""
    for step in (one, plain):
        step()
    times: dict[Step, list[float]] = {one: [], plain: []}
    for index in range(repeats):
        for step in (one, plain) if index % 2 == 0 else (plain, one):
            times[step].append(seconds(step, device))
    fastest, plain_fastest = min(times[one]), min(times[plain])
    return {"ratio": fastest / plain_fastest, "seconds": fastest, "plain_seconds": plain_fastest}


def peak_bytes(kind: str, P: int, B: int, S: int, released: Path | None, device: str) -> int:
    """Peak memory above what the interpreter and its libraries take, of one training step after another."""
    small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    train(kind, build(kind, P, released, device, SHAPE | small), torch.zeros(B, S, dtype=int).to(device), P)()
    before = _peak_resident()
    step = train(kind, build(kind, P, released, device), torch.randint(SHAPE["vocab_size"], (B, S)).to(device), P)
    for _ in range(2):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _peak_resident() - before


def _peak_resident() -> int:
    """Peak resident bytes of this process (Linux; `getrusage` would count the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each P, S and what is measured."""
    rows = []
    for P in args.streams:
        model, plain = build(kind, P, args.released, args.device), build("plain", P, None, args.device)
        share(model, plain)
        for S in args.lengths:
            ids = torch.randint(SHAPE["vocab_size"], (args.batch_size, S), device=args.device)
            for what, make in STEPS.items():
                repeats = DECODED_TOKENS if what == "decode" else args.repeats
                found = ratio(make(kind, model, ids, P), make("plain", plain, ids, P), repeats, args.device)
                rows.append({"model": kind, "what": what, "P": P, "S": S, "B": args.batch_size} | found)
                print(f"{kind:9} {what:8} P={P} S={S:5}  ratio {found['ratio']:.3f}", file=sys.stderr)
            if args.device == "cuda" or Path("/proc/self/status").exists():
                peaks = [_peak_in_process(name, P, S, args) for name in (kind, "plain")]
                found = {"ratio": peaks[0] / peaks[1], "bytes": peaks[0], "plain_bytes": peaks[1]}
                rows.append({"model": kind, "what": "train memory", "P": P, "S": S, "B": args.batch_size} | found)
                print(f"{kind:9} memory   P={P} S={S:5}  ratio {found['ratio']:.3f}", file=sys.stderr)
    return rows


def _peak_in_process(kind: str, P: int, S: int, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--peak", kind, "--streams", str(P), "--lengths", str(S)]
    command += ["--batch-size", str(args.batch_size), "--device", args.device, "--threads", str(args.threads)]
    if args.released is not None:
        command += ["--released", str(args.released)]
    # glibc then gives every large tensor its own pages and takes them back: peaks do not depend on fragmentation
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8], help="values of P")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024], help="values of S, tokens")
    parser.add_argument("--batch-size", type=int, default=1, help="B, sequences")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of prefill and training steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--released", type=Path, help="folder of the released modeling code")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--peak", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_bytes(args.peak, args.streams[0], args.batch_size, args.lengths[0], args.released, args.device))
        return
    kinds = ["parscale"] if args.released is None else ["parscale", "released"]
    rows = [row for kind in kinds for row in measure(kind, args)]
    result = {
        "processor": processor() if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": SHAPE,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
