"""Cases for the tests of the public functions: what is called, with which arguments and options.

A case draws its arguments from a seeded generator in float64 and rounds them to its types; the
truth is the reference in float64 on the rounded values, the ordinary evaluation the reference in
the compute type (see tolerances.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy_oracle
import tensorflow as tf

from cbam_ops import reference

MLP = ("w0", "b0", "w1", "b1")
ARGUMENTS = {
    "cbam": ("x", *MLP, "kernel", "bias"),
    "cbam_with_batch_norm": ("x", *MLP, "kernel", "gamma", "beta"),
    "channel_attention": ("x", *MLP),
    "spatial_attention": ("x", "kernel", "bias"),
    "spatial_attention_with_batch_norm": ("x", "kernel", "gamma", "beta"),
    "channel_pool": ("x",),
    "spatial_pool": ("x",),
}
MAPS = ("x", "residual")
STATISTICS = {"cbam_with_batch_norm": (1, 2), "spatial_attention_with_batch_norm": (1, 2)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `values` of the map are "normal", "relu" (many equal ones) or "equal"."""

    function: str = "cbam"
    size: tuple[int, int, int, int] = (2, 5, 7, 13)  # N, H, W, C
    hidden: int = 3
    kernel_size: int = 3
    residual: bool = False
    biases: bool = True
    half_weights: bool = False  # weights of the map's half type instead of float32
    values: str = "normal"
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = [self.function, "x".join(map(str, self.size)), f"k{self.kernel_size}"]
        parts += [str(value) for _, value in self.options]
        for flag in ("residual", "half_weights"):
            parts += [flag] * getattr(self, flag)
        parts += ["no_biases"] * (not self.biases)
        parts += [self.values] * (self.values != "normal")
        return "-".join(parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that the call takes, in the order of its arguments."""
        names = ARGUMENTS[self.function]
        if not self.biases:
            names = tuple(name for name in names if name not in ("b0", "b1", "bias"))
        return (*names, "residual") if self.residual else names

    def draw(self, dtype: str, data_format: str) -> dict[str, tf.Tensor]:
        """The arguments, as tensors of the types that a call in `dtype` takes."""
        n, h, w, c = self.size
        k, hidden = self.kernel_size, self.hidden
        generator = np.random.default_rng(zlib.crc32(repr(self).encode()))
        shapes = {
            "x": (n, h, w, c) if data_format == "NHWC" else (n, c, h, w),
            "w0": (c, hidden),
            "b0": (hidden,),
            "w1": (hidden, c),
            "b1": (c,),
            "kernel": (k, k, 2, 1),
            "bias": (1,),
            "gamma": (1,),
            "beta": (1,),
        }
        shapes["residual"] = shapes["x"]
        # Scales that keep the gates' logits near 1, so that no sigmoid saturates.
        scales = {"w0": c**-0.5, "w1": hidden**-0.5, "kernel": 1 / k}
        weights = dtype if self.half_weights else "float64" if dtype == "float64" else "float32"
        tensors = {}
        for name in self.names:
            value = generator.normal(size=shapes[name]) * scales.get(name, 1.0)
            if name == "x" and self.values == "relu":
                value = np.maximum(value, 0.0)
            if name == "x" and self.values == "equal":
                value = np.full_like(value, 0.5)
            tensors[name] = tf.cast(tf.constant(value), dtype if name in MAPS else weights)
        return tensors

    def call(
        self, module: ModuleType, tensors: dict[str, tf.Tensor], data_format: str
    ) -> list[tf.Tensor]:
        """All outputs of the function of `module`: y, then the gates where there are any."""
        arguments = [tensors.get(name) for name in ARGUMENTS[self.function]]
        keywords: dict[str, Any] = {"data_format": data_format, **dict(self.options)}
        if not self.function.endswith("pool"):
            keywords.update(residual=tensors.get("residual"), return_gates=True)
        outputs = getattr(module, self.function)(*arguments, **keywords)
        return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]

    def output_names(self) -> list[str]:
        """What the outputs of `call` are, in order."""
        return {
            "cbam": ["y", "channel_gate", "spatial_gate"],
            "cbam_with_batch_norm": ["y", "mean", "variance", "channel_gate", "spatial_gate"],
            "channel_attention": ["y", "channel_gate"],
            "spatial_attention": ["y", "spatial_gate"],
            "spatial_attention_with_batch_norm": ["y", "mean", "variance", "spatial_gate"],
            "channel_pool": ["mean", "maximum"],
            "spatial_pool": ["descriptors"],
        }[self.function]

    def cotangents(self, outputs: list[tf.Tensor]) -> list[tf.Tensor]:
        """A gradient for each output, exactly representable in every type."""
        generator = np.random.default_rng(7)
        return [
            tf.constant(generator.integers(-8, 9, size=output.shape) / 8.0, output.dtype)
            for output in outputs
        ]

    def gradients(
        self, module: ModuleType, tensors: dict[str, tf.Tensor], data_format: str
    ) -> dict[str, tf.Tensor]:
        """The gradient of every argument, from gradients of every output."""
        with tf.GradientTape() as tape:
            tape.watch(list(tensors.values()))
            outputs = self.call(module, tensors, data_format)
        gradients = tape.gradient(
            outputs,
            tensors,
            output_gradients=self.cotangents(outputs),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return gradients


def cast(tensors: dict[str, tf.Tensor], dtype: str) -> dict[str, tf.Tensor]:
    """The same values in another type."""
    return {name: tf.cast(tensor, dtype) for name, tensor in tensors.items()}


def truth_and_stock(case: Case, tensors: dict[str, tf.Tensor], what: str, data_format: str) -> Any:
    """`case.<what>` of the reference in float64, and in the compute type of `tensors`."""
    truth, stock = (cast(tensors, dtype) for dtype in ("float64", "float32"))
    half = tensors["x"].dtype in (tf.float16, tf.bfloat16)
    if half and dict(case.options).get("order") == "spatial_first":
        # A composition of two ops, which hands on a map in its own type: so does an ordinary one.
        stock = {**stock, **{name: tensors[name] for name in MAPS if name in tensors}}
    truth, stock = (getattr(case, what)(reference, v, data_format) for v in (truth, stock))
    if tensors["x"].dtype == tf.float64:
        # In float64 the truth is an ordinary evaluation itself. That errs as one in float32 does,
        # by as many roundings.
        def shrink(truth: tf.Tensor, stock: tf.Tensor) -> tf.Tensor:
            return truth + (tf.cast(stock, tf.float64) - truth) * 2.0**-29

        stock = tf.nest.map_structure(shrink, truth, stock)
    return truth, stock


def gradient_magnitudes(
    case: Case, tensors: dict[str, tf.Tensor], data_format: str
) -> dict[str, np.ndarray]:
    """What the sums behind each gradient come to without their signs (of pools: nothing known)."""
    if case.function.endswith("pool"):
        return {}
    values = {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.items()}
    keywords = {key: value or "none" for key, value in case.options}
    outputs = case.call(reference, cast(tensors, "float64"), data_format)
    cotangents = dict(zip(case.output_names(), case.cotangents(outputs), strict=True))
    gates = {"channel_attention": "channel_only", "spatial_attention": "spatial_only"}
    keywords["gates"] = gates.get(
        case.function.removesuffix("_with_batch_norm"), keywords.pop("order", "channel_first")
    )
    if "gamma" in values:
        keywords["batch_norm"] = True
        values["bias"] = values.pop("beta")
    for gate in ("channel_gate", "spatial_gate"):
        if gate in cotangents:
            keywords[f"d_{gate}"] = cotangents[gate].numpy()
    result = numpy_oracle.backward(
        dy=cotangents["y"].numpy(), layout=data_format, magnitude=True, **values, **keywords
    )
    names = {"residual": "d_residual", "beta": "dbias"}
    return {name: result[names.get(name, f"d{name}")] for name in tensors}


def digest(results: Any) -> str:
    """A short text that changes with any bit of any tensor."""
    hashed = hashlib.sha256()
    for tensor in tf.nest.flatten(results):
        hashed.update(tensor.numpy().tobytes())
    return hashed.hexdigest()


def magnitude(truth: np.ndarray) -> float:
    """What the sums behind a result come to without their signs, to the order of magnitude.

    Terms that cancel leave their rounding errors. The largest result is an estimate from below.
    """
    return float(np.max(np.abs(truth), initial=0.0, where=np.isfinite(truth)))


def options(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


# Every function with every option at least once; each runs in all types and both layouts.
OPTIONS = [
    Case(),
    Case(values="relu", biases=False),
    Case(half_weights=True, kernel_size=7),
    Case(residual=True, options=options(activation="relu", mlp_activation="relu")),
    Case(residual=True, values="relu", options=options(order="parallel")),
    Case(residual=True, options=options(order="spatial_first", activation="relu")),
    Case("cbam_with_batch_norm", kernel_size=7),
    Case(
        "cbam_with_batch_norm",
        residual=True,
        half_weights=True,
        options=options(order="parallel", activation="relu", epsilon=1e-5),
    ),
    Case("channel_attention", values="relu", residual=True),
    Case("channel_attention", biases=False, options=options(pooling="avg", activation="relu")),
    Case("channel_attention", options=options(pooling="max", mlp_activation="relu")),
    Case("spatial_attention", values="relu", kernel_size=7, biases=False),
    Case("spatial_attention", residual=True, options=options(activation="relu")),
    Case("spatial_attention_with_batch_norm", values="relu"),
    Case("channel_pool", values="relu"),
    Case("spatial_pool", values="relu"),
]

# Sizes that vectors, tiles and halos must get right; these run in float32 (and float16, whose
# conversion has tails of its own) and both layouts.
SIZES = [
    Case(size=(1, 1, 1, 1), hidden=1, kernel_size=1),
    Case(size=(3, 1, 1, 33), hidden=2, kernel_size=7),
    Case(size=(2, 1, 9, 3), hidden=1, kernel_size=11),  # a map smaller than the kernel
    Case(size=(2, 3, 2, 257), hidden=16, kernel_size=5, values="relu"),
    Case(size=(5, 17, 1, 16), hidden=1, kernel_size=3),
    Case(size=(1, 31, 29, 64), hidden=4, kernel_size=7, residual=True),
    Case(size=(9, 4, 4, 8), hidden=8, kernel_size=7, options=options(activation="relu")),
    Case("spatial_attention", size=(2, 64, 63, 1), kernel_size=7),
    Case("channel_attention", size=(2, 2, 3, 1025), hidden=64),
    Case("channel_pool", size=(2, 70, 61, 5)),
    Case("spatial_pool", size=(2, 3, 5, 515)),
    Case(size=(2, 4, 6, 10), values="equal"),
]

# Large enough to be shared out among threads: by samples, and within one sample.
LARGE = [
    Case(size=(1, 56, 56, 128), hidden=8, kernel_size=7),
    Case(size=(5, 28, 28, 256), hidden=16, kernel_size=7, residual=True),
    Case("cbam_with_batch_norm", size=(16, 7, 7, 512), hidden=32, kernel_size=7),
    Case("channel_pool", size=(1, 100, 100, 96)),
    Case("spatial_pool", size=(1, 100, 100, 96)),
]
