"""The build backend (PEP 517 and 660): scikit-build-core, plus where TensorFlow and nvcc come from.

The TensorFlow already in the target environment is compiled against, if it is of the right
release; another release stops the build; and where there is none it becomes a requirement of the
build, which the frontend then puts into the build environment. The CUDA compiler: find_cuda.py.
"""

from __future__ import annotations

from typing import Any

import find_cuda
import scikit_build_core.build as _scikit_build
from find_tensorflow import check, find_tensorflow, requirement
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def _tensorflow_requirement() -> list[str]:
    found = find_tensorflow()
    if found is None:
        return [str(requirement())]
    check(found)
    return []


def _complete(settings: Settings) -> dict[str, Any]:
    """The settings plus what CMake must know of TensorFlow and nvcc."""
    found = find_tensorflow()
    if found is None:
        wanted = requirement()
        raise SystemExit(
            f"TensorFlow was not found in the build environment: run pip install '{wanted}' first, "
            "or build with isolation."
        )
    check(found)
    return {
        "cmake.define.CBAM_OPS_TENSORFLOW_DIR": str(found.directory),
        "cmake.define.CBAM_OPS_TENSORFLOW_VERSION": found.version,
        **find_cuda.cmake_settings(settings),
        **(settings or {}),
    }


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What the build of a wheel needs besides `build-system.requires`."""
    return [
        *_scikit_build.get_requires_for_build_wheel(config_settings),
        *_tensorflow_requirement(),
        *find_cuda.requirements(config_settings),
    ]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """What an editable install needs besides `build-system.requires`."""
    return [
        *_scikit_build.get_requires_for_build_editable(config_settings),
        *_tensorflow_requirement(),
        *find_cuda.requirements(config_settings),
    ]


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Builds the wheel; returns its file name."""
    return _scikit_build.build_wheel(
        wheel_directory, _complete(config_settings), metadata_directory
    )


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Builds what an editable install installs; returns its file name."""
    return _scikit_build.build_editable(
        wheel_directory, _complete(config_settings), metadata_directory
    )
