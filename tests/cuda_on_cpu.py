"""Builds the CUDA kernels for a CPU (csrc/testing/cuda_on_cpu.h) and calls them on numpy arrays.

The sources of csrc/core/cuda are compiled by the C++ compiler, one fiber per CUDA thread, into a
Python module with the functions of `cbam_ops._core.cuda`. Nothing here needs a GPU or nvcc.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cbam_ops import _core
from cbam_ops._cli import gpu_kernels

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
CACHE = Path(os.environ.get("CBAM_OPS_TEST_CACHE", tempfile.gettempdir())) / "cbam_ops_cuda_on_cpu"

Array = np.ndarray


def cuda_sources(csrc: Path) -> list[Path]:
    """The translation units of the CUDA kernels."""
    return sorted(p for p in (csrc / "core" / "cuda").glob("*.cu"))


def changed_sources(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """A copy of the sources in `folder`, changed in turn: file, text, replacement."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    for name, text, replacement in changes:
        source = (csrc / name).read_text()
        assert text in source, f"{name} has no longer, so update it: {text}"
        (csrc / name).write_text(source.replace(text, replacement))
    return csrc


def _fingerprint(csrc: Path, folders: Sequence[str], flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((csrc / folder).rglob("*")):
            if path.suffix in (".cu", ".cuh", ".h", ".cc") and path.parent.name != "cpu":
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    digest.update(" ".join([COMPILER, *flags]).encode())
    return digest.hexdigest()[:20]


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(str(c) for c in command)}\n{done.stderr[-4000:]}")


@functools.cache
def sanitizer_works(name: str) -> bool:
    """Whether the compiler links, and the machine runs, a program with -fsanitize=`name`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "one.cc")
        source.write_text("int main() { return 0; }")
        try:
            _run([COMPILER, f"-fsanitize={name}", source, "-o", f"{folder}/one"])
            _run([f"{folder}/one"])
        except (OSError, RuntimeError):
            return False
    return True


# AddressSanitizer's checks as calls: the kernels of a type compile in 12 seconds for 31.
CHECKS_ARE_CALLS = ("--param", "asan-instrumentation-with-call-threshold=0")


def sanitizer_flags(name: str) -> list[str]:
    """What compiles with -fsanitize=`name`."""
    return [f"-fsanitize={name}", "-g1", "-fno-omit-frame-pointer", *CHECKS_ARE_CALLS]


def build(
    csrc: Path = CSRC,
    *,
    sanitizer: str = "",
    only: Sequence[str] | None = None,
    main: Path | None = None,
    glue: Sequence[str] = (),
    glue_flags: Sequence[str] = (),
    glue_link: Sequence[str] = (),
) -> Path:
    """Compiles the emulated kernels, or finds them compiled, and returns the file.

    Either `main` or `glue` says what they are for.

    Args:
      csrc: the source tree; a changed copy of it for mutation tests.
      sanitizer: "" or what -fsanitize= takes.
      only: the stems of the sources in core/cuda to compile; default all. The rest is undefined, so
        `main` or the types used must not need it (CBAM_OPS_CUDA_FLOAT32_ONLY is set then).
      main: a source with a main function: an executable is built instead of a shared library.
      glue: sources, relative to csrc, to build with the kernels into a shared library, with what
        they need to compile and link.
    """
    flags = list(FLAGS)
    if only is not None:
        flags.append("-DCBAM_OPS_CUDA_FLOAT32_ONLY=1")
    runtime_flags = list(flags)
    if sanitizer:
        instrumented = sanitizer_flags(sanitizer)
        flags += instrumented
        # The runtime itself is not instrumented for threads: see cuda_on_cpu.cc.
        runtime_flags += ["-DCBAM_TSAN=1", "-g1"] if sanitizer == "thread" else instrumented
    folders = ["core", "ops", "testing", *(["python", "tf"] if glue else [])]
    key = [*flags, str(only), str(main and main.read_text()), *glue, *glue_flags, *glue_link]
    folder = CACHE / _fingerprint(csrc, folders, key)
    target = folder / ("check" if main else "kernels.so")
    if target.exists():
        return target
    building = Path(tempfile.mkdtemp(prefix="build", dir=_made(CACHE)))
    units = [(s, flags) for s in cuda_sources(csrc) if only is None or s.stem in only]
    units.append((csrc / "testing" / "cuda_on_cpu.cc", runtime_flags))
    units += [(csrc / name, [*flags, *glue_flags]) for name in glue]
    if main:
        units += [
            (source, flags)
            for source in (main, csrc / "ops/dimensions.cc", csrc / "ops/options.cc")
        ]
    objects = [building / f"{source.stem}.o" for source, _ in units]

    def compile_one(index: int) -> None:
        source, its_flags = units[index]
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        _run([COMPILER, *its_flags, f"-I{csrc}", *language, "-c", source, "-o", objects[index]])

    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        list(pool.map(compile_one, range(len(units))))
    link = [] if main else ["-shared"]
    link += [f"-fsanitize={sanitizer}"] if sanitizer else []
    _run([COMPILER, *link, *objects, *glue_link, "-o", building / target.name])
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(building / target.name, target)
    shutil.rmtree(building, ignore_errors=True)
    return target


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def module() -> ModuleType:
    """The emulated kernels as a Python module: csrc/testing/cuda_on_cpu_module.cc."""
    import pybind11

    name = "cuda_on_cpu_kernels"
    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    library = build(
        glue=["testing/cuda_on_cpu_module.cc", "ops/dimensions.cc", "ops/options.cc"],
        glue_flags=["-fvisibility=hidden", *(f"-isystem{path}" for path in includes)],
    )
    return load_module(name, library)


def load_module(name: str, library: Path) -> ModuleType:
    """A Python module from a shared library, wherever that lies."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    loaded = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(loaded)
    return loaded


