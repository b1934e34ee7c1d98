"""The CPU kernels on aarch64: cross-built with Debian's compiler, run under emulation."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
from cuda_on_cpu import CSRC
from test_core_sanitized import built, run

TARGET = "aarch64-linux-gnu"
QEMU = shutil.which("qemu-aarch64")
LIBRARIES = f"/usr/{TARGET}"
CROSS = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_CXX_COMPILER": f"{TARGET}-g++",
    "CMAKE_BUILD_TYPE": "Release",  # with debug information a file takes 40 seconds for 24
}

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not shutil.which(f"{TARGET}-g++"), reason=f"no {TARGET}-g++ (apt-get install g++-{TARGET})"
    ),
]


@pytest.fixture(scope="module")
def core() -> Path:
    return built("core_aarch64", CSRC / "testing", CROSS)


@pytest.mark.skipif(not QEMU, reason="no qemu-aarch64 (apt-get install qemu-user)")
def test_the_kernels_are_right(core):
    """Every op, type and option in random calls, against their definition in double."""
    output = run(QEMU, "-L", LIBRARIES, core / "core_test")
    assert "tested: baseline" in output and "\n0 failures" in output


@pytest.mark.parametrize(
    ("type_", "instruction"),
    [
        ("f32", r"fmla\s+v\d+\.4s"),
        ("f64", r"fmla\s+v\d+\.2d"),
        ("f32", r"fmax\s+v\d+\.4s"),
        ("f64", r"fmax\s+v\d+\.2d"),
        ("f16", r"fcvtl\s+v\d+\.4s"),
        ("f16", r"fcvtn\s+v\d+\.4h"),
    ],
)
def test_the_kernels_use_its_vectors(core, type_, instruction):
    """Fails where what has one instruction is computed with several."""
    (level,) = core.glob(f"CMakeFiles/level_baseline_{type_}.dir/**/level.cc.o")
    assert re.search(instruction, run(f"{TARGET}-objdump", "-d", "--no-show-raw-insn", level))


def test_the_libraries_link_against_its_tensorflow():
    """All that can be had without such a machine. CBAM_OPS_TEST_AARCH64 is an unpacked wheel:

    pip download --no-deps --platform manylinux_2_27_aarch64 tensorflow && unzip tensorflow-*.whl
    """
    wheel = os.environ.get("CBAM_OPS_TEST_AARCH64", "")
    if not wheel:
        pytest.skip("CBAM_OPS_TEST_AARCH64 names no unpacked TensorFlow for aarch64")
    import pybind11

    (metadata,) = Path(wheel).glob("tensorflow-*.dist-info")
    settings = {
        **CROSS,
        "CBAM_OPS_CUDA": "OFF",
        "CBAM_OPS_TENSORFLOW_DIR": Path(wheel) / "tensorflow",
        "CBAM_OPS_TENSORFLOW_VERSION": metadata.name.split("-")[1].removesuffix(".dist"),
        "Python_EXECUTABLE": shutil.which("python"),
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    # Linked with --no-undefined: a symbol that the wheel does not export ends the build.
    folder = built("aarch64", CSRC.parent, settings, "cbam_ops_tf", "cbam_ops_xla")
    for name, needed in (("tf", {"framework"}), ("xla", {"framework", "cc"})):
        headers = run(f"{TARGET}-readelf", "-hd", folder / "csrc" / f"libcbam_ops_{name}.so")
        assert "AArch64" in headers
        assert set(re.findall(r"libtensorflow_(\w+)\.so\.2\]", headers)) == needed
