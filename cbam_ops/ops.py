"""The fused operations: each runs the native kernels where they can run, else the reference.

Words and shapes (Woo et al., 2018, section 3): the feature map ``x`` is ``[N, H, W, C]`` (NHWC) or
``[N, C, H, W]`` (NCHW) of type T: float16, bfloat16, float32 or float64. The compute type U is
float64 for a float64 map and float32 for the others. Weights have type T or, beside a half type,
float32; sums, descriptors and gates are of type U. An empty batch is legal; a height, width or
number of channels of 0 is not.

Gradients are exact, to any order, and flow to every floating argument; at equal maxima they are
split evenly, as ``tf.reduce_max`` splits them. The first gradient is a fused kernel, the gradient
of that goes through the reference. Importing this module registers them; graphs that were loaded
from a file need that too.

All functions raise ``ValueError`` for arguments that do not fit each other (where sizes are known
only when a graph runs, ``tf.errors.InvalidArgumentError``); the message names the argument, what
was expected and what was received. They raise :class:`cbam_ops.NativeUnavailableError` where
``use_implementation("native")`` holds and the native kernels cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import tensorflow as tf

from cbam_ops import _checks, _gpu, _loader, options, reference

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

    ``y = activation(u * spatial_gate(u) + residual)`` with ``u = x * channel_gate(x)``. A forward
    pass reads and writes a map once; a training step keeps ``x`` and small tensors for the gradient
    (and ``y`` with an activation), never ``u``.

    Args:
        x: Feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``.
        w0: ``[C, hidden]``, first layer of the shared MLP.
        b0: ``[hidden]`` or None.
        w1: ``[hidden, C]``, second layer of the shared MLP.
        b1: ``[C]`` or None.
        kernel: ``[k, k, 2, 1]`` with odd k; input plane 0 is the mean, plane 1 the maximum.
        bias: ``[1]`` or None, the bias of the spatial convolution.
        data_format: "NHWC" or "NCHW".
        mlp_activation: None (the paper) or "relu", applied to each of the two MLP outputs before
            their sum.
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        order: "channel_first" (the paper), "spatial_first" (the other way round, as two fused ops)
            or "parallel" (both gates taken from ``x``).
        return_gates: Whether to return the gates too; gradients flow through them.

    Returns:
        ``y``, like ``x``; with ``return_gates`` the tuple ``(y, channel_gate, spatial_gate)`` with
        gates ``[N, C]`` and ``[N, H, W]`` in the compute type.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    native = options.native_ops(_cause_of_the_place)
    if native is None:
        return reference.cbam(
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
            return_gates=return_gates,
        )
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
    y, channel_gate, spatial_gate, _ = _both_gates(
        native, args, data_format, mlp_activation, activation, order
    )
    return (y, channel_gate, spatial_gate) if return_gates else y


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
        return_gates: See :func:`cbam`.

    Returns:
        ``(y, batch_mean, batch_variance)`` with statistics of shape ``[1]`` in the compute type,
        through which no gradient flows (they are for moving averages); with ``return_gates``
        followed by the two gates.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    native = options.native_ops(_cause_of_the_place)
    if native is None:
        return reference.cbam_with_batch_norm(
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
            return_gates=return_gates,
        )
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
    y, channel_gate, spatial_gate, statistics = _both_gates(
        native, args, data_format, mlp_activation, activation, order
    )
    result = (y, *_mean_and_variance(statistics))
    return (*result, channel_gate, spatial_gate) if return_gates else result


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
    """The channel part of CBAM (Woo et al., 2018, equation 2).

    ``y = activation(x * channel_gate(x) + residual)``, in one read and one write of a map.

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

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    native = options.native_ops(_cause_of_the_place)
    if native is None:
        return reference.channel_attention(
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
            return_gates=return_gates,
        )
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
    result = _channel_attention(
        native, args, args.x, args.residual, data_format, pooling, mlp_activation, activation
    )
    return (result.y, result.channel_gate) if return_gates else result.y


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
    """The spatial part of CBAM (Woo et al., 2018, equation 3).

    ``y = activation(x * spatial_gate(x) + residual)``, in one read and one write of a map.

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

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    native = options.native_ops(_cause_of_the_place)
    if native is None:
        return reference.spatial_attention(
            x,
            kernel,
            bias,
            data_format=data_format,
            residual=residual,
            activation=activation,
            return_gates=return_gates,
        )
    args = _checks.check_spatial_attention(
        x, kernel, bias, data_format=data_format, residual=residual, activation=activation
    )
    result = _spatial_attention(native, args, args.x, args.residual, data_format, activation)
    return (result.y, result.spatial_gate) if return_gates else result.y


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
        epsilon: Added to the variance; rounded to float32.
        data_format: "NHWC" or "NCHW".
        residual: Like ``x`` or None; added to the gated map.
        activation: None or "relu", applied last.
        return_gates: Whether to return the gate too.

    Returns:
        ``(y, batch_mean, batch_variance)`` as :func:`cbam_with_batch_norm`; with ``return_gates``
        followed by the spatial gate.

    Raises:
        ValueError: An argument does not fit; see the module's description.
    """
    native = options.native_ops(_cause_of_the_place)
    if native is None:
        return reference.spatial_attention_with_batch_norm(
            x,
            kernel,
            gamma,
            beta,
            epsilon=epsilon,
            data_format=data_format,
            residual=residual,
            activation=activation,
            return_gates=return_gates,
        )
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
    result = _spatial_attention(native, args, args.x, args.residual, data_format, activation)
    values = (result.y, *_mean_and_variance(result.batch_statistics))
    return (*values, result.spatial_gate) if return_gates else values


