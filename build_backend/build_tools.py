"""Imported before what it looks for: without build isolation nobody need have installed it."""

from importlib.machinery import PathFinder

_TOOLS = {
    "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11",
    "packaging": "packaging",
}

_missing = [name for module, name in _TOOLS.items() if PathFinder.find_spec(module) is None]
if _missing:
    raise SystemExit(
        "To build cbam_ops without build isolation, install the build tools first: "
        f"pip install {' '.join(_missing)} cmake ninja"
    )
