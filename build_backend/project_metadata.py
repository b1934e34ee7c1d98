"""What of the package's metadata a build decides; scikit-build-core asks for it (pyproject.toml).

What is compiled for one minor release of TensorFlow requires that one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from find_tensorflow import TensorFlow
from packaging.requirements import Requirement

# A part of the version behind a "+", for wheels of one version that differ: "tf2.21".
LOCAL_VERSION = "CBAM_OPS_LOCAL_VERSION"

_VERSION_FILE = Path(__file__).resolve().parent.parent / "cbam_ops" / "__init__.py"

# What the build at hand compiles for, set by the backend; None where it compiles nothing.
compiled_for: TensorFlow | None = None


def _version() -> str:
    found = re.search(r'^__version__ = "(.+)"', _VERSION_FILE.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{_VERSION_FILE} has no __version__.")
    local = os.environ.get(LOCAL_VERSION)
    return f"{found[1]}+{local}" if local else found[1]


def _requirement(text: str) -> str:
    if compiled_for is None or Requirement(text).name != "tensorflow":
        return text
    return f"{compiled_for.distribution}=={compiled_for.minor}.*"


def dynamic_metadata(field: str, settings: dict[str, Any]) -> str | list[str]:
    """The version or the dependencies; `settings` are those of pyproject.toml."""
    if field == "version":
        return _version()
    return [_requirement(text) for text in settings["requirements"]]
