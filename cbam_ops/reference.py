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
maxima the gradient is split evenly, but for ``ties="first"``.

The functions are those of :mod:`cbam_ops.ops`, whatever implementation is chosen: same arguments,
results and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

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
        gated = scale_channels(u, channel_gate, data_format)
    else:
        channel_gate = _channel_gate(x, args)
        u = scale_channels(x, channel_gate, data_format)
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
    gated = scale_channels(args.x, gate, args.data_format)
    return {"y": _finish(gated, args), "channel_gate": gate}


def _spatial_attention(args: Arguments) -> Outputs:
    gate, statistics = _spatial_gate(args.x, args)
    gated = _scale_positions(args.x, gate, args.data_format)
    return {"y": _finish(gated, args), "spatial_gate": gate, "batch_statistics": statistics}


def _channel_pool(args: Arguments) -> Outputs:
    axes = _position_axes(args.x, args.data_format)
    return {"mean": tf.reduce_mean(args.x, axes), "maximum": tf.reduce_max(args.x, axes)}


def _spatial_pool(args: Arguments) -> Outputs:
    axis = _channel_axis(args.x, args.data_format)
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


def _rank(x: tf.Tensor) -> int:
    return x.shape.rank or 4


def _channel_axis(x: tf.Tensor, data_format: str) -> int:
    return 1 if data_format == "NCHW" else _rank(x) - 1


def _position_axes(x: tf.Tensor, data_format: str) -> list[int]:
    return [axis for axis in range(1, _rank(x)) if axis != _channel_axis(x, data_format)]


_HIDDEN: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "relu": tf.nn.relu,
    "swish": lambda t: t * tf.sigmoid(t),
    # Not tf.nn.gelu, which divides by a square root of 2 in float32 whatever the type. LiteRT's
    # converter knows it in this order.
    "gelu": lambda t: 0.5 * t * (1.0 + tf.math.erf(t * 0.5**0.5)),
    "elu": tf.nn.elu,
    "mish": lambda t: t * tf.tanh(tf.nn.softplus(t)),
}
_GATES: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "sigmoid": tf.sigmoid,
    "hard_sigmoid": lambda t: tf.nn.relu6(t + 3.0) * (1.0 / 6.0),
}


def _channel_gate(x: tf.Tensor, args: Arguments) -> tf.Tensor:
    """``[N, C]`` in the weights' type: of the MLP, whose branches meet in one of three places."""

    def hidden(t: tf.Tensor) -> tf.Tensor:
        t = tf.matmul(tf.cast(t, args.w0.dtype), args.w0)
        t = t if args.b0 is None else t + args.b0
        return t if args.w1 is None else _HIDDEN[args.hidden_activation](t)

    def logits(t: tf.Tensor) -> tf.Tensor:
        if args.w1 is not None:
            t = tf.matmul(t, args.w1)
            t = t if args.b1 is None else t + args.b1
        return tf.nn.relu(t) if args.mlp_activation == "relu" else t

    branches = _descriptors(x, _position_axes(x, args.data_format), args.pooling, args)
    steps = {"hidden": hidden, "logits": logits, "gates": _GATES[args.gate_activation]}
    for name, step in steps.items():
        branches = [step(branch) for branch in branches]
        if name == args.mlp_merge:
            branches = [reduce(tf.add, branches)]
    return branches[0]


def _spatial_gate(
    x: tf.Tensor, args: Arguments
) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor] | None]:
    """``[N, H, W]`` in the kernel's type, and the batch's mean and variance, both ``[1]`` in U."""
    z = _spatial_logits(x, args)
    if args.gamma is None:
        return _GATES[args.gate_activation](z), None
    # The statistics span the whole batch: at least float32, as in Keras's batch norm.
    z = tf.cast(z, args.compute_type)
    # Moments as tf.nn.moments computes them, except that those of an empty batch are 0, not NaN.
    count = tf.cast(tf.maximum(tf.size(z, tf.int64), 1), z.dtype)
    mean = tf.reshape(tf.reduce_sum(z) / count, [1])
    deviation = tf.math.squared_difference(z, mean)
    variance = tf.reshape(tf.reduce_sum(deviation) / count, [1])
    gamma, beta = tf.cast(args.gamma, z.dtype), tf.cast(args.beta, z.dtype)
    normalised = tf.nn.batch_normalization(z, mean, variance, beta, gamma, args.epsilon)
    # In the kernel's type, as without batch norm.
    gate = tf.cast(_GATES[args.gate_activation](normalised), args.kernel.dtype)
    return gate, (tf.stop_gradient(mean), tf.stop_gradient(variance))


_CONVOLUTIONS: dict[int, Callable[..., tf.Tensor]] = {
    3: partial(tf.nn.conv1d, stride=1),
    4: partial(tf.nn.conv2d, strides=1),
    5: partial(tf.nn.conv3d, strides=[1] * 5),
}


