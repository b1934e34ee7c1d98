"""Checks of arguments, shared by the fused ops and the reference.

There is one ``check_<function>`` per public function, with its arguments. It returns them as
tensors in one :class:`Arguments`, or raises ``ValueError`` with a text that names the argument,
what was expected and what was received. Sizes that are not known while a graph is traced are left
to the kernels, which check them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

FLOATING = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
HALF = (tf.float16, tf.bfloat16)

DATA_FORMATS = ("NHWC", "NCHW")
POOLINGS = ("avg+max", "avg", "max")
ORDERS = ("channel_first", "spatial_first", "parallel")
ACTIVATIONS = (None, "relu")


@dataclass
class Arguments:
    """What a check returns: the arguments that it was given, as tensors."""

    x: tf.Tensor
    w0: tf.Tensor | None = None
    b0: tf.Tensor | None = None
    w1: tf.Tensor | None = None
    b1: tf.Tensor | None = None
    kernel: tf.Tensor | None = None
    bias: tf.Tensor | None = None
    gamma: tf.Tensor | None = None
    beta: tf.Tensor | None = None
    residual: tf.Tensor | None = None
    epsilon: float = 1e-3

    @property
    def compute_type(self) -> tf.DType:
        """The type of sums, descriptors and returned gates: float64 for float64, else float32."""
        return tf.float64 if self.x.dtype == tf.float64 else tf.float32


def channel_axis(data_format: str) -> int:
    """The axis of the channels."""
    return data_format.index("C")


def position_axes(data_format: str) -> list[int]:
    """The axes of the positions, height and width."""
    return [data_format.index("H"), data_format.index("W")]


def check_cbam(
    x: Any,
    w0: Any,
    b0: Any,
    w1: Any,
    b1: Any,
    kernel: Any,
    bias: Any,
    *,
    data_format: str,
    mlp_activation: str | None,
    residual: Any,
    activation: str | None,
    order: str,
) -> Arguments:
    """Checks the arguments of ``cbam``."""
    function = "cbam"
    _option(function, "mlp_activation", mlp_activation, ACTIVATIONS)
    _option(function, "order", order, ORDERS)
    args = _feature_map(function, x, residual, data_format, activation)
    _mlp(function, args, w0, b0, w1, b1, data_format)
    _spatial_kernel(function, args, kernel)
    args.bias = _scalar(function, args, "bias", bias)
    _same_type(function, args)
    return args


def check_cbam_with_batch_norm(
    x: Any,
    w0: Any,
    b0: Any,
    w1: Any,
    b1: Any,
    kernel: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float,
    data_format: str,
    mlp_activation: str | None,
    residual: Any,
    activation: str | None,
    order: str,
) -> Arguments:
    """Checks the arguments of ``cbam_with_batch_norm``."""
    function = "cbam_with_batch_norm"
    _option(function, "mlp_activation", mlp_activation, ACTIVATIONS)
    _option(function, "order", order, ORDERS)
    args = _feature_map(function, x, residual, data_format, activation)
    _mlp(function, args, w0, b0, w1, b1, data_format)
    _spatial_kernel(function, args, kernel)
    _batch_norm(function, args, gamma, beta, epsilon)
    _same_type(function, args)
    return args


def check_channel_attention(
    x: Any,
    w0: Any,
    b0: Any,
    w1: Any,
    b1: Any,
    *,
    pooling: str,
    data_format: str,
    mlp_activation: str | None,
    residual: Any,
    activation: str | None,
) -> Arguments:
    """Checks the arguments of ``channel_attention``."""
    function = "channel_attention"
    _option(function, "pooling", pooling, POOLINGS)
    _option(function, "mlp_activation", mlp_activation, ACTIVATIONS)
    args = _feature_map(function, x, residual, data_format, activation)
    _mlp(function, args, w0, b0, w1, b1, data_format)
    _same_type(function, args)
    return args


def check_spatial_attention(
    x: Any,
    kernel: Any,
    bias: Any,
    *,
    data_format: str,
    residual: Any,
    activation: str | None,
) -> Arguments:
    """Checks the arguments of ``spatial_attention``."""
    function = "spatial_attention"
    args = _feature_map(function, x, residual, data_format, activation)
    _spatial_kernel(function, args, kernel)
    args.bias = _scalar(function, args, "bias", bias)
    _same_type(function, args)
    return args


def check_spatial_attention_with_batch_norm(
    x: Any,
    kernel: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float,
    data_format: str,
    residual: Any,
    activation: str | None,
) -> Arguments:
    """Checks the arguments of ``spatial_attention_with_batch_norm``."""
    function = "spatial_attention_with_batch_norm"
    args = _feature_map(function, x, residual, data_format, activation)
    _spatial_kernel(function, args, kernel)
    _batch_norm(function, args, gamma, beta, epsilon)
    _same_type(function, args)
    return args


def check_channel_pool(x: Any, *, data_format: str) -> Arguments:
    """Checks the arguments of ``channel_pool``."""
    return _feature_map("channel_pool", x, None, data_format, None)


def check_spatial_pool(x: Any, *, data_format: str) -> Arguments:
    """Checks the arguments of ``spatial_pool``."""
    return _feature_map("spatial_pool", x, None, data_format, None)


def _option(function: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    # An array or a tensor compares elementwise: the type is looked at first.
    if (value is None or isinstance(value, str)) and value in allowed:
        return
    choices = " or ".join(repr(choice) for choice in allowed)
    raise ValueError(f"{function}: `{name}` must be {choices}, got {value!r}")


def _feature_map(
    function: str, x: Any, residual: Any, data_format: str, activation: str | None
) -> Arguments:
    """``x`` and the residual: rank 4, floating, with no empty dimension but the batch."""
    _option(function, "data_format", data_format, DATA_FORMATS)
    _option(function, "activation", activation, ACTIVATIONS)
    x = _tensor(function, "x", x, None)
    if x.dtype not in FLOATING:
        allowed = " or ".join(dtype.name for dtype in FLOATING)
        raise ValueError(f"{function}: `x` must have dtype {allowed}, got {x.dtype.name}")
    sizes = _sizes(function, "x", x, list(data_format), [None] * 4)
    for letter, size in zip(data_format, sizes, strict=True):
        if letter != "N" and size == 0:
            raise ValueError(f"{function}: `x` must have {letter} >= 1, got shape {_text(x.shape)}")
    if residual is not None:
        residual = _tensor(function, "residual", residual, x.dtype)
        if residual.dtype != x.dtype:
            raise ValueError(
                f"{function}: `residual` must have the dtype of `x`, {x.dtype.name}, "
                f"got {residual.dtype.name}"
            )
        _sizes(function, "residual", residual, list(data_format), sizes)
    return Arguments(x, residual=residual)


def _mlp(
    function: str, args: Arguments, w0: Any, b0: Any, w1: Any, b1: Any, data_format: str
) -> None:
    shape = args.x.shape
    channels = None if shape.rank is None else shape[channel_axis(data_format)]
    args.w0 = _weight(function, args, "w0", w0)
    channels, hidden = _sizes(function, "w0", args.w0, ["C", "hidden"], [channels, None])
    if hidden == 0:
        raise ValueError(
            f"{function}: `w0` must have hidden >= 1, got shape {_text(args.w0.shape)}"
        )
    args.w1 = _weight(function, args, "w1", w1)
    hidden, channels = _sizes(function, "w1", args.w1, ["hidden", "C"], [hidden, channels])
    if b0 is not None:
        args.b0 = _weight(function, args, "b0", b0)
        _sizes(function, "b0", args.b0, ["hidden"], [hidden])
    if b1 is not None:
        args.b1 = _weight(function, args, "b1", b1)
        _sizes(function, "b1", args.b1, ["C"], [channels])


def _spatial_kernel(function: str, args: Arguments, kernel: Any) -> None:
    args.kernel = _weight(function, args, "kernel", kernel)
    names = ["k", "k", "2", "1"]
    height, width, _, _ = _sizes(function, "kernel", args.kernel, names, [None, None, 2, 1])
    if height is not None and width is not None:
        _sizes(function, "kernel", args.kernel, names, [height, height, 2, 1])
    if any(size is not None and size % 2 == 0 for size in (height, width)):
        raise ValueError(
            f"{function}: `kernel` must have an odd k, got shape {_text(args.kernel.shape)}"
        )


def _batch_norm(function: str, args: Arguments, gamma: Any, beta: Any, epsilon: Any) -> None:
    args.gamma = _required(function, "gamma", _scalar(function, args, "gamma", gamma))
    args.beta = _required(function, "beta", _scalar(function, args, "beta", beta))
    # Rounded to float32, the type of the ops' attribute: so the fused ops and the reference are
    # the same function in float64 too.
    try:
        args.epsilon = float(np.float32(epsilon))
    except (TypeError, ValueError):
        args.epsilon = -1.0
    if not 0.0 <= args.epsilon < float("inf"):
        raise ValueError(f"{function}: `epsilon` must be a number >= 0, got {epsilon!r}")


def _scalar(function: str, args: Arguments, name: str, value: Any) -> tf.Tensor | None:
    if value is None:
        return None
    value = _weight(function, args, name, value)
    _sizes(function, name, value, ["1"], [1])
    return value


def _required(function: str, name: str, value: tf.Tensor | None) -> tf.Tensor:
    if value is None:
        raise ValueError(f"{function}: `{name}` must be a tensor, got None")
    return value


def _same_type(function: str, args: Arguments) -> None:
    """All weights have one type."""
    names = ("w0", "b0", "w1", "b1", "kernel", "bias", "gamma", "beta")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    first = next(iter(given))
    expected = given[first].dtype
    for name, weight in given.items():
        if weight.dtype != expected:
            raise ValueError(
                f"{function}: `{name}` must have the dtype of `{first}`, {expected.name}, "
                f"got {weight.dtype.name}"
            )


def _weight(function: str, args: Arguments, name: str, value: Any) -> tf.Tensor:
    """A weight has the type of the map; beside a half type it may also be float32."""
    value = _tensor(function, name, value, args.x.dtype)
    allowed = [args.x.dtype] + ([tf.float32] if args.x.dtype in HALF else [])
    if value.dtype not in allowed:
        expected = " or ".join(dtype.name for dtype in allowed)
        raise ValueError(
            f"{function}: `{name}` must have dtype {expected} beside `x` of dtype "
            f"{args.x.dtype.name}, got {value.dtype.name}"
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


def _sizes(
    function: str,
    name: str,
    tensor: tf.Tensor,
    letters: Sequence[str],
    expected: Sequence[int | None],
) -> list[int | None]:
    """What is known of the shape, from the tensor and from ``expected``.

    Raises unless the two fit; ``letters`` are the names of the dimensions.
    """
    if not tensor.shape.is_compatible_with(tf.TensorShape(expected)):
        wanted = f"[{', '.join(letters)}]"
        known = [
            letter if size is None else str(size)
            for letter, size in zip(letters, expected, strict=True)
        ]
        if known != list(letters):
            wanted += f" = [{', '.join(known)}]"
        raise ValueError(
            f"{function}: `{name}` must have shape {wanted}, got {_text(tensor.shape)}"
        )
    return tensor.shape.merge_with(expected).as_list()


def _text(shape: tf.TensorShape) -> str:
    if shape.rank is None:
        return "unknown"
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
