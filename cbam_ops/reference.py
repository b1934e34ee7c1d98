"""The definition of every operation in plain TensorFlow: oracle, fallback and benchmark baseline.

Equivalent to, and written as, the stock lines that :func:`cbam_ops.cbam` replaces (NHWC, all
options off)::

    mlp = lambda t: tf.matmul(tf.nn.relu(tf.matmul(t, w0) + b0), w1) + b1
    mean, maximum = tf.reduce_mean(x, [1, 2]), tf.reduce_max(x, [1, 2])
    channel_gate = tf.sigmoid(mlp(mean) + mlp(maximum))
    u = x * channel_gate[:, None, None, :]
    mean, maximum = tf.reduce_mean(u, 3), tf.reduce_max(u, 3)
    descriptors = tf.stack([mean, maximum], 3)
    z = tf.nn.conv2d(descriptors, kernel, strides=1, padding="SAME") + bias
    y = u * tf.sigmoid(z)

Words and shapes (Woo et al., 2018, section 3): the feature map ``x`` is ``[N, H, W, C]`` (NHWC) or
``[N, C, H, W]`` (NCHW), its type T float16, bfloat16, float32 or float64. The compute type U is
float64 for a float64 map and float32 for the others.

Types. With weights of type U the descriptors of a half-type map are cast to float32, the MLP and the
convolution compute in float32, and the gates are cast back to T before they multiply the map. With
weights of the same half type as ``x`` everything is computed in that type, as a stock graph would.
Gates and batch statistics are returned in U either way. Gradients are TensorFlow's own: at equal
maxima the gradient is split evenly.

All functions raise ``ValueError`` for arguments that do not fit each other; the message names the
argument, what was expected and what was received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from cbam_ops import _checks

__all__ = [
    "cbam",
    "cbam_with_batch_norm",
    "channel_attention",
    "channel_pool",
    "spatial_attention",
    "spatial_attention_with_batch_norm",
    "spatial_pool",
]


def cbam(
    x: Any,
    w0: Any,
    b0: Any,
    w1: Any,
    b1: Any,
    kernel: Any,
    bias: Any = None,
    *,
    data_format: str = "NHWC",
    mlp_activation: str | None = None,
    residual: Any = None,
    activation: str | None = None,
    order: str = "channel_first",
    return_gates: bool = False,
) -> Any:
    """The convolutional block attention module (Woo et al., 2018, equations 1 to 3).

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        w0: ``[C, hidden]``, first layer of the shared MLP.
        b0: ``[hidden]`` or None.
        w1: ``[hidden, C]``, second layer of the shared MLP.
        b1: ``[C]`` or None.
        kernel: ``[k, k, 2, 1]`` with odd k; input plane 0 is the mean, plane 1 the maximum.
        bias: ``[1]`` or None, the bias of the spatial convolution.
        data_format: "NHWC" or "NCHW".
        mlp_activation: None or "relu", applied to each of the two MLP outputs before their sum.
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        order: "channel_first" (``y = u * spatial_gate(u)`` with ``u = x * channel_gate(x)``),
            "spatial_first" (the other way round) or "parallel" (both gates taken from ``x``).
        return_gates: Whether to return the gates too.

    Returns:
        ``y``, like ``x``; with ``return_gates`` the tuple ``(y, channel_gate, spatial_gate)`` with
        gates ``[N, C]`` and ``[N, H, W]`` in the compute type.
    """
    _checks.option("cbam", "order", order, _checks.ORDERS)
    x, residual = _map("cbam", x, residual, activation, data_format)
    mlp = _mlp("cbam", x, w0, b0, w1, b1, mlp_activation, data_format)
    kernel, bias = _spatial_weights("cbam", x, kernel, bias=bias)
    _checks.same_type("cbam", w0=mlp.w0, kernel=kernel, bias=bias)

    def spatial_gate(t: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(_spatial_logits(t, kernel, bias, data_format))

    gated, g_c, g_s = _both_gates(x, mlp, spatial_gate, order, data_format)
    y = _finish(gated, residual, activation)
    return (y, _out(g_c, x), _out(g_s, x)) if return_gates else y


def cbam_with_batch_norm(
    x: Any,
    w0: Any,
    b0: Any,
    w1: Any,
    b1: Any,
    kernel: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float = 1e-3,
    data_format: str = "NHWC",
    mlp_activation: str | None = None,
    residual: Any = None,
    activation: str | None = None,
    order: str = "channel_first",
    return_gates: bool = False,
) -> Any:
    """:func:`cbam` with a batch norm between the spatial convolution and its sigmoid, in training.

    The convolution has no bias; its one output channel is normalised by its own mean and (biased)
    variance over the batch and all positions. At inference fold the moving statistics into
    ``kernel`` and ``bias`` of :func:`cbam` instead.

    Args:
        x: As for :func:`cbam`, like all arguments not named here.
        w0: See :func:`cbam`.
        b0: See :func:`cbam`.
        w1: See :func:`cbam`.
        b1: See :func:`cbam`.
        kernel: See :func:`cbam`.
        gamma: ``[1]``, scale of the batch norm.
        beta: ``[1]``, offset of the batch norm.
        epsilon: Added to the variance.
        data_format: See :func:`cbam`.
        mlp_activation: See :func:`cbam`.
        residual: See :func:`cbam`.
        activation: See :func:`cbam`.
        order: See :func:`cbam`.
        return_gates: See :func:`cbam`.

    Returns:
        ``(y, batch_mean, batch_variance)`` with statistics of shape ``[1]`` in the compute type,
        through which no gradient flows; with ``return_gates`` followed by the two gates.
    """
    op = "cbam_with_batch_norm"
    _checks.option(op, "order", order, _checks.ORDERS)
    epsilon = _checks.epsilon(op, epsilon)
    x, residual = _map(op, x, residual, activation, data_format)
    mlp = _mlp(op, x, w0, b0, w1, b1, mlp_activation, data_format)
    kernel, gamma, beta = _spatial_weights(op, x, kernel, gamma=gamma, beta=beta)
    _checks.same_type(op, w0=mlp.w0, kernel=kernel, gamma=gamma, beta=beta)
    statistics: list[tf.Tensor] = []

    def spatial_gate(t: tf.Tensor) -> tf.Tensor:
        gate, *moments = _normalised_spatial_gate(t, kernel, gamma, beta, epsilon, data_format)
        statistics.extend(moments)
        return gate

    gated, g_c, g_s = _both_gates(x, mlp, spatial_gate, order, data_format)
    y = _finish(gated, residual, activation)
    return (y, *statistics, _out(g_c, x), _out(g_s, x)) if return_gates else (y, *statistics)


def channel_attention(
    x: Any,
    w0: Any,
    b0: Any,
    w1: Any,
    b1: Any,
    *,
    pooling: str = "avg+max",
    data_format: str = "NHWC",
    mlp_activation: str | None = None,
    residual: Any = None,
    activation: str | None = None,
    return_gates: bool = False,
) -> Any:
    """The channel part of CBAM (Woo et al., 2018, equation 2): ``y = x * channel_gate``.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        w0: ``[C, hidden]``.
        b0: ``[hidden]`` or None.
        w1: ``[hidden, C]``.
        b1: ``[C]`` or None.
        pooling: "avg+max", "avg" (squeeze and excitation) or "max": which descriptors feed the MLP.
        data_format: "NHWC" or "NCHW".
        mlp_activation: None or "relu", applied to each MLP output before their sum.
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        return_gates: Whether to return the gate too.

    Returns:
        ``y``, like ``x``; with ``return_gates`` the tuple ``(y, channel_gate)``, the gate ``[N, C]``
        in the compute type.
    """
    op = "channel_attention"
    _checks.option(op, "pooling", pooling, _checks.POOLINGS)
    x, residual = _map(op, x, residual, activation, data_format)
    mlp = _mlp(op, x, w0, b0, w1, b1, mlp_activation, data_format)
    gate = _channel_gate(x, mlp, pooling, data_format)
    y = _finish(_scale_channels(x, gate, data_format), residual, activation)
    return (y, _out(gate, x)) if return_gates else y


def spatial_attention(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    data_format: str = "NHWC",
    residual: Any = None,
    activation: str | None = None,
    return_gates: bool = False,
) -> Any:
    """The spatial part of CBAM (Woo et al., 2018, equation 3): ``y = x * spatial_gate``.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        kernel: ``[k, k, 2, 1]`` with odd k; input plane 0 is the mean, plane 1 the maximum.
        bias: ``[1]`` or None.
        data_format: "NHWC" or "NCHW".
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        return_gates: Whether to return the gate too.

    Returns:
        ``y``, like ``x``; with ``return_gates`` the tuple ``(y, spatial_gate)``, the gate
        ``[N, H, W]`` in the compute type.
    """
    op = "spatial_attention"
    x, residual = _map(op, x, residual, activation, data_format)
    kernel, bias = _spatial_weights(op, x, kernel, bias=bias)
    gate = tf.sigmoid(_spatial_logits(x, kernel, bias, data_format))
    y = _finish(_scale_positions(x, gate, data_format), residual, activation)
    return (y, _out(gate, x)) if return_gates else y


def spatial_attention_with_batch_norm(
    x: Any,
    kernel: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float = 1e-3,
    data_format: str = "NHWC",
    residual: Any = None,
    activation: str | None = None,
    return_gates: bool = False,
) -> Any:
    """:func:`spatial_attention` with a batch norm before its sigmoid, in training.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        kernel: ``[k, k, 2, 1]`` with odd k.
        gamma: ``[1]``, scale of the batch norm.
        beta: ``[1]``, offset of the batch norm.
        epsilon: Added to the variance.
        data_format: "NHWC" or "NCHW".
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        return_gates: Whether to return the gate too.

    Returns:
        ``(y, batch_mean, batch_variance)`` as :func:`cbam_with_batch_norm`; with ``return_gates``
        followed by the spatial gate.
    """
    op = "spatial_attention_with_batch_norm"
    epsilon = _checks.epsilon(op, epsilon)
    x, residual = _map(op, x, residual, activation, data_format)
    kernel, gamma, beta = _spatial_weights(op, x, kernel, gamma=gamma, beta=beta)
    gate, *statistics = _normalised_spatial_gate(x, kernel, gamma, beta, epsilon, data_format)
    y = _finish(_scale_positions(x, gate, data_format), residual, activation)
    return (y, *statistics, _out(gate, x)) if return_gates else (y, *statistics)


def channel_pool(x: Any, *, data_format: str = "NHWC") -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and maximum over positions.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        data_format: "NHWC" or "NCHW".

    Returns:
        ``(mean, maximum)``, each ``[N, C]`` in the type of ``x``.
    """
    x, _ = _map("channel_pool", x, None, None, data_format)
    axes = _position_axes(data_format)
    return tf.reduce_mean(x, axes), tf.reduce_max(x, axes)


