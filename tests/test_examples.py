"""The notebook: it runs, and what is committed is a whole run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def _assert_whole(cells: list) -> None:
    """Every cell ran once, in order, without an error, and there are pictures."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "same outputs: True" in text and "of the answers" in text


def test_the_committed_notebook_is_a_whole_run():
    """Fails when a reader would see a notebook without its pictures, or with warnings."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    _assert_whole(cells)
    assert '"stderr"' not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Fails when a reader who runs it gets an error."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the tests' own
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    _assert_whole(notebook.cells)
