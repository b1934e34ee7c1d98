"""Where the CUDA compiler comes from: the machine, else NVIDIA's wheels, else nowhere.

CBAM_OPS_CUDA, a setting of the build or an environment variable, says what is wanted: AUTO (the
default), ON or OFF. The machine's nvcc (CUDACXX, or on PATH) is taken where there is one. Else the
wheels become a requirement of the build where CUDA was asked for (ON) or an NVIDIA driver shows
that it would be of use. CMake (csrc/cmake/OptionalCuda.cmake) has the last word.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTING = "cmake.define.CBAM_OPS_CUDA"
ENVIRONMENT_VARIABLE = "CBAM_OPS_CUDA"

# With what they require (the runtime, the code generator) they are a whole compiler.
WHEELS = ["nvidia-cuda-nvcc>=13.5,<14", "nvidia-cuda-cccl>=13.3,<14"]
_IN_THE_WHEELS = Path("nvidia", "cu13", "bin", "nvcc")

_OLDEST = (12, 0)

# The kernel module's, a container's, and Windows's.
_SIGNS_OF_A_DRIVER = (
    "/proc/driver/nvidia/version",
    "/dev/nvidiactl",
    "/usr/lib/wsl/lib/libcuda.so.1",
)


def wanted(settings: dict[str, Any] | None) -> str:
    """AUTO, ON, OFF, or whatever else was written: CMake refuses it."""
    given = (settings or {}).get(SETTING) or os.environ.get(ENVIRONMENT_VARIABLE) or "AUTO"
    return str(given).upper()


def nvcc_of_the_machine() -> str | None:
    """What CMake will find by itself."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def driver_is_present() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return any(os.path.exists(path) for path in _SIGNS_OF_A_DRIVER)


def check_version(nvcc: str) -> None:
    """Exits with one sentence where `nvcc` says that it is too old. CMake judges the others."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release and (int(release[1]), int(release[2])) < _OLDEST:
        raise SystemExit(
            f"The CUDA kernels of cbam_ops need nvcc {'.'.join(map(str, _OLDEST))} or later, but "
            f"{nvcc} is {release[1]}.{release[2]}: name a newer one in the environment variable "
            f"CUDACXX, or leave the kernels out with {ENVIRONMENT_VARIABLE}=OFF."
        )


def requirements(settings: dict[str, Any] | None) -> list[str]:
    """The wheels, where the build shall bring them."""
    mode, nvcc = wanted(settings), nvcc_of_the_machine()
    if mode == "OFF":
        return []
    if nvcc:
        check_version(nvcc)
        return []
    return list(WHEELS) if mode == "ON" or driver_is_present() else []


def nvcc_of_the_wheels() -> Path | None:
    """The wheels' nvcc in the build environment, if they are installed there."""
    for entry in sys.path:
        nvcc = Path(entry or os.curdir).resolve() / _IN_THE_WHEELS
        if os.access(nvcc, os.X_OK):
            return nvcc
    return None


def cmake_settings(settings: dict[str, Any] | None) -> dict[str, str]:
    """What CMake has to be told."""
    mode = wanted(settings)
    # Always, so that the answer does not depend on what an earlier build in the folder was told.
    result = {SETTING: mode}
    if mode != "OFF" and not nvcc_of_the_machine():
        nvcc = nvcc_of_the_wheels()
        if nvcc is not None:
            result["cmake.define.CMAKE_CUDA_COMPILER"] = str(nvcc)
            # A compiler in a temporary environment: a folder kept for the next build would
            # remember one that is gone.
            result["build-dir"] = ""
    return result
