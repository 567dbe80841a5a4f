"""Counts what the code of the packages is made of, and writes the tables of `docs/how/code.md`.

    .venv/bin/python tools/code_figures.py
    .venv/bin/python tools/code_figures.py --tree FOLDER --column before
    .venv/bin/python tools/code_figures.py --tests build/tests.xml

The first line counts this tree. The second counts another one, such as a clone at an older commit. The third adds how
long each room of the tests takes: run `pytest -m "not gpu and not nightly" --junit-xml build/tests.xml` before, with
nothing else on the machine. What is a circle and what is a private name is read in `tests/test_rooms.py` and
`tests/compat/test_private_names.py`, which forbid both.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import runpy
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from packaging.requirements import Requirement
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "code.json"
COLUMNS = ("before", "now")
COMPAT = ("parscale.compat", "parscale.kernels.compat")  # where private names may stand
Function = ast.FunctionDef | ast.AsyncFunctionDef


def counted(tree: Path) -> dict[str, Any]:
    """The figures of a source tree with the four packages."""
    rooms = runpy.run_path(str(ROOT / "tests" / "test_rooms.py"))
    found = rooms["modules"]({name: tree / path.relative_to(ROOT) for name, path in rooms["SOURCES"].items()})
    found = {name: path for name, path in found.items() if "notebooks" not in path.parts}
    lines = {name: len(path.read_text().splitlines()) for name, path in found.items()}
    functions = {f"{name}.{node.name}": node for name, path in found.items() for node in functions_of(path)}
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions.items()}
    annotated = [annotation for path in found.values() for annotation in parameters_of(path)]
    return {
        "commit": commit_of(tree),
        "modules": len(found),
        "lines": sum(lines.values()),
        "largest module": largest(lines),
        "longest function": largest(lengths),
        "typed parameters": len(annotated),
        "of type Any": sum(annotation == "Any" for annotation in annotated),
        "circles": circles(rooms["arrows"](found)),
        "modules with private names": uses_private_names(found),
        "packages": len(installed_with(tree)),
    }


def functions_of(path: Path) -> Iterator[Function]:
    """All functions and methods of a module, also those inside others."""
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function))


def parameters_of(path: Path) -> Iterator[str]:
    """The annotation of each parameter that has one, but for `*args` and `**kwargs`; kernels' have none."""
    for function in functions_of(path):
        given = function.args
        for parameter in (*given.posonlyargs, *given.args, *given.kwonlyargs):
            if parameter.annotation is not None:
                yield ast.unparse(parameter.annotation)


def largest(sizes: dict[str, int]) -> dict[str, Any]:
    """The largest by name and size."""
    name = max(sizes, key=lambda each: sizes[each])
    return {"name": name, "lines": sizes[name]}


def circles(arrows: dict[str, set[str]]) -> list[int]:
    """The numbers of modules in each circle of imports, the largest first."""
    names = list(arrows)
    matrix = np.array([[other in arrows[name] for other in names] for name in names])
    _, circle = connected_components(matrix, directed=True, connection="strong")
    return sorted((int(size) for size in np.bincount(circle) if size > 1), reverse=True)


def uses_private_names(found: dict[str, Path]) -> list[str]:
    """The modules outside `compat` that use a private name of another library."""
    checks = runpy.run_path(str(ROOT / "tests" / "compat" / "test_private_names.py"))
    outside = {name: ast.parse(path.read_text()) for name, path in found.items() if not name.startswith(COMPAT)}
    own = checks["own_members"](found[name] for name in outside)
    return sorted(name for name, tree in outside.items() if any(checks["foreign_names"](tree, own)))


