"""The notebook: it runs, and what is committed is a whole run of it; what train.py refuses.

Runs of train.py are in test_distribution.py.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from programs import HANGS

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"


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
    nbclient.NotebookClient(notebook, timeout=HANGS, resources=resources).execute()
    _assert_whole(notebook.cells)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--batch 2000", "--batch must be 1 to 1347, .*, got 2000"),
        ("--batch 0", "--batch: must be at least 1, got 0"),
        ("--every 0", "--every: must be at least 1, got 0"),
        ("--policy half", "--policy: invalid choice: 'half'"),
        ("--data nowhere", "nowhere has no folders with .jpg"),
    ],
)
def test_train_refuses_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    """Fails when a folder of few images, or none, ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    assert re.search(words, f"{ended.value} {capsys.readouterr().err}")
    assert not list(tmp_path.iterdir())
