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

Types. With weights of type U the descriptors of a half-type map are cast to float32, the MLP and
the convolution compute in float32, and the gates are cast back to T before they multiply the map.
With weights of the half type of ``x`` everything is computed in that type, as a stock graph would.
Gates and batch statistics are returned in U either way. Gradients are TensorFlow's own: at equal
maxima the gradient is split evenly.

All functions raise ``ValueError`` for arguments that do not fit each other; the message names the
argument, what was expected and what was received.
"""

from __future__ import annotations

from typing import Any

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


@tf.autograph.experimental.do_not_convert
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
    args = _checks.check_cbam(
        x,
        w0,
        b0,
        w1,
        b1,
        kernel,
        bias,
        data_format=data_format,
        mlp_activation=mlp_activation,
        residual=residual,
        activation=activation,
        order=order,
    )

    def spatial_gate(t: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(_spatial_logits(t, args.kernel, args.bias, data_format))

    gated, g_c, g_s = _both_gates(args, mlp_activation, data_format, order, spatial_gate)
    y = _finish(gated, args.residual, activation)
    if return_gates:
        return y, tf.cast(g_c, args.compute_type), tf.cast(g_s, args.compute_type)
    return y


@tf.autograph.experimental.do_not_convert
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
        epsilon: Added to the variance; rounded to float32, the type of the op's attribute.
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
    args = _checks.check_cbam_with_batch_norm(
        x,
        w0,
        b0,
        w1,
        b1,
        kernel,
        gamma,
        beta,
        epsilon=epsilon,
        data_format=data_format,
        mlp_activation=mlp_activation,
        residual=residual,
        activation=activation,
        order=order,
    )
    statistics: list[tf.Tensor] = []

    def spatial_gate(t: tf.Tensor) -> tf.Tensor:
        gate, *moments = _normalised_spatial_gate(t, args, data_format)
        statistics.extend(moments)
        return gate

    gated, g_c, g_s = _both_gates(args, mlp_activation, data_format, order, spatial_gate)
    y = _finish(gated, args.residual, activation)
    if return_gates:
        gates = tf.cast(g_c, args.compute_type), tf.cast(g_s, args.compute_type)
        return (y, *statistics, *gates)
    return (y, *statistics)


@tf.autograph.experimental.do_not_convert
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
        ``y``, like ``x``; with ``return_gates`` the tuple ``(y, channel_gate)``, the gate
        ``[N, C]`` in the compute type.
    """
    args = _checks.check_channel_attention(
        x,
        w0,
        b0,
        w1,
        b1,
        pooling=pooling,
        data_format=data_format,
        mlp_activation=mlp_activation,
        residual=residual,
        activation=activation,
    )
    gate = _channel_gate(args.x, args, pooling, mlp_activation, data_format)
    y = _finish(_scale_channels(args.x, gate, data_format), args.residual, activation)
    return (y, tf.cast(gate, args.compute_type)) if return_gates else y


@tf.autograph.experimental.do_not_convert
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
    args = _checks.check_spatial_attention(
        x, kernel, bias, data_format=data_format, residual=residual, activation=activation
    )
    gate = tf.sigmoid(_spatial_logits(args.x, args.kernel, args.bias, data_format))
    y = _finish(_scale_positions(args.x, gate, data_format), args.residual, activation)
    return (y, tf.cast(gate, args.compute_type)) if return_gates else y


@tf.autograph.experimental.do_not_convert
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
        epsilon: Added to the variance; rounded to float32, the type of the op's attribute.
        data_format: "NHWC" or "NCHW".
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        return_gates: Whether to return the gate too.

    Returns:
        ``(y, batch_mean, batch_variance)`` as :func:`cbam_with_batch_norm`; with ``return_gates``
        followed by the spatial gate.
    """
    args = _checks.check_spatial_attention_with_batch_norm(
        x,
        kernel,
        gamma,
        beta,
        epsilon=epsilon,
        data_format=data_format,
        residual=residual,
        activation=activation,
    )
    gate, mean, variance = _normalised_spatial_gate(args.x, args, data_format)
    y = _finish(_scale_positions(args.x, gate, data_format), args.residual, activation)
    if return_gates:
        return y, mean, variance, tf.cast(gate, args.compute_type)
    return y, mean, variance


@tf.autograph.experimental.do_not_convert
def channel_pool(x: Any, *, data_format: str = "NHWC") -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and maximum over positions.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        data_format: "NHWC" or "NCHW".

    Returns:
        ``(mean, maximum)``, each ``[N, C]`` in the type of ``x``.
    """
    args = _checks.check_channel_pool(x, data_format=data_format)
    axes = _checks.position_axes(data_format)
    return tf.reduce_mean(args.x, axes), tf.reduce_max(args.x, axes)


@tf.autograph.experimental.do_not_convert
def spatial_pool(x: Any, *, data_format: str = "NHWC") -> tf.Tensor:
    """Mean and maximum over channels, mean first.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        data_format: "NHWC" or "NCHW".

    Returns:
        ``[N, H, W, 2]`` (NHWC) or ``[N, 2, H, W]`` (NCHW) in the type of ``x``.
    """
    args = _checks.check_spatial_pool(x, data_format=data_format)
    axis = _checks.channel_axis(data_format)
    return tf.stack([tf.reduce_mean(args.x, axis), tf.reduce_max(args.x, axis)], axis)


