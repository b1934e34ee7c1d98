"""The CUDA kernels' own sources, executed on the CPU and held against the float64 definition.

csrc/testing/cuda_on_cpu.h runs the .cuh and .cu files one fiber per CUDA thread. What is checked
here is what the kernels compute and how they synchronise; not how fast they are, nor that nvcc
translates them as the C++ compiler does (`benchmarks/gpu_check.py` does that on a GPU).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cuda_resources
import numpy as np
import numpy_oracle as oracle
import pytest
from cuda_on_cpu import (
    COMPILER,
    CSRC,
    Kernels,
    build,
    empty,
    place,
    problem,
    sanitizer_works,
)

ml_dtypes = pytest.importorskip("ml_dtypes")

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler on PATH")

Array = np.ndarray
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
# Largest error of a tensor over its largest value. A few units of the map's type for maps, of the
# compute type for what is summed.
MAP_ERROR = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "float64": 1e-13}
COMPUTE_ERROR = {"float32": 2e-5, "float16": 2e-5, "bfloat16": 2e-5, "float64": 1e-13}
MAPS = {"y", "dx", "d_residual"}


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels(build())


@pytest.fixture(autouse=True)
def _defaults(request: pytest.FixtureRequest) -> None:
    if "kernels" in request.fixturenames:
        k = request.getfixturevalue("kernels")
        k.set_schedule(0)
        k.set_path("portable")
        k.set_device()


class Case:
    """Inputs of one problem and both implementations on them."""

    def __init__(
        self,
        n: int = 2,
        h: int = 5,
        w: int = 7,
        c: int = 8,
        *,
        hidden: int = 3,
        k: int = 3,
        dtype: str = "float32",
        layout: str = "NHWC",
        gates: str = "channel_first",
        pooling: str = "avg+max",
        mlp_activation: str = "none",
        activation: str = "none",
        batch_norm: bool = False,
        residual: bool = False,
        biases: bool = True,
        offset: int = 0,
        seed: int = 0,
        x: Array | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.dtype, self.layout, self.gates, self.offset = dtype, layout, gates, offset
        map_type = DTYPES[dtype]
        self.compute = np.dtype(np.float64 if dtype == "float64" else np.float32)
        shape = (n, h, w, c) if layout == "NHWC" else (n, c, h, w)
        self.shape, self.n, self.h, self.w, self.c, self.k = shape, n, h, w, c, k
        self.has_channel, self.has_spatial = gates != "spatial_only", gates != "channel_only"

        def random_map() -> Array:
            # In steps of 1/8: exact in every type, and full of equal maxima.
            return place((np.round(rng.normal(size=shape) * 8) / 8).astype(map_type), offset)

        def weight(*size: int) -> Array:
            return place((rng.normal(size=size) * 0.5).astype(self.compute))

        self.x = random_map() if x is None else place(x.astype(map_type), offset)
        self.dy = random_map()
        self.residual = random_map() if residual else None
        self.weights: dict[str, Array | None] = {}
        if self.has_channel:
            self.weights |= {"w0": weight(c, hidden), "w1": weight(hidden, c)}
            self.weights |= {
                "b0": weight(hidden) if biases else None,
                "b1": weight(c) if biases else None,
            }
        if self.has_spatial:
            self.weights |= {"kernel": weight(k, k, 2), "bias": weight(1) if biases else None}
            if batch_norm:
                self.weights["gamma"] = weight(1)
                self.weights["bias"] = weight(1)
        self.d_gates: dict[str, Array] = {}
        if self.has_channel:
            self.d_gates["d_channel_gate"] = weight(n, c)
        if self.has_spatial:
            self.d_gates["d_spatial_gate"] = weight(n, h, w)
        self.options = {
            "layout": layout,
            "gates": gates,
            "pooling": pooling,
            "mlp_activation": mlp_activation,
            "activation": activation,
            "batch_norm": batch_norm,
        }
        self.problem = problem(
            dtype=dtype,
            batch=n,
            height=h,
            width=w,
            channels=c,
            hidden=hidden,
            kernel_size=k,
            **self.options,
        )

    def forward(self, kernels: Kernels) -> dict[str, Array]:
        """What the kernels give, with every output that the problem has."""
        out = {"y": empty(self.shape, DTYPES[self.dtype], self.offset)}
        if self.has_channel:
            out["channel_descriptors"] = empty((2, self.n, self.c), self.compute)
            out["channel_gate"] = empty((self.n, self.c), self.compute)
        if self.has_spatial:
            out["spatial_descriptors"] = empty((self.n, 2, self.h, self.w), self.compute)
            out["spatial_gate"] = empty((self.n, self.h, self.w), self.compute)
            if self.options["batch_norm"]:
                out["batch_statistics"] = empty((2,), self.compute)
        kernels.call(
            "forward", self.problem, x=self.x, residual=self.residual, **self.weights, **out
        )
        return out

    def backward(
        self, kernels: Kernels, saved: dict[str, Array], d_gates: bool = True
    ) -> dict[str, Array]:
        """The kernels' gradients from what their forward gave."""
        relu = self.options["activation"] == "relu"
        out = {"dx": empty(self.shape, DTYPES[self.dtype], self.offset)}
        if relu and self.residual is not None:
            out["d_residual"] = empty(self.shape, DTYPES[self.dtype], self.offset)
        for name, value in self.weights.items():
            if value is not None:
                out["d" + name] = empty(value.shape, self.compute)
        if self.has_spatial and "dbias" not in out:
            weights_bias = empty((1,), self.compute)  # always wanted by the kernels
        else:
            weights_bias = None
        inputs = {k: v for k, v in self.weights.items() if k != "bias"}
        its_saved = {k: v for k, v in saved.items() if k != "y"}
        if relu:
            its_saved["y"] = saved["y"]
        kernels.call(
            "backward",
            self.problem,
            x=self.x,
            dy=self.dy,
            **inputs,
            **its_saved,
            **(self.d_gates if d_gates else {}),
            **({"dbias": weights_bias} if weights_bias is not None else {}),
            **out,
        )
        return out

    def oracle_inputs(self) -> dict[str, Any]:
        weights = dict(self.weights)
        if "kernel" in weights:
            weights["kernel"] = weights["kernel"].reshape(self.k, self.k, 2, 1)
        return {"x": self.x, "residual": self.residual, **weights, **self.options}

    def expected_forward(self) -> dict[str, Array]:
        return oracle.forward(**self.oracle_inputs())

    def expected_backward(
        self, saved: dict[str, Array], d_gates: bool = True, magnitude: bool = False
    ) -> dict[str, Array]:
        extra: dict[str, Any] = dict(self.d_gates) if d_gates else {}
        extra["magnitude"] = magnitude
        if self.options["activation"] == "relu":
            extra["y"] = saved["y"].astype(np.float64)
        if self.gates == "channel_first":
            extra["tie_gate"] = saved["channel_gate"]
        return oracle.backward(dy=self.dy, **extra, **self.oracle_inputs())

    def compare(
        self, got: dict[str, Array], expected: dict[str, Array], sizes: dict[str, Array]
    ) -> None:
        """`sizes`: the same tensors with nothing cancelled, which errors are measured against."""
        for name, value in got.items():
            truth = np.asarray(expected[name]).reshape(value.shape)
            bound = (MAP_ERROR if name in MAPS else COMPUTE_ERROR)[self.dtype]
            value = value.astype(np.float64)
            nan = np.isnan(truth)
            assert (np.isnan(value) == nan).all(), f"{name}: NaN where none belongs, or none"
            finite = np.isfinite(truth)
            other = ~finite & ~nan
            assert (value[other] == truth[other]).all(), f"{name}: infinities differ"
            if finite.any():
                error = np.abs(value - truth)[finite].max()
                scale = np.nanmax(np.abs(np.asarray(sizes[name]).reshape(value.shape)[finite]))
                scale = max(min(scale, 1e30), 1e-3)
                assert error <= bound * scale, f"{name}: error {error:.3g}, values to {scale:.3g}"

    def check(self, kernels: Kernels, d_gates: bool = True) -> dict[str, Array]:
        """Forward and backward against the definition; returns what the kernels gave."""
        with np.errstate(all="ignore"):
            got = self.forward(kernels)
            expected = self.expected_forward()
            self.compare(got, expected, expected)
            gradients = self.backward(kernels, got, d_gates)
            truth = self.expected_backward(got, d_gates)
            sizes = self.expected_backward(got, d_gates, magnitude=True)
            self.compare(gradients, truth, sizes)
        return {**got, **gradients}


