"""Cases of `cbam_ops.testing` on numpy arrays: both passes of the kernels, and the definition.

`kernels` is whatever has the functions of `cbam_ops._core`: that itself, or the CUDA kernels as
cuda_on_cpu.py runs them. The definition is numpy_oracle's.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy_oracle as oracle

from cbam_ops import _core, testing
from cbam_ops.testing import Case, assert_accurate

Tensors = dict[str, np.ndarray]
DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("NHWC", "NCHW")
# A module of each kind.
MODULES = {
    "channel_first": Case(),
    "parallel": Case(options=testing.options(order="parallel")),
    "channel_only": Case("channel_attention"),
    "spatial_only": Case("spatial_attention"),
}
# Of the MLP. Where it has one branch nothing is merged, whatever the word.
MLPS = [
    dict(zip(("pooling", "mlp_activation", "mlp_merge"), row, strict=True))
    for row in (
        *itertools.product(("avg+max",), ("none", "relu"), ("logits", "hidden", "gates")),
        ("avg", "none", "logits"),
        ("avg", "none", "gates"),
        ("avg", "relu", "hidden"),
        ("max", "none", "hidden"),
        ("max", "relu", "logits"),
        ("max", "relu", "gates"),
    )
]


class Problem:
    """A case as the kernels take it.

    Attributes:
      case: the case; its function may be an op with options that no public function has.
      op: the function of the kernels.
      options: its options.
      inputs: its arrays, by the names of the op.
      gradients: what comes back: `dy` and, unless `gate_gradients` is false, those of the gates.
    """

    def __init__(self, case: Case, *, gate_gradients: bool = True, **inputs: np.ndarray) -> None:
        self.case = case
        self.op = case.function.removesuffix("_with_batch_norm")
        self.options = {"data_format": case.data_format, **dict(case.options)}
        self.inputs = case.arrays()
        if "beta" in self.inputs:
            self.inputs["bias"] = self.inputs.pop("beta")
        self.inputs |= inputs
        n, *sides, c = case.size
        shapes = {
            "d_channel_gate": (n, c),
            "d_spatial_gate": (n, *sides),
            "d_mean": (n, c),
            "d_maximum": (n, c),
            "d_descriptors": (n, *sides, 2) if case.data_format == "NHWC" else (n, 2, *sides),
        }
        rows = {row["name"]: row for row in _core.signatures()[f"{self.op}_grad"]["inputs"]}
        rng = np.random.default_rng((case.seed, 1, *case.size))
        self.gradients: Tensors = {}
        if "dy" in rows:
            self.gradients["dy"] = case.replace(fill="normal", seed=case.seed + 1).arrays()["x"]
        for name, shape in shapes.items():
            if name in rows and (gate_gradients or not rows[name]["optional"]):
                kind = self.inputs["x"].dtype if rows[name]["type"] == "T" else self.compute
                self.gradients[name] = rng.standard_normal(shape).astype(kind)

    @property
    def compute(self) -> str:
        """The type of weights, gates and sums."""
        return testing.compute_type(self.case.dtype)

    @property
    def exact(self) -> str:
        """The type in which the truth is evaluated."""
        return testing.truth_type(self.case.dtype)

    @property
    def relu(self) -> bool:
        """Whether the module ends in a ReLU."""
        return self.options.get("activation") == "relu"

    def forward(self, kernels: Any, **running: Any) -> Tensors:
        """All outputs of the kernels."""
        return getattr(kernels, self.op)(**self.inputs, **self.options, **running)

    def backward(self, kernels: Any, outputs: Tensors, **running: Any) -> Tensors:
        """All gradients of the kernels, from what their forward pass gave."""
        known = self.inputs | outputs | self.gradients
        if not self.relu:
            known.pop("y", None)
        names = {row["name"] for row in _core.signatures()[f"{self.op}_grad"]["inputs"]}
        arguments: dict[str, Any] = {k: v for k, v in known.items() if k in names}
        if self.relu and "residual" in self.inputs:
            arguments["d_residual"] = True
        return getattr(kernels, f"{self.op}_grad")(**arguments, **self.options, **running)

    def both(self, kernels: Any, **running: Any) -> Tensors:
        """Outputs and gradients."""
        outputs = self.forward(kernels, **running)
        return outputs | self.backward(kernels, outputs, **running)

    def define_forward(self, dtype: str, *, magnitude: bool = False) -> Tensors:
        """The definition's outputs; with `magnitude`, how large the terms of their sums are."""
        inputs = self.inputs
        if magnitude:
            inputs = {name: np.abs(value.astype(dtype)) for name, value in inputs.items()}
        with np.errstate(all="ignore"):
            if self.op.endswith("pool"):
                return getattr(oracle, self.op)(inputs["x"], self.case.data_format, dtype)
            outputs = oracle.forward(**inputs, **oracle.options_of(self.case), dtype=dtype)
            if magnitude:
                truth = self.define_forward(dtype)
                gates = np.ones(self.case.size)
                if "channel_gate" in truth:
                    sides = tuple(range(1, gates.ndim - 1))
                    gates = gates * np.expand_dims(truth["channel_gate"], sides)
                if "spatial_gate" in truth:
                    gates = gates * truth["spatial_gate"][..., None]
                y = inputs["x"] * oracle.from_nhwc(gates, self.case.data_format)
                outputs = {k: v for k, v in outputs.items() if k.endswith("descriptors")}
                outputs["y"] = y + inputs.get("residual", 0)
            return outputs

    def define_backward(self, outputs: Tensors, dtype: str, *, magnitude: bool = False) -> Tensors:
        """The definition's gradients, given the kernels' outputs, which decide ties and signs."""
        with np.errstate(all="ignore"):
            if self.op.endswith("pool"):
                gradients = self.gradients.values()
                gradients = map(np.abs, gradients) if magnitude else gradients
                define = getattr(oracle, f"{self.op}_grad")
                return define(self.inputs["x"], *gradients, self.case.data_format, dtype)
            return oracle.backward(
                **self.inputs,
                **self.gradients,
                **oracle.options_of(self.case),
                dtype=dtype,
                y=outputs["y"].astype(np.float64),
                tie_gate=outputs.get("channel_gate"),
                magnitude=magnitude,
            )

    def check_forward(self, outputs: Tensors) -> None:
        """Holds every output against the definition."""
        truth, stock = self.define_forward(self.exact), self.define_forward(self.compute)
        magnitudes = self.define_forward(self.exact, magnitude=True)
        self._compare(outputs, truth, stock, magnitudes)

    def check_backward(self, outputs: Tensors, gradients: Tensors) -> None:
        """Holds every gradient against the definition."""
        truth, stock = (self.define_backward(outputs, t) for t in (self.exact, self.compute))
        magnitudes = self.define_backward(outputs, self.exact, magnitude=True)
        expected = {testing.gradient_name(name) for name in self.inputs if name != "residual"}
        expected |= {"d_residual"} if self.relu and "residual" in self.inputs else set()
        if not self.op.endswith("pool"):
            # The kernels have gradients for the biases that the problem does not have.
            assert expected == set(gradients) - ({"db0", "db1", "dbias"} - expected), self.case
        self._compare(gradients, truth, stock, magnitudes)

    def check(self, kernels: Any, **running: Any) -> Tensors:
        """Runs both passes, holds every result against the definition and returns all."""
        outputs = self.forward(kernels, **running)
        self.check_forward(outputs)
        gradients = self.backward(kernels, outputs, **running)
        self.check_backward(outputs, gradients)
        return outputs | gradients

    def _compare(
        self, actual: Tensors, truth: Tensors, stock: Tensors, magnitudes: Tensors
    ) -> None:
        for name, value in actual.items():
            if name in truth:
                assert_accurate(
                    value, truth[name], stock[name], f"{self.case}: {name}",
                    magnitude=magnitudes.get(name),
                )  # fmt: skip


def check(case: Case, kernels: Any, *, gate_gradients: bool = True, **running: Any) -> Tensors:
    """Both passes of a case against the definition."""
    return Problem(case, gate_gradients=gate_gradients).check(kernels, **running)


def check_infinity(kernels: Any, mlp: dict[str, str], infinity: float) -> None:
    """Infinities of a weight and of a gradient reach what they reach in the definition."""
    options = testing.options(**mlp)
    case = Case("channel_attention", size=(9, 3, 3, 40), hidden=4, options=options)
    for unit in range(case.hidden):
        w1 = case.arrays()["w1"]
        w1[unit, 5::7] = infinity
        problem = Problem(case, w1=w1)
        problem.check_forward(problem.forward(kernels))
    problem = Problem(case)
    samples = np.arange(9)
    problem.gradients["d_channel_gate"][samples, 4 * samples] = infinity
    outputs = problem.forward(kernels)
    truth, ours = problem.define_backward(outputs, "float64"), problem.backward(kernels, outputs)
    for name in ("dw0", "db0", "dw1", "db1"):
        assert (np.isnan(truth[name]) == np.isnan(ours[name])).all(), name
        infinite = np.isinf(truth[name])
        assert (truth[name][infinite] == ours[name][infinite]).all(), name
