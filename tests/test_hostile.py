"""Calls that nobody sane makes end in words, never with the process (see hostile.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().with_name("hostile.py")


def make_calls(kind: str, count: int, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, kind, str(count), "--seed", str(seed)],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines() or [""]
    assert done.returncode == 0, (
        f"ended with {done.returncode} at\n{lines[-1]}\n{done.stderr[-2000:]}"
    )
    assert "UNEXPECTED" not in done.stdout, done.stdout
    summary = re.fullmatch(r"10 ops: (\d+) returned, (\d+) refused", lines[-1])
    assert summary, lines[-1]
    # Both happen, or the calls are not what they should be.
    assert min(int(number) for number in summary.groups()) > count // 50, lines[-1]


KINDS = {"eager": 400, "graph": 400, "custom_call": 200}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_calls_end_in_words(kind):
    make_calls(kind, KINDS[kind], seed=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_more_hostile_calls_end_in_words(kind):
    make_calls(kind, 5 * KINDS[kind], seed=1)