def installed_with(tree: Path) -> set[str]:
    """The packages that `make quickstart` of a tree installs, by what is installed here."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    plain = "quickstart: $(PLAIN)" in (tree / "Makefile").read_text()
    extras = project["optional-dependencies"]
    waiting = [Requirement(each) for each in [*project["dependencies"], *([] if plain else extras["dev"])]]
    found: set[str] = set()
    seen: set[str] = set()
    while waiting:
        needed = waiting.pop()
        if str(needed) in seen or not applies(needed):
            continue
        seen.add(str(needed))
        name = needed.name.lower().replace("_", "-")
        if name == "parscale":
            waiting += [Requirement(each) for extra in needed.extras for each in extras[extra]]
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of a GPU, or of a build that is not this one
            continue
        found.add(name)
        waiting += [each for each in map(Requirement, requires) if applies(each, needed.extras)]
    return found


def applies(needed: Requirement, extras: set[str] | frozenset[str] = frozenset()) -> bool:
    """Whether a requirement holds here, for a package that is installed with these extras."""
    if needed.marker is None:
        return True
    return any(needed.marker.evaluate({"extra": extra}) for extra in extras or {""})


def commit_of(tree: Path) -> str:
    """The commit that a tree is at."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def seconds_of(report: Path) -> dict[str, dict[str, float]]:
    """The number of tests and their seconds by room, from a report of pytest."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        parts = case.attrib["classname"].split(".")[1:]
        room = parts[0] if len(parts) > 1 and not parts[0].startswith("test_") else "the others"
        seconds[room] += float(case.attrib["time"])
        tests[room] += 1
    return {room: {"tests": tests[room], "seconds": round(seconds[room], 1)} for room in sorted(seconds)}


def whole_run(report: Path) -> dict[str, float]:
    """The number of tests and the seconds from start to end, from a report of pytest."""
    (suite,) = ElementTree.parse(report).iter("testsuite")
    return {"tests": int(suite.attrib["tests"]), "seconds": round(float(suite.attrib["time"]), 1)}


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown, with the seconds of the tests where they are known."""
    columns = [figures[name] for name in COLUMNS]
    rows = {
        "commit": [f"`{each['commit']}`" for each in columns],
        "modules": [each["modules"] for each in columns],
        "lines": [f"{each['lines']:,}" for each in columns],
        "largest module": [described(each["largest module"]) for each in columns],
        "longest function": [described(each["longest function"]) for each in columns],
        "typed parameters; of type `Any`": [f"{each['typed parameters']:,}; {each['of type Any']}" for each in columns],
        "circles of imports": [", ".join(f"{size} modules" for size in each["circles"]) or "none" for each in columns],
        "modules with private names of other libraries, beside `compat`": [
            len(each["modules with private names"]) for each in columns
        ],
        "packages of `make quickstart`": [each["packages"] for each in columns],
    }
    lines = ["| | before | now |", "|---|---|---|"]
    lines += [f"| {name} | {before} | {now} |" for name, (before, now) in rows.items()]
    if "tests" in figures["now"]:
        lines += ["", "| room of the tests | tests | seconds |", "|---|---|---|"]
        tests = figures["now"]["tests"] | {"from start to end, two at a time": figures["now"]["whole run"]}
        lines += [f"| {room} | {found['tests']:,} | {found['seconds']:.0f} |" for room, found in tests.items()]
    return "\n".join(lines) + "\n"


def described(found: dict[str, Any]) -> str:
    """A module or a function with its lines."""
    return f"`{found['name'].removeprefix('parscale.')}`, {found['lines']}"


def main() -> None:
    """Counts, or reads the report of the tests, and writes figures and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the source tree to count")
    parser.add_argument("--column", choices=COLUMNS, default="now", help="where the figures go")
    parser.add_argument("--tests", type=Path, help="a report of pytest, in place of counting")
    args = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    column = figures.setdefault(args.column, {})
    if args.tests is not None:
        column.update({"tests": seconds_of(args.tests), "whole run": whole_run(args.tests)})
    else:
        column.update(counted(args.tree.resolve()))
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    if all(name in figures for name in COLUMNS):
        FIGURES.with_suffix(".md").write_text(tables(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