def same(one: dict[str, Array], other: dict[str, Array]) -> None:
    """Bitwise equality of all tensors."""
    for name, value in one.items():
        assert value.tobytes() == other[name].tobytes(), f"{name} differs"


@pytest.mark.parametrize("path", ["portable", "cluster"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("gates", ["channel_first", "parallel", "channel_only", "spatial_only"])
def test_every_kind_of_gates(
    kernels: Kernels, gates: str, dtype: str, layout: str, path: str
) -> None:
    """Fails where a type, layout or order computes another function than the definition."""
    if path == "cluster" and dtype == "float64":
        pytest.skip("float64 has no cluster kernels")
    kernels.set_path(path)
    kernels.set_schedule(1)
    Case(5, 4, 6, 16, gates=gates, dtype=dtype, layout=layout).check(kernels)


OPTIONS = [
    dict(zip(("pooling", "mlp_activation", "activation", "residual", "biases"), row, strict=True))
    for row in (
        ("avg+max", "none", "none", True, True),
        ("avg+max", "relu", "relu", True, False),
        ("avg+max", "relu", "none", False, True),
        ("avg", "none", "relu", False, True),
        ("avg", "relu", "relu", True, True),
        ("max", "none", "none", False, False),
        ("max", "relu", "relu", True, True),
        ("max", "none", "relu", False, True),
    )
]


@pytest.mark.parametrize("kind", ["portable", "cluster", "batch_norm"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_options(kernels: Kernels, options: dict[str, Any], layout: str, kind: str) -> None:
    """Fails where pooling, activations, residual, biases or batch norm are wired wrongly."""
    kernels.set_path("cluster" if kind == "cluster" else "portable")
    kernels.set_schedule(2)
    case = Case(5, 4, 6, 16, k=5, layout=layout, batch_norm=kind == "batch_norm", **options)
    case.check(kernels, d_gates=options["biases"])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1, 1),
        (3, 1, 9, 5),
        (2, 7, 7, 33),
        (1, 13, 11, 64),
        (9, 2, 3, 17),
        (1, 20, 9, 130),
        (1, 2, 2, 1500),
        (1, 40, 40, 8),
    ],
    ids=str,
)
def test_sizes(kernels: Kernels, size: tuple[int, ...], dtype: str, layout: str) -> None:
    """Odd sizes: tails of vectors, of tiles, of slices, and rows shorter than a warp."""
    kernels.set_schedule(3)
    Case(*size, dtype=dtype, layout=layout).check(kernels)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("size", [(1, 3, 600, 4), (1, 2, 1030, 8), (1, 4, 143, 4)], ids=str)
def test_rows_longer_than_a_tile(kernels: Kernels, size: tuple[int, ...], layout: str) -> None:
    """Planes wider than a tile are cut within rows; a width that is no multiple of a vector too."""
    Case(*size, layout=layout).check(kernels)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 9, 15, 41])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_kernel_sizes(kernels: Kernels, kernel_size: int, batch_norm: bool, layout: str) -> None:
    """Halos from none to wider than the plane, and a kernel whose window does not fit (41)."""
    Case(2, 9, 10, 8, k=kernel_size, layout=layout, batch_norm=batch_norm).check(kernels)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("hidden", [1, 7, 300, 700])
