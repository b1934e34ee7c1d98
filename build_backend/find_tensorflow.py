"""Finds the TensorFlow to compile against, by path: importing it would cost seconds.

Used by the build backend beside this file and, as a program, by CMake:

    python build_backend/find_tensorflow.py

prints the directory and the version on two lines, or says in one sentence what is wrong and exits
with status 1.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


class TensorFlow(NamedTuple):
    """An installed TensorFlow: the package's directory, its version and what pip calls it."""

    directory: Path
    version: str
    distribution: str

    @property
    def minor(self) -> str:
        """The minor release: "2.21"."""
        return ".".join(self.version.split(".")[:2])


def requirement() -> Requirement:
    """The releases of TensorFlow that pyproject.toml names among the dependencies."""
    tools = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]
    for text in tools["scikit-build"]["metadata"]["dependencies"]["requirements"]:
        parsed = Requirement(text)
        if parsed.name == "tensorflow":
            return parsed
    raise SystemExit(f"{PYPROJECT} does not depend on tensorflow.")


def _search_path() -> list[str]:
    """Where the target environment keeps packages.

    With build isolation pip hides that from `sys.path`, but `sysconfig` still names it.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return [path for path in paths if path]


def _distribution(directory: Path) -> tuple[str, str] | None:
    """Name and version in the metadata that was installed beside the package."""
    found = [
        (distribution.metadata["Name"].lower().replace("_", "-"), distribution.version)
        for distribution in metadata.distributions(path=[str(directory.parent)])
        if distribution.metadata["Name"]
    ]
    for wanted in ("tensorflow", "tensorflow-cpu"):
        for name, version in found:
            if name == wanted:
                return name, version
    return None


def find_tensorflow() -> TensorFlow | None:
    """The TensorFlow of this Python: of the build environment, else of the target environment."""
    for spec in (
        importlib.util.find_spec("tensorflow"),
        PathFinder.find_spec("tensorflow", _search_path()),
    ):
        if spec is None or not spec.origin:  # a bare directory of that name has no origin
            continue
        directory = Path(spec.origin).parent
        distribution = _distribution(directory)
        if distribution is not None:
            name, version = distribution
            return TensorFlow(directory, version, name)
    return None


def check(found: TensorFlow) -> None:
    """Exits with one sentence unless `found` is of a release that this version is made for."""
    wanted = requirement()
    if not wanted.specifier.contains(found.version, prereleases=True):
        raise SystemExit(
            f"cbam_ops needs {wanted}, but this environment has TensorFlow {found.version} "
            f"({found.directory}): run pip install '{wanted}', or use another environment."
        )


def main() -> None:
    """Prints what CMake needs to know."""
    found = find_tensorflow()
    if found is None:
        wanted = requirement()
        raise SystemExit(f"TensorFlow was not found for {sys.executable}: pip install '{wanted}'")
    check(found)
    print(os.fspath(found.directory))
    print(found.version)


if __name__ == "__main__":
    main()
