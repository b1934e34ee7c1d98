"""Builds the CUDA kernels for a CPU (csrc/testing/cuda_on_cpu.h) and calls them on numpy arrays.

The sources of csrc/core/cuda are compiled by the C++ compiler, one fiber per CUDA thread, into a
shared library that ctypes loads. Nothing here needs a GPU, nvcc or TensorFlow.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
CACHE = Path(os.environ.get("CBAM_OPS_TEST_CACHE", tempfile.gettempdir())) / "cbam_ops_cuda_on_cpu"

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}
LAYOUTS = {"NHWC": 0, "NCHW": 1}
POOLINGS = {"avg+max": 0, "avg": 1, "max": 2}
ACTIVATIONS = {"none": 0, "relu": 1}
GATES = {"channel_first": 0, "parallel": 1, "channel_only": 2, "spatial_only": 3}

Array = np.ndarray


def cuda_sources(csrc: Path) -> list[Path]:
    """The translation units of the CUDA kernels."""
    return sorted(p for p in (csrc / "core" / "cuda").glob("*.cu"))


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

    Args:
      csrc: the source tree; a changed copy of it for mutation tests.
      sanitizer: "" or what -fsanitize= takes.
      only: the stems of the sources in core/cuda to compile; default all. The rest is undefined, so
        `main` or the types used must not need it (CBAM_OPS_CUDA_FLOAT32_ONLY is set then).
      main: a source with a main function: an executable is built instead of a shared library.
      glue: sources, relative to csrc, to build into the shared library instead of the C functions
        that `Kernels` calls, with what they need to compile and link.
    """
    flags = list(FLAGS)
    if only is not None:
        flags.append("-DCBAM_OPS_CUDA_FLOAT32_ONLY=1")
    runtime_flags = list(flags)
    if sanitizer:
        flags += [f"-fsanitize={sanitizer}", "-g1", "-fno-omit-frame-pointer"]
        # The runtime itself is not instrumented for threads: see cuda_on_cpu.cc.
        runtime_flags += ["-DCBAM_TSAN=1", "-g1"] if sanitizer == "thread" else flags[-3:]
    folders = ["core", "testing", *(["tf"] if glue else [])]
    key = [*flags, str(only), str(main and main.read_text()), *glue, *glue_flags, *glue_link]
    folder = CACHE / _fingerprint(csrc, folders, key)
    target = folder / ("check" if main else "kernels.so")
    if target.exists():
        return target
    building = Path(tempfile.mkdtemp(prefix="build", dir=_made(CACHE)))
    units = [(s, flags) for s in cuda_sources(csrc) if only is None or s.stem in only]
    units.append((csrc / "testing" / "cuda_on_cpu.cc", runtime_flags))
    if glue:
        units += [(csrc / name, [*flags, *glue_flags]) for name in glue]
    else:
        units.append((main or csrc / "testing" / "cuda_on_cpu_api.cc", flags))
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