@pytest.mark.parametrize("path", ["portable", "cluster"])
def test_hidden_sizes(kernels: Kernels, path: str, hidden: int, layout: str) -> None:
    """More hidden units than a slice of shared memory, and than a block has threads."""
    kernels.set_path(path)
    Case(9, 2, 4, 40, hidden=hidden, layout=layout).check(kernels)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_misaligned(kernels: Kernels, layout: str) -> None:
    """Maps off a 16-byte boundary take the scalar kernels, with the same results."""
    for dtype in ("float32", "float16"):
        Case(2, 4, 4, 16, layout=layout, dtype=dtype, offset=1).check(kernels)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_chunks_of_samples_change_nothing(kernels: Kernels, batch_norm: bool, layout: str) -> None:
    """How many samples are in flight depends on the GPU's L2: results must not."""
    case = Case(7, 4, 4, 8, layout=layout, batch_norm=batch_norm, activation="relu", residual=True)
    kernels.set_device(l2=1 << 30)
    kernels.launched()
    whole = case.check(kernels)
    whole_launches = len(kernels.launched())
    kernels.set_device(l2=3 * 4 * 4 * 8 * 4 * 2)
    parts = case.check(kernels)
    assert len(kernels.launched()) > whole_launches
    same(whole, parts)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("shared", [20_000, 30_000, 45_000, 232_448])
