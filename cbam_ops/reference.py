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

The functions are those of :mod:`cbam_ops.ops`, whatever implementation is chosen: same arguments,
results and errors.
"""

from __future__ import annotations

import tensorflow as tf

from cbam_ops import _call, ops
from cbam_ops._call import Arguments, Outputs

__all__ = [
    "cbam",
    "cbam_with_batch_norm",
    "channel_attention",
    "channel_pool",
    "spatial_attention",
    "spatial_attention_with_batch_norm",
    "spatial_pool",
]


def _cbam(args: Arguments) -> Outputs:
    x, data_format = args.x, args.data_format
    if args.order == "spatial_first":
        spatial_gate, statistics = _spatial_gate(x, args)
        u = _scale_positions(x, spatial_gate, data_format)
        channel_gate = _channel_gate(u, args)
        gated = _scale_channels(u, channel_gate, data_format)
    else:
        channel_gate = _channel_gate(x, args)
        u = _scale_channels(x, channel_gate, data_format)
        spatial_gate, statistics = _spatial_gate(x if args.order == "parallel" else u, args)
        gated = _scale_positions(u, spatial_gate, data_format)
    return {
        "y": _finish(gated, args),
        "channel_gate": channel_gate,
        "spatial_gate": spatial_gate,
        "batch_statistics": statistics,
    }


def _channel_attention(args: Arguments) -> Outputs:
    gate = _channel_gate(args.x, args)
    gated = _scale_channels(args.x, gate, args.data_format)
    return {"y": _finish(gated, args), "channel_gate": gate}


def _spatial_attention(args: Arguments) -> Outputs:
    gate, statistics = _spatial_gate(args.x, args)
    gated = _scale_positions(args.x, gate, args.data_format)
    return {"y": _finish(gated, args), "spatial_gate": gate, "batch_statistics": statistics}


def _channel_pool(args: Arguments) -> Outputs:
    axes = _position_axes(args.data_format)
    return {"mean": tf.reduce_mean(args.x, axes), "maximum": tf.reduce_max(args.x, axes)}


def _spatial_pool(args: Arguments) -> Outputs:
    axis = _channel_axis(args.data_format)
    pooled = [tf.reduce_mean(args.x, axis), tf.reduce_max(args.x, axis)]
    return {"descriptors": tf.stack(pooled, axis)}


cbam = _call.reference_of(ops.cbam, _cbam)
cbam_with_batch_norm = _call.reference_of(ops.cbam_with_batch_norm, _cbam)
channel_attention = _call.reference_of(ops.channel_attention, _channel_attention)
spatial_attention = _call.reference_of(ops.spatial_attention, _spatial_attention)
spatial_attention_with_batch_norm = _call.reference_of(
    ops.spatial_attention_with_batch_norm, _spatial_attention
)
channel_pool = _call.reference_of(ops.channel_pool, _channel_pool)
spatial_pool = _call.reference_of(ops.spatial_pool, _spatial_pool)


def _channel_axis(data_format: str) -> int:
    return data_format.index("C")


def _position_axes(data_format: str) -> list[int]:
    return [data_format.index("H"), data_format.index("W")]


def _channel_gate(x: tf.Tensor, args: Arguments) -> tf.Tensor:
    """``[N, C]`` in the weights' type: sigmoid of the shared MLP's summed logits."""

    def mlp(t: tf.Tensor) -> tf.Tensor:
        t = tf.matmul(tf.cast(t, args.w0.dtype), args.w0)
        t = tf.nn.relu(t if args.b0 is None else t + args.b0)
        t = tf.matmul(t, args.w1)
        t = t if args.b1 is None else t + args.b1
        return tf.nn.relu(t) if args.mlp_activation == "relu" else t

    axes = _position_axes(args.data_format)
    if args.pooling == "avg":
        return tf.sigmoid(mlp(tf.reduce_mean(x, axes)))
    if args.pooling == "max":
        return tf.sigmoid(mlp(tf.reduce_max(x, axes)))
    return tf.sigmoid(mlp(tf.reduce_mean(x, axes)) + mlp(tf.reduce_max(x, axes)))


def _spatial_gate(
    x: tf.Tensor, args: Arguments
) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor] | None]:
    """``[N, H, W]`` in the kernel's type, and the batch's mean and variance, both ``[1]`` in U."""
    z = _spatial_logits(x, args.kernel, args.bias, args.data_format)
    if args.gamma is None:
        return tf.sigmoid(z), None
    # The statistics span the whole batch: at least float32, as in Keras's batch norm.
    z = tf.cast(z, args.compute_type)
    # Moments as tf.nn.moments computes them, except that those of an empty batch are 0, not NaN.
    count = tf.cast(tf.maximum(tf.size(z, tf.int64), 1), z.dtype)
    mean = tf.reshape(tf.reduce_sum(z) / count, [1])
    deviation = tf.math.squared_difference(z, mean)
    variance = tf.reshape(tf.reduce_sum(deviation) / count, [1])
    gamma, beta = tf.cast(args.gamma, z.dtype), tf.cast(args.beta, z.dtype)
    gate = tf.sigmoid(tf.nn.batch_normalization(z, mean, variance, beta, gamma, args.epsilon))
    # In the kernel's type, as without batch norm.
    gate = tf.cast(gate, args.kernel.dtype)
    return gate, (tf.stop_gradient(mean), tf.stop_gradient(variance))


def _spatial_logits(
    x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, data_format: str
) -> tf.Tensor:
    """``[N, H, W]`` in the kernel's type: the convolution of the spatial descriptors."""
    axis = _channel_axis(data_format)
    # The spatial descriptors are put last in both layouts: CPUs have no NCHW convolution.
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


def _scale_channels(x: tf.Tensor, gate: tf.Tensor, data_format: str) -> tf.Tensor:
    gate = tf.cast(gate, x.dtype)
    gate = gate[:, :, None, None] if data_format == "NCHW" else gate[:, None, None, :]
    return tf.multiply(x, gate)


def _scale_positions(x: tf.Tensor, gate: tf.Tensor, data_format: str) -> tf.Tensor:
    return tf.multiply(x, tf.expand_dims(tf.cast(gate, x.dtype), _channel_axis(data_format)))


def _finish(y: tf.Tensor, args: Arguments) -> tf.Tensor:
    if args.residual is not None:
        y = tf.add(y, args.residual)
    return tf.nn.relu(y) if args.activation == "relu" else y
