"""Finds and loads the libraries with the TensorFlow ops, or says why they cannot be loaded.

Nothing happens at import. `load_ops()` does the work once per process and returns the module of ops
that `tf.load_op_library` makes, or a `Cause`: what is wrong and the one command that mends it.

What XLA needs to compile the ops is in a library of its own, so that its failure leaves them as
they are. It is loaded together with them: a graph that was made outside XLA can reach XLA without
any call of this package. `load_xla()` says how that went.

A library built for one minor release of TensorFlow does not load in another (C++ symbols differ),
so versions are compared before anything is loaded. The minor is the one in the build record, a file
that the build writes beside the library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.request import url2pathname

LIBRARY = "libcbam_ops_tf.so"
XLA_LIBRARY = "libcbam_ops_xla.so"
CORE_LIBRARY = "libcbam_ops_core.so"  # the kernels, which all others need
BUILD_RECORD = "_build_record.json"
XLA_SINCE = "2.20"  # the first TensorFlow with what the XLA library is built with

CauseKind = Literal[
    "no_tensorflow",
    "source_tree",
    "pure_python",
    "not_built",
    "other_tensorflow",
    "old_tensorflow",
    "corrupt",
    "load_failed",
    "no_kernel",
    "gpu_check",
    "converter",
]


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why the native ops cannot be used: the kind, one sentence on it, and what mends it."""

    kind: CauseKind
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.reason} {self.fix}"


_PACKAGE = Path(__file__).resolve().parent


def _source_root(package: Path) -> Path | None:
    """The source tree that `package` (the directory of the Python files) lies in, if it does."""
    root = package.parent
    return root if (root / "CMakeLists.txt").is_file() and (root / "csrc").is_dir() else None


def _origin() -> str:
    """Where the installed package came from, in pip's words: a path, a URL, or its name alone."""
    try:
        text = importlib.metadata.distribution("cbam-ops").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    record = json.loads(text or "{}")  # there is none of a package that an index was asked for
    url = record.get("url", "cbam-ops")
    if "vcs_info" in record:
        return f"{record['vcs_info']['vcs']}+{url}"
    return url2pathname(url.removeprefix("file://")) if url.startswith("file:") else url


def _rebuild_command(package: Path) -> str:
    origin = str(_source_root(package) or _origin())
    return f"pip install --force-reinstall --no-deps {shlex.quote(origin)}"


def compiled_directory() -> Path | None:
    """The directory of the compiled parts, or None where there are none.

    It is where the pybind11 module lies: in an editable install that is in site-packages, while the
    Python files are in the source tree.
    """
    spec = importlib.util.find_spec("cbam_ops._core")
    if spec is None or not spec.origin:
        return None
    return Path(spec.origin).resolve().parent


def ops_library() -> Path | None:
    """The library of TensorFlow ops, for `tf.load_op_library`; None where nothing was built."""
    directory = compiled_directory()
    return None if directory is None else directory / LIBRARY


def read_build_record(directory: Path) -> dict[str, Any]:
    """The build record in `directory`.

    Raises:
      ValueError: There is none, or it is not what a build writes; the text says which.
    """
    path = directory / BUILD_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    parts = ("compiler", "cpu", "cuda", "libraries", "tensorflow")
    if (
        not isinstance(record, dict)
        or not all(isinstance(record.get(part), dict) for part in parts)
        or not isinstance(record["tensorflow"].get("version"), str)
    ):
        raise ValueError(f"{path} is not what a build of cbam_ops writes")
    return record


def build_record() -> dict[str, Any]:
    """What the build wrote about itself: versions, compiler, flags, CUDA, checksums.

    Empty where nothing was built, or where the record cannot be used.
    """
    directory = compiled_directory()
    try:
        return {} if directory is None else read_build_record(directory)
    except ValueError:
        return {}


def tensorflow_requirement() -> str:
    """The releases of TensorFlow that this package asks for, from its metadata."""
    try:
        requirements = importlib.metadata.requires("cbam-ops") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    found = [text for text in requirements if re.match(r"tensorflow\b", text)]
    return found[0] if found else "tensorflow"


