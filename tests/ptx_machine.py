"""Executes the PTX that nvcc emits for the CUDA kernels, checks it and counts it.

csrc/testing/ptx is a machine for PTX: `machine()` takes programs as text, `PtxKernels` has the
functions of `cbam_ops._core.cuda` over what nvcc compiled, host code included. No GPU is needed;
the kernels need nvcc, the machine a C++ compiler.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import cuda_on_cpu
import cuda_resources
from cuda_on_cpu import COMPILER, CSRC, Array, cuda_sources

CACHE = cuda_on_cpu.CACHE.with_name("cbam_ops_ptx")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
# PTX alone, as text in the object, with the source lines.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-no-compress",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
MACHINE = ("program", "arithmetic", "memory", "compile", "machine")


def nvcc() -> str | None:
    """The machine's, or that of NVIDIA's wheels (build_backend/find_cuda.py) beside the tests."""
    wheels = shutil.which(Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc"))
    return cuda_resources.nvcc() or wheels


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(str(c) for c in command)}\n{done.stderr[-4000:]}")


def _compile(source: Path, csrc: Path, flags: Sequence[str]) -> Path:
    """The object of a source of the tree, from the cache if nothing has changed there."""
    compiler = nvcc() if source.suffix == ".cu" or source.stem == "runtime" else COMPILER
    folders = ("core", "ops", "python", "testing/ptx")
    if source.stem in MACHINE:
        folders = ("testing/ptx",)
    elif source.suffix == ".cu":
        folders = ("core",)
    digest = hashlib.sha256(repr((compiler, flags, source.name)).encode())
    headers = (".h", ".cuh") if source.suffix == ".cu" else (".h",)
    for path in sorted(p for folder in folders for p in (csrc / folder).rglob("*.*")):
        if path.suffix in headers or path == source:
            digest.update(path.read_bytes())
    target = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _run([compiler or "nvcc", *flags, f"-I{csrc}", "-c", source, "-o", f"{folder}/out.o"])
            os.replace(f"{folder}/out.o", target)
    return target


def _build(
    name: str, csrc: Path, kernels: Sequence[Path] = (), nvcc_flags: Sequence[str] = ()
) -> Path:
    """The file of the Python module `name`."""
    import pybind11

    folder = csrc / "testing" / "ptx"
    includes = [f"-isystem{p}" for p in (pybind11.get_include(), sysconfig.get_path("include"))]
    glue = [*FLAGS, *includes, f"-DCBAM_PTX_MODULE={name}"]
    units = [(folder / f"{stem}.cc", FLAGS) for stem in MACHINE]
    if kernels:
        glue.append("-DCBAM_PTX_KERNELS=1")
        units += [(source, nvcc_flags) for source in kernels]
        units.append(
            (folder / "runtime.cc", ["-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"])
        )
        units += [(csrc / "ops" / f"{stem}.cc", FLAGS) for stem in ("dimensions", "options")]
    units.append((folder / "module.cc", glue))
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        objects = list(pool.map(lambda unit: _compile(unit[0], csrc, unit[1]), units))
    digest = hashlib.sha256(repr([p.name for p in objects]).encode()).hexdigest()
    library = CACHE / f"{name}-{digest[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as building:
            _run([COMPILER, "-shared", *objects, "-o", f"{building}/{name}.so"])
            os.replace(f"{building}/{name}.so", library)
    return library


def _load(name: str, library: Path) -> ModuleType:
    # In a package of its own: of two modules of one name pybind11 gives the first again.
    full_name = f"{library.stem}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(full_name, str(library))
    loaded = importlib.util.module_from_spec(importlib.util.spec_from_loader(full_name, loader))
    loader.exec_module(loaded)
    return loaded


@functools.cache
def machine() -> ModuleType:
    """The machine alone."""
    return _load("ptx_machine", _build("ptx_machine", CSRC))


class PtxKernels(cuda_on_cpu.Kernels):
    """`cbam_ops._core` over the PTX of the kernels: the same functions, on numpy arrays.

    Args:
      csrc: the source tree; a changed copy of it for planted faults.
      only_float32: leaves out the other types, which takes a quarter of the time.
      capability: for which compute capability, 10 * major + minor.
      change: makes of the bytes of what was built, with the PTX as text, those that are loaded.
    """

    def __init__(
        self,
        csrc: Path = CSRC,
        *,
        only_float32: bool = False,
        capability: int = 90,
        change: Callable[[bytes], bytes] | None = None,
    ) -> None:
        # The machine's memory is the host's.
        sources = [source for source in cuda_sources(csrc) if source.stem != "memory"]
        target = f"compute_{capability}"
        flags = [*NVCC_FLAGS, f"-gencode=arch={target},code={target}"]
        if only_float32:
            sources = [s for s in sources if s.stem == "kernels" or "float32" in s.stem]
            flags.append("-DCBAM_OPS_CUDA_FLOAT32_ONLY=1")
        library = _build("ptx_kernels", csrc, sources, flags)
        with tempfile.TemporaryDirectory() as folder:
            if change is not None:
                changed = change(library.read_bytes())
                library = Path(folder, f"{library.stem}_{Path(folder).name}.so")
                library.write_bytes(changed)
            super().__init__(_load("ptx_kernels", library))

    def _announce(
        self, inputs: dict[str, Array], outputs: dict[str, Array], workspace: Array
    ) -> None:
        self.module.remove_buffers()
        for name, array in inputs.items():
            self.module.add_buffer(name, array.ctypes.data, array.nbytes, True, False)
        for name, array in outputs.items():
            self.module.add_buffer(name, array.ctypes.data, array.nbytes, False, True)
        self.module.add_buffer(
            "the workspace", workspace.ctypes.data, workspace.nbytes, False, True
        )
