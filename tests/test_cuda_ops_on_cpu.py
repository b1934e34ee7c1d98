"""The ops for GPUs, executed without one: TensorFlow's side of the CUDA kernels.

An op library is built in which the very code that registers the kernels for GPUs (csrc/tf/ops.cc,
fused_op.h, gpu_device.h) registers them for CPUs, over the CUDA kernels' sources as
csrc/testing/cuda_on_cpu.h runs them. The tests of the public functions then run anew with that
library. What stays for a real GPU: the stream (csrc/tf/gpu_kernels.cc) and what nvcc makes of the
sources.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu import COMPILER, build

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler on PATH"),
]

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def library() -> Path:
    import tensorflow as tf

    include = tf.sysconfig.get_include()
    framework = Path(tf.sysconfig.get_lib()) / "libtensorflow_framework.so.2"
    # The flags of csrc/cmake/FindPipTensorFlow.cmake, and that of a build with CUDA kernels.
    flags = ["-D_GLIBCXX_USE_CXX11_ABI=1", "-DEIGEN_MAX_ALIGN_BYTES=64", "-DNDEBUG"]
    flags.append("-DCBAM_HAVE_CUDA=1")
    return build(
        glue=["ops/dimensions.cc", "ops/options.cc", "tf/ops.cc", "testing/cuda_on_cpu_ops.cc"],
        glue_flags=[*flags, "-isystem", include],
        glue_link=[str(framework)],
    )


def passed(library: Path, *arguments: str) -> int:
    """Runs tests with the library in a process of its own; how many passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent,
        env={
            **os.environ,
            "CBAM_OPS_TEST_LIBRARY": str(library),
            "CBAM_OPS_TEST_DEVICE": "CPU",  # of test_gpu.py
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    return int(re.search(r"(\d+) passed", done.stdout)[1])


# All but what is about CPUs, about other processes, or about the reference.
SELECTED = {
    "test_ops.py": "not instruction_set and not threads and not fresh_process and not quiet "
    "and not reference and not empty_batch and not taken_over",
    "test_gradients.py": "",
    "test_bad_input.py": "not reference",
    "test_gpu.py": "not every_option and not every_size and not xla",
}


@pytest.mark.parametrize("tests", list(SELECTED))
def test_the_tests_of_the_ops_pass(library, tests):
    """Fails where an argument, an attribute or a type reaches the CUDA kernels wrongly."""
    assert passed(library, str(TESTS / tests), "-k", SELECTED[tests]) >= 10


def run_python(library: Path, code: str, **environment: str) -> str:
    """Runs a program with the library in place of the installed one; what it printed last."""
    head = """
import sys
import tensorflow as tf
load = tf.load_op_library
tf.load_op_library = lambda installed: load(sys.argv[1])
import cbam_ops
cbam_ops.set_implementation("native")
"""
    done = subprocess.run(
        [sys.executable, "-c", head + code, str(library)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_kernels_that_ran_were_the_cuda_ones(library):
    """Fails where the library that the tests above are given is not the one that computes."""
    program = """
import ctypes
cbam_ops.channel_pool(tf.ones((1, 3, 4, 5)))
launched = ctypes.CDLL(sys.argv[1]).cbam_take_launched_kernels
launched.restype = ctypes.c_char_p
print(launched().decode())
"""
    assert "Kernel" in run_python(library, program).split()


def test_what_a_device_cannot_run_is_an_error_with_the_reason(library):
    """Here the kernels refuse more positions than 31 bits count, and then there is no driver."""
    program = """
x = tf.zeros((0, 65536, 65536, 5))
w0, w1, kernel = (tf.ones(s) for s in [(5, 1), (1, 5), (3, 3, 2, 1)])
try:
    cbam_ops.cbam(x, w0, None, w1, None, kernel)
except tf.errors.UnimplementedError as error:
    print(error.message)
"""
    message = run_python(library, program)
    assert "CbamOps>Cbam: There is no NVIDIA driver." in message
