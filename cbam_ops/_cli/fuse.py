"""`cbam-ops fuse`: `cbam_ops.fuse` on files."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cbam_ops._console import CommandError, first_line, import_tensorflow, say, written


def run(*, model: Path, output: Path, modules: Sequence[str], trust: bool) -> int:
    """Runs the command and returns its exit code.

    Raises:
      CommandError: a module or the model cannot be loaded, the model cannot be fused, or the output
        cannot be written.
    """
    if output.suffix != ".keras":
        raise CommandError(f"the output must be a .keras file, got {output}")
    import_tensorflow()
    import cbam_ops

    try:
        fused, report = cbam_ops.fuse(
            load_model(model, modules, trust), verbose=1, return_report=True
        )
    except ValueError as error:
        raise CommandError(f"{model}: {error}") from error
    replaced = sum(bool(row.found) for row in report)
    if not replaced:
        return 1
    with written(output) as path:
        fused.save(path)
    say(f"{output}: {replaced} of {len(report)} replaced.")
    return 0


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    """The user's modules lie where the command is run, as `python -m` has it."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def load_model(path: Path, modules: Sequence[str], trust: bool, compiled: bool = True) -> Any:
    """A Keras model of a file.

    Args:
      path: the file.
      modules: the names of those to import, which have the model's own layers.
      trust: whether to run the Python code in it.
      compiled: whether to compile it as it was.

    Raises:
      CommandError: a module or the model cannot be loaded.
    """
    import keras

    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    names: dict[str, Any] = {}
    for module in modules:
        try:
            with _current_folder_first():
                names.update(vars(importlib.import_module(module)))
        except Exception as error:  # whatever the user's code raises
            raise CommandError(f"cannot import {module}: {first_line(error)}") from error
    classes = {name: value for name, value in names.items() if callable(value)}

    def load(compiled: bool) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optimizers, which start afresh
            return keras.models.load_model(path, classes, compiled, not trust)

    try:
        return load(compiled)
    except Exception as error:  # of many types, for a file that is damaged or no model
        text = str(error)
        if "safe_mode=False" in text:
            raise CommandError(
                f"{path} has Lambda layers with Python code in them; --trust runs that code"
            ) from error
        if "Could not locate" in text:
            what = text.partition("Could not locate ")[2].partition(".")[0]
            with contextlib.suppress(Exception):
                loaded = load(compiled=False)
                say(f"{path} is compiled with {what}, which --import MODULE imports: left out.")
                return loaded
            raise CommandError(
                f"{path} needs {what}; --import MODULE imports the module that has it"
            ) from error
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, NameError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise CommandError(
                f"cannot load {path}: {cause} in its Python code, of which Keras keeps no imports; "
                "make the model in Python, load its weights, and call cbam_ops there"
            ) from error
        raise CommandError(f"cannot load {path}: {first_line(error)}") from error
