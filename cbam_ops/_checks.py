"""Checks of arguments, shared by the fused ops and the reference.

Each check takes the name of the public function it speaks for, returns the argument as a tensor
and raises `ValueError` with a text that names the argument, what was expected and what was
received. Sizes that are not known while a graph is traced are left to the kernels, which check
them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

FLOATING = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
HALF = (tf.float16, tf.bfloat16)

DATA_FORMATS = ("NHWC", "NCHW")
POOLINGS = ("avg+max", "avg", "max")
ORDERS = ("channel_first", "spatial_first", "parallel")
ACTIVATIONS = (None, "relu")


def compute_dtype(dtype: tf.DType) -> tf.DType:
    """The type of sums, gates and descriptors of a map of `dtype`: float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def channel_axis(data_format: str) -> int:
    """The axis of the channels."""
    return data_format.index("C")


def option(function: str, name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Returns `value` if it is one of `allowed`."""
    # A tensor or an array compares elementwise: the type is looked at first.
    if (value is None or isinstance(value, str)) and value in allowed:
        return value
    choices = " or ".join(repr(choice) for choice in allowed)
    raise ValueError(f"{function}: `{name}` must be {choices}, got {value!r}")


def epsilon(function: str, value: Any) -> float:
    """Returns `value` rounded to float32, the type of the ops' attribute.

    Rounding here keeps the fused ops and the reference the same function in float64 too.
    """
    try:
        rounded = float(np.float32(value))
    except (TypeError, ValueError):
        rounded = -1.0
    if not 0.0 <= rounded < float("inf"):
        raise ValueError(f"{function}: `epsilon` must be a number >= 0, got {value!r}")
    return rounded


def feature_map(function: str, x: Any, data_format: str, name: str = "x") -> tf.Tensor:
    """Returns the feature map: rank 4, floating, with no empty dimension but the batch."""
    option(function, "data_format", data_format, DATA_FORMATS)
    x = _tensor(function, name, x, None)
    if x.dtype not in FLOATING:
        allowed = " or ".join(dtype.name for dtype in FLOATING)
        raise ValueError(f"{function}: `{name}` must have dtype {allowed}, got {x.dtype.name}")
    letters = list(data_format)
    _shape(function, name, x, letters, [None] * 4)
    if x.shape.rank is not None:
        for letter, size in zip(letters, x.shape, strict=True):
            if letter != "N" and size == 0:
                raise ValueError(
                    f"{function}: `{name}` must have {letter} >= 1, got shape {_text(x.shape)}"
                )
    return x


def like(function: str, x: tf.Tensor, value: Any, data_format: str, name: str) -> tf.Tensor:
    """Returns `value` (a residual, say), which must have the type and the shape of `x`."""
    value = _tensor(function, name, value, x.dtype)
    if value.dtype != x.dtype:
        raise ValueError(
            f"{function}: `{name}` must have the dtype of `x`, {x.dtype.name}, "
            f"got {value.dtype.name}"
        )
    sizes = [None] * 4 if x.shape.rank is None else x.shape.as_list()
    _shape(function, name, value, list(data_format), sizes)
    return value


def mlp(
    function: str, x: tf.Tensor, w0: Any, b0: Any, w1: Any, b1: Any, data_format: str
) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor, tf.Tensor | None]:
    """Returns the weights of the shared MLP: w0 [C, hidden], b0 [hidden], w1 [hidden, C], b1 [C].

    The biases may be None.
    """
    channels = None if x.shape.rank is None else x.shape[channel_axis(data_format)]
    w0 = _weight(function, "w0", w0, x)
    _shape(function, "w0", w0, ["C", "hidden"], [channels, None])
    hidden = None
    if w0.shape.rank is not None:
        channels = w0.shape[0] if channels is None else channels
        hidden = w0.shape[1]
    if hidden == 0:
        raise ValueError(f"{function}: `w0` must have hidden >= 1, got shape {_text(w0.shape)}")
    w1 = _weight(function, "w1", w1, x)
    _shape(function, "w1", w1, ["hidden", "C"], [hidden, channels])
    if b0 is not None:
        b0 = _weight(function, "b0", b0, x)
        _shape(function, "b0", b0, ["hidden"], [hidden])
    if b1 is not None:
        b1 = _weight(function, "b1", b1, x)
        _shape(function, "b1", b1, ["C"], [channels])
    same_type(function, w0=w0, b0=b0, w1=w1, b1=b1)
    return w0, b0, w1, b1


def spatial_kernel(function: str, x: tf.Tensor, kernel: Any) -> tf.Tensor:
    """Returns the kernel of the spatial convolution, [k, k, 2, 1] with an odd k."""
    kernel = _weight(function, "kernel", kernel, x)
    names = ["k", "k", "2", "1"]
    _shape(function, "kernel", kernel, names, [None, None, 2, 1])
    if kernel.shape.rank is not None:
        height, width = kernel.shape[0], kernel.shape[1]
        if height is not None:
            _shape(function, "kernel", kernel, names, [height, height, 2, 1])
        for size in (height, width):
            if size is not None and size % 2 == 0:
                raise ValueError(
                    f"{function}: `kernel` must have an odd k, got shape {_text(kernel.shape)}"
                )
    return kernel


def scalar_weight(function: str, x: tf.Tensor, value: Any, name: str) -> tf.Tensor:
    """Returns a weight of shape [1]: the bias, gamma or beta of the spatial convolution."""
    value = _weight(function, name, value, x)
    _shape(function, name, value, ["1"], [1])
    return value


def same_type(function: str, **weights: tf.Tensor | None) -> None:
    """Raises unless all weights that are given have one type."""
    given = {name: weight for name, weight in weights.items() if weight is not None}
    first = next(iter(given))
    for name, weight in given.items():
        if weight.dtype != given[first].dtype:
            raise ValueError(
                f"{function}: `{name}` must have the dtype of `{first}`, "
                f"{given[first].dtype.name}, got {weight.dtype.name}"
            )


def _weight(function: str, name: str, value: Any, x: tf.Tensor) -> tf.Tensor:
    """A weight has the type of the map; beside a half type it may also be float32."""
    value = _tensor(function, name, value, x.dtype)
    allowed = [x.dtype] + ([tf.float32] if x.dtype in HALF else [])
    if value.dtype not in allowed:
        expected = " or ".join(dtype.name for dtype in allowed)
        raise ValueError(
            f"{function}: `{name}` must have dtype {expected} beside `x` of dtype "
            f"{x.dtype.name}, got {value.dtype.name}"
        )
    return value


def _tensor(function: str, name: str, value: Any, preferred: tf.DType | None) -> tf.Tensor:
    if value is None:
        raise ValueError(f"{function}: `{name}` must be a tensor, got None")
    if hasattr(value, "dtype"):
        preferred = None  # what has a type keeps it; only Python numbers take the map's
    try:
        return tf.convert_to_tensor(value, dtype_hint=preferred)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{function}: `{name}` must be a tensor or something that converts to one, "
            f"got {type(value).__name__}: {error}"
        ) from error


def _shape(
    function: str,
    name: str,
    tensor: tf.Tensor,
    letters: Sequence[str],
    sizes: Sequence[int | None],
) -> None:
    """Raises unless the static shape fits; `letters` are the names of the dimensions."""
    if tensor.shape.is_compatible_with(tf.TensorShape(sizes)):
        return
    expected = f"[{', '.join(letters)}]"
    known = [
        letter if size is None else str(size) for letter, size in zip(letters, sizes, strict=True)
    ]
    if known != list(letters):
        expected += f" = [{', '.join(known)}]"
    raise ValueError(f"{function}: `{name}` must have shape {expected}, got {_text(tensor.shape)}")


def _text(shape: tf.TensorShape) -> str:
    if shape.rank is None:
        return "unknown"
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
