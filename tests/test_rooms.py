"""Imports run one way: each room imports itself and the rooms before it, and no modules import each other in a circle.

Imports inside functions, those for type checkers and modules that are named in a string count as all others do.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where each package's source lies.
SOURCES = {
    "parscale": ROOT / "parscale",
    "parscale.kernels": ROOT / "kernels",
    "parscale.checkpoints": ROOT / "checkpoints",
    "parscale.scaling_laws": ROOT / "scaling_laws",
}
# Programs beside the package: of what lies in rooms they take public names alone.
SCRIPTS = {"benchmarks": ROOT / "benchmarks", "examples": ROOT / "examples"}
# The rooms from the ground up. A room is a module, or a package with all that is in it but for what stands here apart.
ROOMS = [
    "parscale.version",
    "parscale.errors",
    "parscale.descriptions",
    "parscale.compat",
    "parscale.config",
    "parscale.kernels",
    "parscale.terminal",
    "parscale.distributed",
    "parscale.streams",
    "parscale.attention",
    "parscale.transforms",
    "parscale.hooks",
    "parscale.format",
    "parscale.integrations",
    "parscale.methods",
    "parscale.wrapping",
    "parscale.loading",
    "parscale.auto",
    "parscale.modeling_parscale",
    "parscale.integrations.vllm",
    "parscale",  # its names alone, which are found when they are used
    "parscale.scaling_laws",
    "parscale.checkpoints.description",
    "parscale.checkpoints.finite_values",
    "parscale.checkpoints.versions",
    "parscale.checkpoints.small_model",
    "parscale.checkpoints.models",
    "parscale.checkpoints.texts",
    "parscale.checkpoints.evaluation",
    "parscale.checkpoints.checkpoint_comparison",
    "parscale.checkpoints.training",
    "parscale.checkpoints.conversion",
    "parscale.checkpoints.control_runs",
    "parscale.checkpoints.quickstart",
    "parscale.checkpoints",  # the public names alone, which are found when they are used
    "parscale.export",
    "parscale.cli",
    "parscale.__main__",
]


def modules(sources: dict[str, Path]) -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for package, folder in sources.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def arrows(found: dict[str, Path]) -> dict[str, set[str]]:
    """For each module those that it names in an import statement or in a string."""

    def module_of(name: str) -> str | None:
        while name and name not in found:
            name = name.rpartition(".")[0]
        return name or None

    asked = {}
    for module, path in found.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names: list[str] = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names += [f"{base}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Constant) and node.value in found and "." in str(node.value):
                names.append(str(node.value))
        asked[module] = {other for name in names if (other := module_of(name)) is not None} - {module}
    return asked


def room_of(module: str) -> str | None:
    """The room that a module belongs to; only the package's own names belong to `parscale`."""
    fitting = [room for room in ROOMS if module == room or (module.startswith(f"{room}.") and room != "parscale")]
    return max(fitting, key=len, default=None)


def upward(asked: dict[str, set[str]]) -> list[str]:
    """The arrows that run up."""
    place = {module: ROOMS.index(room) for module in asked if (room := room_of(module)) is not None}
    return sorted(f"{a} -> {b}" for a, others in asked.items() for b in others if place[b] > place[a])


def circle(asked: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none if there is no circle."""
    try:
        graphlib.TopologicalSorter(asked).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def into_rooms(asked: dict[str, set[str]]) -> list[str]:
    """The arrows from scripts into `parscale.checkpoints`, past its public names."""
    return sorted(
        f"{a} -> {b}"
        for a, others in asked.items()
        for b in others
        if a.partition(".")[0] in SCRIPTS and b.startswith("parscale.checkpoints.")
    )


@pytest.fixture(scope="module")
def everything():
    return arrows(modules(SOURCES | SCRIPTS))


@pytest.fixture(scope="module")
def ours(everything):
    return {module: others for module, others in everything.items() if module.partition(".")[0] not in SCRIPTS}


def test_every_module_has_a_room(ours):
    assert [module for module in ours if room_of(module) is None] == [], "name its room in ROOMS"


def test_no_arrow_runs_up(ours):
    assert upward(ours) == []


def test_no_modules_import_each_other_in_a_circle(ours):
    assert circle(ours) == []


def test_scripts_import_public_names_of_checkpoints_alone(everything):
    assert into_rooms(everything) == [], "import it from parscale.checkpoints itself"


def listed(path: Path) -> list[str]:
    """The modules that a package's docstring lists, as in "- `name`: what it is for"."""
    return sorted(re.findall(r"^- `(\w+)`: ", ast.get_docstring(ast.parse(path.read_text())) or "", flags=re.M))


def contents(folder: Path) -> list[str]:
    """The modules and packages in a package."""
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    return sorted(names - {"__init__"})


def test_docstrings_that_list_modules_list_all():
    packages = [path for folder in SOURCES.values() for path in folder.rglob("__init__.py") if listed(path)]
    assert ROOT / "parscale" / "streams" / "__init__.py" in packages
    for path in packages:
        assert listed(path) == contents(path.parent), path.relative_to(ROOT)


def test_files_are_short():
    folders = [*SOURCES.values(), *(ROOT / name for name in ("benchmarks", "examples", "tests", "tools"))]
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in folder.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length >= 500} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import parscale.wrapping",
        "from parscale import wrapping",
        "from parscale.wrapping import wrap",
        "from ..wrapping import wrap",
        "def late():\n    from parscale.wrapping import wrap",
        "if TYPE_CHECKING:\n    from parscale.wrapping import wrap",
        "import_module('parscale.wrapping')",
    ],
)
def test_an_arrow_that_runs_up_is_found(line, tmp_path):
    (tmp_path / "streams").mkdir()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "wrapping.py").touch()
    (tmp_path / "streams" / "state.py").write_text(line)
    assert upward(arrows(modules({"parscale": tmp_path}))) == ["parscale.streams.state -> parscale.wrapping"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from parscale.checkpoints import train", []),
        ("from parscale.checkpoints.training import train", ["parscale.checkpoints.training"]),
        ("import parscale.checkpoints.models as m", ["parscale.checkpoints.models"]),
        ("def late():\n    from parscale.checkpoints import models", ["parscale.checkpoints.models"]),
    ],
)
def test_a_script_that_reaches_into_a_room_is_found(line, found, tmp_path):
    folders = {"benchmarks": tmp_path / "benchmarks", "parscale.checkpoints": tmp_path / "checkpoints"}
    for folder in (folders["benchmarks"] / "evidence", folders["parscale.checkpoints"] / "training"):
        folder.mkdir(parents=True)
    for file in ("__init__.py", "models.py", "training/__init__.py"):
        (folders["parscale.checkpoints"] / file).touch()
    (folders["benchmarks"] / "evidence" / "work.py").write_text(line)
    assert into_rooms(arrows(modules(folders))) == [f"benchmarks.evidence.work -> {module}" for module in found]


def test_a_circle_inside_a_room_is_found(tmp_path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("def late():\n    from parscale.streams import b")
    (tmp_path / "b.py").write_text("from parscale.streams.c import x")
    (tmp_path / "c.py").write_text("import parscale.streams.a")
    found = arrows(modules({"parscale.streams": tmp_path}))
    assert set(circle(found)) == {f"parscale.streams.{name}" for name in "abc"}