class _Problem(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("gates", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("pooling", ctypes.c_int32),
        ("mlp_activation", ctypes.c_int32),
        ("kernel_size", ctypes.c_int64),
        ("batch_norm", ctypes.c_bool),
        ("epsilon", ctypes.c_double),
        ("activation", ctypes.c_int32),
    ]


def _pointers(names: str) -> type[ctypes.Structure]:
    fields = [(name, ctypes.c_void_p) for name in names.split()]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


ARGS = {
    "forward": _pointers(
        "x residual w0 b0 w1 b1 kernel bias gamma y channel_descriptors channel_gate "
        "spatial_descriptors spatial_gate batch_statistics"
    ),
    "backward": _pointers(
        "x dy y w0 b0 w1 b1 kernel gamma channel_descriptors channel_gate spatial_descriptors "
        "spatial_gate batch_statistics d_channel_gate d_spatial_gate dx d_residual dw0 db0 dw1 db1 "
        "dkernel dbias dgamma"
    ),
    "channel_pool": _pointers("x mean maximum"),
    "channel_pool_grad": _pointers("x maximum d_mean d_maximum dx"),
    "spatial_pool": _pointers("x descriptors"),
    "spatial_pool_grad": _pointers("x descriptors d_descriptors dx"),
}
_WORKSPACES = {
    "forward": "forward",
    "backward": "backward",
    "channel_pool": "channel_pool",
    "channel_pool_grad": "channel_pool",
    "spatial_pool": "spatial_pool",
    "spatial_pool_grad": "spatial_pool",
}


class KernelError(RuntimeError):
    """The kernels returned an error, or did what a GPU would hang on."""


def problem(**options: Any) -> _Problem:
    """A problem of contract.h; names of options as in numpy_oracle, sizes as in the struct."""
    tables = {
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "pooling": POOLINGS,
        "mlp_activation": ACTIVATIONS,
        "activation": ACTIVATIONS,
        "gates": GATES,
    }
    made = _Problem(hidden=1, kernel_size=7, epsilon=1e-3)
    for name, value in options.items():
        setattr(made, name, tables[name][value] if name in tables else value)
    return made


def empty(shape: Sequence[int], dtype: Any, offset: int = 0) -> Array:
    """An array full of NaN, `offset` elements off a 64-byte boundary."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    raw = np.full(count * dtype.itemsize + 64 + offset * dtype.itemsize + 64, 0xFF, np.uint8)
    start = -raw.ctypes.data % 64 + offset * dtype.itemsize
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def place(array: Array, offset: int = 0) -> Array:
    """A copy of `array`, `offset` elements off a 64-byte boundary."""
    copy = empty(array.shape, array.dtype, offset)
    copy[...] = array
    return copy


class Kernels:
    """The emulated kernels of one library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in set(_WORKSPACES.values()):
            getattr(self._library, f"cbam_{name}_workspace").restype = ctypes.c_size_t
        if hasattr(self._library, "cbam_report_failures"):  # what only the emulation has
            self._library.cbam_take_launched_kernels.restype = ctypes.c_char_p
            self._library.cbam_half_to_float.restype = ctypes.c_float
            self._library.cbam_report_failures()

    def call(self, name: str, its_problem: _Problem, **arrays: Array | None) -> None:
        """Runs `forward`, `backward` or a pool; arrays that are None are null pointers."""
        args = ARGS[name]()
        for key, array in arrays.items():
            assert array is None or array.flags.c_contiguous
            setattr(args, key, None if array is None else array.ctypes.data)
        size = getattr(self._library, f"cbam_{_WORKSPACES[name]}_workspace")(
            ctypes.byref(its_problem)
        )
        workspace = np.full(size + 512, 0xFF, np.uint8)
        start = -workspace.ctypes.data % 256
        message = ctypes.create_string_buffer(512)
        code = getattr(self._library, f"cbam_{name}")(
            ctypes.byref(its_problem),
            ctypes.byref(args),
            ctypes.c_void_p(workspace.ctypes.data + start),
            None,  # the stream
            message,
            ctypes.c_size_t(512),
        )
        if code != 0:
            raise KernelError(f"{code}: {message.value.decode()}")
        if (workspace[start + size :] != 0xFF).any() or (workspace[:start] != 0xFF).any():
            raise KernelError("written outside the workspace")

    def set_schedule(self, seed: int) -> None:
        """The order in which blocks and threads run."""
        self._library.cbam_set_schedule(ctypes.c_uint64(seed))

    def set_path(self, path: str) -> None:
        """Which kernels run: auto, portable or cluster."""
        self._library.cbam_set_path({"auto": 0, "portable": 1, "cluster": 2}[path])

    def path(self, direction: str, its_problem: _Problem) -> str:
        """The path that `forward` or `backward` would take."""
        chosen = getattr(self._library, f"cbam_{direction}_path")(ctypes.byref(its_problem))
        return ("auto", "portable", "cluster")[chosen]

    def set_device(self, l2: int = 1 << 20, capability: int = 90, shared: int = 232448) -> None:
        """The device that is pretended."""
        self._library.cbam_set_device(
            ctypes.c_int64(l2), ctypes.c_int(capability), ctypes.c_int64(shared)
        )

    def launched(self) -> list[str]:
        """Names of the kernels launched since the last call."""
        return self._library.cbam_take_launched_kernels().decode().split()

    def explain(self, driver: int, build: int, capability: int, architectures: str) -> str:
        """Why a build cannot run on a machine, in the words of core/cuda/explain.h."""
        text = ctypes.create_string_buffer(512)
        self._library.cbam_explain_machine(
            driver, build, capability, architectures.encode(), text, ctypes.c_size_t(512)
        )
        return text.value.decode()

    def to_half(self, value: float) -> int:
        """The emulation's own rounding to float16, as bits."""
        return self._library.cbam_float_to_half(ctypes.c_float(value)) & 0xFFFF

    def from_half(self, bits: int) -> float:
        """The emulation's own reading of float16."""
        return self._library.cbam_half_to_float(ctypes.c_uint16(bits))
