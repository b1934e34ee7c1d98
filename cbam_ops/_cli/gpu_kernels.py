"""`cbam-ops check --gpu-kernels`: the CUDA kernels against the CPU's, without TensorFlow.

Every op, option, type and layout on small and odd shapes, in device memory from `_core.cuda`. The
truth is `_core` in float64. :mod:`cbam_ops._gpu_check` runs this in a process of its own and reads
what it prints: a case's name before the case runs, and after it how it went. So a case that ends
the process, or never ends, has a name.
"""

from __future__ import annotations

import functools
import itertools
import signal
from collections.abc import Collection
from typing import Any

import numpy as np

from cbam_ops import _gpu, _loader, testing
from cbam_ops._console import CommandError, say
from cbam_ops.testing import Case, Finding

Arrays = dict[str, np.ndarray]

# What the first line begins with: whatever went wrong before it is no fault of the kernels.
STARTED = "The CUDA kernels against the CPU's"
# So long after its start the process ends, even if something hangs and nobody waits for it.
LONGEST_SECONDS = 1800


def _in_every_type_and_layout(case: Case) -> list[Case]:
    every = itertools.product(testing.EPSILON, ("NHWC", "NCHW"))
    return [case.replace(dtype=dtype, data_format=layout) for dtype, layout in every]


def cases(quick: bool) -> list[Case]:
    """What single calls of kernels compute, of :mod:`cbam_ops.testing`; `quick`: small maps."""
    found = []
    for case in (*testing.OPTIONS, *testing.SIZES, *(() if quick else testing.LARGE)):
        if case.is_one_call:
            few = quick and case in testing.SIZES
            found += [
                one
                for one in _in_every_type_and_layout(case)
                if not few or one.dtype in ("float32", "float16")
            ]
    return found


# ... and those whose maps are to lie off an aligned address, where other code reads them.
MISALIGNED = _in_every_type_and_layout(Case(size=(2, 8, 8, 32)))


def describe_call(
    signature: dict[str, Any], given: dict[str, Any]
) -> tuple[Arrays, dict[str, tuple[list[int], np.dtype]], dict[str, Any]]:
    """What the kernels are to be called with.

    Args:
      signature: what `_core.signatures()` has of the op.
      given: arrays and options by name; true for an optional output that is wanted.

    Returns:
      The inputs; the shape and type of every output; what the op takes beside their addresses.
    """
    nchw, rest = given.get("data_format") == "NCHW", dict(given)
    is_volume = given["x"].ndim == 5

    def dims(row: dict[str, Any]) -> list[str]:
        names = [name for name in row["dims"] if is_volume or name not in ("D", "kd")]
        if row["is_map"] and nchw:
            names.insert(1, names.pop())
        return names

    inputs = {}
    sizes = {"1": 1, "2": 2, "statistics": 2 if "gamma" in given else 0}
    sizes.update(hidden=1, kd=1, kh=1, kw=1)
    for row in signature["inputs"]:
        array = rest.pop(row["name"], None)
        if array is not None:
            inputs[row["name"]] = array
            sizes.update(zip(dims(row), array.shape, strict=True))
    x = inputs["x"]
    types = {"T": x.dtype, "U": np.dtype(testing.compute_type(x.dtype.name))}
    outputs = {}
    for row in signature["outputs"]:
        wanted = rest.pop(row["name"], row["count"] is None)
        if wanted or (row["count"] == "num_gamma" and "gamma" in inputs):
            outputs[row["name"]] = ([sizes[dim] for dim in dims(row)], types[row["type"]])
    problem = {
        "shape": x.shape, "dtype": x.dtype.name, "hidden": sizes["hidden"],
        "kernel_size": tuple(sizes[side] for side in ("kd", "kh", "kw")[not is_volume :]), **rest,
    }  # fmt: skip
    return inputs, outputs, problem


