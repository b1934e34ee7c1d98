"""TensorFlow's and XLA's sides of the ops under AddressSanitizer, with right and hostile calls."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
import tensorflow as tf
from cuda_on_cpu import COMPILER, sanitizer_flags, sanitizer_works
from test_core_sanitized import built
from test_hostile import SCRIPT

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not sanitizer_works("address"), reason="no AddressSanitizer here"),
]


@pytest.fixture(scope="module")
def libraries() -> Path:
    """The folder with the libraries."""
    tensorflow = importlib.util.find_spec("tensorflow")
    assert tensorflow is not None and tensorflow.origin is not None
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS": " ".join(sanitizer_flags("address")),
        "CMAKE_CXX_FLAGS_RELEASE": "-O1 -DNDEBUG",
        "CBAM_OPS_INSTRUCTION_SETS": "",  # the kernels of each are test_core_sanitized.py's
        "CBAM_OPS_CUDA": "OFF",
        "CBAM_OPS_WERROR": "OFF",  # at other optimisations GCC warns of other things
        "CBAM_OPS_TENSORFLOW_DIR": Path(tensorflow.origin).parent,
        "CBAM_OPS_TENSORFLOW_VERSION": tf.__version__,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    return built("sanitized", ROOT, settings, "cbam_ops_tf", "cbam_ops_xla") / "csrc"


@pytest.mark.parametrize("kind", ["eager", "graph", "custom_call"])
def test_hostile_calls_under_a_sanitizer(kind, libraries):
    def library(name: str) -> str:
        command = [COMPILER, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    environment = {
        # Python itself has no C++ library, and the sanitizer takes functions from it at the start.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "CBAM_OPS_TEST_LIBRARIES": str(libraries),
        # Python and TensorFlow are not clean themselves.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, kind, "200", "--seed", "5"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    last = done.stdout[-1000:]
    assert done.returncode == 0, f"{last}\n{done.stderr[-6000:]}"
    assert "UNEXPECTED" not in done.stdout, done.stdout
    assert "10 ops: " in last
