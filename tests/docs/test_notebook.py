"""The notebook of the main job runs from the first cell to the last, and is stored with what it showed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "main_job.ipynb"


def outputs(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook, "stream") if output.name == "stdout")


@pytest.mark.nightly
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(tmp_path))
    for line in ("230,146 of 3,576,834 parameters were trained", "8 tokens in", "one prefix of 48 tokens: "):
        assert line in printed(notebook)
    assert len(outputs(notebook, "display_data") + outputs(notebook, "execute_result")) == 2


def test_the_notebook_is_stored_with_what_it_showed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert re.search(r"one prefix of 48 tokens: [+-]0\.\d{4} \(", printed(notebook))
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text(encoding="utf-8"))
