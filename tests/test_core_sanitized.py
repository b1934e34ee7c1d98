"""The core's own C++ tests (csrc/testing/core_test.cc) under the compiler's sanitizers.

They run at every instruction set that the machine has.
"""

from __future__ import annotations

import hashlib
import os
import subprocess

import pytest
from cuda_on_cpu import CACHE, COMPILER, CSRC, sanitizer_works

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler on PATH"),
]


def run(*command: object, **environment: str) -> str:
    """The output of a command that succeeds; its end where it does not."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout[-8000:]}"
    return done.stdout


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_core_under_a_sanitizer(sanitizer: str) -> None:
    """address, undefined: what lies outside of memory or of the language. thread: data races.

    The build folder stays, so that a second run compiles what changed.
    """
    if not sanitizer_works(sanitizer):
        pytest.skip(f"-fsanitize={sanitizer} does not work with {COMPILER} here")
    key = hashlib.sha256(f"{CSRC} {COMPILER}".encode()).hexdigest()[:12]
    folder = CACHE.parent / f"cbam_ops_core_{sanitizer.replace(',', '_')}_{key}"
    run(
        "cmake", "-G", "Ninja", "-S", CSRC / "testing", "-B", folder,
        f"-DCBAM_OPS_SANITIZE={sanitizer}", f"-DCMAKE_CXX_COMPILER={COMPILER}",
    )  # fmt: skip
    run("cmake", "--build", folder)
    output = run(folder / "core_test", UBSAN_OPTIONS="print_stacktrace=1")
    assert "tested: baseline" in output
