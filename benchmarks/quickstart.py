"""The quickstart's figures for the documentation, from a run's `report.json`: without times and places of that machine.

parscale quickstart --output build/quickstart
python benchmarks/quickstart.py build/quickstart/report.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parscale.checkpoints import HELD_AGAINST, QUICKSTART_CONTROLS, format_interval, quickstart_sentences

RESULTS = Path(__file__).parent / "results"
OF_THE_MACHINE = ("seconds", "output", "threads")


def published(report: Mapping[str, Any]) -> dict[str, Any]:
    """What of a report does not depend on how fast the machine was."""
    kept = {name: value for name, value in report.items() if name not in OF_THE_MACHINE}
    models = {
        name: {key: value for key, value in figures.items() if key != "training_seconds"}
        for name, figures in report["models"].items()
    }
    return kept | {"models": models}


def tables(report: Mapping[str, Any]) -> str:
    """Losses by model, differences of streams from their controls, and what they say, as Markdown."""
    models, comparisons = report["models"], report["comparisons"]
    places = [(text, where) for text, found in next(iter(models.values()))["loss"].items() for where in found]
    documents = {(entry["text"], entry["where"]): entry["documents"] for entry in comparisons}
    heads = [f"{where} of {text} ({documents[text, where]})" for text, where in places]
    lines = [_row("nats per token", *heads), _row(*["---"] * (1 + len(heads)))]
    for figures in models.values():
        lines.append(_row(figures["title"], *(f"{figures['loss'][text][where]:.4f}" for text, where in places)))
    lines += ["", _row("difference (95 % interval)", *heads), _row(*["---"] * (1 + len(heads)))]
    shown = [(arm, "untouched") for arm in models if arm != "untouched"]
    shown += [(arm, baseline) for arm in QUICKSTART_CONTROLS for baseline in HELD_AGAINST[arm] if baseline in models]
    shown = list(dict.fromkeys(shown))
    for arm, baseline in shown:
        found = {
            (entry["text"], entry["where"]): format_interval(entry)
            for entry in comparisons
            if (entry["arm"], entry["baseline"]) == (arm, baseline)
        }
        lines.append(_row(f"{models[arm]['title']}, against {models[baseline]['title']}", *(found[p] for p in places)))
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in quickstart_sentences(report))]) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write `results/quickstart.json` and `results/quickstart.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="a run's report.json")
    report = published(json.loads(parser.parse_args().report.read_text(encoding="utf-8")))
    (RESULTS / "quickstart.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "quickstart.md").write_text(tables(report), encoding="utf-8")


if __name__ == "__main__":
    main()
