"""The workflows run what the Makefile has, on the package's Pythons, and the hooks are of the pinned versions."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
HOOKS = {repo["repo"]: repo for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]}


def made(job):
    """The targets that a job asks make for."""
    words = " ".join(step["run"] for step in job["steps"] if "run" in step)
    if "matrix.target" in words:
        return job["strategy"]["matrix"]["target"]
    return [word for word in words.split() if word != "make"]


def test_every_target_is_in_the_makefile():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    for workflow in WORKFLOWS.values():
        for name, job in workflow["jobs"].items():
            assert set(made(job)) <= targets, name


def test_what_make_test_leaves_out_runs_at_night():
    assert any("test-nightly" in made(job) for job in WORKFLOWS["nightly"]["jobs"].values())
    assert {"lint", "typecheck"} <= set(made(WORKFLOWS["test"]["jobs"]["lint"]))


def test_the_pythons_are_those_of_the_package():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = {entry.rpartition(" ")[2] for entry in classifiers if "Python :: 3." in entry}
    assert set(WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"]) == named


def test_the_hooks_run_the_pinned_ruff():
    revision = HOOKS["https://github.com/astral-sh/ruff-pre-commit"]["rev"]
    assert f"ruff=={revision.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_subjects_of_commits():
    (hook,) = (hook for hook in HOOKS["local"]["hooks"] if hook["id"] == "subject")
    pattern = re.compile(hook["entry"], re.MULTILINE | re.DOTALL)  # as pre-commit reads it with --multiline
    assert pattern.search("masks: a window hides no prefix\n\n" + "Why, at length. " * 9)
    assert pattern.search("Merge branch 'other'\n")
    assert not pattern.search("no area\n\nbody: of two lines")
    assert not pattern.search("masks: " + "very " * 14 + "long\n\nbody")
