"""What streams cost beside the arithmetic of P rows: ratios to the plain backbone at batch P*B, in one run.

The backbone's `lm_head` and loss run on B rows only, as ParScale's do. Prefill, decoding and training steps of both
models, with the same tensors, alternate in one process, and the fastest of each counts: whatever else a machine does
only adds time, and the ratio at P = 1, where both do the same, shows what is left of it. `low` and `high` are the
quartiles of the ratio over the pairs of turns. Peak memory comes from one process for each model. The released code,
where its folder is named, is held against the plain backbone likewise.

Beside each ratio stands its floor: the same ratio of what has to be done, once the aggregator's and the prefix's own
arithmetic is added; operations for a prefill and a training step, bytes for a decoded token, parameters and their
gradients for memory. A row that is measured again takes its place in the file of results; the others stay.

    python benchmarks/overhead.py --output benchmarks/results/overhead.json
    python benchmarks/overhead.py --what decode --output benchmarks/results/overhead.json
    python benchmarks/overhead.py --shapes narrow --streams 4 --lengths 256
    python benchmarks/overhead.py --released FOLDER --shapes small
    python benchmarks/overhead.py --table benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import transformers
from machine import is_gpu, seconds, surroundings
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
SHAPES: dict[str, dict[str, Any]] = {
    "small": SHAPE,
    # little beside what streams add
    "narrow": SHAPE | {"vocab_size": 4096, "intermediate_size": 1408},
    # Qwen2.5-0.5B, but for its number of layers
    "qwen": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 4,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "heads": SHAPE | {"intermediate_size": 1408, "num_attention_heads": 32, "num_key_value_heads": 32},
}
PREFIX_LENGTH = 48  # T, as wrap takes it by default
LONGEST = 4096  # tokens in a cache, beside the lengths of prompts
DECODED_TOKENS = 24
Step = Callable[[], Any]


def build(kind: str, P: int, released: Path | None, device: str, name: str, **changed: int) -> Any:
    """A model: `"plain"`, `"parscale"`, `"shared"` (streams that share keys and values) or `"released"`.

    Args:
        kind: which of these.
        P: streams.
        released: folder of the released code.
        device: where it runs.
        name: of the shape.
        **changed: sizes other than that has.
    """
    shape, family = SHAPES[name] | changed, "Llama" if name == "llama" else "Qwen2"
    torch.manual_seed(0)
    if kind == "released":
        assert released is not None
        return released_model(released, shape, P).to(device)
    config = getattr(transformers, f"{family}Config")
    positions = {"max_position_embeddings": 2 * LONGEST}
    model = getattr(transformers, f"{family}ForCausalLM")(config(**shape | positions, attn_implementation="sdpa"))
    if kind != "plain":
        from parscale import wrap

        kv = "shared" if kind == "shared" else "own"
        wrap(model, P, prefix_length=PREFIX_LENGTH, init="random", seed=0, kv=kv)
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
    """One token after as many as `ids` has; the cache grows with every call."""
    cache: Any = transformers.DynamicCache()
    model.eval()
    with torch.inference_mode():
        if kind == "released":  # which makes its own
            cache = model(ids, use_cache=True).past_key_values
        else:
            fill(cache, model.config, ids.shape[0] * (1 if kind == "shared" else P), ids)

    def step() -> None:
        with torch.inference_mode():
            forward(kind, model, ids[:, :1], P, cache)

    return step


def fill(cache: Any, config: Any, rows: int, ids: torch.Tensor) -> None:
    """Keys and values of a text, at random: what they are takes no time."""
    size = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        states = torch.randn(rows, config.num_key_value_heads, ids.shape[1], size, device=ids.device)
        cache.update(states, states.clone(), layer)


def train(kind: str, model: Any, ids: torch.Tensor, P: int) -> Step:
    """Forward and backward, every parameter."""

    def step() -> None:
        model.train().zero_grad()
        logits = forward(kind, model, ids, P)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    return step


STEPS = {"prefill": prefill, "decode": decode, "train": train}
MEMORY = "train memory"


def ratio(one: Step, plain: Step, repeats: int, device: str) -> dict[str, float]:
    """Ratio of the fastest steps, whose turns alternate, and both in seconds."""
    for step in (one, plain):
        step()
    times: dict[Step, list[float]] = {one: [], plain: []}
    for index in range(repeats):
        for step in (one, plain) if index % 2 == 0 else (plain, one):
            times[step].append(seconds(step, device))
    fastest, plain_fastest = min(times[one]), min(times[plain])
    pairs = [a / b for a, b in zip(times[one], times[plain], strict=True)]
    low, _, high = quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    found = {"ratio": fastest / plain_fastest, "low": low, "high": high}
    return found | {"seconds": fastest, "plain_seconds": plain_fastest}


# -- what has to be done


def extra_operations(shape: dict[str, Any], P: int, rows: int, S: int) -> tuple[int, int]:
    """Multiplications and additions of a forward pass that streams add: the aggregator's, and attention to prefixes.

    Args:
        shape: of the model.
        P: streams.
        rows: B.
        S: tokens.
    """
    if P == 1:
        return 0, 0
    H = shape["hidden_size"]
    aggregator = 2 * rows * S * (P * H * H + H * P + P * H)  # both projections and the mixture
    return aggregator, 4 * P * rows * S * PREFIX_LENGTH * H * shape["num_hidden_layers"]


def floor(what: str, kind: str, shape: dict[str, Any], P: int, rows: int, S: int) -> float:
    """The ratio of what has to be done, with streams to the plain backbone at P*B rows; arguments as above."""
    H, layers, vocabulary = shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]
    keys = H // shape["num_attention_heads"] * shape["num_key_value_heads"]  # G*D
    weights = layers * (2 * H * H + 2 * H * keys + 3 * H * shape["intermediate_size"])
    if what == "decode":  # bytes in units of one number: weights, cache, prefixes, aggregator
        cache = 2 * layers * keys * rows * S
        plain = weights + vocabulary * H + P * cache
        own = weights + vocabulary * H + (1 if kind == "shared" else P) * cache
        streams = P - (kind == "shared")
        extra = 2 * layers * keys * streams * PREFIX_LENGTH + P * H * (H + 1) if P > 1 else 0
        return (own + extra) / plain
    attention = 4 * P * rows * S * (S + 1) // 2 * H * layers
    matrices = 2 * rows * S * (P * weights + vocabulary * H)
    aggregator, prefix = extra_operations(shape, P, rows, S)
    # backwards a matrix product is two, and attention without its weights is five in place of two
    linear, attended = (3.0, 3.5) if what == "train" else (1.0, 1.0)
    plain = linear * matrices + attended * attention
    return (plain + linear * aggregator + attended * prefix) / plain


def memory_floor(kind: str, shape: dict[str, Any], P: int, plain_bytes: int) -> float:
    """The ratio of memory in training if streams add their parameters and these' gradients, in float32, alone."""
    if P == 1:
        return 1.0
    H, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = H // shape["num_attention_heads"] * shape["num_key_value_heads"]  # G*D
    aggregator = P * H * H + H + P * H + P
    prefixes = 2 * layers * (P - (kind == "shared")) * PREFIX_LENGTH * keys
    return 1 + 2 * 4 * (aggregator + prefixes) / plain_bytes


