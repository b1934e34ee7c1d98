"""Programs that tests run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parent
# Seconds after which a program is taken to hang. None takes so long on a slow machine under load.
HANGS = 1200


def run_python(code: str, *arguments: str, cwd: Path = TESTS, **environment: str) -> list[str]:
    """Runs `code` with warnings as errors, the tests' helpers at hand; the lines that it prints."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()
