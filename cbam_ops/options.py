"""Which implementation computes, and what this installation is.

"native" are the compiled kernels, "reference" plain TensorFlow (`cbam_ops.reference`), "auto" the
native ones where they run and else the reference, with one warning per cause.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from importlib import metadata
from types import ModuleType
from typing import Any, Literal, get_args

from . import _gpu, _loader

Implementation = Literal["auto", "native", "reference"]
ENVIRONMENT_VARIABLE = "CBAM_OPS_IMPLEMENTATION"
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


class NativeUnavailableError(RuntimeError):
    """Raised where "native" was asked for and the compiled ops cannot be used.

    Attributes:
      cause: the `Cause`, with `kind`, `reason` and `fix`.
    """

    def __init__(self, cause: _loader.Cause) -> None:
        super().__init__(f"The native implementation cannot be used. {cause}")
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cause,)  # how it comes back from a process of a pool


_lock = threading.Lock()
_process: str | None = None  # None until first used: then the environment variable decides
_blocks: ContextVar[tuple[use_implementation, ...]] = ContextVar("cbam_ops_blocks", default=())
_warned: set[str] = set()


def _check(name: object, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        expected = ", ".join(f'"{known}"' for known in IMPLEMENTATIONS)
        raise ValueError(f"{source} must be one of {expected}, got {name!r}")
    return str(name)


def implementation() -> str:
    """The choice in force here: "auto", "native" or "reference".

    Raises:
      ValueError: the environment variable CBAM_OPS_IMPLEMENTATION holds something else.
    """
    global _process
    blocks = _blocks.get()
    if blocks:
        return blocks[0].name
    if _process is None:
        value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
        _process = _check(value or "auto", f"the environment variable {ENVIRONMENT_VARIABLE}")
    return _process


def set_implementation(name: Implementation) -> None:
    """Chooses who computes in the whole process, wherever no `use_implementation` block holds.

    The choice is made where a function is called or traced: a `tf.function` keeps the one it was
    traced with. The initial choice is the environment variable CBAM_OPS_IMPLEMENTATION, read at
    first use, else "auto".

    Args:
      name: "auto": native where it runs, else the reference with one warning per cause. "native":
        a `NativeUnavailableError`, a RuntimeError, where it does not run. "reference": plain
        TensorFlow.

    Raises:
      ValueError: `name` is something else.
    """
    global _process
    _process = _check(name, "set_implementation: `name`")


class use_implementation:
    """Chooses who computes inside a `with` block, whatever the rest of the process does.

        with cbam_ops.use_implementation("native"):
            y = cbam_ops.cbam(x, w0, b0, w1, b1, kernel)

    It holds for the thread or the asyncio task that runs the block, and for the tasks that it
    starts there. Threads that it starts have the process's choice: those of Python, and those that
    TensorFlow makes for `tf.py_function` and for the replicas of a `tf.distribute` strategy.

    Args:
      name: see `set_implementation`.

    Raises:
      ValueError: `name` is something else.
    """

    def __init__(self, name: Implementation) -> None:
        self.name = _check(name, "use_implementation: `name`")

    def __enter__(self) -> None:
        _blocks.set((self, *_blocks.get()))

    def __exit__(self, *exception: object) -> None:
        # Blocks that generators hold open end in any order: this takes away its own.
        blocks = list(_blocks.get())
        if self in blocks:
            blocks.remove(self)
        _blocks.set(tuple(blocks))


def _level_of_the_caller() -> int:
    """The `stacklevel` that makes a warning point at the code that called this package."""
    # Between the two stands AutoGraph, which is told to leave the public functions as they are.
    passed_over = (f"{__package__}.", "tensorflow.python.autograph.")
    frame, level = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(passed_over):
        frame, level = frame.f_back, level + 1
    return level + 1


_REFERENCE_COMPUTES = "cbam_ops computes with plain TensorFlow (the reference), which is slower."


def warn_once(cause: _loader.Cause, consequence: str = _REFERENCE_COMPUTES) -> None:
    """Says once per process what follows from a cause."""
    text = f"{consequence} {cause}"
    with _lock:
        if text in _warned:
            return
        _warned.add(text)
    warnings.warn(text, RuntimeWarning, stacklevel=_level_of_the_caller())


def native_ops(
    cause_of_the_place: Callable[[], _loader.Cause | None] | None = None,
) -> ModuleType | None:
    """The module of native ops if they are to compute, None if the reference is.

    This is the one place that turns the choice, the state of the installation and the place where
    an op would run into a decision.

    Args:
      cause_of_the_place: says why the ops, though loaded, cannot run where the caller stands.

    Raises:
      NativeUnavailableError: the choice is "native" and the ops cannot be used.
      ValueError: the environment variable CBAM_OPS_IMPLEMENTATION holds an unknown word.
    """
    choice = implementation()
    if choice == "reference":
        return None
    loaded = _loader.load_ops()
    if not isinstance(loaded, _loader.Cause):
        cause = cause_of_the_place() if cause_of_the_place else None
        if cause is None:
            return loaded
        loaded = cause
    if choice == "native":
        raise NativeUnavailableError(loaded)
    if loaded.kind != "converter":  # of that there is nothing to mend
        warn_once(loaded)
    return None


def loaded_ops() -> ModuleType:
    """The module of native ops, where there is no choice: for an op that is native itself.

    Raises:
      NativeUnavailableError: the ops cannot be loaded.
    """
    loaded = _loader.load_ops()
    if isinstance(loaded, _loader.Cause):
        raise NativeUnavailableError(loaded)
    return loaded


def _version(*distributions: str) -> str | None:
    """The version of the first that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def _devices() -> list[str]:
    try:
        import tensorflow as tf

        return [device.name for device in tf.config.list_physical_devices()]
    except Exception as error:  # a report about a broken installation must still come out
        return [f"unknown ({error})"]


