"""The CUDA kernels on tensors of PyTorch, without TensorFlow: `cbam_ops._core.cuda`.

What the kernels take and give is `_core.signatures()`'s to say. The truth is `_core` on the CPU, in
float64.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbam_ops import _core, testing
from cbam_ops._bench import OURS, Case, Inputs, Prepared, Provider, cpus
from cbam_ops._cli import gpu_kernels

Arrays = dict[str, np.ndarray]
# Where everything lies. On "cpu" it is the same code, over the kernels' sources as the tests run
# them: to try all this where there is no GPU. Of the processes that are started too.
DEVICE = os.environ.get("CBAM_OPS_BENCHMARK_DEVICE", "cuda")
# What the forward pass keeps for the backward pass.
_KEPT = ("channel_gate", "spatial_gate", "channel_descriptors", "spatial_descriptors",
         "batch_statistics")  # fmt: skip


def kernels() -> Any:
    """`_core.cuda`, or what has its functions on this device."""
    if DEVICE == "cuda":
        return _core.cuda
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    return importlib.import_module("cuda_on_cpu").module()


class TorchMemory:
    """Tensors on the GPU. Those that are made are full of NaN, `offset` elements off a boundary."""

    def empty(self, shape: Any, dtype: str, offset: int = 0) -> Any:
        import torch

        count = int(np.prod(shape))
        kind = getattr(torch, dtype)
        fill = 255 if dtype == "uint8" else float("nan")
        return torch.full((count + offset,), fill, dtype=kind, device=DEVICE)[offset:].view(*shape)

    def place(self, array: np.ndarray, offset: int = 0) -> Any:
        import torch

        tensor = self.empty(array.shape, array.dtype.name, offset)
        bits = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        tensor.copy_(torch.from_numpy(bits).view(tensor.dtype).view(tensor.shape))
        return tensor

    def host(self, tensor: Any) -> np.ndarray:
        import torch

        flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
        return flat.view(np.dtype(str(tensor.dtype).removeprefix("torch."))).reshape(tensor.shape)

    def address(self, tensor: Any) -> int:
        return tensor.data_ptr()

    def stream(self) -> int:
        import torch

        return torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0


class Call:
    """A case with its tensors on the device; `forward` and `backward` only enqueue.

    Args:
      case: what is computed.
      cuda: `_core.cuda`, or what has its functions.
      signatures: `_core.signatures()`.
      memory: where the tensors are.
      arrays: the arguments, and `dy`.
      offset: how many elements the maps lie off an aligned address.
    """

    def __init__(
        self,
        case: testing.Case,
        cuda: Any,
        signatures: Mapping[str, Any],
        memory: Any,
        arrays: Mapping[str, np.ndarray],
        offset: int = 0,
    ) -> None:
        self._cuda, self._signatures, self._memory, self._offset = cuda, signatures, memory, offset
        self._op = case.function.removesuffix("_with_batch_norm")
        n, h, w, c = case.size
        self._sizes = {"N": n, "H": h, "W": w, "C": c, "hidden": case.hidden}
        self._sizes |= {"k": case.kernel_size, "1": 1, "2": 2}
        self._sizes["statistics"] = 2 if "gamma" in arrays else 0
        self._nchw = case.data_format == "NCHW"
        self._types = {"T": case.dtype, "U": testing.compute_type(case.dtype)}
        self._options = {"data_format": case.data_format, **dict(case.options)}
        self.inputs = {
            name: memory.place(array, offset if name in (*testing.MAPS, "dy") else 0)
            for name, array in arrays.items()
        }
        relu = dict(case.options).get("activation") == "relu"
        self.outputs = self._made(self._op, set())
        wanted = {"dgamma"} if "gamma" in arrays else set()
        wanted |= {"d_residual"} if relu and case.residual else set()
        self.gradients = self._made(f"{self._op}_grad", wanted)
        kept = {name: self.outputs[name] for name in _KEPT if name in self.outputs}
        kept |= {"y": self.outputs["y"]} if relu else {}
        names = {row["name"] for row in signatures[self._op]["inputs"]}
        given = {name: t for name, t in self.inputs.items() if name in names}
        self.forward = self._bound(self._op, {**given, **self.outputs})
        given.pop("residual", None)
        given = {**given, **kept, "dy": self.inputs["dy"], **self.gradients}
        self.backward = self._bound(f"{self._op}_grad", given)

    def _made(self, op: str, wanted: set[str]) -> dict[str, Any]:
        made = {}
        for row in self._signatures[op]["outputs"]:
            if row["count"] is None or row["name"] in wanted:
                order = (0, 3, 1, 2) if row["is_map"] and self._nchw else range(4)
                dims = [row["dims"][i] for i in order if i < len(row["dims"])]
                shape = [self._sizes[dim] for dim in dims]
                offset = self._offset if row["is_map"] else 0
                made[row["name"]] = self._memory.empty(shape, self._types[row["type"]], offset)
        return made

    def _bound(self, op: str, tensors: Mapping[str, Any]) -> Callable[[], None]:
        shape = [self._sizes[dim] for dim in ("NCHW" if self._nchw else "NHWC")]
        arguments = {
            "shape": shape, "dtype": self._types["T"], "hidden": self._sizes["hidden"],
            "kernel_size": self._sizes["k"], **self._options,
            **{name: self._memory.address(tensor) for name, tensor in tensors.items()},
        }  # fmt: skip
        size = getattr(self._cuda, f"{op}_workspace")(**arguments)
        workspace = self._memory.empty([size + 256], "uint8")
        start = self._memory.address(workspace)
        arguments["workspace"] = start + -start % 256
        function = getattr(self._cuda, op)

        def run(keep: Any = (workspace, tensors)) -> None:
            function(**arguments, stream=self._memory.stream())

        return run

    def step(self) -> None:
        self.forward()
        self.backward()

    def results(self) -> Arrays:
        """Outputs and gradients on the host."""
        found = {**self.outputs, **self.gradients}
        return {name: self._memory.host(tensor) for name, tensor in found.items()}


class Apart(gpu_kernels.Kernels):
    """Arguments in allocations of their own, only inputs written: for compute-sanitizer."""

    def _run(
        self,
        op: str,
        places: dict[str, slice],
        inputs: Collection[str],
        before: np.ndarray,
        problem: dict[str, Any],
    ) -> np.ndarray:
        sizes = {name: place.stop - place.start for name, place in places.items()}
        addresses = {name: self._cuda.allocate(max(size, 1)) for name, size in sizes.items()}
        try:
            for name in inputs:
                self._cuda.copy_to_device(addresses[name], before[places[name]])
            getattr(self._cuda, op)(**addresses, **problem)
            after = before.copy()
            for name in set(places) - set(inputs):
                self._cuda.copy_to_host(after[places[name]], addresses[name])
            return after
        finally:
            for address in addresses.values():
                self._cuda.free(address)


def on_the_cpu(case: testing.Case, arrays: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    """What `_core` computes of a case on the CPU in another type: outputs and gradients."""
    op = case.function.removesuffix("_with_batch_norm")
    given: dict[str, Any] = {name: array.astype(dtype) for name, array in arrays.items()}
    dy, residual = given.pop("dy"), given.pop("residual", None)
    options = {"data_format": case.data_format, **dict(case.options), "threads": min(cpus(), 256)}
    more = {} if residual is None else {"residual": residual}
    outputs = getattr(_core, op)(**given, **more, **options)
    relu = dict(case.options).get("activation") == "relu"
    kept = {name: outputs[name] for name in _KEPT if name in outputs}
    kept |= {"y": outputs["y"]} if relu else {}
    more = {"d_residual": True} if relu and residual is not None else {}
    gradients = getattr(_core, f"{op}_grad")(**given, dy=dy, **kept, **more, **options)
    return {**outputs, **gradients}


def findings(case: testing.Case, call: Call, arrays: Arrays) -> list[testing.Finding]:
    """Every result of a call that ran against the CPU in float64, by the tests' policy."""
    truth, stock = (on_the_cpu(case, arrays, dtype) for dtype in ("float64", "float32"))
    return gpu_kernels.compare(case, call.results(), truth, stock)


