"""How far results may be from the truth: every tolerance of the tests, and the comparers.

The truth is the definition in float64 on the same inputs (of float64 maps: in the widest type numpy
has). Ours may err at most twice what an
ordinary evaluation in the same type errs, plus a small floor; see :func:`assert_accurate`. Nothing
passes on a wrong shape, a wrong type, or a NaN where the truth has a number (or the reverse).
"""

from __future__ import annotations

import numpy as np

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
