"""What the commands and the benchmarks share: errors for the user, quiet imports, files, tables."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cbam_ops import _gpu_check, options
from cbam_ops._loader import backend_fix, tensorflow_requirement


class CommandError(Exception):
    """The command cannot run and the user can fix it; the text is one clear sentence."""


# What Keras and TensorFlow say before they say what is wrong: where. Stack frames are indented.
_PLACES = ("Exception encountered", "Graph execution error", "Detected at node", "<stack traces")


def first_line(error: Exception) -> str:
    """What an error says, in a line; of a layer or a graph that failed, what is behind it."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))  # Keras's are partly bold
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].startswith(_PLACES):
        lines = [line for line in lines if not line.startswith((*_PLACES, " "))] or lines
    return lines[0].strip() if lines else type(error).__name__


# What `pip install` calls a module, where it is another name.
_DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "tensorflow": f"'{tensorflow_requirement()}'",
}


def require(modules: Iterable[str], purpose: str) -> None:
    """Imports the modules, or raises one `CommandError` that names all missing ones.

    Args:
      modules: names as in an import statement.
      purpose: who needs them, the start of the message ("the demo").
    """
    missing: list[str] = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            # The module itself or one that it needs.
            name = (error.name or module).split(".")[0]
            missing.append(_DISTRIBUTIONS.get(name, name))
        except ImportError as error:
            raise CommandError(
                f"{module} is installed but cannot be imported ({error}); install it again with: "
                f"pip install --force-reinstall {_DISTRIBUTIONS.get(module, module)}"
            ) from error
    missing = list(dict.fromkeys(missing))
    if missing:
        what = "a package that is" if len(missing) == 1 else "packages that are"
        raise CommandError(
            f"{purpose} needs {what} not installed; install with: pip install {' '.join(missing)}"
        )


def check_environment() -> None:
    """Looks for mistyped values in the package's environment variables.

    Raises:
      CommandError: with the variable, its words and what it holds.
    """
    try:
        options.implementation()
        _gpu_check.word()
    except ValueError as error:
        raise CommandError(str(error)) from error
    try:
        import cbam_ops._core as _core
    except ImportError:  # the commands say so themselves
        return
    variable, known = "CBAM_OPS_INSTRUCTION_SET", _core.available_instruction_sets()
    value = os.environ.get(variable, "")
    if value and value not in known:
        words = ", ".join(f'"{name}"' for name in known)
        raise CommandError(
            f"the environment variable {variable} must be one of those that run here, {words}, "
            f"got {value!r}"
        )


def why_reference(allow_reference: bool) -> str | None:
    """Why the reference computes in the place of the fused ops; None where the fused ops run.

    Args:
      allow_reference: whether the user lets it (`--allow-reference`).

    Raises:
      CommandError: the fused ops do not run, and the user did not ask for the reference.
    """
    import_tensorflow()
    import tensorflow as tf

    import cbam_ops

    if options.implementation() == "reference":
        return f"the reference was asked for ({options.ENVIRONMENT_VARIABLE})."
    try:
        with cbam_ops.use_implementation("native"):
            cbam_ops.channel_pool(tf.zeros((1, 1, 1, 1)))
    except cbam_ops.NativeUnavailableError as error:
        if allow_reference:
            return str(error.cause)
        raise CommandError(
            f"the fused ops do not run here: {error.cause} (--allow-reference runs the reference "
            "in their place)"
        ) from error
    return None


def prepare_folder(folder: Path) -> None:
    """Makes the folder: one that cannot be written to shows before the work, not after it.

    Raises:
      CommandError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(
            f"cannot write to the folder {folder} ({error.strerror or error}); choose another with "
            "--output DIR"
        ) from error


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path beside `path` for a block to write to; the file is moved to `path` once it is whole.

    Raises:
      CommandError: it cannot be written; what was at `path` before is still there.
    """
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


_AGAIN_SECONDS = 5.0  # more than what an interrupted command still has to put in order


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt whatever the block makes of it.

    TensorFlow, interrupted while it calls Python, ends with an error of its own. In a destructor,
    or where everything is caught, a KeyboardInterrupt is lost: it comes again while the block goes
    on. Destructors of what it leaves half done fail, at any time until the process ends: their
    errors are no longer shown.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not in_main_thread:
        yield  # ignored, or somebody else's
        return
    interrupted = False

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        sys.unraisablehook = lambda unraisable: None
        signal.default_int_handler(number, frame)

    handlers = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)
    }
    try:
        yield
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_command() -> bool:
    """Whether this process is `cbam-ops` or `python -m cbam_ops`."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return Path(program).name == "cbam-ops" or sys.orig_argv[1:3] == ["-m", "cbam_ops"]


@contextlib.contextmanager
def quiet_start_up() -> Iterator[None]:
    """Keeps back TensorFlow's start-up messages, if this process is the command.

    What the block writes to stderr is shown only if the block fails, or if the user has set
    TF_CPP_MIN_LOG_LEVEL to 0 or 1. (That variable alone does not silence TensorFlow while it
    loads.)
    """
    if not is_command() or os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") in ("0", "1"):
        yield
        return
    try:
        kept, messages = os.dup(2), tempfile.TemporaryFile()
    except OSError:  # no stderr, or nowhere to keep what it gets
        yield
        return
    with messages:
        os.dup2(messages.fileno(), 2)
        try:
            yield
        except Exception:
            messages.seek(0)
            os.write(kept, messages.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def import_tensorflow() -> None:
    """Imports TensorFlow and Keras.

    Raises:
      CommandError: one of them is not installed or does not load.
    """
    with quiet_start_up():
        try:
            importlib.import_module("keras")
        except Exception as error:  # of any type, where its backend does not load
            if fix := backend_fix(error):
                raise CommandError(f"Keras cannot be imported: {error}. {fix}") from error
        require(["tensorflow", "keras"], "cbam_ops")


def print_table(rows: Sequence[Sequence[str]], align: str) -> None:
    """Prints rows as aligned columns; the first row is the head.

    Args:
      rows: cells; those missing at the end of a row are empty.
      align: one character per column, "<" or ">".
    """
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        *(
            Column(title, justify="left" if side == "<" else "right", no_wrap=True)
            for title, side in zip(rows[0], align, strict=True)
        ),
        box=box.SIMPLE,
    )
    for row in rows[1:]:
        table.add_row(*row)
    # A fixed width: where the output is no terminal, rich would cut at 80 columns.
    Console(width=200, markup=False, highlight=False).print(table)


def say(text: str = "") -> None:
    """Prints a line at once: the output is read while the command runs."""
    print(text, flush=True)
