"""Whether this machine can compile the package: one sentence, before anything is downloaded.

scikit-build-core sets CXX to the compiler that Python was built with, which a machine need not have
though it has another: where that one is missing, the usual names are tried.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from typing import Any

_PROCESSORS = ("x86_64", "aarch64")
_USUAL = ("c++", "g++", "clang++")
# The first that know C++17 as TensorFlow's headers use it.
_OLDEST = {"g++": 9, "clang++": 10}

# Who says one of these chooses the compiler, and CMake explains what is wrong with it.
_CHOICES = (
    *("cmake.define.CMAKE_CXX_COMPILER", "cmake.define.CMAKE_TOOLCHAIN_FILE"),
    *("CMAKE_TOOLCHAIN_FILE", "CMAKE_ARGS", "SKBUILD_CMAKE_ARGS"),
)

WITHOUT = (
    "To install the package without compiled ops (the same functions in plain TensorFlow, slower), "
    "set the environment variable CBAM_OPS_NATIVE=OFF."
)


def _exists(command: str) -> bool:
    words = shlex.split(command)
    return bool(words) and all(shutil.which(word) for word in words if not word.startswith("-"))


def _check_platform() -> None:
    system, processor = platform.system(), platform.machine()
    if system != "Linux" or processor not in _PROCESSORS:
        raise SystemExit(
            "The compiled ops of cbam_ops need Linux on "
            f"{' or '.join(_PROCESSORS)}, but this is {system} on {processor}. {WITHOUT}"
        )


def _check_version(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "-E", "-dM", "-x", "c++", os.devnull],
        capture_output=True,
        text=True,
    )
    macros = dict(re.findall(r"^#define (__clang_major__|__GNUC__) (\d+)$", done.stdout, re.M))
    name = "clang++" if "__clang_major__" in macros else "g++"
    version = macros.get("__clang_major__", macros.get("__GNUC__"))
    if version is None or int(version) < _OLDEST[name]:
        found = f"{name} {version}" if version else "neither"
        raise SystemExit(
            f"cbam_ops needs g++ {_OLDEST['g++']} or clang++ {_OLDEST['clang++']} or later, but "
            f"`{command}` is {found}: install a newer one, or name one in the environment variable "
            f"CXX. {WITHOUT}"
        )


def prepare(settings: Mapping[str, Any] | None) -> None:
    """Sets CXX where Python's own compiler is missing; exits with a sentence where none will do."""
    _check_platform()
    given = {**os.environ, **(settings or {})}
    if any(given.get(name) for name in _CHOICES):
        return
    named = os.environ.get("CXX")
    if named and not _exists(named):
        raise SystemExit(f"There is no C++ compiler `{named}` (the environment variable CXX).")
    for command in (named, sysconfig.get_config_var("CXX"), *_USUAL):
        if command and _exists(command):
            _check_version(command)
            os.environ["CXX"] = command
            return
    raise SystemExit(
        f"cbam_ops needs a C++ compiler, and none of {', '.join(_USUAL)} is on PATH: install one "
        f"(apt-get install g++, or dnf install gcc-c++), or name one in the environment variable "
        f"CXX. {WITHOUT}"
    )