def _is_pure_python() -> bool:
    """Whether the installed package is one without compiled parts, as its owner wished."""
    try:
        wheel = importlib.metadata.distribution("cbam-ops").read_text("WHEEL")
    except importlib.metadata.PackageNotFoundError:
        return False
    return wheel is not None and "Root-Is-Purelib: true" in wheel


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _damage(library: Path, record: dict[str, Any]) -> str | None:
    """Why a compiled file must not be loaded: it is not the one that was built.

    A library that is cut off or has a wrong byte can end the process when it is loaded, or compute
    something else. The checksums of all compiled files take 20 ms.
    """
    expected = record["libraries"].get(library.name)
    found = hashlib.sha256(library.read_bytes()).hexdigest()
    if found == expected:
        return None
    return f"is not the file that was built (SHA-256 {found}, in the build record {expected})"


def _corrupt(reason: str) -> Cause:
    return Cause(
        "corrupt",
        f"The compiled ops are damaged: {reason}.",
        f"Install them again: {_rebuild_command(_PACKAGE)}",
    )


def load_core() -> ModuleType:
    """The kernels on numpy arrays, `cbam_ops._core`.

    Raises:
      ImportError: It is missing, damaged or does not load; the text says why.
    """
    directory = compiled_directory()
    if directory is not None and "cbam_ops._core" not in sys.modules:
        try:
            record = read_build_record(directory)
        except ValueError as error:
            raise ImportError(str(error)) from error
        for library in (*directory.glob("_core.*.so"), directory / CORE_LIBRARY):
            damage = _damage(library, record) if library.is_file() else None
            if damage is not None:
                raise ImportError(f"{library} {damage}")
    return importlib.import_module("cbam_ops._core")


def find_cause(directory: Path | None, tensorflow_version: str) -> Cause | None:
    """What would keep the library in `directory` from loading, as far as that shows beforehand."""
    if directory is None and _is_pure_python():
        return Cause(
            "pure_python",
            "This is an installation without compiled ops (CBAM_OPS_NATIVE=OFF).",
            f"Install it with them, where they can be compiled: {_rebuild_command(_PACKAGE)}",
        )
    source = _source_root(_PACKAGE)
    if directory is None and source is not None:
        return Cause(
            "source_tree",
            f"cbam_ops was imported from the source tree ({_PACKAGE}), which has no compiled "
            "parts.",
            "Run Python from another folder to use the installed package, or build the source "
            f"tree's: pip install -e {shlex.quote(str(source))}",
        )
    libraries = [(directory or _PACKAGE) / name for name in (LIBRARY, CORE_LIBRARY)]
    for library in libraries:
        if directory is None or not library.is_file():
            return Cause(
                "not_built",
                f"The compiled ops are missing: there is no {library}.",
                f"Build and install them: {_rebuild_command(_PACKAGE)}",
            )
    assert directory is not None
    try:
        record = read_build_record(directory)
    except ValueError as error:
        return _corrupt(str(error))
    built_for = record["tensorflow"]["version"]
    if _minor(built_for) != _minor(tensorflow_version):
        return Cause(
            "other_tensorflow",
            f"The compiled ops were built for TensorFlow {_minor(built_for)} ({built_for}), but "
            f"TensorFlow {tensorflow_version} is installed.",
            f"Install the release they were built for: pip install "
            f"'tensorflow=={_minor(built_for)}.*'",
        )
    for library in libraries:
        damage = _damage(library, record)
        if damage is not None:
            return _corrupt(f"{library} {damage}")
    return None


_BACKEND_FIX = "set KERAS_BACKEND=tensorflow before importing keras."


def check_backend(who: str) -> None:
    """Raises RuntimeError where Keras runs on another backend than TensorFlow's."""
    import keras

    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"{who} needs the TensorFlow backend of Keras, but Keras runs on "
            f"{keras.backend.backend()!r}: {_BACKEND_FIX}"
        )