def _both_gates(
    args: _checks.Arguments, mlp_activation: str | None, data_format: str, order: str, spatial: Any
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Applies both gates to ``args.x`` in the given order; ``spatial`` maps a map to its gate."""
    x = args.x
    if order == "spatial_first":
        g_s = spatial(x)
        u = _scale_positions(x, g_s, data_format)
        g_c = _channel_gate(u, args, "avg+max", mlp_activation, data_format)
        return _scale_channels(u, g_c, data_format), g_c, g_s
    g_c = _channel_gate(x, args, "avg+max", mlp_activation, data_format)
    u = _scale_channels(x, g_c, data_format)
    g_s = spatial(x if order == "parallel" else u)
    return _scale_positions(u, g_s, data_format), g_c, g_s


def _channel_gate(
    x: tf.Tensor,
    args: _checks.Arguments,
    pooling: str,
    mlp_activation: str | None,
    data_format: str,
) -> tf.Tensor:
    """``[N, C]`` in the weights' type: sigmoid of the shared MLP's summed logits."""
    w0, b0, w1, b1 = args.w0, args.b0, args.w1, args.b1
    assert w0 is not None and w1 is not None  # the checks saw to it

    def mlp(t: tf.Tensor) -> tf.Tensor:
        t = tf.matmul(tf.cast(t, w0.dtype), w0)
        t = tf.nn.relu(t if b0 is None else t + b0)
        t = tf.matmul(t, w1)
        t = t if b1 is None else t + b1
        return tf.nn.relu(t) if mlp_activation == "relu" else t

    axes = _checks.position_axes(data_format)
    if pooling == "avg":
        return tf.sigmoid(mlp(tf.reduce_mean(x, axes)))
    if pooling == "max":
        return tf.sigmoid(mlp(tf.reduce_max(x, axes)))
    return tf.sigmoid(mlp(tf.reduce_mean(x, axes)) + mlp(tf.reduce_max(x, axes)))


def _spatial_logits(
    x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, data_format: str
) -> tf.Tensor:
    """``[N, H, W]`` in the kernel's type: the convolution of the spatial descriptors."""
    axis = _checks.channel_axis(data_format)
    # The two descriptor planes are put last in both layouts: CPUs have no NCHW convolution.
    descriptors = tf.stack([tf.reduce_mean(x, axis), tf.reduce_max(x, axis)], 3)
    z = tf.nn.conv2d(tf.cast(descriptors, kernel.dtype), kernel, strides=1, padding="SAME")
    z = z if bias is None else z + bias
    if descriptors.shape[0]:
        return tf.squeeze(z, 3)
    # Of an empty batch (or one not known yet) by a reshape: on processors with AVX-512 TensorFlow
    # 2.21 returns it with as many channels as it was given, and its gradients take it so.
    logits = tf.reshape(z, tf.shape(descriptors)[:3])
    logits.set_shape(descriptors.shape[:3])
    return logits


def _normalised_spatial_gate(
    x: tf.Tensor, args: _checks.Arguments, data_format: str
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The spatial gate after batch norm, the batch's mean and its variance, both ``[1]`` in U."""
    # The statistics span the whole batch: at least float32, as in Keras's batch norm.
    kernel = args.kernel
    assert kernel is not None
    z = tf.cast(_spatial_logits(x, kernel, None, data_format), args.compute_type)
    # Moments as tf.nn.moments computes them, except that those of an empty batch are 0, not NaN.
    count = tf.cast(tf.maximum(tf.size(z, tf.int64), 1), z.dtype)
    mean = tf.reshape(tf.reduce_sum(z) / count, [1])
    deviation = tf.math.squared_difference(z, mean)
    variance = tf.reshape(tf.reduce_sum(deviation) / count, [1])
    gamma, beta = tf.cast(args.gamma, z.dtype), tf.cast(args.beta, z.dtype)
    gate = tf.sigmoid(tf.nn.batch_normalization(z, mean, variance, beta, gamma, args.epsilon))
    # In the kernel's type, as without batch norm.
    gate = tf.cast(gate, kernel.dtype)
    return gate, tf.stop_gradient(mean), tf.stop_gradient(variance)


def _scale_channels(x: tf.Tensor, gate: tf.Tensor, data_format: str) -> tf.Tensor:
    gate = tf.cast(gate, x.dtype)
    gate = gate[:, :, None, None] if data_format == "NCHW" else gate[:, None, None, :]
    return tf.multiply(x, gate)


def _scale_positions(x: tf.Tensor, gate: tf.Tensor, data_format: str) -> tf.Tensor:
    return tf.multiply(x, tf.expand_dims(tf.cast(gate, x.dtype), _checks.channel_axis(data_format)))


def _finish(y: tf.Tensor, residual: tf.Tensor | None, activation: str | None) -> tf.Tensor:
    if residual is not None:
        y = tf.add(y, residual)
    return tf.nn.relu(y) if activation == "relu" else y
