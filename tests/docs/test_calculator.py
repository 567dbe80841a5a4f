"""The calculator: its table is the cost model's, and in a browser each control changes the picture."""

import html
import itertools
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from parscale.scaling_laws import fit, published

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "results" / "calculator.json"
ASSETS = ROOT / "docs" / "assets"
PAGE = (ROOT / "docs" / "worth.md").read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def numbers(value):
    """All numbers in nested lists and dictionaries, in order."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers(item)]
    if isinstance(value, dict):
        return numbers(list(value.values()))
    return [value] if isinstance(value, (int, float)) else []


def test_the_table_is_the_cost_models():
    counted = runpy.run_path(str(ROOT / "benchmarks" / "calculator.py"))["table"](fit(*published("stack")))
    stored = json.loads(FIGURES.read_text())
    assert counted.keys() == stored.keys()
    assert [model["name"] for model in counted["models"]] == [model["name"] for model in stored["models"]]
    assert numbers(counted) == pytest.approx(numbers(stored), rel=2e-3)  # four digits


def test_every_cell_is_there():
    stored = json.loads(FIGURES.read_text())
    axes = ("models", "devices", "batches", "prompts")
    assert len(stored["cells"]) == len(list(itertools.product(*(stored[axis] for axis in axes))))
    assert all(len(cell) == 1 + 3 * len(stored["streams"]) for cell in stored["cells"])


def test_the_page_has_what_the_program_looks_for():
    program = (ASSETS / "calculator.js").read_text(encoding="utf-8")
    for name in re.findall(r'querySelector\("\.?(\w+)"\)|draw\("\.(\w+)"', program):
        assert re.search(rf'class="[^"]*{name[0] or name[1]}|<{name[0] or name[1]}', PAGE), name
    for name in re.findall(r'getElementById\("([\w-]+)"\)', program):
        assert f'id="{name}"' in PAGE
    controls = set(re.findall(r'<select name="(\w+)">', PAGE))
    assert controls == set(re.findall(r"^    (\w+): figures\.", program, flags=re.MULTILINE))
    assert not re.search(r"https?://|fetch\(|import\(", program)


@pytest.fixture
def opened(tmp_path):
    """What the calculator's part of the page is after its program ran, and what its console said."""
    part = re.search(r'<div id="calculator">.*</script>', PAGE, flags=re.DOTALL).group()
    snippet = '--8<-- "benchmarks/results/calculator.json"'
    assert snippet in part
    style = f"<style>{(ASSETS / 'site.css').read_text()}</style>"
    body = part.replace(snippet, FIGURES.read_text()).replace(
        "assets/calculator.js", (ASSETS / "calculator.js").as_uri()
    )
    body += "<script>document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth</script>"
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'>{style}"
    (tmp_path / "page.html").write_text(f"<!doctype html><html><head>{head}</head><body>{body}</body></html>")

    def run(choice=""):
        address = (tmp_path / "page.html").as_uri() + f"#{choice}"
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
        finished = subprocess.run(
            [*command, "--window-size=390,800", "--dump-dom", address], capture_output=True, text=True, timeout=120
        )
        said = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
        assert 'data-overflow="0"' in finished.stdout  # nothing is wider than a phone
        return html.unescape(finished.stdout.partition('<p class="verdict"')[2].partition("<noscript")[0]), said

    return run


@pytest.mark.nightly
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_each_control_changes_the_picture(opened):
    shown, said = opened()
    assert not said
    assert "P = 4 takes" in shown
    cell = json.loads(FIGURES.read_text())["cells"][7 * 9 * 4]  # the second model with the first of everything else
    for memory, prefill, decode in (cell[0], cell[4], cell[6]):  # plain, P = 4, of equal loss
        assert f"{1000 * (prefill + decode):.3g} ms" in shown
        assert f"{memory:.2f} GB" in shown
    seen = {shown}
    for choice in ("model=3", "streams=2", "kind=1", "batch=4", "prompt=3", "device=4"):
        shown, said = opened(choice)
        assert not said
        seen.add(shown)
    assert len(seen) == 7
    assert "does not fit" in opened("model=4&device=4")[0]
