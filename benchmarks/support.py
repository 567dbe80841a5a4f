"""Which causal language model classes of transformers take streams: tiny random models held to what wrapping promises.

    python benchmarks/support.py --output docs/architectures.md --jobs 2

writes the table, and the same for programs beside the other results. `--columns shared` examines that one alone, and
keeps the others as they were.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from promises import CONTEXT_TOLERANCE, NOT, NOT_BUILT, SUPPORTED, TOLERANCE, TRANSFORMS, Verdict, examine

import parscale

SHARED = "shared"
RESULTS = Path(__file__).with_name("results") / "support.json"


def examine_all(names: list[str], columns: list[str], jobs: int) -> dict[str, dict[str, Verdict]]:
    """Verdicts by class and column.

    Args:
        names: of the classes.
        columns: of `TRANSFORMS`.
        jobs: how many at once.
    """
    tasks = [(name, transform) for name in names for transform in columns]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=quiet) as pool:
        verdicts = list(pool.map(examine, *zip(*tasks, strict=True)))
    found: dict[str, dict[str, Verdict]] = {name: {} for name in names}
    for (name, transform), verdict in zip(tasks, verdicts, strict=True):
        found[name][transform] = verdict
    return found


def quiet() -> None:
    """One thread for each process, and nothing said by transformers."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def results(found: dict[str, dict[str, Verdict]]) -> dict[str, Any]:
    """What goes into the file for programs."""
    torch_version = str(torch.__version__).split("+")[0]
    versions = {"parscale": parscale.__version__, "torch": torch_version, "transformers": transformers.__version__}
    classes = {}
    for name, verdicts in found.items():
        fields = {
            transform: {key: value for key, value in dataclasses.asdict(verdict).items() if value}
            for transform, verdict in verdicts.items()
        }
        classes[name] = {"model_types": tiny_models.model_types(name), **fields}
    return {"versions": versions, "classes": classes}


def counts(classes: dict[str, Any], *transforms: str) -> dict[str, int]:
    """Classes by verdict, of `results`: the best one under any of the transforms."""
    best = (SUPPORTED, NOT, NOT_BUILT)
    verdicts = [min((fields[x]["verdict"] for x in transforms), key=best.index) for fields in classes.values()]
    return {verdict: verdicts.count(verdict) for verdict in best}


def page(found: dict[str, Any]) -> str:
    """The table in Markdown, with what stands around it, from `results`."""
    classes, transforms = found["classes"], [x for x in TRANSFORMS if x in next(iter(found["classes"].values()))]
    own = [transform for transform in transforms if transform != SHARED]
    by_version = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# Which architectures take streams",
        "",
        f"Made by `make support` with {by_version}.",
        "",
        "Every causal language model class of transformers (`AutoModelForCausalLM`) is built with about two layers",
        "and random weights, wrapped, and held to what wrapping promises: P = 1 and `unwrap` give the backbone's",
        "logits to the last bit; with a cache, the logits are those of one pass, and `generate` writes the same;",
        "streams change the logits, and equal streams mix to one of them; each tensor of each stream has a gradient,",
        "and the last token sees every prefix token, whatever the window; a saved folder, and saved streams, load to",
        f"the same logits. Float32, on a CPU, to {TOLERANCE:.0e} of the largest logit.",
        "",
        f"| | {SUPPORTED} | {NOT} | {NOT_BUILT} |",
        "|---|---|---|---|",
    ]
    for label, chosen in [*((transform, [transform]) for transform in transforms), ("any of them", transforms)]:
        lines.append(f"| {label} | " + " | ".join(map(str, counts(classes, *chosen).values())) + " |")
    lines += [
        "",
        f"- **{', '.join(own)}**: what makes the streams differ. *yes*: every promise is kept; a number: the",
        "  reason below.",
        *_about_shared(transforms),
        "- **without a prefix**: kinds of layers that have no keys and values to put a prefix in front of; there the",
        "  streams differ by what reaches these layers.",
        '- **context**: whether a stream that starts as a text (`init="context"`), by itself, is the backbone that',
        f"  reads the text first. *exact*: to {CONTEXT_TOLERANCE:.0e}; *approximate*: it is not, and `wrap` says so;",
        "  *refused*: `wrap` raises an error.",
        "- **notes**: what the plain backbone itself does not do, so that it is not asked of the wrapped one.",
        "",
        f"| class | model types | {' | '.join(transforms)} | without a prefix | context | notes |",
        "|---|---|" + "---|" * len(transforms) + "---|---|---|",
    ]
    reasons: list[str] = []
    for name, fields in classes.items():
        cells = []
        for verdict in (fields[transform] for transform in transforms):
            reason = verdict.get("reason", "").replace(name, "this class")
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(f"{verdict['verdict']} ({reasons.index(reason) + 1})" if reason else "yes")
        types, kinds = (
            ", ".join(f"`{kind}`" for kind in kinds)
            for kinds in (fields["model_types"], fields[transforms[0]].get("without", []))
        )
        context, notes = fields[transforms[0]].get("context", ""), "; ".join(fields[transforms[0]].get("notes", []))
        lines.append(f"| `{name}` | {types} | {' | '.join(cells)} | {kinds} | {context} | {notes} |")
    lines += ["", "## Reasons", "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))]
    return "\n".join(lines) + "\n"


def _about_shared(transforms: list[str]) -> list[str]:
    if SHARED not in transforms:
        return []
    return [
        '- **shared**: streams with a prefix that read the keys and values of stream 0 (`kv="shared"`). Equal streams',
        "  are not asked for, since stream 0 has no prefix; the cache has the rows of the backbone's.",
    ]


def main() -> None:
    columns = list(TRANSFORMS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes, and nothing is written")
    parser.add_argument("--output", type=Path, help="the page to write, and beside the other results the same as JSON")
    parser.add_argument("--columns", nargs="+", choices=columns, default=columns, help="by default all of them")
    parser.add_argument("--jobs", type=int, default=2, help="classes at once")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.only or ()) - set(tiny_models.names()))
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no {', '.join(unknown)} for causal language models")
    verdicts = examine_all(arguments.only or tiny_models.names(), arguments.columns, arguments.jobs)
    for name, by_transform in verdicts.items():
        for transform, verdict in by_transform.items():
            details = filter(None, [verdict.reason, *verdict.without, verdict.context, *verdict.notes])
            print(f"{name} ({transform}): {verdict.verdict}", *details, sep="; ")
    found = results(verdicts)
    if arguments.columns != columns and not arguments.only:
        earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["classes"]
        found["classes"] = {name: earlier.get(name, {}) | fields for name, fields in found["classes"].items()}
    for transform in arguments.columns:
        numbers = counts(found["classes"], transform)
        print(transform, *(f"{number} {verdict}" for verdict, number in numbers.items()), sep=", ")
    if arguments.output is not None and not arguments.only:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page(found), encoding="utf-8")
        RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
