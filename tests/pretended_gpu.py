"""A pretended GPU, good or with a fault: the CUDA kernels as cuda_on_cpu.py runs them.

    python pretended_gpu.py FAULT LOG check --gpu-kernels 0 --quick
    python pretended_gpu.py FAULT LOG ask

is the command `cbam-ops` on it, for `cbam_ops._gpu_check` to start, and a process that asks
`_gpu_check` about it. Each check adds a line to the file LOG. As in the command that stands in for,
there is no TensorFlow.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["tensorflow"] = None  # type: ignore[assignment]
    sys.path.append(str(Path(__file__).parent))

import cuda_on_cpu

from cbam_ops import _core, _gpu_check
from cbam_ops._cli import gpu_kernels

Arguments = dict[str, Any]


def _wrong_value(arguments: Arguments) -> None:
    if arguments["dtype"] == "float32":
        ctypes.c_float.from_address(arguments["dx"] + 8).value += 1.0


def _stray_write(arguments: Arguments) -> None:
    ctypes.c_ubyte.from_address(arguments["dx"] - 1).value = 0


def _device_error(arguments: Arguments) -> None:
    raise RuntimeError("an illegal memory access was encountered (launch)")


# What a fault does, after the kernel or in its place.
FAULTS: dict[str, Callable[[Arguments], None]] = {
    "wrong": _wrong_value,
    "stray": _stray_write,
    "error": _device_error,
    "crash": lambda arguments: os.abort(),
    "hang": lambda arguments: time.sleep(600),
}
FAULTY_OP = "spatial_attention_grad"


class Cuda:
    """Stands in for `_core.cuda`; FAULTY_OP has the fault."""

    built = True
    architectures = "90"
    build_version = 13000

    def __init__(self, fault: str = "") -> None:
        self._module, self._fault = cuda_on_cpu.module(), fault

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name != FAULTY_OP or self._fault not in FAULTS:
            return function

        def faulty(**arguments: Any) -> None:
            function(**arguments)
            FAULTS[self._fault](arguments)

        return faulty

    def driver_version(self) -> int:
        return 13000

    def why_not(self, capability: int = 0) -> str:
        return ""

    def allocate(self, size: int) -> int:
        if self._fault == "no memory":
            raise MemoryError
        return self._module.allocate(size)


def command(fault: str, log: Path) -> tuple[str, ...]:
    return (sys.executable, __file__, fault, str(log))


ALL_CASES = gpu_kernels.cases


def few_cases(quick: bool) -> list[Any]:
    """Each function once, in float32 and NHWC; the one with the faulty op first."""
    plain = [c for c in ALL_CASES(quick) if (c.dtype, c.data_format) == ("float32", "NHWC")]
    by_function = {case.function: case for case in reversed(plain)}
    return sorted(by_function.values(), key=lambda case: not FAULTY_OP.startswith(case.function))


def main() -> int:
    fault, log, *arguments = sys.argv[1:]
    _core.cuda = Cuda(fault)
    if arguments == ["ask"]:
        _gpu_check._COMMAND = command(fault, Path(log))
        (gpu,) = _gpu_check.found()
        print(json.dumps(_gpu_check.outcome_of(gpu).__dict__))
        return 0
    from cbam_ops import __main__

    with open(log, "a") as file:
        file.write("checked\n")
    gpu_kernels.cases, gpu_kernels.MISALIGNED = few_cases, gpu_kernels.MISALIGNED[2:3]
    return __main__.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
