"""The CUDA kernels' own sources, executed on the CPU and held against the float64 definition.

csrc/testing/cuda_on_cpu.h runs the .cuh and .cu files one fiber per CUDA thread. What is checked here
is what the kernels compute and how they synchronise; not how fast they are, nor that nvcc translates
them as the C++ compiler does (`benchmarks/gpu_check.py` does that on a GPU).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy_oracle as oracle
import pytest
from cuda_on_cpu import COMPILER, Kernels, build, empty, place, problem

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
        if self.has_spatial:
            out.setdefault("dbias", empty((1,), self.compute))
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

    def expected_backward(self, saved: dict[str, Array], d_gates: bool = True) -> dict[str, Array]:
        extra: dict[str, Any] = dict(self.d_gates) if d_gates else {}
        if self.options["activation"] == "relu":
            extra["y"] = saved["y"].astype(np.float64)
        if self.gates == "channel_first":
            extra["tie_gate"] = saved["channel_gate"]
        return oracle.backward(dy=self.dy, **extra, **self.oracle_inputs())

    def compare(self, got: dict[str, Array], expected: dict[str, Array]) -> None:
        for name, value in got.items():
            if name == "dbias" and name not in expected:
                continue
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
                scale = max(np.abs(truth[finite]).max(), 1e-3)
                assert error <= bound * scale, f"{name}: error {error:.3g}, values to {scale:.3g}"

    def check(self, kernels: Kernels, d_gates: bool = True) -> dict[str, Array]:
        got = self.forward(kernels)
        self.compare(got, self.expected_forward())
        gradients = self.backward(kernels, got, d_gates)
        self.compare(gradients, self.expected_backward(got, d_gates))
        return {**got, **gradients}


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("gates", ["channel_first", "parallel", "channel_only", "spatial_only"])
def test_every_kind_of_gates(kernels: Kernels, gates: str, dtype: str, layout: str) -> None:
    """Fails where a type, layout or order computes another function than the definition."""
    Case(2, 4, 6, 16, gates=gates, dtype=dtype, layout=layout).check(kernels)