# -- all of them


def peak_bytes(kind: str, P: int, S: int, args: argparse.Namespace) -> int:
    """Peak memory above what the interpreter and its libraries take, of one training step after another."""
    name, B = args.shapes[0], args.batch_size
    small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    few = small | {"num_attention_heads": 4, "num_key_value_heads": 2}

    def steps(**changed: int) -> None:
        model = build(kind, P, args.released, args.device, name, **changed)
        step = train(kind, model, torch.randint(256, (B, S)).to(args.device), P)
        for _ in range(2):
            step()

    steps(**few)
    before = _peak_resident()
    steps()
    if is_gpu(args.device):
        return torch.cuda.max_memory_allocated(args.device)
    return _peak_resident() - before


def _peak_resident() -> int:
    """Peak resident bytes of this process (Linux; `getrusage` would count the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each shape, P, S and what is measured."""
    kinds = ["parscale", "shared"] if args.released is None else ["parscale", "shared", "released"]
    for name in args.shapes:
        for P in args.streams:
            plain = build("plain", P, None, args.device, name)
            for kind in kinds:
                model = build(kind, P, args.released, args.device, name)
                share(model, plain)
                for what, S in _measured(kind, args):
                    ids = torch.randint(SHAPES[name]["vocab_size"], (args.batch_size, S), device=args.device)
                    make, repeats = STEPS[what], DECODED_TOKENS if what == "decode" else args.repeats
                    steps = make(kind, model, ids, P), make("plain", plain, ids, P)
                    row = {"shape": name, "model": kind, "what": what, "P": P, "S": S, "B": args.batch_size}
                    least = {"floor": floor(what, kind, SHAPES[name], P, args.batch_size, S)}
                    yield row | ratio(*steps, repeats, args.device) | least
            for S in args.lengths if MEMORY in args.what and _peaks_are_known(args.device) else ():
                peaks = {kind: _peak_in_process(kind, name, P, S, args) for kind in ("plain", *kinds)}
                for kind in kinds:
                    row = {"shape": name, "model": kind, "what": MEMORY, "P": P, "S": S, "B": args.batch_size}
                    least = memory_floor(kind, SHAPES[name], P, peaks["plain"])
                    found = {"bytes": peaks[kind], "plain_bytes": peaks["plain"], "floor": least}
                    yield row | {"ratio": peaks[kind] / peaks["plain"]} | found