def _instruction_sets() -> dict[str, Any]:
    try:
        _core = _loader.load_core()
    except ImportError as error:
        return {"active": None, "available": [], "error": str(error)}
    return {
        "active": _core.instruction_set(),
        "available": list(_core.available_instruction_sets()),
    }


def build_info() -> dict[str, Any]:
    """What this installation is: for bug reports, and to see why native is off.

    Loads TensorFlow and the ops if they are not loaded yet; does not fail where they cannot be.

    Returns:
      A dictionary of plain values (it can be written as JSON):
        version: this package's; python, tensorflow, keras, numpy: theirs, None if not installed.
        platform: operating system and machine.
        package, compiled: the directories of the Python files and of the compiled parts (or None).
        build: the build record: versions, compiler, flags, CUDA and why not; empty if not built.
        devices: the physical devices that TensorFlow sees.
        instruction_set: `active` and `available` ones of the CPU kernels.
        gpu: whether CUDA kernels are `built`, with which `cuda`, for which `architectures`, the
          newest CUDA of the driver (`driver_cuda`, None without one), `why_not` they cannot run on
          the current device (None where they can), and the records of their `checks` by GPU.
        implementation: the choice in force; native: whether the native ops run;
        native_off_because: if not, why and what mends it, else None;
        xla: whether they run inside XLA (`jit_compile=True`); xla_off_because: likewise.
    """
    from . import __version__

    loaded = _loader.load_ops()
    cause = loaded if isinstance(loaded, _loader.Cause) else None
    xla_cause = _loader.load_xla()
    directory = _loader.compiled_directory()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "tensorflow": _version("tensorflow", "tensorflow-cpu"),
        "keras": _version("keras"),
        "numpy": _version("numpy"),
        "platform": platform.platform(),
        "package": str(_loader._PACKAGE),
        "compiled": None if directory is None else str(directory),
        "build": _loader.build_record(),
        "devices": _devices(),
        "instruction_set": _instruction_sets(),
        "gpu": _gpu.report(),
        "implementation": implementation(),
        "native": cause is None,
        "native_off_because": None if cause is None else str(cause),
        "xla": xla_cause is None,
        "xla_off_because": None if xla_cause is None else str(xla_cause),
    }
