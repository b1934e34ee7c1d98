"""Cases of the public functions, and how far a result may be from the truth.

A :class:`Case` draws its arguments from a seeded generator in float64 and rounds them to its types.
The truth is the reference in float64 on the rounded values (of float64 maps: in the widest type
that numpy has), the ordinary evaluation the reference in the compute type. A result may err at most
twice what the ordinary evaluation errs, plus a small floor; see :func:`assert_accurate`. Nothing
passes on a wrong shape, a wrong type, or a NaN where the truth has a number (or the reverse).
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

from cbam_ops import reference

# Ours may err at most this many times what the ordinary evaluation errs.
STOCK_FACTOR = 2.0
# ... plus this many roundings of the compute type, of the size of the value itself or, where large
# terms cancel, of the sum of their absolute values.
FLOOR_ROUNDINGS = 8.0

# Distance from 1 to the next number, and the smallest positive number.
EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
}
SMALLEST = {
    "float64": 2.0**-1074,
    "float32": 2.0**-149,
    "bfloat16": 2.0**-133,
    "float16": 2.0**-24,
}
LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float16": 65504.0,
}

# Central differences in float64: their own error is of the order of the step squared and of the
# rounding over the step. Relative to the largest entry, like the other tolerances below.
FINITE_DIFFERENCE_STEP = 1e-5
FINITE_DIFFERENCE_TOLERANCE = 1e-7
# <J v, w> against <v, J' w>, relative to the root of the sum of squares of the terms.
DOT_PRODUCT_TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
# Second order and forward mode against the reference in float64.
SECOND_ORDER_TOLERANCE = {"float32": 1e-3, "float64": 1e-10}

# Whole networks of up to fifty layers, relative to the largest value: in float64 against a
# composition of other ops (epsilon of the spatial batch norm is an attribute of type float32), in
# mixed precision against float32.
MODEL_FORWARD = 1e-9
MODEL_GRADIENT = 1e-7
MIXED_MODEL = {"mixed_float16": 0.03, "mixed_bfloat16": 0.2}
# The same few operations in float32 in another order.
FLOAT32 = 1e-5
# ... and in float64.
FLOAT64 = 1e-13
# Of a few hundred random draws or more against their distribution's.
STANDARD_DEVIATION = 0.1


def compute_type(dtype: str) -> str:
    """The type that sums, weights, gates and descriptors of a map of type ``dtype`` have."""
    return "float64" if dtype == "float64" else "float32"


def truth_type(dtype: str) -> str:
    """The type to evaluate the truth in for results of type ``dtype``."""
    return "longdouble" if dtype == "float64" else "float64"


def assert_accurate(
    actual: np.ndarray,
    truth: np.ndarray,
    stock: np.ndarray,
    name: str,
    *,
    magnitude: np.ndarray | float | None = None,
    smallest: float = 0.0,
) -> None:
    """Asserts that ``actual`` is as near the truth as its type allows.

    Args:
      actual: the result, of any of the four types. A result of a half type was computed in float32
        and rounded once: that rounding is all that its bound has over a float32 result's.
      truth: of a wider type than the compute type of ``actual``.
      stock: the ordinary evaluation, in the *compute type* of ``actual``, not rounded to a half.
      name: for the message.
      magnitude: what the sums behind ``actual`` come to without their signs, where that is more
        than ``truth``: terms that cancel leave their rounding errors.
      smallest: values below may be 0 (the smallest normal number where denormals may be flushed).
    """
    actual, truth, stock = np.asarray(actual), np.asarray(truth), np.asarray(stock)
    assert actual.shape == truth.shape == stock.shape, (
        f"{name}: shape {actual.shape} instead of {truth.shape}"
    )
    if actual.size == 0:
        return
    dtype = actual.dtype.name
    value = actual.astype(truth.dtype)
    _assert_same_kind(value, truth, LARGEST[dtype], name)

    finite = np.isfinite(value) & np.isfinite(truth)
    if not finite.any():
        return
    with np.errstate(invalid="ignore", over="ignore"):
        stock_error = np.abs(stock.astype(truth.dtype) - truth)
        error = np.abs(value - truth)
    usable = stock_error[finite & np.isfinite(stock_error)]
    bound = STOCK_FACTOR * (usable.max() if usable.size else 0.0)
    scale = np.abs(truth) if magnitude is None else np.fmax(np.abs(truth), magnitude)
    narrow = compute_type(dtype)
    bound = bound + FLOOR_ROUNDINGS * (EPSILON[narrow] * scale + SMALLEST[narrow]) + smallest
    if narrow != dtype:
        bound = bound + 0.5 * EPSILON[dtype] * (np.abs(truth) + bound) + SMALLEST[dtype]
    wrong = finite & ~(error <= bound)
    if wrong.any():
        at = np.unravel_index(np.argmax(np.where(finite, error - bound, -np.inf)), error.shape)
        where = tuple(int(i) for i in at)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {error.size} values are too far off; at {where} "
            f"{value[at]!r} instead of {truth[at]!r}, error {error[at]:.3g}, allowed "
            f"{np.broadcast_to(bound, error.shape)[at]:.3g}"
        )


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, name: str) -> None:
    """Asserts a largest error of ``tolerance`` times the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    if actual.size == 0:
        return
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    _assert_same_kind(actual, expected, LARGEST["float64"], name)
    finite = np.isfinite(expected)
    error = np.abs(np.subtract(actual, expected, where=finite, out=np.zeros_like(actual))).max()
    scale = np.abs(np.where(finite, expected, 0.0)).max()
    assert error <= tolerance * scale, (
        f"{name}: error {error:.3g}, {error / scale if scale else np.inf:.3g} of the largest "
        f"value; allowed {tolerance:.3g}"
    )


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Asserts equality of shape, type and every bit (NaN equals NaN, -0 is not 0)."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: type {actual.dtype}, not {expected.dtype}"
    same = np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()
    if not same:
        differ = actual.astype(np.float64) != expected.astype(np.float64)
        raise AssertionError(f"{name}: {int(differ.sum())} of {actual.size} values differ")


def _assert_same_kind(value: np.ndarray, truth: np.ndarray, largest: float, name: str) -> None:
    """NaN where the truth is NaN, infinite where the truth is or may round to infinity."""
    nan = np.isnan(value) != np.isnan(truth)
    if nan.any():
        at = tuple(int(i) for i in np.argwhere(nan)[0])
        raise AssertionError(
            f"{name}: {int(nan.sum())} of {value.size} values are NaN where the truth is not or "
            f"the reverse; at {at} {value[at]!r} instead of {truth[at]!r}"
        )
    near_overflow = np.abs(truth) > largest * (1 - 2.0**-7)
    infinite = np.isinf(value) | np.isinf(truth)
    wrong = infinite & ~near_overflow & ~np.isnan(truth)
    wrong |= infinite & (np.sign(value) != np.sign(truth))
    wrong |= np.isinf(truth) & ~np.isinf(value)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {value.size} values are infinite where the truth is "
            f"not or the reverse; at {at} {value[at]!r} instead of {truth[at]!r}"
        )


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
    """The options of a case, in the form in which it can be hashed."""
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