def spatial_pool(x: Any, *, data_format: str = "NHWC") -> tf.Tensor:
    """Mean and maximum over channels, mean first.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        data_format: "NHWC" or "NCHW".

    Returns:
        ``[N, H, W, 2]`` (NHWC) or ``[N, 2, H, W]`` (NCHW) in the type of ``x``.
    """
    x, _ = _map("spatial_pool", x, None, None, data_format)
    axis = _channel_axis(data_format)
    return tf.stack([tf.reduce_mean(x, axis), tf.reduce_max(x, axis)], axis)


class _Mlp(NamedTuple):
    """The shared MLP's weights, and what follows its second layer."""

    w0: tf.Tensor
    b0: tf.Tensor | None
    w1: tf.Tensor
    b1: tf.Tensor | None
    activation: str | None

    def __call__(self, t: tf.Tensor) -> tf.Tensor:
        t = tf.matmul(tf.cast(t, self.w0.dtype), self.w0)
        t = tf.nn.relu(t if self.b0 is None else t + self.b0)
        t = tf.matmul(t, self.w1)
        t = t if self.b1 is None else t + self.b1
        return tf.nn.relu(t) if self.activation == "relu" else t


def _map(
    op: str, x: Any, residual: Any, activation: str | None, data_format: str
) -> tuple[tf.Tensor, tf.Tensor | None]:
    _checks.option(op, "activation", activation, _checks.ACTIVATIONS)
    x = _checks.feature_map(op, x, data_format)
    if x.shape.rank is None:
        x = tf.ensure_shape(x, [None] * 4)
    if residual is not None:
        residual = _checks.like(op, x, residual, data_format, "residual")
    return x, residual