@tf.autograph.experimental.do_not_convert
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
    native = options.native_ops(_cause_of_the_place)
    if native is None:
        return reference.channel_pool(x, data_format=data_format)
    args = _checks.check_channel_pool(x, data_format=data_format)
    result = native.cbam_ops_channel_pool(args.x, data_format=data_format)
    return result.mean, result.maximum


@tf.autograph.experimental.do_not_convert
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
    native = options.native_ops(_cause_of_the_place)
    if native is None:
        return reference.spatial_pool(x, data_format=data_format)
    args = _checks.check_spatial_pool(x, data_format=data_format)
    return native.cbam_ops_spatial_pool(args.x, data_format=data_format)


@tf.autograph.experimental.do_not_convert
def load_library() -> None:
    """Loads the native ops now, for a SavedModel or a GraphDef that contains them.

    The functions above load the library themselves; this is for a process that runs a saved graph
    without calling any of them first. The import of this module brings the gradients.

    Raises:
        NativeUnavailableError: The library cannot be loaded; the message says why and what helps.
    """
    _loaded_ops()


# --------------------------------------------------------------------------------------------------
# Where the native ops can run
# --------------------------------------------------------------------------------------------------


def _cause_of_the_place() -> _loader.Cause | None:
    """Why the library, though loaded, has no kernel for the place where the op would run."""
    from tensorflow.python.ops import control_flow_util

    compiled = not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )
    return cause_in_xla() if compiled else _cause_of_the_device()


def cause_in_xla() -> _loader.Cause | None:
    """Why XLA, compiling for the place where the op would run, cannot compile it."""
    return _loader.load_xla() or _cause_of_the_device()


def _cause_of_the_device() -> _loader.Cause | None:
    if not tf.config.list_logical_devices("GPU"):
        return None
    # Where TensorFlow would put a stock op now: the innermost tf.device, or by default the GPU. An
    # op without a kernel there would quietly run on the CPU, with copies either way.
    place = tf.zeros(()).device
    device = tf.DeviceSpec.from_string(place).device_type if place else "GPU"
    if device != "GPU":
        return None
    reason = _gpu.why_not_under_tensorflow()
    if reason is None:
        return None
    return _loader.Cause(
        "no_kernel",
        f"The op would run on a GPU, where the kernels cannot. {reason}",
        'Put it under tf.device("CPU") to use the native ones there.',
    )


# --------------------------------------------------------------------------------------------------
# The native ops, called with checked arguments
# --------------------------------------------------------------------------------------------------


def _optional(value: tf.Tensor | None) -> list[tf.Tensor]:
    """An optional input of an op is a list of no or one tensor."""
    return [] if value is None else [value]


