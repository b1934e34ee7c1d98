"""The build backend (PEP 517 and 660): scikit-build-core, plus where TensorFlow and nvcc come from.

The TensorFlow already in the target environment is compiled against, if it is of a release that
will do; another one stops the build; and where there is none the newest becomes a requirement of
the build, which the frontend then puts into the build environment. The CUDA compiler: find_cuda.py.

Two more words in the environment: CBAM_OPS_INSTRUCTION_SETS is CMake's setting of that name
(CpuLevels.cmake). CBAM_OPS_NATIVE=OFF, which scikit-build-core calls `wheel.cmake=false`, compiles
nothing and needs none of the above: the package then has the reference alone.
"""

from __future__ import annotations

import os
from typing import Any

import build_tools  # noqa: F401
import find_compiler
import find_cuda
import project_metadata
import scikit_build_core.build as _scikit_build
from find_tensorflow import check, find_tensorflow, requirement
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

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

_WORDS = {"ON": True, "1": True, "TRUE": True, "OFF": False, "0": False, "FALSE": False}


def _is_native(settings: Settings) -> bool:
    """Whether anything shall be compiled."""
    for name, value in (
        ("wheel.cmake", (settings or {}).get("wheel.cmake")),
        ("CBAM_OPS_NATIVE", os.environ.get("CBAM_OPS_NATIVE")),
    ):
        if value and str(value).upper() not in _WORDS:
            raise SystemExit(f"{name} must be ON or OFF, got {value!r}.")
        if value:
            return _WORDS[str(value).upper()]
    return True


def _requirements(settings: Settings) -> list[str]:
    """What a build needs of TensorFlow and nvcc; exits where this machine cannot do it."""
    find_compiler.prepare(settings)
    found = find_tensorflow()
    if found is not None:
        check(found)
    return [
        *([] if found else [str(requirement())]),
        *find_cuda.requirements(settings),
    ]


def _complete(settings: Settings) -> dict[str, Any]:
    """The settings plus what CMake must know of TensorFlow and nvcc."""
    if not _is_native(settings):
        project_metadata.compiled_for = None
        return {"wheel.py-api": "py3", **(settings or {}), "wheel.cmake": "false"}
    find_compiler.prepare(settings)
    found = find_tensorflow()
    if found is None:
        wanted = requirement()
        raise SystemExit(
            f"TensorFlow was not found in the build environment: run pip install '{wanted}' first, "
            "or build with isolation."
        )
    check(found)
    project_metadata.compiled_for = found
    return {
        "cmake.define.CBAM_OPS_TENSORFLOW_DIR": str(found.directory),
        "cmake.define.CBAM_OPS_TENSORFLOW_VERSION": found.version,
        # Always, so that the answer does not depend on an earlier build in the folder.
        "cmake.define.CBAM_OPS_INSTRUCTION_SETS": os.environ.get(
            "CBAM_OPS_INSTRUCTION_SETS", "AUTO"
        ),
        **find_cuda.cmake_settings(settings),
        **(settings or {}),
    }


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What the build of a wheel needs besides `build-system.requires`."""
    if not _is_native(config_settings):
        return []
    needed = _requirements(config_settings)  # first: it may end the build
    return [*_scikit_build.get_requires_for_build_wheel(config_settings), *needed]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """What an editable install needs besides `build-system.requires`."""
    if not _is_native(config_settings):
        return []
    needed = _requirements(config_settings)
    return [*_scikit_build.get_requires_for_build_editable(config_settings), *needed]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Writes the metadata of the wheel that would be built; returns its folder's name."""
    return _scikit_build.prepare_metadata_for_build_wheel(
        metadata_directory, _complete(config_settings)
    )


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Writes the metadata of an editable install; returns its folder's name."""
    return _scikit_build.prepare_metadata_for_build_editable(
        metadata_directory, _complete(config_settings)
    )


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
