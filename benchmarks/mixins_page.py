"""Writes the page of what the tests of transformers and PEFT say about wrapped models.

python benchmarks/mixins_page.py --output docs/results/mixins.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
HEAD = """# The tests of transformers and PEFT

Made by `python benchmarks/mixins_page.py --output docs/results/mixins.md`.

A test that the authors of transformers or PEFT wrote for a plain model should pass on the same model with streams.
Each test runs on a small random model, and, if it passes there, on one that is wrapped as soon as it is made or
loaded (float32, on a CPU, prefixes of three tokens).

- **tests**: all tests that were collected.
- **do not apply**: the tests skip themselves on the plain model.
- **fail plain**: fail on the plain model too, so they say nothing about streams.
- **pass**, **skip**, **fail**: on the wrapped model, of those that pass on the plain one.

`GenerationTesterMixin` checks shapes in methods that the tests of a model may override. For wrapped models they expect
P rows for each sequence, stream-major (B rows in a shared cache and in the last hidden states), and attention weights
with a column more for each token of the prefix. What a test generates, continues or compares is not touched. BERT has
no text to generate; `kv="shared"` is for decoders, and so not for BERT and T5.
"""
LM_EVAL = """
## lm-eval

Nothing of lm-eval's own tests can be run on a wrapped model here. Three of its files run a model of transformers:
`test_huggingface.py` (8 tests) and `test_evaluator.py` (6) on Pythia models and data sets of the Hub, whose
figures nearly all of them assert, and `test_hf_steered.py`, which skips itself. A model with streams has other figures.
[In their place](../evaluation.md#how-far-it-was-checked) all kinds of requests are compared with the model's logits.
"""
COLUMNS = [
    "| model | P | `kv` | tests | do not apply | fail plain | pass | skip | fail |",
    "|---|---|---|---|---|---|---|---|---|",
]
PLAIN = "do not apply to the plain model", "fail on the plain model"


def rows_of(name: str, found: dict[str, Any]) -> list[str]:
    """The rows of a table, one for each set of streams."""
    skipped, failing = (found[key] for key in PLAIN)
    return [
        f"| {name} | {row['num_streams']} | {row['kv']} | {found['tests']} | {skipped} | {len(failing)} "
        f"| {row['pass']} | {len(row['skipped'])} | {len(row['fail'])} |"
        for row in found["wrapped"]
    ]


def function_of(test: str) -> str:
    """The name of a test's function, without class and parameters."""
    return test.rpartition("::")[2].partition("[")[0]


def failures_of(families: dict[str, Any]) -> list[str]:
    """One line for each test that fails on a wrapped model alone, and why."""
    seen: dict[str, set[str]] = {}
    for name, found in families.items():
        for row in found["wrapped"]:
            for test, failure in row["fail"].items():
                why = failure["reason"] or f"unexplained: `{failure['outcome']}`"
                seen.setdefault(f"| `{function_of(test)}` | {why} |", set()).add(name)
    if not seen:
        return ["No test fails on a wrapped model alone."]
    lines = [f"{line} {', '.join(sorted(names))} |" for line, names in sorted(seen.items())]
    return ["| fails on wrapped models | why | models |", "|---|---|---|", *lines]


def plain_failures_of(families: dict[str, Any]) -> list[str]:
    """One line for each test that fails on a plain model, and what it says."""
    lines = [
        f"| `{function_of(test)}` | {name} | `{outcome.replace('|', '/')}` |"
        for name, found in families.items()
        for test, outcome in found[PLAIN[1]].items()
    ]
    lines = list(dict.fromkeys(lines))
    return ["", "| fails on the plain model | model | says |", "|---|---|---|", *lines] if lines else []


def section(title: str, families: dict[str, Any]) -> str:
    """A table of counts and one of reasons."""
    counts = [*COLUMNS, *(line for name, found in families.items() for line in rows_of(name, found))]
    return "\n".join(["", f"## {title}", "", *counts, "", *failures_of(families), *plain_failures_of(families), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    measured = json.loads((RESULTS / "mixins.json").read_text())
    page = HEAD
    for found in measured["mixins"].values():
        chosen = f", `--only '{found['only']}'`" if found["only"] else ""
        others = f", tests of {found['version']}" if found["version"] != measured["transformers"] else ""
        title = f"transformers {measured['transformers']}{others}: `{found['mixin']}`{chosen}"
        page += section(title, found["families"])
    adapters = RESULTS / "mixins_peft.json"
    if adapters.exists():
        found = json.loads(adapters.read_text())
        title = f"PEFT {found['peft']}: tests of decoder models"
        page += section(title, {", ".join(name.split("/")[-1] for name in found["models"]): found})
        page += f'\nChosen with `-k "{found["only"]}"`.\n' if found["only"] else ""
        page += "\nThe streams are frozen: they would train beside an adapter, but tests of training assert that\n"
        page += "nothing else has a gradient.\n"
    else:
        page += "\nPEFT's tests have not been run to their end yet (`python benchmarks/mixins_peft.py`).\n"
    args.output.write_text(page + LM_EVAL)


if __name__ == "__main__":
    main()