def maps_of(signature: dict[str, Any]) -> set[str]:
    """The inputs and outputs of an op that are maps."""
    rows = (*signature["inputs"], *signature["outputs"])
    return {row["name"] for row in rows if row["is_map"]}


class Kernels:
    """`cbam_ops._core` over the CUDA kernels: the same functions, on numpy arrays.

    A call's arrays lie in one block of device memory, apart from each other and full of NaN: what a
    kernel leaves out shows as NaN, and what it writes elsewhere is a RuntimeError.

    Args:
      cuda: `_core.cuda`, or what has its functions.
      misalign: how many elements maps lie off an aligned address.
    """

    _ALIGNMENT = 256

    def __init__(self, cuda: Any, misalign: int = 0) -> None:
        self._cuda, self._misalign = cuda, misalign
        self._signatures = _loader.load_core().signatures()
        self._memory = self._size = 0
        self._reserve(2**25)

    def __getattr__(self, name: str) -> Any:
        if name in self._signatures:
            return functools.partial(self._call, name)
        raise AttributeError(name)

    def _reserve(self, size: int) -> None:
        if size > self._size:
            if self._memory:
                self._cuda.free(self._memory)
            self._memory = self._size = 0
            self._memory, self._size = self._cuda.allocate(size), size

    def _run(
        self,
        op: str,
        places: dict[str, slice],
        inputs: Collection[str],
        before: np.ndarray,
        problem: dict[str, Any],
    ) -> np.ndarray:
        """What an op makes of the bytes `before`, which have the arguments at their places."""
        self._reserve(before.size)
        self._cuda.copy_to_device(self._memory, before)
        addresses = {name: self._memory + place.start for name, place in places.items()}
        getattr(self._cuda, op)(**addresses, **problem)
        after = np.empty_like(before)
        self._cuda.copy_to_host(after, self._memory)
        return after

    def _call(self, op: str, **given: Any) -> Arrays:
        signature = self._signatures[op]
        inputs, described, problem = describe_call(signature, given)
        inputs = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        outputs = {name: np.empty(*how) for name, how in described.items()}
        offset = self._misalign * inputs["x"].itemsize
        maps = maps_of(signature)
        places: dict[str, slice] = {}
        end = 0

        def place(name: str, size: int) -> int:
            nonlocal end
            start = (end // self._ALIGNMENT + 2) * self._ALIGNMENT
            start += offset if name in maps else 0
            end = start + size
            places[name] = slice(start, end)
            return start

        arguments: dict[str, Any] = {
            name: place(name, array.nbytes) for name, array in (inputs | outputs).items()
        }
        # How much does not depend on where things are.
        workspace = getattr(self._cuda, f"{op}_workspace")(**arguments, **problem)
        place("workspace", workspace)
        before = np.full(end + self._ALIGNMENT, 0xFF, np.uint8)
        for name, array in inputs.items():
            before[places[name]] = array.reshape(-1).view(np.uint8)
        after = self._run(op, places, inputs, before, problem)
        for name, array in outputs.items():
            array.reshape(-1).view(np.uint8)[:] = after[places[name]]
        for name in (*outputs, "workspace"):
            before[places[name]] = after[places[name]]
        if not np.array_equal(before, after):
            raise RuntimeError(f"{op}: the kernels wrote where they must not")
        return outputs


def both_passes(kernels: Any, case: Case, dtype: str | None = None) -> Arrays:
    """All outputs and gradients of a case's op.

    Args:
      kernels: `_core`, or what has its functions.
      case: what one call computes.
      dtype: the type of all arrays, instead of the case's types.
    """
    op = case.function.removesuffix("_with_batch_norm")
    options = case.kernel_options
    inputs = case.arrays()
    if "beta" in inputs:
        inputs["bias"] = inputs.pop("beta")
    if dtype is not None:
        inputs = {name: array.astype(dtype) for name, array in inputs.items()}
    outputs = getattr(kernels, op)(**inputs, **options)
    relu = options.get("activation") == "relu"
    given: dict[str, Any] = {"d_residual": True} if relu and case.residual else {}
    known = inputs | outputs
    cotangents = dict(zip(outputs, case.cotangents(list(outputs.values())), strict=True))
    for row in _loader.load_core().signatures()[f"{op}_grad"]["inputs"]:
        name = row["name"]
        output = "y" if name == "dy" else name.removeprefix("d_")
        if name in known:
            if name != "y" or relu:
                given[name] = known[name]
        elif output in cotangents:
            given[name] = cotangents[output]
    return outputs | getattr(kernels, f"{op}_grad")(**given, **options)


def compare(case: Case, results: Arrays, truth: Arrays, stock: Arrays) -> list[Finding]:
    """Every result of a case, by the tests' policy.

    Args:
      case: the case.
      results: what the CUDA kernels computed.
      truth: what the CPU kernels computed in float64.
      stock: what they computed in float32.
    """
    same = testing.FLOAT64 if case.dtype == "float64" else testing.FLOAT32
    found = []
    for name, value in results.items():
        exact, ordinary = truth[name], stock[name].astype(np.float64)
        if case.dtype == "float64":  # errs as one in float32 does, by as many roundings
            ordinary = exact + (ordinary - exact) * 2.0**-29
        scale = float(np.max(np.abs(exact), initial=0.0))
        # The CPU adds in float64 in places: it errs less than the same operations in another order.
        slack = same * scale
        found.append(testing.compare(value, exact, ordinary, name, magnitude=scale, smallest=slack))
    return found


def examine(case: Case, kernels: Any) -> list[Finding]:
    """Runs a case and compares every result with the CPU kernels'."""
    core = _loader.load_core()
    truth, stock = (both_passes(core, case, dtype) for dtype in ("float64", "float32"))
    return compare(case, both_passes(kernels, case), truth, stock)


def run(device: int, quick: bool) -> int:
    """Prints a line per case; exit code 0 if all pass, 1 if one fails.

    Args:
      device: CUDA's number of it.
      quick: the small maps only.

    Raises:
      CommandError: the kernels cannot be tried here.
    """
    signal.alarm(LONGEST_SECONDS)
    try:
        cuda = _loader.load_core().cuda
        devices = cuda.devices() if cuda.built else []
        if not 0 <= device < len(devices):
            raise CommandError(
                _gpu.why_not() or f"CUDA finds {len(devices)} GPUs, none is {device}"
            )
        cuda.use_device(device)
        aligned, misaligned = Kernels(cuda), Kernels(cuda, misalign=1)
    except (ImportError, RuntimeError) as error:
        raise CommandError(f"the GPU cannot be used: {error}") from error
    except MemoryError as error:
        raise CommandError("the GPU has less than 64 MiB of free memory") from error
    name, capability = devices[device]
    say(f"{STARTED} on GPU {device}, {name} (compute capability {capability / 10})")
    chosen = [(case, aligned) for case in cases(quick)]
    chosen += [(case, misaligned) for case in MISALIGNED]
    wrong = 0
    for case, kernels in chosen:
        print(f"{case}{'' if kernels is aligned else '-misaligned'}:", end=" ", flush=True)
        try:
            found = examine(case, kernels)
        except MemoryError as error:
            raise CommandError("the GPU has too little free memory") from error
        except RuntimeError as error:
            if "out of memory" in str(error):  # for the kernels' code
                raise CommandError("the GPU has too little free memory") from error
            say(str(error))
            return 1  # after an error of the device nothing runs in this process
        faults = [finding.fault for finding in found if finding.fault]
        say("; ".join(faults) or "ok")
        wrong += bool(faults)
    say(f"{wrong} of {len(chosen)} cases fail." if wrong else f"All {len(chosen)} cases pass.")
    return 1 if wrong else 0