def _mlp(
    op: str,
    x: tf.Tensor,
    w0: Any,
    b0: Any,
    w1: Any,
    b1: Any,
    mlp_activation: str | None,
    data_format: str,
) -> _Mlp:
    _checks.option(op, "mlp_activation", mlp_activation, _checks.ACTIVATIONS)
    return _Mlp(*_checks.mlp(op, x, w0, b0, w1, b1, data_format), mlp_activation)


def _spatial_weights(op: str, x: tf.Tensor, kernel: Any, **scalars: Any) -> list[Any]:
    """The checked kernel, and the scalars in the order given; only the bias may be None."""
    kernel = _checks.spatial_kernel(op, x, kernel)
    given = {
        name: None
        if name == "bias" and value is None
        else _checks.scalar_weight(op, x, value, name)
        for name, value in scalars.items()
    }
    _checks.same_type(op, kernel=kernel, **given)
    return [kernel, *given.values()]


def _both_gates(
    x: tf.Tensor,
    mlp: _Mlp,
    spatial_gate: Callable[[tf.Tensor], tf.Tensor],
    order: str,
    data_format: str,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gated map, the channel gate and the spatial gate, in the given order."""
    if order == "spatial_first":
        g_s = spatial_gate(x)
        u = _scale_positions(x, g_s, data_format)
        g_c = _channel_gate(u, mlp, "avg+max", data_format)
        return _scale_channels(u, g_c, data_format), g_c, g_s
    g_c = _channel_gate(x, mlp, "avg+max", data_format)
    u = _scale_channels(x, g_c, data_format)
    g_s = spatial_gate(x if order == "parallel" else u)
    return _scale_positions(u, g_s, data_format), g_c, g_s


def _channel_gate(x: tf.Tensor, mlp: _Mlp, pooling: str, data_format: str) -> tf.Tensor:
    """``[N, C]`` in the weights' type: sigmoid of the shared MLP's summed logits."""
    axes = _position_axes(data_format)
    if pooling == "avg":
        return tf.sigmoid(mlp(tf.reduce_mean(x, axes)))
    if pooling == "max":
        return tf.sigmoid(mlp(tf.reduce_max(x, axes)))
    return tf.sigmoid(mlp(tf.reduce_mean(x, axes)) + mlp(tf.reduce_max(x, axes)))


def _spatial_logits(
    x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, data_format: str
) -> tf.Tensor:
    """``[N, H, W]`` in the kernel's type: the convolution of the spatial descriptors."""
    axis = _channel_axis(data_format)
    # The two descriptor planes are put last in both layouts: CPUs have no NCHW convolution.
    descriptors = tf.stack([tf.reduce_mean(x, axis), tf.reduce_max(x, axis)], 3)
    z = tf.nn.conv2d(tf.cast(descriptors, kernel.dtype), kernel, strides=1, padding="SAME")
    return tf.squeeze(z if bias is None else z + bias, 3)


def _normalised_spatial_gate(
    x: tf.Tensor,
    kernel: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    data_format: str,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The spatial gate after batch norm, the batch's mean and its variance, both ``[1]`` in U."""
    # The statistics span the whole batch: at least float32, as in Keras's batch norm.
    z = _out(_spatial_logits(x, kernel, None, data_format), x)
    mean, variance = tf.nn.moments(tf.reshape(z, [-1, 1]), [0])
    gamma, beta = tf.cast(gamma, z.dtype), tf.cast(beta, z.dtype)
    gate = tf.sigmoid(tf.nn.batch_normalization(z, mean, variance, beta, gamma, epsilon))
    return tf.cast(gate, kernel.dtype), tf.stop_gradient(mean), tf.stop_gradient(variance)


def _out(gate: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    return tf.cast(gate, _checks.compute_dtype(x.dtype))


def _channel_axis(data_format: str) -> int:
    return data_format.index("C")


def _position_axes(data_format: str) -> list[int]:
    return [data_format.index("H"), data_format.index("W")]


def _scale_channels(x: tf.Tensor, gate: tf.Tensor, data_format: str) -> tf.Tensor:
    gate = tf.cast(gate, x.dtype)
    gate = gate[:, :, None, None] if data_format == "NCHW" else gate[:, None, None, :]
    return tf.multiply(x, gate)


def _scale_positions(x: tf.Tensor, gate: tf.Tensor, data_format: str) -> tf.Tensor:
    return tf.multiply(x, tf.expand_dims(tf.cast(gate, x.dtype), _channel_axis(data_format)))


def _finish(y: tf.Tensor, residual: tf.Tensor | None, activation: str | None) -> tf.Tensor:
    if residual is not None:
        y = tf.add(y, residual)
    return tf.nn.relu(y) if activation == "relu" else y