def _mean_and_variance(statistics: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    statistics = tf.stop_gradient(statistics)
    return statistics[:1], statistics[1:]


def _mlp_weights(args: _checks.Arguments) -> dict[str, tf.Tensor]:
    """The MLP's weights in the compute type, with zeros for the biases that were not given."""
    w0, w1 = (tf.cast(w, args.compute_type) for w in (args.w0, args.w1))
    b0 = tf.zeros_like(w0[0]) if args.b0 is None else tf.cast(args.b0, args.compute_type)
    b1 = tf.zeros_like(w1[0]) if args.b1 is None else tf.cast(args.b1, args.compute_type)
    return {"w0": w0, "b0": b0, "w1": w1, "b1": b1}


def _spatial_weights(args: _checks.Arguments) -> dict[str, Any]:
    """The weights of the spatial gate in the compute type; the bias is beta with batch norm."""
    bias = args.bias if args.gamma is None else args.beta
    bias = tf.zeros([1], args.compute_type) if bias is None else tf.cast(bias, args.compute_type)
    gamma = None if args.gamma is None else tf.cast(args.gamma, args.compute_type)
    kernel = tf.cast(args.kernel, args.compute_type)
    return {"kernel": kernel, "bias": bias, "gamma": _optional(gamma), "epsilon": args.epsilon}


def _both_gates(
    native: ModuleType,
    args: _checks.Arguments,
    data_format: str,
    mlp_activation: str | None,
    activation: str | None,
    order: str,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """``(y, channel_gate, spatial_gate, batch_statistics)``."""
    if order == "spatial_first":
        first = _spatial_attention(native, args, args.x, None, data_format, None)
        second = _channel_attention(
            native,
            args,
            first.y,
            args.residual,
            data_format,
            "avg+max",
            mlp_activation,
            activation,
        )
        return second.y, second.channel_gate, first.spatial_gate, first.batch_statistics
    result = native.cbam_ops_cbam(
        x=args.x,
        residual=_optional(args.residual),
        data_format=data_format,
        mlp_activation=mlp_activation or "none",
        activation=activation or "none",
        order=order,
        **_mlp_weights(args),
        **_spatial_weights(args),
    )
    return result.y, result.channel_gate, result.spatial_gate, result.batch_statistics


def _channel_attention(
    native: ModuleType,
    args: _checks.Arguments,
    x: tf.Tensor,
    residual: tf.Tensor | None,
    data_format: str,
    pooling: str,
    mlp_activation: str | None,
    activation: str | None,
) -> Any:
    return native.cbam_ops_channel_attention(
        x=x,
        residual=_optional(residual),
        data_format=data_format,
        pooling=pooling,
        mlp_activation=mlp_activation or "none",
        activation=activation or "none",
        **_mlp_weights(args),
    )


def _spatial_attention(
    native: ModuleType,
    args: _checks.Arguments,
    x: tf.Tensor,
    residual: tf.Tensor | None,
    data_format: str,
    activation: str | None,
) -> Any:
    return native.cbam_ops_spatial_attention(
        x=x,
        residual=_optional(residual),
        data_format=data_format,
        activation=activation or "none",
        **_spatial_weights(args),
    )


# --------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------


def _loaded_ops() -> ModuleType:
    """The native ops, where there is no choice: for the gradient of an op that is native itself."""
    loaded = _loader.load_ops()
    if isinstance(loaded, _loader.Cause):
        raise options.NativeUnavailableError(loaded)
    return loaded


def _attributes(op: Any, names: Sequence[str]) -> dict[str, Any]:
    values = {name: op.get_attr(name) for name in names}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


def _take(values: Sequence[tf.Tensor], *groups: Sequence[str] | tuple[str, int]) -> dict[str, Any]:
    """Names an op's flat inputs or outputs: by a list of names, or ``(name, count)`` of a list."""
    named: dict[str, Any] = {}
    position = 0
    for group in groups:
        if isinstance(group, tuple):
            name, count = group
            named[name] = list(values[position : position + count])
            position += count
        else:
            named.update(zip(group, values[position:], strict=False))
            position += len(group)
    return named


def _gradient_of_gradient(
    function: Callable[..., Sequence[tf.Tensor]],
    primals: Sequence[tf.Tensor],
    cotangents: Sequence[tf.Tensor],
    upstream: Sequence[tf.Tensor],
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Differentiates the gradient of ``function`` (its vector-Jacobian product).

    Args:
        function: Maps the primals to a list of outputs, in plain TensorFlow.
        primals: What the gradient was taken with respect to.
        cotangents: The gradients of the outputs, one each.
        upstream: The gradients that reach the gradients of the primals, one each.

    Returns:
        The gradients with respect to the primals and to the cotangents.
    """
    with tf.GradientTape() as outer:
        outer.watch([*primals, *cotangents])
        with tf.GradientTape() as inner:
            inner.watch(primals)
            outputs = function(*primals)
        gradients = inner.gradient(
            outputs,
            primals,
            output_gradients=cotangents,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
    result = outer.gradient(gradients, [*primals, *cotangents], output_gradients=upstream)
    return result[: len(primals)], result[len(primals) :]


class _GatedGradients:
    """The gradients of one of the three gated ops, and of its gradient.

    The inputs of an op and of its gradient are those of ``csrc/tf/signature.h``, less what belongs
    to a gate that the op does not have.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        with_batch_norm: Callable[..., Any] | None,
        *,
        channel: bool,
        spatial: bool,
    ) -> None:
        self._gradient_name = f"cbam_ops_{name}_grad"
        self._function = function  # the reference
        self._with_batch_norm = with_batch_norm
        self._weights = ["w0", "b0", "w1", "b1"] * channel + ["kernel", "bias"] * spatial
        self._gates = ["channel_gate"] * channel + ["spatial_gate"] * spatial
        self._saved = ["channel_descriptors"] * channel
        self._saved += ["spatial_descriptors", "batch_statistics"] * spatial
        self._d_gates = [f"d_{gate}" for gate in self._gates]
        self._options = ["data_format", "activation"]
        self._options += ["mlp_activation"] * channel + ["epsilon"] * spatial
        self._options += ["order"] * (channel and spatial) + ["pooling"] * (not spatial)
        self._channel = channel
        self._spatial = spatial

    def gradient(self, op: Any, *d_outputs: tf.Tensor) -> list[tf.Tensor]:
        """The registered gradient of the op."""
        attributes = _attributes(op, self._options)
        num_gamma = op.get_attr("num_gamma") if self._spatial else 0
        num_residual = op.get_attr("num_residual")
        relu = attributes["activation"] == "relu"
        inputs = _take(op.inputs, ["x", *self._weights], ("gamma", num_gamma))
        if not self._spatial:
            del inputs["gamma"]
        outputs = _take(op.outputs, ["y", *self._gates, *self._saved])
        y = outputs.pop("y")
        dy, *d_gates = d_outputs[: 1 + len(self._gates)]
        result = getattr(_loaded_ops(), self._gradient_name)(
            dy=dy,
            y=[y] if relu else [],
            num_d_residual=num_residual if relu else 0,
            **inputs,
            **outputs,
            **dict(zip(self._d_gates, d_gates, strict=True)),
            **attributes,
        )
        # In the order of the inputs, with the lists of dgamma and d_residual last.
        gradients = tf.nest.flatten(list(result))
        if num_residual and not relu:
            gradients.append(dy)
        return gradients

    def second_gradient(self, op: Any, *upstream: tf.Tensor) -> list[tf.Tensor | None]:
        """The registered gradient of the gradient op, through the reference.

        The gates and descriptors among its inputs are functions of the other inputs, which account
        for the whole derivative; so they get none.
        """
        attributes = _attributes(op, self._options)
        num_gamma = op.get_attr("num_gamma") if self._spatial else 0
        num_y = op.get_attr("num_y")
        inputs = _take(
            op.inputs,
            ["x", "dy"],
            ("y", num_y),
            self._weights,
            ("gamma", num_gamma),
            [*self._gates, *self._saved, *self._d_gates],
        )
        primals = [inputs["x"], *(inputs[name] for name in self._weights), *inputs["gamma"]]

        # With an activation dy is masked before anything else; the mask is locally constant.
        def mask(gradient: tf.Tensor) -> tf.Tensor:
            if not num_y:
                return gradient
            return tf.where(inputs["y"][0] > 0, gradient, tf.zeros_like(gradient))

        cotangents = [mask(inputs["dy"]), *(inputs[name] for name in self._d_gates)]
        d_primals, d_cotangents = _gradient_of_gradient(
            lambda *values: self._reference(values, attributes, num_gamma),
            primals,
            cotangents,
            upstream[: len(primals)],
        )
        d_dy, *d_d_gates = d_cotangents
        for d_residual in upstream[len(primals) :]:
            d_dy = d_dy + d_residual
        d_x, *d_weights_and_gamma = d_primals
        no_gradient = [None] * (len(self._gates) + len(self._saved))
        return [
            d_x,
            mask(d_dy),
            *([None] * num_y),
            *d_weights_and_gamma,
            *no_gradient,
            *d_d_gates,
        ]

    def _reference(
        self, primals: Sequence[tf.Tensor], attributes: dict[str, Any], num_gamma: int
    ) -> list[tf.Tensor]:
        """``[y, *gates]`` before residual and activation."""
        x, *weights = primals
        keywords = {n: v for n, v in attributes.items() if n not in ("activation", "epsilon")}
        if keywords.get("mlp_activation") == "none":
            keywords["mlp_activation"] = None
        if not num_gamma or self._with_batch_norm is None:
            return list(self._function(x, *weights, return_gates=True, **keywords))
        *weights, beta, gamma = weights
        keywords["epsilon"] = attributes["epsilon"]
        y, _, _, *gates = self._with_batch_norm(
            x, *weights, gamma, beta, return_gates=True, **keywords
        )
        return [y, *gates]


def _register_gated_gradients() -> None:
    for op, gradients in {
        "Cbam": _GatedGradients(
            "cbam", reference.cbam, reference.cbam_with_batch_norm, channel=True, spatial=True
        ),
        "ChannelAttention": _GatedGradients(
            "channel_attention", reference.channel_attention, None, channel=True, spatial=False
        ),
        "SpatialAttention": _GatedGradients(
            "spatial_attention",
            reference.spatial_attention,
            reference.spatial_attention_with_batch_norm,
            channel=False,
            spatial=True,
        ),
    }.items():
        tf.RegisterGradient(f"CbamOps>{op}")(gradients.gradient)
        tf.RegisterGradient(f"CbamOps>{op}Grad")(gradients.second_gradient)


_register_gated_gradients()


@tf.RegisterGradient("CbamOps>ChannelPool")
def _channel_pool_gradient(op: Any, d_mean: tf.Tensor, d_maximum: tf.Tensor) -> tf.Tensor:
    return _loaded_ops().cbam_ops_channel_pool_grad(
        x=op.inputs[0],
        maximum=op.outputs[1],
        d_mean=d_mean,
        d_maximum=d_maximum,
        **_attributes(op, ["data_format"]),
    )


@tf.RegisterGradient("CbamOps>ChannelPoolGrad")
def _channel_pool_second_gradient(op: Any, upstream: tf.Tensor) -> list[tf.Tensor | None]:
    x, _, d_mean, d_maximum = op.inputs
    attributes = _attributes(op, ["data_format"])
    (d_x,), d_descriptors = _gradient_of_gradient(
        lambda x: list(reference.channel_pool(x, **attributes)),
        [x],
        [d_mean, d_maximum],
        [upstream],
    )
    return [d_x, None, *d_descriptors]


@tf.RegisterGradient("CbamOps>SpatialPool")
def _spatial_pool_gradient(op: Any, d_descriptors: tf.Tensor) -> tf.Tensor:
    return _loaded_ops().cbam_ops_spatial_pool_grad(
        x=op.inputs[0],
        descriptors=op.outputs[0],
        d_descriptors=d_descriptors,
        **_attributes(op, ["data_format"]),
    )


@tf.RegisterGradient("CbamOps>SpatialPoolGrad")
def _spatial_pool_second_gradient(op: Any, upstream: tf.Tensor) -> list[tf.Tensor | None]:
    x, _, d_descriptors = op.inputs
    attributes = _attributes(op, ["data_format"])
    (d_x,), (d_d_descriptors,) = _gradient_of_gradient(
        lambda x: [reference.spatial_pool(x, **attributes)], [x], [d_descriptors], [upstream]
    )
    return [d_x, None, d_d_descriptors]
