"""Makes the layers known to Keras as soon as Keras and TensorFlow are loaded.

`keras.saving` finds a custom layer only among classes that are registered already; it never imports
the module that a saved model names. A package whose names load lazily would therefore break

    import cbam_ops, keras
    keras.models.load_model("model.keras")

So `install()`, called when `cbam_ops` is imported, has `cbam_ops.layers` imported (which registers
the layers) once both `keras` and `tensorflow` are there: at once when they are, else when the last
of the two has been imported. Where that is never, nothing happens and nothing is paid.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_WATCHED = ("keras", "tensorflow")
# Modules that register Keras objects when they are imported.
_REGISTERING = ("cbam_ops.layers",)


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    if module is None:
        return False
    # `import tensorflow` imports keras before it has finished itself.
    return not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _register(just_loaded: str = "") -> bool:
    """Imports the registering modules if everything is there; whether it was."""
    if not all(name == just_loaded or _is_loaded(name) for name in _WATCHED):
        return False
    for name in _REGISTERING:
        try:
            importlib.import_module(name)
        except Exception:
            # Importing Keras must not fail because of this package. Whoever then uses
            # `cbam_ops.CBAM` imports the same module and gets this same error.
            pass
    return True


class _Watcher(MetaPathFinder):
    """Finds nothing itself; has `_register` called after a watched module was executed."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in _WATCHED or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy = False
        execute = getattr(getattr(spec, "loader", None), "exec_module", None)
        if spec is None or execute is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if _register(just_loaded=fullname) and self in sys.meta_path:
                sys.meta_path.remove(self)

        try:
            spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        except AttributeError:
            pass
        return spec


def install() -> None:
    """Registers the layers now or when Keras is imported; never raises, never imports Keras."""
    if not _register():
        sys.meta_path.insert(0, _Watcher())