def test_a_sample_over_more_or_fewer_blocks(kernels: Kernels, shared: int, layout: str) -> None:
    """Clusters of several sizes: halos, column sums and gates cross the blocks' borders."""
    kernels.set_path("cluster")
    kernels.set_device(shared=shared)
    Case(5, 12, 12, 32, k=7, hidden=20, layout=layout).check(kernels)


def test_the_path_that_is_chosen(kernels: Kernels) -> None:
    """What the plan promises for the sizes of a ResNet-50, and the override."""
    kernels.set_path("auto")
    stages = {(56, 256): True, (28, 512): True, (14, 1024): True, (7, 2048): False}
    for (side, channels), expected in stages.items():
        sizes = {"height": side, "width": side, "channels": channels, "hidden": channels // 16}
        stage = problem(dtype="float32", layout="NHWC", batch=32, gates="channel_first", **sizes)
        assert (kernels.path("forward", stage) == "cluster") is expected, side
    kernels.set_device(capability=80)
    assert kernels.path("forward", problem(batch=1, height=8, width=8, channels=8)) == "portable"
    kernels.set_path("cluster")
    with pytest.raises(RuntimeError, match="does not fit"):
        Case(2, 4, 4, 8).forward(kernels)


@pytest.mark.parametrize("path", ["portable", "cluster"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_repeats_bitwise_in_any_order(kernels: Kernels, layout: str, path: str) -> None:
    """Threads and blocks in another order: the same bits, or something depends on who is first."""
    kernels.set_path(path)
    case = Case(5, 9, 8, 36, layout=layout, activation="relu")
    first = case.check(kernels)
    for schedule in (1, 2, 3):
        kernels.set_schedule(schedule)
        same(first, case.check(kernels))


@pytest.mark.parametrize("path", ["portable", "cluster"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("gates", ["channel_first", "parallel"])
def test_nan_and_infinity(kernels: Kernels, gates: str, layout: str, path: str) -> None:
    """They reach what they reach in the definition, and nothing else."""
    kernels.set_path(path)
    for value in (np.nan, np.inf, -np.inf):
        case = Case(5, 4, 4, 8, layout=layout, gates=gates)
        case.x.reshape(-1)[5] = value
        with np.errstate(all="ignore"):
            got, expected = case.forward(kernels), case.expected_forward()
            case.compare(got, expected, expected)
            gradients = case.backward(kernels, got)
            truth = case.expected_backward(got)
            # Which of the samples have a NaN gradient; the others must be untouched by it.
            touched = np.isnan(truth["dx"]).any(axis=(1, 2, 3))
            ours = np.isnan(gradients["dx"]).any(axis=(1, 2, 3))
        assert (touched == ours).all()


def test_constant_map(kernels: Kernels) -> None:
    """Everything is a maximum (after a ReLU whole maps are): the gradient is split evenly."""
    for path in ("portable", "cluster"):
        kernels.set_path(path)
        for layout in ("NHWC", "NCHW"):
            shape = (2, 4, 4, 8)
            Case(
                *shape, layout=layout, x=np.zeros(shape if layout == "NHWC" else (2, 8, 4, 4))
            ).check(kernels)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_empty_batch(kernels: Kernels, layout: str, batch_norm: bool) -> None:
    """No samples: empty maps, and weights' gradients of zero rather than of nothing."""
    case = Case(0, 4, 4, 8, layout=layout, batch_norm=batch_norm)
    got = case.forward(kernels)
    gradients = case.backward(kernels, got)
    for name, value in gradients.items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", [(2, 5, 7, 8), (3, 4, 4, 32), (1, 20, 17, 3)], ids=str)
def test_pools(kernels: Kernels, size: tuple[int, ...], dtype: str, layout: str) -> None:
    """The pools on their own and their gradients, with ties."""
    n, h, w, c = size
    case = Case(*size, dtype=dtype, layout=layout)
    map_type = DTYPES[dtype]
    rng = np.random.default_rng(1)
    planes = (n, h, w, 2) if layout == "NHWC" else (n, 2, h, w)

    def check(got: dict[str, Array], expected: dict[str, Array]) -> None:
        for name, value in got.items():
            truth = np.asarray(expected[name])
            error = np.abs(value.astype(np.float64) - truth).max()
            assert error <= MAP_ERROR[dtype] * np.abs(truth).max(), f"{name}: {error:.3g}"

    got = {"mean": empty((n, c), map_type), "maximum": empty((n, c), map_type)}
    kernels.call("channel_pool", case.problem, x=case.x, **got)
    check(got, oracle.channel_pool(case.x, layout))
    d = {name: place(rng.normal(size=(n, c)).astype(map_type)) for name in ("d_mean", "d_maximum")}
    dx = empty(case.shape, map_type)
    kernels.call("channel_pool_grad", case.problem, x=case.x, maximum=got["maximum"], dx=dx, **d)
    check({"dx": dx}, oracle.channel_pool_grad(case.x, d["d_mean"], d["d_maximum"], layout))

    got = {"descriptors": empty(planes, map_type)}
    kernels.call("spatial_pool", case.problem, x=case.x, **got)
    check(got, oracle.spatial_pool(case.x, layout))
    d_planes = place(rng.normal(size=planes).astype(map_type))
    dx = empty(case.shape, map_type)
    kernels.call("spatial_pool_grad", case.problem, x=case.x, dx=dx, d_descriptors=d_planes, **got)
    check({"dx": dx}, oracle.spatial_pool_grad(case.x, d_planes, layout))


def test_invalid_problems_are_named(kernels: Kernels) -> None:
    """The contract's own checks come first."""
    case = Case(1, 2, 2, 4)
    case.problem.kernel_size = 4
    with pytest.raises(RuntimeError, match="kernel_size must be odd"):
        case.forward(kernels)
    case = Case(1, 2, 2, 4)
    case.problem.height = case.problem.width = 1 << 20
    with pytest.raises(RuntimeError, match="below 2"):
        case.forward(kernels)


BUILT = "75-real 80-real 90-real 120-real 121-virtual"


@pytest.mark.parametrize(
    ("driver", "capability", "architectures", "sentence"),
    [
        (13000, 90, BUILT, ""),
        (13050, 86, BUILT, ""),  # 80's machine code
        (13000, 121, BUILT, ""),
        (13000, 130, BUILT, ""),  # 121's PTX
        (13000, 90, "", ""),  # the build did not say
        (13000, 90, "native", ""),
        (13000, 90, "90", ""),
        (13000, 103, "90", ""),  # PTX too
        (13000, 90, "90a-real", ""),
        (13000, 103, "100f-real", ""),
        (0, 90, BUILT, "There is no NVIDIA driver."),
        (
            12040,
            90,
            BUILT,
            "The NVIDIA driver is made for CUDA 12.4, and the kernels were built with CUDA 13.5: "
            "they need a driver for CUDA 13.",
        ),
        (13000, 0, BUILT, "The NVIDIA driver finds no GPU."),
        *(
            (
                13000,
                capability,
                architectures,
                f"The GPU has compute capability {capability // 10}.{capability % 10}, and the "
                f"kernels were built for the architectures {architectures}.",
            )
            for capability, architectures in (
                (61, BUILT),
                (100, BUILT),  # neither 90's code nor 121's PTX
                (80, "86-real 90-real"),
                (103, "90a-real 100a-real"),
                (120, "100f-real 110-real"),
            )
        ),
    ],
)
def test_why_a_build_cannot_run(
    kernels: Kernels, driver: int, capability: int, architectures: str, sentence: str
) -> None:
    assert kernels.explain(driver, 13050, capability, architectures) == sentence


def test_half_conversions_of_the_header(kernels: Kernels) -> None:
    """All float16 numbers, and all roundings between neighbours, as numpy rounds them."""
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    for number, value in zip(bits, values, strict=True):
        if np.isnan(value):
            assert np.isnan(kernels.from_half(int(number)))
            continue
        assert kernels.from_half(int(number)) == value
        between = np.float32(value * np.float32(1.0003))
        with np.errstate(over="ignore"):
            assert kernels.to_half(float(between)) == between.astype(np.float16).view(np.uint16)


# ---- sanitizers and mutants ----------------------------------------------------------------------

CHECK = CSRC / "testing" / "cuda_on_cpu_check.cc"
FLOAT32 = ("kernels", "float32", "gates_float32")


def _run_check(binary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return subprocess.run(
        [str(binary), *arguments],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer(sanitizer: str) -> None:
    """address: reads and writes beyond shared memory, maps and workspace. thread: missing barriers,
    and blocks or clusters that write what others read."""
    if not sanitizer_works(sanitizer):
        pytest.skip(f"-fsanitize={sanitizer} does not work with {COMPILER} here")
    arguments = ["threads"] if sanitizer == "thread" else []
    done = _run_check(build(sanitizer=sanitizer, only=FLOAT32, main=CHECK), *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


# Faults put into a copy of the sources: file, text, replacement. Each must be noticed by the
# results or by a sanitizer, or the tests above would not notice it either.
MUTANTS = {
    "reduce: barrier before the fold removed": (
        "reduce.cuh",
        "  Barrier();\n  for (int c = ThreadIndex(); c < width;",
        "  for (int c = ThreadIndex(); c < width;",
    ),
    "reduce: one row thread too few": (
        "reduce.cuh",
        "for (int r = 1; r < params.row_threads; ++r)",
        "for (int r = 1; r < params.row_threads - 1; ++r)",
    ),
    "reduce: tail rows counted twice": (
        "reduce.cuh",
        "if (this_row >= end) continue;",
        "",
    ),
    "spatial: halo one column too narrow": (
        "spatial.cuh",
        "tile.column = -radius;",
        "tile.column = -radius + 1;",
    ),
    "spatial: window one row too short": (
        "spatial.cuh",
        "tile.rows = static_cast<int>(last_row - first_row) + 1 + 2 * radius;",
        "tile.rows = static_cast<int>(last_row - first_row) + 2 * radius;",
    ),
    "spatial: kernel not flipped": (
        "spatial.cuh",
        "const A value = last[-(i * tile.columns + j)];",
        "const A value = last[(i - 2) * tile.columns + j - 2];",
    ),
    "mlp: barrier after a slice removed": (
        "gate_mlp.cuh",
        "    }\n    Barrier();\n  }\n  CBAM_UNROLL\n  for (int s = 0; s < kSums; ++s) shared[s",
        "    }\n  }\n  CBAM_UNROLL\n  for (int s = 0; s < kSums; ++s) shared[s",
    ),
    "cluster: waits for no copy": (
        "cluster.cuh",
        "void WaitForStage(int stage) const { WaitForCopies(barriers + stage, 0); }",
        "void WaitForStage(int) const {}",
    ),
    "cluster: barrier before combining removed": (
        "cluster.cuh",
        "      ClusterBarrier();\n      CombineColumns<true>(part, partial, store);",
        "      CombineColumns<true>(part, partial, store);",
    ),
    "cluster: last barrier of the gather removed": (
        "cluster.cuh",
        "    store(i, sum);\n  }\n  ClusterBarrier();",
        "    store(i, sum);\n  }",
    ),
    "cluster: first stage copied twice, last never": (
        "cluster.cuh",
        "const int64_t begin = static_cast<int64_t>(StageRow(stage)) * columns;",
        "const int64_t begin = static_cast<int64_t>(StageRow(stage > 2 ? 0 : stage)) * columns;",
    ),
    "map: ties get the whole gradient": (
        "reduce.cuh",
        "side.max_share = d_max / count;",
        "side.max_share = d_max;",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_mutants_are_caught(mutant: str, tmp_path: Path) -> None:
    """A fault in the sources is noticed by the results, by the scheduler or by ThreadSanitizer."""
    name, text, replacement = MUTANTS[mutant]
    csrc = tmp_path / "csrc"
    for folder in ("core", "testing"):
        shutil.copytree(CSRC / folder, csrc / folder)
    target = csrc / "core" / "cuda" / name
    source = target.read_text()
    assert text in source, "the mutation no longer applies: update it"
    target.write_text(source.replace(text, replacement))
    done = _run_check(build(csrc, only=FLOAT32, main=CHECK), "quick")
    if done.returncode == 0 and sanitizer_works("thread"):
        done = _run_check(build(csrc, sanitizer="thread", only=FLOAT32, main=CHECK), "threads")
    assert done.returncode != 0, "nobody noticed"


# ---- nvcc ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_resources_and_warnings() -> None:
    """No kernel spills, none uses many more registers than the committed table says, and nvcc has
    nothing to warn of. One architecture here (`python tests/cuda_resources.py` takes all)."""
    if cuda_resources.nvcc() is None:
        pytest.skip("no nvcc on PATH and no CUDACXX")
    units = ("kernels", "float32", "bfloat16", "gates_float32")
    report = cuda_resources.compile_report(["90"], units)
    assert len(report) > 60
    assert not cuda_resources.differences(report, cuda_resources.read_table())


def test_committed_table_has_no_spills() -> None:
    """For all architectures that are built by default."""
    table = cuda_resources.read_table()
    assert {str(row["architecture"]) for row in table} == set(cuda_resources.ARCHITECTURES)
    assert not cuda_resources.differences(table, table)
