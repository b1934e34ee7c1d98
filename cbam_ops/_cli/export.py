"""`cbam-ops export`: `cbam_ops.export` on files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbam_ops._cli.fuse import load_model
from cbam_ops._console import CommandError, first_line, import_tensorflow, say

# What messages call arguments of `cbam_ops.export`, and the command's words for them.
_OPTIONS = {"`data`": "--data", "overwrite=True": "--overwrite", "verify=False": "--no-verify"}


def run(
    *,
    model: Path,
    output: Path,
    data: Path | None,
    modules: Sequence[str],
    trust: bool,
    **options: Any,
) -> int:
    """Runs the command and returns its exit code; `options` are arguments of `cbam_ops.export`.

    Raises:
      CommandError: an argument does not fit, the model cannot be loaded or exported, or the output
        cannot be written.
    """
    import_tensorflow()
    import cbam_ops

    arrays = None if data is None else _arrays(data)
    source = model if model.is_dir() else load_model(model, modules, trust, compiled=False)
    try:
        cbam_ops.export(source, output, data=arrays, **options)
    except cbam_ops.exporting.ExportError as error:
        say(str(error))
        return 1
    except (ValueError, FileExistsError, ImportError, cbam_ops.NativeUnavailableError) as error:
        text = first_line(error).removeprefix("export: ")
        for argument, option in _OPTIONS.items():
            text = text.replace(argument, option)
        raise CommandError(text) from error
    return 0


def _arrays(path: Path) -> Any:
    """What a .npy file holds, or a .npz file by name."""
    import numpy as np

    try:
        with path.open("rb") as file:
            content = np.load(file)
            return content if isinstance(content, np.ndarray) else dict(content)
    except Exception as error:  # of many types, for a damaged file
        raise CommandError(f"cannot read {path} as a .npy or .npz file: {error}") from error