def _convolve_slices(descriptors: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The convolution of a volume: of its slices by all of the kernel's, added where they meet.

    Of two channels to one, TensorFlow's 3-D convolution takes ten times as long on CPUs.
    """
    taps, shape = kernel.shape[0], tf.shape(descriptors)
    slices = tf.reshape(descriptors, tf.concat([[-1], shape[2:]], 0))
    z = tf.nn.conv2d(slices, tf.transpose(kernel[..., 0], [1, 2, 3, 0]), 1, "SAME")
    z = tf.reshape(z, tf.concat([shape[:-1], [taps]], 0))
    z = tf.pad(z, [[0, 0], [taps // 2, taps // 2], [0, 0], [0, 0], [0, 0]])
    z = tf.add_n([z[:, tap : tap + shape[1], ..., tap : tap + 1] for tap in range(taps)])
    z.set_shape([*descriptors.shape[:-1], 1])
    return z


def _spatial_logits(x: tf.Tensor, args: Arguments) -> tf.Tensor:
    """``[N, H, W]`` in the kernel's type: the convolution of the spatial descriptors."""
    # The spatial descriptors are put last in both layouts: CPUs have no NCHW convolution.
    pooled = _descriptors(x, [_channel_axis(x, args.data_format)], "avg+max", args)
    kernel = args.kernel
    if args.for_int8:
        factors = tf.constant([8.0, 2.0], x.dtype)  # powers of two change no bit
        pooled = [descriptor * factors[i] for i, descriptor in enumerate(pooled)]
        kernel = kernel / tf.cast(factors[:, None], kernel.dtype)
    descriptors = tf.stack(pooled, -1)
    descriptors = tf.cast(descriptors, kernel.dtype)
    if args.native is not None and _rank(x) == 5 and kernel.shape[0] is not None:
        z = _convolve_slices(descriptors, kernel)
    else:
        z = _CONVOLUTIONS[_rank(x)](descriptors, kernel, padding="SAME")
    z = z if args.bias is None else z + args.bias
    if descriptors.shape[0]:
        return tf.squeeze(z, -1)
    # Of an empty batch (or one not known yet) by a reshape: on processors with AVX-512 TensorFlow
    # 2.21 returns it with as many channels as it was given, and its gradients take it so.
    logits = tf.reshape(z, tf.shape(descriptors)[:-1])
    logits.set_shape(descriptors.shape[:-1])
    return logits


def _descriptors(
    x: tf.Tensor, axes: Sequence[int], pooling: str, args: Arguments
) -> list[tf.Tensor]:
    """The mean and the maximum over positions or channels, or the one that ``pooling`` names."""
    mean = maximum = None
    # A mean alone is one read in stock ops too, and its gradient none.
    may_be_fused = pooling != "avg" and args.ties == "even" and not args.for_int8
    if args.native is not None and may_be_fused:
        over_channels = axes == [_channel_axis(x, args.data_format)]
        op = "CbamOps>SpatialPool" if over_channels else "CbamOps>ChannelPool"
        pool = Arguments(x=x, data_format=args.data_format)
        pooled = list(_call.native_outputs(args.native, op, pool).values())
        mean, maximum = tf.unstack(pooled[0], axis=axes[0]) if over_channels else pooled
    descriptors = []
    if pooling != "max":
        descriptors.append(tf.reduce_mean(x, axes) if mean is None else mean)
    if pooling != "avg":
        maximum = tf.reduce_max(x, axes) if maximum is None else maximum
        descriptors.append(_first(x, axes, maximum) if args.ties == "first" else maximum)
    return descriptors


def _first(x: tf.Tensor, axes: Sequence[int], maximum: tf.Tensor) -> tf.Tensor:
    """The maximum once more, as the one value that comes first among its equals.

    So the gradient is that value's alone. First in the order of rows, as in PyTorch; NaN is the
    maximum where there is one.
    """
    for axis in sorted(axes):
        maximum = tf.expand_dims(maximum, axis)
    sizes = [tf.shape(x)[axis] if axis in axes else 1 for axis in range(_rank(x))]
    places = tf.reshape(tf.range(tf.reduce_prod(sizes)), sizes)
    places = tf.where((x == maximum) | tf.math.is_nan(x), places, places.dtype.max)
    first = places == tf.reduce_min(places, axes, keepdims=True)
    return tf.reduce_sum(tf.where(first, x, tf.zeros_like(x)), axes)


def scale_channels(x: tf.Tensor, gate: tf.Tensor, data_format: str) -> tf.Tensor:
    gate = tf.cast(gate, x.dtype)
    whole, sides = slice(None), [tf.newaxis] * (_rank(x) - 2)
    gate = gate[(whole, whole, *sides) if data_format == "NCHW" else (whole, *sides, whole)]
    return tf.multiply(x, gate)


def _scale_positions(x: tf.Tensor, gate: tf.Tensor, data_format: str) -> tf.Tensor:
    return tf.multiply(x, tf.expand_dims(tf.cast(gate, x.dtype), _channel_axis(x, data_format)))


def _finish(y: tf.Tensor, args: Arguments) -> tf.Tensor:
    if args.residual is not None:
        y = tf.add(y, args.residual)
    return tf.nn.relu(y) if args.activation == "relu" else y
