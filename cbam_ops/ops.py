"""The fused operations: each runs the native kernels where they can run, else the reference.

Words and shapes (Woo et al., 2018, section 3): the feature map ``x`` is ``[N, H, W, C]`` (NHWC) or
``[N, C, H, W]`` (NCHW) of type T: float16, bfloat16, float32 or float64. It may also be a series,
``[N, L, C]`` or ``[N, C, L]``, or a volume, ``[N, D, H, W, C]`` or ``[N, C, D, H, W]``: "NHWC" then
means channels last and "NCHW" channels first, and TensorFlow's own words do too ("NWC", "NCW",
"NDHWC", "NCDHW"). What is said of ``[N, H, W]`` holds for ``[N, L]`` and ``[N, D, H, W]``; the
kernel is ``[k, 2, 1]`` or ``[kd, kh, kw, 2, 1]``. A series is computed as an image of one column;
a map of unknown rank is taken for an image. The compute type U is
float64 for a float64 map and float32 for the others. Weights have type T or, beside a half type,
float32; sums, descriptors and gates are of type U. An empty batch is legal; a height, width or
number of channels of 0 is not.

Gradients are exact, to any order, and flow to every floating argument; at equal maxima they are
split evenly, as ``tf.reduce_max`` splits them, but for ``ties="first"``. The first gradient is a
fused kernel, the gradient of that goes through the reference.

What the kernels do not fuse is composed of the fused pools and stock TensorFlow: a
``hidden_activation`` that is not "relu", a ``gate_activation`` that is not "sigmoid" and an MLP of
one layer, each for that part alone (of a "channel_first" or "spatial_first" :func:`cbam` the other
part stays one fused op), and a "parallel" :func:`cbam` whose ``pooling`` is not "avg+max".
``ties="first"`` is stock TensorFlow. In all of these, descriptors have type T, and so has the map
between two ops.

All functions raise ``ValueError`` for arguments that do not fit each other (where sizes are known
only when a graph runs, ``tf.errors.InvalidArgumentError``); the message names the argument, what
was expected and what was received. They raise :class:`cbam_ops.NativeUnavailableError` where
``use_implementation("native")`` holds and the native kernels cannot run.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from cbam_ops import _call, options

__all__ = [
    "cbam",
    "cbam_with_batch_norm",
    "channel_attention",
    "channel_pool",
    "load_library",
    "spatial_attention",
    "spatial_attention_with_batch_norm",
    "spatial_pool",
]


@_call.not_converted
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
    pooling: str = "avg+max",
    hidden_activation: str = "relu",
    gate_activation: str = "sigmoid",
    mlp_merge: str = "logits",
    ties: str = "even",
    return_gates: bool = False,
) -> Any:
    """The convolutional block attention module (Woo et al., 2018, equations 1 to 3).

    ``y = activation(u * spatial_gate(u) + residual)`` with ``u = x * channel_gate(x)``. A forward
    pass reads and writes a map once; a training step keeps ``x`` and small tensors for the gradient
    (and ``y`` with an activation), never ``u``.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        w0: ``[C, hidden]``, first layer of the shared MLP.
        b0: ``[hidden]`` or None.
        w1: ``[hidden, C]``, second layer of the shared MLP; None if it has no hidden layer, but
            ``w0 [C, C]`` and ``b0 [C]`` alone.
        b1: ``[C]`` or None.
        kernel: ``[kh, kw, 2, 1]`` with odd kh and kw; input plane 0 is the mean, plane 1 the
            maximum.
        bias: ``[1]`` or None, the bias of the spatial convolution.
        data_format: "NHWC" or "NCHW".
        mlp_activation: None (the paper) or "relu", applied to each of the two MLP outputs before
            their sum.
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        order: "channel_first" (the paper), "spatial_first" (the other way round, as two fused ops)
            or "parallel" (both gates taken from ``x``).
        pooling: "avg+max" (the paper), "avg" or "max": which descriptors feed the MLP; all but the
            first as two fused ops, or not fused in the order "parallel".
        hidden_activation: "relu", "swish" (SiLU), "gelu" (by the error function), "elu" or "mish":
            what follows the MLP's first layer.
        gate_activation: "sigmoid" or "hard_sigmoid" (``relu6(z + 3) / 6``), of both gates.
        mlp_merge: where the MLP's two branches are added: "logits" (the paper: one gate of the sum
            of both outputs), "hidden" (both branches' hidden units, before the second layer, whose
            bias and ``mlp_activation`` then come once) or "gates" (a gate of each output; their sum
            is between 0 and 2). Of no effect where ``pooling`` leaves one branch.
        ties: where the gradient of a maximum goes among equals: "even" (split, as
            ``tf.reduce_max``) or "first" (to the first, as PyTorch's ``max_pool2d`` and ``max``
            over a dimension).
        return_gates: Whether to return the gates too; gradients flow through them.

    Returns:
        ``y``, like ``x``; with ``return_gates`` the tuple ``(y, channel_gate, spatial_gate)`` with
        gates ``[N, C]`` and ``[N, H, W]`` in the compute type.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    return _call.call("cbam", locals())


