"""The core's own C++ tests (csrc/testing/core_test.cc) under the compiler's sanitizers.

They run at every instruction set that the machine has, and no other is built.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import CACHE, CHECKS_ARE_CALLS, COMPILER, CSRC, sanitizer_works

from cbam_ops import _core

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


def built(name: str, source: Path, settings: dict[str, object], *targets: str) -> Path:
    """The folder that CMake has built in. It stays, so that a second run compiles what changed.

    Even where the environment that brought Ninja is gone.
    """
    key = hashlib.sha256(f"{source} {COMPILER}".encode()).hexdigest()[:12]
    folder = CACHE.with_name(f"cbam_ops_{name}_{key}")
    settings = {
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        "CMAKE_CXX_COMPILER": COMPILER,
        **settings,
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    run("cmake", "-G", "Ninja", "-S", source, "-B", folder, *defines)
    run("cmake", "--build", folder, *(["--target", *targets] if targets else []))
    return folder


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_core_under_a_sanitizer(sanitizer: str) -> None:
    """address, undefined: what lies outside of memory or of the language. thread: data races."""
    if not sanitizer_works(sanitizer):
        pytest.skip(f"-fsanitize={sanitizer} does not work with {COMPILER} here")
    name = f"core_{sanitizer.replace(',', '_')}"
    available = set(_core.available_instruction_sets())
    settings = {
        "CBAM_OPS_SANITIZE": sanitizer,
        "CMAKE_CXX_FLAGS": " ".join(CHECKS_ARE_CALLS),
        "CBAM_OPS_INSTRUCTION_SETS": ";".join(sorted(available - {"baseline"})).upper(),
    }
    folder = built(name, CSRC / "testing", settings)
    output = run(folder / "core_test", UBSAN_OPTIONS="print_stacktrace=1")
    assert set(re.findall(r"^tested: (\w+)$", output, re.MULTILINE)) == available
