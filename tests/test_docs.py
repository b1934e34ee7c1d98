"""README.md and the other pages: their code runs, what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tensorflow as tf

import cbam_ops
from cbam_ops.testing import FLOAT32, Case, assert_close

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> list:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = 1 + text.count("\n", 0, match.start())
            found.append(pytest.param(match[1], id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize("code", blocks())
def test_code_runs(fresh_options, tmp_path, monkeypatch, code):
    """Fails when a reader who copies the lines gets an error."""
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(code, "documentation", "exec"), {"tf": tf})


def test_the_ten_lines_are_the_definition():
    """Fails when the README's equivalent in stock TensorFlow is not what the package computes."""
    names: dict = {"tf": tf}
    (code,) = [block.values[0] for block in blocks() if "def cbam(" in block.values[0]]
    exec(code, names)
    tensors = Case("cbam", size=(2, 6, 5, 8)).draw()
    expected = cbam_ops.reference.cbam(**tensors)
    assert_close(names["cbam"](**tensors).numpy(), expected.numpy(), FLOAT32, "the ten lines")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Fails when a page or picture that a page links to has moved."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("#").strip()).lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page):
    """Fails when a page says that a test shows something, and no test has that name."""
    for command in re.findall(r"`pytest ([^`]+)`", page.read_text(encoding="utf-8")):
        files = re.findall(r"tests/\S+\.py", command)
        source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        expression = re.search(r"""-k ("[^"]+"|\S+)""", command)
        for word in expression[1].strip('"').split(" or ") if expression else []:
            assert re.search(rf"def test\w*{word}", source), f"{word} in {files}"