@_call.not_converted
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
    epsilon: float = 1e-5,
    data_format: str = "NHWC",
    mlp_activation: str | None = None,
    residual: Any = None,
    activation: str | None = None,
    order: str = "channel_first",
    pooling: str = "avg+max",
    hidden_activation: str = "relu",
    gate_activation: str = "sigmoid",
    mlp_merge: str = "logits",
    ties: str = "even",
    return_gates: bool = False,
) -> Any:
    """:func:`cbam` with a batch norm between the spatial convolution and its sigmoid, in training.

    The convolution has no bias; its one output channel is normalised by its own mean and (biased)
    variance over the batch and all positions, as in the code that the paper's authors released. At
    inference fold the moving statistics into ``kernel`` and ``bias`` of :func:`cbam` instead.

    Args:
        x: As for :func:`cbam`, like all arguments not described here.
        w0: See :func:`cbam`.
        b0: See :func:`cbam`.
        w1: See :func:`cbam`.
        b1: See :func:`cbam`.
        kernel: See :func:`cbam`.
        gamma: ``[1]``, scale of the batch norm.
        beta: ``[1]``, offset of the batch norm.
        epsilon: Added to the variance; rounded to float32.
        data_format: See :func:`cbam`.
        mlp_activation: See :func:`cbam`.
        residual: See :func:`cbam`.
        activation: See :func:`cbam`.
        order: See :func:`cbam`.
        pooling: See :func:`cbam`.
        hidden_activation: See :func:`cbam`.
        gate_activation: See :func:`cbam`.
        mlp_merge: See :func:`cbam`.
        ties: See :func:`cbam`.
        return_gates: See :func:`cbam`.

    Returns:
        ``(y, batch_mean, batch_variance)`` with statistics of shape ``[1]`` in the compute type,
        through which no gradient flows (they are for moving averages); with ``return_gates``
        followed by the two gates.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    return _call.call("cbam_with_batch_norm", locals())


@_call.not_converted
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
    hidden_activation: str = "relu",
    gate_activation: str = "sigmoid",
    mlp_merge: str = "logits",
    ties: str = "even",
    return_gates: bool = False,
) -> Any:
    """The channel part of CBAM (Woo et al., 2018, equation 2).

    ``y = activation(x * channel_gate(x) + residual)``, in one read and one write of a map.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        w0: ``[C, hidden]``.
        b0: ``[hidden]`` or None.
        w1: ``[hidden, C]`` or None; see :func:`cbam`.
        b1: ``[C]`` or None.
        pooling: "avg+max", "avg" (squeeze and excitation) or "max": which descriptors feed the MLP.
        data_format: "NHWC" or "NCHW".
        mlp_activation: None or "relu", applied to each MLP output before their sum.
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        hidden_activation: See :func:`cbam`.
        gate_activation: See :func:`cbam`.
        mlp_merge: See :func:`cbam`.
        ties: See :func:`cbam`.
        return_gates: Whether to return the gate too.

    Returns:
        ``y``, like ``x``; with ``return_gates`` the tuple ``(y, channel_gate)``, the gate
        ``[N, C]`` in the compute type.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    return _call.call("channel_attention", locals())


@_call.not_converted
def spatial_attention(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    data_format: str = "NHWC",
    residual: Any = None,
    activation: str | None = None,
    gate_activation: str = "sigmoid",
    ties: str = "even",
    return_gates: bool = False,
) -> Any:
    """The spatial part of CBAM (Woo et al., 2018, equation 3).

    ``y = activation(x * spatial_gate(x) + residual)``, in one read and one write of a map.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        kernel: ``[kh, kw, 2, 1]`` with odd kh and kw; input plane 0 is the mean, plane 1 the
            maximum.
        bias: ``[1]`` or None.
        data_format: "NHWC" or "NCHW".
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        gate_activation: See :func:`cbam`.
        ties: See :func:`cbam`.
        return_gates: Whether to return the gate too.

    Returns:
        ``y``, like ``x``; with ``return_gates`` the tuple ``(y, spatial_gate)``, the gate
        ``[N, H, W]`` in the compute type.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    return _call.call("spatial_attention", locals())


@_call.not_converted
def spatial_attention_with_batch_norm(
    x: Any,
    kernel: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float = 1e-5,
    data_format: str = "NHWC",
    residual: Any = None,
    activation: str | None = None,
    gate_activation: str = "sigmoid",
    ties: str = "even",
    return_gates: bool = False,
) -> Any:
    """:func:`spatial_attention` with a batch norm before its sigmoid, in training.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        kernel: ``[kh, kw, 2, 1]`` with odd kh and kw.
        gamma: ``[1]``, scale of the batch norm.
        beta: ``[1]``, offset of the batch norm.
        epsilon: Added to the variance; rounded to float32.
        data_format: "NHWC" or "NCHW".
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        gate_activation: See :func:`cbam`.
        ties: See :func:`cbam`.
        return_gates: Whether to return the gate too.

    Returns:
        ``(y, batch_mean, batch_variance)`` as :func:`cbam_with_batch_norm`; with ``return_gates``
        followed by the spatial gate.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    return _call.call("spatial_attention_with_batch_norm", locals())


@_call.not_converted
def channel_pool(x: Any, *, data_format: str = "NHWC") -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and maximum over positions, in one read of ``x``.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        data_format: "NHWC" or "NCHW".

    Returns:
        ``(mean, maximum)``, each ``[N, C]`` in the type of ``x``.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    return _call.call("channel_pool", locals())


@_call.not_converted
def spatial_pool(x: Any, *, data_format: str = "NHWC") -> tf.Tensor:
    """Mean and maximum over channels, mean first, in one read of ``x``.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        data_format: "NHWC" or "NCHW".

    Returns:
        ``[N, H, W, 2]`` (NHWC) or ``[N, 2, H, W]`` (NCHW) in the type of ``x``.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    return _call.call("spatial_pool", locals())


@_call.not_converted
def load_library() -> None:
    """Raises where the native ops are not loaded, for a program whose graphs contain them.

    The import of :mod:`cbam_ops` loads them, but passes over what keeps it from that.

    Raises:
        NativeUnavailableError: The library cannot be loaded; the message says why and what helps.
    """
    options.loaded_ops()