# --- as providers of the suite --------------------------------------------------------------------


def truth_of(case: Case, inputs: Inputs) -> Arrays:
    """`y` and every gradient in float64."""
    arrays = {**inputs.weights, **inputs.sets[0]}
    found = on_the_cpu(case.problem, arrays, "float64")
    return {name: value for name, value in found.items() if name == "y" or name.startswith("d")}


def _setup(case: Case, inputs: Inputs) -> Prepared:
    import torch
    from baselines import cuda_seconds

    memory = TorchMemory()
    kind = np.dtype(case.dtype)
    calls = [
        Call(
            case.problem, kernels(), _core.signatures(), memory,
            {**inputs.weights, **{name: array.astype(kind) for name, array in maps.items()}},
        )
        for maps in inputs.sets
    ]  # fmt: skip
    copies = [torch.empty_like(call.inputs["x"]) for call in calls]

    def at(i: int, mode: str) -> None:
        getattr(calls[i % len(calls)], mode)()

    def results() -> Arrays:
        at(0, "step")
        return calls[0].results()

    for call in calls:  # backward reads what a forward pass left
        call.forward()
    return Prepared(
        run={mode: functools.partial(at, mode=mode) for mode in case.modes},
        calls=1,
        step=lambda: at(0, "step"),
        results=results,
        copy=lambda i: copies[i % len(calls)].copy_(calls[i % len(calls)].inputs["x"]),
        framework="torch",
        timer=cuda_seconds if DEVICE == "cuda" else None,
    )


PROVIDERS = {OURS: Provider("torch", _setup)}
