"""The notebooks run from the first cell to the last, and say what they are meant to say."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "scaling_laws" / "notebooks"
SAYS = {
    "1_the_paper.ipynb": ["batch 1: it adds  22.5 times the memory and  6.43 times the time", "k         0.3935"],
    "2_your_own_runs.ipynb": ["all points have P = 4, so what a stream is worth (k) could be anything"],
    "3_is_it_worth_it.ipynb": ["1e21 operations of training   3.97B with P =  1"],
}


def test_every_notebook_is_tested():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(SAYS)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", SAYS)
def test_notebook_runs(name, tmp_path):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for line in SAYS[name]:
        assert line in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("name", SAYS)
def test_notebook_shows_its_figures_where_it_is_read(name):
    """Stored with outputs, in order, and with nothing of the machine that ran it."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 1
    assert not re.search(r"/(home|root|tmp|work|Users)/", (FOLDER / name).read_text(encoding="utf-8"))