def _measured(kind: str, args: argparse.Namespace) -> list[tuple[str, int]]:
    """What is measured of a model, and at which S; of shared keys and values, what is another computation."""
    found = [("decode", S) for S in sorted({*args.lengths, *args.cached})]
    if kind != "shared":
        found += [(what, S) for what in ("prefill", "train") for S in args.lengths]
    return [(what, S) for what, S in found if what in args.what]


def _peaks_are_known(device: str) -> bool:
    return is_gpu(device) or Path("/proc/self/status").exists()


def _peak_in_process(kind: str, name: str, P: int, S: int, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--peak", kind, "--shapes", name, "--streams", str(P), "--lengths", str(S)]
    command += ["--batch-size", str(args.batch_size), "--device", args.device, "--threads", str(args.threads)]
    if args.released is not None:
        command += ["--released", str(args.released)]
    # glibc then gives every large tensor its own pages and takes them back: peaks do not depend on fragmentation
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("shape", "model", "what", "P", "S", "B"))


LABELS = {"parscale": "own", "shared": "shared", "released": "own, released code"}


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: of each shape the highest ratio divided by its floor, from P = 2 on; in brackets at P = 1 (noise)."""
    columns = [("prefill", 64), ("prefill", 256), ("decode", 0), ("train", 0), (MEMORY, 0)]
    lines = ["| shape | keys and values | prefill, 64 tokens | prefill, longer | decode | training step | memory |"]
    lines.append("|---" * 7 + "|")
    for name, model in dict.fromkeys((row["shape"], row["model"]) for row in rows):
        cells = []
        for what, least in columns:
            most = 64 if (what, least) == ("prefill", 64) else LONGEST
            found = [row for row in rows if (row["shape"], row["model"], row["what"]) == (name, model, what)]
            found = [row for row in found if least <= row["S"] <= most]
            sides = [
                [row["ratio"] / row["floor"] for row in found if (row["P"] == 1) is alone] for alone in (False, True)
            ]
            cells.append("{:.2f} ({:.2f})".format(*map(max, sides)) if all(sides) else "")
        lines.append(f"| {name} | {LABELS[model]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ratios; in brackets their floors, and the quartiles over the pairs of turns."""
    lines = ["| shape | keys and values | P | S | prefill | decode, per token | training step | memory in training |"]
    lines.append("|---" * 8 + "|")
    found = {tuple(row[key] for key in ("shape", "model", "P", "S", "what")): row for row in rows}
    shapes, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "model"))
    places = sorted(
        {key[:4] for key in found}, key=lambda key: (shapes.index(key[0]), key[2], models.index(key[1]), key[3])
    )
    for name, model, P, S in places:
        cells = [_cell(found.get((name, model, P, S, what))) for what in (*STEPS, MEMORY)]
        lines.append(f"| {name} | {LABELS[model]} | {P} | {S} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    beside = [f"{row['floor']:.2f}"] if "floor" in row else []
    beside += [f"{row['low']:.2f} to {row['high']:.2f}"] if "low" in row else []
    return f"{row['ratio']:.2f}" + (f" ({'; '.join(beside)})" if beside else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8], help="values of P")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models")
    parser.add_argument("--what", nargs="+", choices=[*STEPS, MEMORY], default=[*STEPS, MEMORY], help="what to measure")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="values of S, tokens")
    parser.add_argument("--cached", type=int, nargs="+", default=[LONGEST], help="further S, for a decoded token")
    parser.add_argument("--batch-size", type=int, default=1, help="B, sequences")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of prefill and training steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--released", type=Path, help="folder of the released modeling code")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a results file, and no more")
    parser.add_argument("--peak", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.table:
        rows = json.loads(args.table.read_text(encoding="utf-8"))["rows"]
        print(f"{summary(rows)}\n\n<details markdown>\n<summary>Every row</summary>\n\n{table(rows)}\n\n</details>")
        return
    if args.peak:
        print(peak_bytes(args.peak, args.streams[0], args.lengths[0], args))
        return
    shapes = {name: SHAPES[name] for name in args.shapes}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if args.output is not None and args.output.exists():
        found = json.loads(args.output.read_text(encoding="utf-8"))
        shapes = found["shapes"] | shapes
        rows = {_key(row): row for row in found["rows"]}
    for row in measure(args):
        rows[_key(row)] = row
        beside = f"  floor {row['floor']:.3f}" if "floor" in row else ""
        print(*_key(row)[:-1], f"ratio {row['ratio']:.3f}{beside}", file=sys.stderr)
    result = {
        **surroundings(args.device, args.threads),
        "shapes": shapes,
        "rows": list(rows.values()),
    }
    text = json.dumps(result, indent=1)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
