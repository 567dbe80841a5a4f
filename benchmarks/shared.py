"""What streams cost with keys and values of their own and with shared ones: ratios to the plain backbone, in one run.

For each P and length of prompt, all at batch B and on the same tensors: the time to the first token (a prompt whose
last logits are kept, into an empty cache), the time of a further token, and the bytes of the cache. The models take
turns in one process, and the fastest turn of each counts: whatever else a machine does only adds time.

    python benchmarks/shared.py --output benchmarks/results/shared.json
    python benchmarks/shared.py --table benchmarks/results/shared.json

The same on a GPU by bytes and arithmetic alone, with the bytes of a step, the batches up to which it costs little, and
those from which a plain model of equal loss is faster:

    python benchmarks/shared.py --counted
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import seconds, surroundings
from overhead import SHAPE, share
from transformers import DynamicCache

from parscale import wrap
from parscale.scaling_laws import Cost, Hardware, cost, crossover, fit, published, published_models

COUNTED = ("1.6B", "h100")
COUNTED_BATCHES, COUNTED_LENGTHS = (1, 8, 64), (512, 4096, 32768)
STREAMS_KEYS = ("P = 4: own", "shared", "P = 8: own", "shared")  # columns
NEW_TOKENS = 256  # of an answer, where it is compared with that of the model of equal loss
LIMIT = 1.10  # up to which a step with eight streams costs little more than a plain one
BYTES = Hardware("bytes", "one byte a second", 1e9, 1e-9, 1e30, 1e30, 1, 1)  # its seconds are the bytes
KINDS = ("plain", "own", "shared")


def models(P: int, device: str) -> dict[str, Any]:
    """A plain Qwen2, and two with P streams on the same tensors."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPE, attn_implementation="sdpa")
    found = {}
    for kind in KINDS:
        found[kind] = transformers.Qwen2ForCausalLM(config).to(device).eval()
        if kind != "plain":
            wrap(found[kind], P, init="random", seed=0, kv=kind)
            share(found[kind], found["plain"])
    return found


def bytes_of(cache: DynamicCache) -> int:
    """What the keys and values of a cache take."""
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def first_token(model: Any, ids: torch.Tensor) -> DynamicCache:
    """Reads a prompt; the cache that it leaves."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def further_token(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Steps after a prompt; the cache grows with each."""
    cache = first_token(model, ids)

    def step() -> None:
        with torch.inference_mode():
            model(ids[:, :1], past_key_values=cache, logits_to_keep=1)

    return step


