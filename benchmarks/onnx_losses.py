"""What weights in 8 and 4 bits cost a model in ONNX Runtime, with streams and without.

The package's small model, plain and with streams that have not been trained, is exported in each dtype. The loss is
that of the beginnings of held-out documents, an end-of-text token in front, by ONNX Runtime. What a dtype adds to it is
compared document by document with what the dtype adds to the plain model's.

    python benchmarks/onnx_losses.py --output benchmarks/results/onnx_losses.json
    python benchmarks/onnx_losses.py --table benchmarks/results/onnx_losses.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import wrap
from parscale.checkpoints import crossed_interval, format_interval, small_model_path, standard_library_split
from parscale.export.onnx import export_onnx

DTYPES = ("float32", "int8", "int4")
KINDS = ((1, "own"), (4, "own"), (4, "shared"), (2, "own"), (2, "shared"))


def texts(documents: int, tokens: int) -> list[list[int]]:
    """The first tokens of held-out documents that have as many."""
    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    found = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for _, text in standard_library_split()[1]]
    return [ids[: tokens + 1] for ids in found if len(ids) > tokens][:documents]


def losses(folder: Path, documents: list[list[int]]) -> list[float]:
    """Nats per token of each document, by ONNX Runtime."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    caches = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
    empty = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in caches}
    found = []
    for document in documents:
        ids = np.array([document])
        (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty})
        given = torch.from_numpy(logits[0, :-1]).double()
        found.append(float(torch.nn.functional.cross_entropy(given, torch.tensor(document[1:]))))
    return found


def measure(P: int, kv: str, documents: list[list[int]]) -> dict[str, Any]:
    """Losses of one kind in each dtype, by document."""
    model = AutoModelForCausalLM.from_pretrained(small_model_path(), dtype=torch.float32)
    if P > 1:
        wrap(model, P, kv=kv, seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(Path(temporary, "source"))
        found = {}
        for dtype in DTYPES:
            folder = Path(temporary, dtype)
            export_onnx(str(Path(temporary, "source")), folder, dtype=dtype)
            found[dtype] = losses(folder, documents)
            print(f"P = {P}, {kv}, {dtype}: {fmean(found[dtype]):.4f}", flush=True)
    return {"num_streams": P, "kv": kv, "losses": found}


def added(row: dict[str, Any], dtype: str) -> list[float]:
    """What a dtype adds to the loss, by document."""
    return [x - y for x, y in zip(row["losses"][dtype], row["losses"]["float32"], strict=True)]


def interval(values: list[float]) -> str:
    """The mean over documents, and its interval by Student's t."""
    return format_interval(asdict(crossed_interval([values])))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the loss, what each dtype adds, and how that differs from what it adds to the plain model's."""
    lower = DTYPES[1:]
    heads = [f"{dtype} adds | beside the plain model" for dtype in lower]
    lines = [f"| P | `kv` | float32 | {' | '.join(heads)} |", "|---" * (3 + 2 * len(lower)) + "|"]
    plain = rows[0]
    for row in sorted(rows, key=lambda row: (row["num_streams"], row["kv"])):
        cells = [
            str(row["num_streams"]),
            row["kv"] if row is not plain else "",
            f"{fmean(row['losses']['float32']):.4f}",
        ]
        for dtype in lower:
            more = [x - y for x, y in zip(added(row, dtype), added(plain, dtype), strict=True)]
            cells += [f"{fmean(added(row, dtype)):+.4f}", interval(more) if row is not plain else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256, help="of each document")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a results file, and no more")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))["rows"]))
        return
    documents = texts(args.documents, args.tokens)
    where = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    where |= {"documents": len(documents), "tokens": args.tokens}
    rows = []
    for P, kv in KINDS:  # what has been measured is kept when a later one is stopped
        rows.append(measure(P, kv, documents))
        if args.output is not None:
            args.output.write_text(json.dumps(where | {"rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