class KernelError(RuntimeError):
    """The kernels did what a GPU would hang on, or wrote where they must not."""


def empty(shape: Sequence[int], dtype: Any, offset: int = 0) -> Array:
    """An array full of NaN, `offset` elements off a 256-byte boundary."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.full(size + 256 + offset * dtype.itemsize, 0xFF, np.uint8)
    start = -raw.ctypes.data % 256 + offset * dtype.itemsize
    return raw[start : start + size].view(dtype).reshape(shape)


def place(array: Array, offset: int = 0) -> Array:
    """A copy of `array`, `offset` elements off a 256-byte boundary."""
    copy = empty(array.shape, array.dtype, offset)
    copy[...] = array
    return copy


class Kernels:
    """`cbam_ops._core` over the emulated kernels: the same functions, on numpy arrays.

    Beside them it has all that `module` has. `misalign` moves the maps that a function takes and
    gives by so many elements off a boundary.
    """

    def __init__(self, kernels: ModuleType | None = None) -> None:
        self.module = kernels or module()
        self._signatures = _core.signatures()

    def __getattr__(self, name: str) -> Any:
        if name in self._signatures:
            return functools.partial(self._call, name)
        return getattr(self.module, name)

    def _announce(
        self, inputs: dict[str, Array], outputs: dict[str, Array], workspace: Array
    ) -> None:
        """What a call may touch, before it."""

    def _call(self, op: str, misalign: int = 0, **given: Any) -> dict[str, Array]:
        signature = self._signatures[op]
        inputs, described, problem = gpu_kernels.describe_call(signature, given)
        offsets = dict.fromkeys(gpu_kernels.maps_of(signature), misalign)
        arrays = {name: place(array, offsets.get(name, 0)) for name, array in inputs.items()}
        outputs = {name: empty(*how, offsets.get(name, 0)) for name, how in described.items()}
        addresses = {name: array.ctypes.data for name, array in (arrays | outputs).items()}
        arguments = {**problem, **addresses}
        size = getattr(self.module, f"{op}_workspace")(**arguments)
        workspace = np.full(size + 512, 0xFF, np.uint8)
        start = -workspace.ctypes.data % 256
        self._announce(arrays, outputs, workspace[start : start + size])
        try:
            getattr(self.module, op)(**arguments, workspace=workspace.ctypes.data + start)
        finally:
            failure = self.module.take_failure()
            if failure:
                raise KernelError(failure)
        if (workspace[start + size :] != 0xFF).any() or (workspace[:start] != 0xFF).any():
            raise KernelError("written outside the workspace")
        return outputs