def backend_fix(error: Exception | None) -> str:
    """What mends an import that failed for the backend that Keras is set to; else empty."""
    module = getattr(error, "name", None)  # that is missing
    other = os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow"
    if module in ("jax", "torch", "openvino") or (other and module not in ("tensorflow", "keras")):
        return f"cbam_ops needs the TensorFlow backend of Keras: {_BACKEND_FIX}"
    return ""


def load_from(directory: Path | None) -> ModuleType | Cause:
    """Loads the ops from `directory`; see `load_ops`. Not cached."""
    try:
        import tensorflow as tf
    except Exception as error:  # of any type, where Keras's backend does not load
        return Cause(
            "no_tensorflow",
            f"TensorFlow cannot be imported ({error}).",
            backend_fix(error) or f"Install it: pip install '{tensorflow_requirement()}'",
        )
    cause = find_cause(directory, tf.__version__)
    if cause is not None or directory is None:
        return cause or Cause("not_built", "There are no compiled ops.", _rebuild_command(_PACKAGE))
    library = directory / LIBRARY
    try:
        ops: ModuleType = tf.load_op_library(str(library))
    except Exception as error:  # tf.errors.NotFoundError with dlopen's words, and whatever else
        return Cause(
            "load_failed",
            f"The compiled ops in {library} do not load: {error}.",
            f"Build them anew for this machine: {_rebuild_command(_PACKAGE)}",
        )
    return ops


def load_xla_from(directory: Path) -> Cause | None:
    """Loads what XLA needs from `directory`, the ops' own; see `load_xla`. Not cached."""
    import tensorflow as tf

    library = directory / XLA_LIBRARY

    def cause(kind: CauseKind, what: str) -> Cause:
        return Cause(
            kind,
            f"XLA (jit_compile=True) cannot compile the ops: {what}.",
            f"Build and install them: {_rebuild_command(_PACKAGE)}",
        )

    record = read_build_record(directory)
    if record.get("xla") is False:
        return Cause(
            "old_tensorflow",
            "XLA (jit_compile=True) cannot compile the ops: TensorFlow "
            f"{record['tensorflow']['version']} has no headers for that, {XLA_SINCE} and later do.",
            f"Install such a one, then cbam_ops again: {_rebuild_command(_PACKAGE)}",
        )
    if not library.is_file():
        return cause("not_built", f"there is no {library}")
    damage = _damage(library, record)
    if damage is not None:
        return cause("corrupt", f"{library} {damage}")
    try:
        tf.load_library(str(library))
    except Exception as error:  # tf.errors.NotFoundError with dlopen's words, and whatever else
        return cause("load_failed", f"{library} does not load: {error}")
    devices = _devices_with_kernels()
    if any(f"XLA_{device}_JIT" not in devices for device in ("CPU", "GPU") if device in devices):
        return cause("load_failed", f"it did not accept those of {library}")
    return None


def _devices_with_kernels() -> set[str]:
    """The devices that the ops have kernels for: "CPU", "GPU", and "XLA_CPU_JIT", "XLA_GPU_JIT"."""
    from tensorflow.python.framework import kernels

    registered = kernels.get_registered_kernels_for_op("CbamOps>Cbam").kernel
    return {kernel.device_type for kernel in registered}


_lock = threading.Lock()
_loaded: tuple[ModuleType | Cause, Cause | None] | None = None  # the ops, why not XLA


def _load() -> tuple[ModuleType | Cause, Cause | None]:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                directory = compiled_directory()
                ops = load_from(directory)
                if isinstance(ops, Cause) or directory is None:
                    _loaded = (ops, None)
                else:
                    _loaded = (ops, load_xla_from(directory))
    return _loaded


def load_ops() -> ModuleType | Cause:
    """The module of native ops, or the cause why there is none. Loads at the first call.

    Returns:
      The module that `tf.load_op_library` makes, with one function per op, or a `Cause`.
    """
    return _load()[0]


def load_xla() -> Cause | None:
    """The cause why XLA cannot compile the native ops, None if it can. Loads at the first call."""
    ops, cause = _load()
    return ops if isinstance(ops, Cause) else cause