def in_turns(steps: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """The fastest of each, after one turn that does not count."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for turn in range(repeats + 1):
        for kind in sorted(steps, reverse=turn % 2 == 1):
            taken = seconds(steps[kind], device)
            if turn:
                times[kind].append(taken)
    return {kind: min(taken) for kind, taken in times.items()}


def measure(P: int, S: int, B: int, repeats: int, device: str) -> dict[str, Any]:
    """One row: seconds and bytes of each kind, and their ratios to the plain backbone."""
    found = models(P, device)
    ids = torch.randint(SHAPE["vocab_size"], (B, S), device=device)
    firsts: dict[str, Callable[[], Any]] = {
        kind: lambda model=model: first_token(model, ids) for kind, model in found.items()
    }
    furthers = {kind: further_token(model, ids) for kind, model in found.items()}
    figures = {
        "first_token_seconds": in_turns(firsts, repeats, device),
        "further_token_seconds": in_turns(furthers, 3 * repeats, device),
        "cache_bytes": {kind: float(bytes_of(first())) for kind, first in firsts.items()},
    }
    row: dict[str, Any] = {"P": P, "S": S, "B": B}
    for name, by_kind in figures.items():
        row[name] = by_kind
        row[name.rpartition("_")[0] + "_ratio"] = {kind: by_kind[kind] / by_kind["plain"] for kind in KINDS[1:]}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ratios to the plain backbone at the same batch."""
    columns = ("first token: own", "shared", "further token: own", "shared", "shared to own", "cache: own", "shared")
    lines = _head("P", "prompt, tokens", *columns)
    for row in rows:
        ratios = [
            row[f"{what}_ratio"][kind] for what in ("first_token", "further_token", "cache") for kind in KINDS[1:]
        ]
        own, shared = ratios[2:4]
        lines.append(_row(row["P"], row["S"], *ratios[:4], shared / own, *ratios[4:]))
    return "\n".join(lines)


def counted(P: int, B: int, S: int, kv: str = "own", hardware: str | Hardware = COUNTED[1]) -> Cost:
    """A prompt and one step, by the cost model."""
    options: dict[str, Any] = {"num_streams": P, "batch_size": B, "input_length": S, "output_length": 2, "kv": kv}
    return cost(published_models()[COUNTED[0]], hardware=hardware, **options)


def counted_table() -> str:
    """Markdown, by the cost model: times, bytes, where P = 8 costs little, and where P streams cost too much."""
    return "\n\n".join("\n".join(lines) for lines in (_times(), _bytes(), _little_more(), _crossovers()))


def _times() -> list[str]:
    """A prompt and a further token: seconds of the plain model, and ratios to it."""
    lines = _head("batch", "prompt, tokens", "prompt, P = 8: own", "shared", "a further token, P = 1", *STREAMS_KEYS)
    for B, S in itertools.product(COUNTED_BATCHES, COUNTED_LENGTHS):
        plain = counted(1, B, S)
        first = [counted(8, B, S, kv).prefill_seconds / plain.prefill_seconds for kv in KINDS[1:]]
        further = [counted(P, B, S, kv).decode_seconds / plain.decode_seconds for P in (4, 8) for kv in KINDS[1:]]
        lines.append(_row(B, f"{S:,}", *first, f"{1000 * plain.decode_seconds:.2f} ms", *further))
    return lines


def _bytes() -> list[str]:
    """What a further token reads and writes: the plain model's, and ratios to it."""
    lines = _head("batch", "prompt, tokens", "bytes of a further token, P = 1", *STREAMS_KEYS)
    for B, S in itertools.product(COUNTED_BATCHES, COUNTED_LENGTHS):
        plain = counted(1, B, S, hardware=BYTES).decode_seconds
        ratios = [counted(P, B, S, kv, BYTES).decode_seconds / plain for P in (4, 8) for kv in KINDS[1:]]
        lines.append(_row(B, f"{S:,}", f"{plain / 1e9:.2f} GB", *ratios))
    return lines


def _little_more() -> list[str]:
    """The batches at which a step with eight streams costs at most `LIMIT` times a plain one."""
    lines = _head(f"up to {LIMIT:.2f} with P = 8", *(f"{S:,} tokens" for S in COUNTED_LENGTHS))
    return lines + [_row(kv, *(batches_within(S, kv) for S in COUNTED_LENGTHS)) for kv in KINDS[1:]]


def _crossovers() -> list[str]:
    """The batch from which streams are slower than the plain, wider model of equal loss."""
    law, model = fit(*published("stack")), published_models()[COUNTED[0]]
    lines = _head("P", "keys", *(f"{S:,} tokens" for S in COUNTED_LENGTHS))
    for P, kv in itertools.product((2, 4, 8), KINDS[1:]):
        options: dict[str, Any] = {"num_streams": P, "kv": kv, "hardware": COUNTED[1], "output_length": NEW_TOKENS}
        found = [crossover(law, model, input_length=S, **options) for S in COUNTED_LENGTHS]
        lines.append(_row(P, kv, *("never" if batch is None else f"batch {batch}" for batch in found)))
    return lines


def _head(*titles: str) -> list[str]:
    return [_row(*titles), "|---" * len(titles) + "|"]


def _row(*cells: Any) -> str:
    return f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def batches_within(S: int, kv: str) -> str:
    """The batches, of 1 to the largest, whose steps with eight streams cost at most `LIMIT` times a plain one."""
    most = COUNTED_BATCHES[-1]
    within = [
        B for B in range(1, most + 1) if counted(8, B, S, kv).decode_seconds <= LIMIT * counted(1, B, S).decode_seconds
    ]
    if within != list(range(1, len(within) + 1)):
        return f"batch {', '.join(map(str, within))}"
    return {0: "no batch", 1: "batch 1", most: "every batch"}.get(len(within), f"batch 1 to {len(within)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8], help="values of P")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 4096], help="values of S, tokens of a prompt")
    parser.add_argument("--batch-size", type=int, default=1, help="B, prompts")
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns of each model at a prompt; three times as many steps"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a results file, and no more")
    parser.add_argument("--counted", action="store_true", help="print the table of the cost model, and no more")
    args = parser.parse_args()
    if args.counted:
        print(counted_table())
        return
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))["rows"]))
        return
    torch.set_num_threads(args.threads)
    SHAPE["max_position_embeddings"] = max(args.lengths) + 4 * args.repeats
    rows = []
    for P, S in itertools.product(args.streams, args.lengths):
        rows.append(measure(P, S, args.batch_size, args.repeats, args.device))
        ratios = {name: value for name, value in rows[-1].items() if name.endswith("_ratio")}
        print(f"P={P} S={S:5} {ratios}", file=sys.stderr)
    result = {
        **surroundings(args.device, args.threads),
        "shape": SHAPE,
        "rows": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
