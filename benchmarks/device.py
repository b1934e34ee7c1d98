"""The CUDA kernels on tensors of PyTorch, without TensorFlow: `cbam_ops._core.cuda`.

What the kernels take and give is `_core.signatures()`'s to say. The truth is `_core` on the CPU, in
float64.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbam_ops import _core, testing
from cbam_ops._bench import (
    OURS,
    Case,
    Inputs,
    Outcome,
    Prepared,
    Provider,
    cpus,
    prepare,
    time_prepared,
)
from cbam_ops._cli import gpu_kernels

Arrays = dict[str, np.ndarray]
# Where everything lies. On "cpu" it is the same code, over the kernels' sources as the tests run
# them: to try all this where there is no GPU. Of the processes that are started too.
DEVICE = os.environ.get("CBAM_OPS_BENCHMARK_DEVICE", "cuda")


def kernels() -> Any:
    """`_core.cuda`, or what has its functions on this device."""
    if DEVICE == "cuda":
        return _core.cuda
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    return importlib.import_module("cuda_on_cpu").module()


def needed(signature: Mapping[str, Any], known: Mapping[str, Any], relu: bool) -> dict[str, Any]:
    """What an op takes of what is known: arguments, what the forward pass gave, `dy`."""
    names = {row["name"] for row in signature["inputs"]} - (set() if relu else {"y"})
    return {name: value for name, value in known.items() if name in names}


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
        if array.ndim and array.strides[0] == 0:  # one sample, repeated: on the device
            array = array[:1].copy()
        bits = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        tensor.copy_(torch.from_numpy(bits).view(tensor.dtype).view(array.shape).to(DEVICE))
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
        self._cuda, self._memory = cuda, memory
        op = case.function.removesuffix("_with_batch_norm")
        options = case.kernel_options
        relu = options.get("activation") == "relu"
        maps = gpu_kernels.maps_of(signatures[op]) | gpu_kernels.maps_of(signatures[f"{op}_grad"])
        offsets = dict.fromkeys(maps, offset)
        self.inputs = {
            name: memory.place(array, offsets.get(name, 0)) for name, array in arrays.items()
        }

        def prepared(
            op: str, known: Mapping[str, Any], **wanted: bool
        ) -> tuple[dict[str, Any], Callable[[], None]]:
            """The outputs of an op and its call."""
            given = needed(signatures[op], arrays, relu) | options | wanted
            _, described, problem = gpu_kernels.describe_call(signatures[op], given)
            made = {
                name: memory.empty(shape, kind.name, offsets.get(name, 0))
                for name, (shape, kind) in described.items()
            }
            return made, self._bound(op, problem, needed(signatures[op], known, relu) | made)

        self.outputs, self.forward = prepared(op, self.inputs)
        wanted = {"d_residual": True} if relu and case.residual else {}
        known = self.inputs | self.outputs
        self.gradients, self.backward = prepared(f"{op}_grad", known, **wanted)

    def _bound(
        self, op: str, problem: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> Callable[[], None]:
        addresses = {name: self._memory.address(tensor) for name, tensor in tensors.items()}
        arguments = {**problem, **addresses}
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
            # The workspace stays: copying what lies between its arrays, which nobody writes, would
            # be reported.
            for name in set(places) - set(inputs) - {"workspace"}:
                self._cuda.copy_to_host(after[places[name]], addresses[name])
            return after
        finally:
            for address in addresses.values():
                self._cuda.free(address)


def on_the_cpu(case: testing.Case, arrays: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    """What `_core` computes of a case on the CPU in another type: outputs and gradients."""
    op = case.function.removesuffix("_with_batch_norm")
    known: dict[str, Any] = {name: array.astype(dtype) for name, array in arrays.items()}
    options = case.kernel_options | {"threads": min(cpus(), 256)}
    relu = options.get("activation") == "relu"
    wanted = {"d_residual": True} if relu and "residual" in known else {}
    of_op, of_gradient = (_core.signatures()[name] for name in (op, f"{op}_grad"))
    outputs = getattr(_core, op)(**needed(of_op, known, relu), **options)
    given = needed(of_gradient, known | outputs, relu)
    gradients = getattr(_core, f"{op}_grad")(**given, **wanted, **options)
    return {**outputs, **gradients}


def findings(case: testing.Case, call: Call, arrays: Arrays) -> list[testing.Finding]:
    """Every result of a call that ran against the CPU in float64, by the tests' policy."""
    truth, stock = (on_the_cpu(case, arrays, dtype) for dtype in ("float64", "float32"))
    return gpu_kernels.compare(case, call.results(), truth, stock)


# --- as providers of the suite --------------------------------------------------------------------

# Timed calls go round maps of four times an H100's L2, but not round more than this many.
_ROTATED_BYTES, _MOST_SETS = 200 * 10**6, 8


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

    def placed(array: np.ndarray) -> np.ndarray:
        array = array.astype(kind)
        whole = len(array) == case.n
        return array if whole else np.broadcast_to(array, (case.n, *array.shape[1:]))

    calls = [
        Call(
            case.problem, kernels(), _core.signatures(), memory,
            {**inputs.weights, **{name: placed(array) for name, array in maps.items()}},
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


def measure_alone(case: Case, seconds: float) -> Outcome:
    """Times ours without a baseline, soon after the call.

    Results are checked of two samples of the problem; of these the first, repeated on the device,
    makes the maps that are timed.
    """
    few = dataclasses.replace(case, n=min(case.n, 2), providers=(OURS,))
    inputs, checked, outcome = prepare(few, 0, PROVIDERS, truth_of)
    if OURS not in checked:
        return outcome
    one = {name: array[:1] for name, array in inputs.sets[0].items()}
    sets = int(np.clip(-(-_ROTATED_BYTES // case.map_bytes), 1, _MOST_SETS))
    repeated = Inputs([one] * sets, inputs.weights)
    ours = _setup(case, repeated)
    ours.errors = checked[OURS].errors
    outcome.rows = time_prepared(case, repeated, {OURS: ours}, seconds)
    return outcome
