"""Keras layers over the fused ops: :class:`CBAM`, :class:`ChannelAttention`, `SpatialAttention`.

Each is one layer with its weights, and one op when it is called. The weights keep the variable type
of the layer's dtype policy (float32 under ``mixed_float16`` and ``mixed_bfloat16``) and are handed
to the op in that type; feature maps have the compute type.

The layers are registered for saving under the package name ``cbam_ops``. They need Keras's
TensorFlow backend.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from cbam_ops import _loader, ops, options

__all__ = ["CBAM", "ChannelAttention", "SpatialAttention"]

_DATA_FORMATS = {"channels_last": "NHWC", "channels_first": "NCHW"}


class _Attention(keras.layers.Layer):
    """What the layers share: the map's layout, the end of the block, the weights of both gates.

    A subclass calls `_set_mlp` and/or `_set_spatial` in its constructor, `_add_mlp` and/or
    `_add_spatial` in `build`, and defines `_gated` (the result and the gates).
    """

    def __init__(
        self, activation: str | None = None, data_format: str | None = None, **kwargs: Any
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"{type(self).__name__} needs the TensorFlow backend of Keras, but Keras runs on "
                f"{keras.backend.backend()!r}: set KERAS_BACKEND=tensorflow before importing keras."
            )
        super().__init__(**kwargs)
        self.activation = self._option("activation", activation, (None, "relu"))
        if data_format is None:
            data_format = keras.config.image_data_format()
        self.data_format = self._option("data_format", data_format, tuple(_DATA_FORMATS))
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.supports_masking = True

    # --- arguments ---------------------------------------------------------------------------

    def _error(self, name: str, expected: str, received: Any) -> ValueError:
        return ValueError(f"{type(self).__name__}: `{name}` must be {expected}, got {received!r}")

    def _option(self, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
        if (value is None or isinstance(value, str)) and value in allowed:
            return value
        raise self._error(name, " or ".join(repr(choice) for choice in allowed), value)

    def _integer(self, name: str, value: Any, expected: str = "a positive integer") -> int:
        try:
            number = int(value)
            if number != value or number < 1 or isinstance(value, bool):
                raise ValueError
        except (TypeError, ValueError):
            raise self._error(name, expected, value) from None
        return number

    def _set_weight(self, weight: str, initializer: Any, regularizer: Any, constraint: Any) -> None:
        setattr(self, f"{weight}_initializer", keras.initializers.get(initializer))
        setattr(self, f"{weight}_regularizer", keras.regularizers.get(regularizer))
        setattr(self, f"{weight}_constraint", keras.constraints.get(constraint))

    def _weights_config(self, *weights: str) -> dict[str, Any]:
        config = {}
        for weight in weights:
            config[f"{weight}_initializer"] = keras.initializers.serialize(
                getattr(self, f"{weight}_initializer")
            )
            config[f"{weight}_regularizer"] = keras.regularizers.serialize(
                getattr(self, f"{weight}_regularizer")
            )
            config[f"{weight}_constraint"] = keras.constraints.serialize(
                getattr(self, f"{weight}_constraint")
            )
        return config

    def _set_mlp(
        self, ratio: int, hidden: int | None, mlp_activation: str | None, use_bias: bool
    ) -> None:
        self.ratio = self._integer("ratio", ratio)
        self.hidden = None if hidden is None else self._integer("hidden", hidden)
        self.mlp_activation = self._option("mlp_activation", mlp_activation, (None, "relu"))
        self.use_bias = bool(use_bias)

    def _set_spatial(
        self,
        kernel_size: int,
        spatial_use_bias: bool | None,
        spatial_batch_norm: bool,
        batch_norm_momentum: float,
        batch_norm_epsilon: float,
    ) -> None:
        expected = "an odd positive integer"
        self.kernel_size = self._integer("kernel_size", kernel_size, expected)
        if self.kernel_size % 2 == 0:
            raise self._error("kernel_size", expected, kernel_size)
        self.spatial_batch_norm = bool(spatial_batch_norm)
        if self.spatial_batch_norm and spatial_use_bias:
            raise self._error(
                "spatial_use_bias",
                "None or False with spatial_batch_norm=True, whose beta is the bias",
                spatial_use_bias,
            )
        self.spatial_use_bias = spatial_use_bias
        if not 0.0 <= batch_norm_momentum <= 1.0:
            raise self._error("batch_norm_momentum", "between 0 and 1", batch_norm_momentum)
        if not batch_norm_epsilon >= 0.0:
            raise self._error("batch_norm_epsilon", "a number of at least 0", batch_norm_epsilon)
        self.batch_norm_momentum = float(batch_norm_momentum)
        self.batch_norm_epsilon = float(batch_norm_epsilon)

    # --- weights -----------------------------------------------------------------------------

    def _add(self, weight: str, shape: tuple[int, ...], prefix: str) -> Any:
        """A trainable weight, never autocast: the ops take float32 weights beside half types."""
        initializer = getattr(self, f"{prefix}_initializer")
        if isinstance(initializer, keras.initializers.Initializer):
            # An initializer without a seed would draw the same numbers each time it is used.
            initializer = initializer.clone()
        return self.add_weight(
            name=weight,
            shape=shape,
            initializer=initializer,
            regularizer=getattr(self, f"{prefix}_regularizer"),
            constraint=getattr(self, f"{prefix}_constraint"),
            autocast=False,
        )

    def _add_mlp(self, channels: int) -> None:
        hidden = channels // self.ratio if self.hidden is None else self.hidden
        if hidden < 1:
            raise ValueError(
                f"{type(self).__name__}: `ratio` must be at most the number of channels, "
                f"C = {channels}, so that the hidden layer has C // ratio >= 1 units, got "
                f"ratio={self.ratio}; give a smaller `ratio`, or the size itself as `hidden`."
            )
        # Dense order: kernel, bias, kernel, bias.
        self.b0 = self.b1 = None
        self.w0 = self._add("mlp_kernel_0", (channels, hidden), "mlp_kernel")
        if self.use_bias:
            self.b0 = self._add("mlp_bias_0", (hidden,), "mlp_bias")
        self.w1 = self._add("mlp_kernel_1", (hidden, channels), "mlp_kernel")
        if self.use_bias:
            self.b1 = self._add("mlp_bias_1", (channels,), "mlp_bias")

    def _add_spatial(self) -> None:
        size = self.kernel_size
        self.spatial_kernel = self._add("spatial_kernel", (size, size, 2, 1), "spatial_kernel")
        self.spatial_bias = None
        if self.spatial_batch_norm:
            self.batch_norm_gamma = self._add("batch_norm_gamma", (1,), "batch_norm_gamma")
            self.batch_norm_beta = self._add("batch_norm_beta", (1,), "batch_norm_beta")
            self.moving_mean, self.moving_variance = (
                self.add_weight(
                    name=name, shape=(1,), initializer=initializer, trainable=False, autocast=False
                )
                for name, initializer in (("moving_mean", "zeros"), ("moving_variance", "ones"))
            )
        elif self.spatial_use_bias is None or self.spatial_use_bias:
            self.spatial_bias = self._add("spatial_bias", (1,), "spatial_bias")

    def _folded_batch_norm(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Kernel and bias that include the batch norm with its moving statistics."""
        dtype = tf.as_dtype(self.spatial_kernel.dtype)
        # A policy with half-type variables still folds in float32.
        wide = dtype if dtype.size > 2 else tf.float32
        kernel, gamma, beta, mean, variance = (
            tf.cast(weight, wide)
            for weight in (
                self.spatial_kernel,
                self.batch_norm_gamma,
                self.batch_norm_beta,
                self.moving_mean,
                self.moving_variance,
            )
        )
        scale = gamma * tf.math.rsqrt(variance + self.batch_norm_epsilon)
        return tf.cast(kernel * scale, dtype), tf.cast(beta - mean * scale, dtype)

    def _update_moving(self, inputs: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> None:
        """Moves the moving statistics towards a batch's; an empty batch has none."""
        some = tf.size(inputs, tf.int64) > 0
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = tf.cast(moving, value.dtype)
            new = old * self.batch_norm_momentum + value * (1.0 - self.batch_norm_momentum)
            moving.assign(tf.where(some, new, old))

    # --- Keras -------------------------------------------------------------------------------

    @property
    def _layout(self) -> str:
        return _DATA_FORMATS[self.data_format]

    def _channels(self, input_shape: Any) -> int:
        """The number of channels; sets the input spec that goes with it."""
        axis = self._layout.index("C")
        if len(input_shape) != 4:
            letters = ", ".join(self._layout)
            raise ValueError(
                f"{type(self).__name__}: `inputs` must have rank 4, [{letters}], got shape "
                f"{tuple(input_shape)}"
            )
        channels = input_shape[axis]
        if channels is None or channels < 1:
            raise ValueError(
                f"{type(self).__name__}: `inputs` must have a defined, positive number of channels "
                f"(axis {axis} with data_format={self.data_format!r}), got shape "
                f"{tuple(input_shape)}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={axis: channels})
        return channels

    def _gated(self, inputs: Any, residual: Any, training: bool) -> tuple[Any, ...]:
        raise NotImplementedError

    def _gate_shapes(self, input_shape: tuple[int | None, ...]) -> list[tuple[int | None, ...]]:
        raise NotImplementedError

    def call(
        self,
        inputs: Any,
        residual: Any = None,
        training: bool | None = None,
        return_gates: bool = False,
    ) -> Any:
        """See the class."""
        # A frozen layer runs as at inference, as keras.layers.BatchNormalization does.
        y, *gates = self._gated(inputs, residual, bool(training) and self.trainable)
        return (y, *gates) if return_gates else y

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """The shape of the result, which is that of the feature map."""
        return tuple(input_shape)

    def compute_output_spec(
        self,
        inputs: Any,
        residual: Any = None,
        training: bool | None = None,
        return_gates: bool = False,
    ) -> Any:
        """The symbolic result of ``call``."""
        shape = tuple(inputs.shape)
        if residual is not None:
            expected = tf.TensorShape(shape)
            if not expected.is_compatible_with(tuple(residual.shape)):
                raise ValueError(
                    f"{type(self).__name__}: `residual` must have the shape of `inputs`, {shape}, "
                    f"got {tuple(residual.shape)}"
                )
        y = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_gates:
            return y
        gate_type = "float64" if self.compute_dtype == "float64" else "float32"
        gates = (keras.KerasTensor(s, dtype=gate_type) for s in self._gate_shapes(shape))
        return (y, *gates)

    @property
    def supports_jit(self) -> bool:
        """Whether Keras may compile a model with this layer by XLA of its own accord.

        True where the fused ops run inside XLA too, and where the reference computes anyway. Else
        false, with one warning that says why: Keras then leaves XLA out, quietly with
        ``jit_compile="auto"``, with a warning of its own with ``jit_compile=True``.
        """
        if not self._supports_jit:
            return False
        cause = ops.cause_in_xla() if _native_runs() else None
        if cause is not None:
            options.warn_once(cause, "Keras leaves XLA out for models with cbam_ops layers.")
        return cause is None

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        self._supports_jit = value

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor."""
        config = super().get_config()
        config.update(activation=self.activation, data_format=self.data_format)
        return config

    def _mlp_config(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "hidden": self.hidden,
            "mlp_activation": self.mlp_activation,
            "use_bias": self.use_bias,
            **self._weights_config("mlp_kernel", "mlp_bias"),
        }

    def _spatial_config(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel_size,
            "spatial_batch_norm": self.spatial_batch_norm,
            "spatial_use_bias": self.spatial_use_bias,
            "batch_norm_momentum": self.batch_norm_momentum,
            "batch_norm_epsilon": self.batch_norm_epsilon,
            **self._weights_config(
                "spatial_kernel", "spatial_bias", "batch_norm_gamma", "batch_norm_beta"
            ),
        }


def _native_runs() -> bool:
    """Whether an op called now, outside XLA, would run the native kernels."""
    if options.implementation() == "reference":
        return False
    return not isinstance(_loader.load_ops(), _loader.Cause) and ops._cause_of_the_place() is None


@keras.saving.register_keras_serializable(package="cbam_ops")
class CBAM(_Attention):
    """Convolutional block attention module (Woo et al., 2018), as one fused op.

    `y = activation(u * spatial_gate(u) + residual)` with `u = inputs * channel_gate(inputs)`. The
    channel gate `[N, C]` is the sigmoid of a shared two-layer MLP summed over the mean and the
    maximum over positions; the spatial gate `[N, H, W]` is the sigmoid of a convolution of the mean
    and the maximum over channels. The layer replaces ten stock layers.

    Args:
        ratio: Integer, reduction ratio of the MLP: it has `C // ratio` hidden units. At most C.
            Defaults to 16.
        kernel_size: Odd integer, size of the spatial convolution. Defaults to 7.
        spatial_batch_norm: Boolean, whether to normalise the spatial convolution's output before
            its sigmoid, as the paper's released code does. In training the batch's own statistics
            are used and the moving ones updated; at inference the moving ones are folded into the
            kernel. As with `keras.layers.BatchNormalization`, a frozen layer
            (`trainable = False`) uses its moving statistics. Defaults to `False`.
        order: `"channel_first"` (the paper), `"spatial_first"` (the spatial gate is taken from the
            inputs and the channel gate from the result) or `"parallel"` (both gates are taken from
            the inputs). Defaults to `"channel_first"`.
        hidden: Integer or `None`, number of hidden units; overrides `ratio`. timm's rounding is
            `hidden=max(1, int(C / 16 + 0.5))`. Defaults to `None`.
        mlp_activation: `None` or `"relu"`, applied to each of the two MLP outputs before their sum.
            Defaults to `None` (the paper).
        use_bias: Boolean, whether the MLP has biases. Defaults to `True`.
        spatial_use_bias: Boolean or `None`, whether the spatial convolution has a bias. `None`
            means one exactly without `spatial_batch_norm`, with which there can be none (`beta`
            takes its place). Defaults to `None`.
        activation: `None` or `"relu"`, applied last. Defaults to `None`.
        data_format: `"channels_last"`, `"channels_first"` or `None` for
            `keras.config.image_data_format()`. Both work on CPUs. Defaults to `None`.
        mlp_kernel_initializer: Initializer of both MLP kernels. Defaults to `"glorot_uniform"`.
        mlp_bias_initializer: Initializer of both MLP biases. Defaults to `"zeros"`.
        spatial_kernel_initializer: Initializer of the spatial kernel. Defaults to
            `"glorot_uniform"`.
        spatial_bias_initializer: Initializer of the spatial bias. Defaults to `"zeros"`.
        mlp_kernel_regularizer: Optional regularizer of the MLP kernels.
        mlp_bias_regularizer: Optional regularizer of the MLP biases.
        spatial_kernel_regularizer: Optional regularizer of the spatial kernel.
        spatial_bias_regularizer: Optional regularizer of the spatial bias.
        mlp_kernel_constraint: Optional constraint of the MLP kernels.
        mlp_bias_constraint: Optional constraint of the MLP biases.
        spatial_kernel_constraint: Optional constraint of the spatial kernel.
        spatial_bias_constraint: Optional constraint of the spatial bias.
        batch_norm_momentum: Number, momentum of the moving statistics. Defaults to 0.99 (the
            released code, where PyTorch calls it 0.01).
        batch_norm_epsilon: Number added to the variance. Defaults to 1e-5 (the released code).
        batch_norm_gamma_initializer: Initializer of the batch norm's scale. Defaults to `"ones"`;
            the released models use `"zeros"`, so that every spatial gate starts at 0.5.
        batch_norm_beta_initializer: Initializer of the batch norm's offset. Defaults to `"zeros"`.
        batch_norm_gamma_regularizer: Optional regularizer of the scale.
        batch_norm_beta_regularizer: Optional regularizer of the offset.
        batch_norm_gamma_constraint: Optional constraint of the scale.
        batch_norm_beta_constraint: Optional constraint of the offset.
        **kwargs: Base layer keyword arguments (`name`, `dtype`, `trainable`).

    Input shape:
        4D tensor: `(batch, height, width, channels)` with `data_format="channels_last"`,
        `(batch, channels, height, width)` with `"channels_first"`. Batch, height and width may be
        undefined; the batch may be empty.

    Output shape:
        That of the input. With `return_gates`, the tuple of the result, the channel gate
        `(batch, channels)` and the spatial gate `(batch, height, width)`; gates are float32
        (float64 under a float64 policy).

    Call arguments:
        inputs: The feature map; float16, bfloat16, float32 or float64, by the dtype policy.
        residual: Optional tensor like `inputs`, added to the gated map before `activation`.
        training: Boolean; matters only with `spatial_batch_norm`.
        return_gates: Boolean, whether to return the gates too. Defaults to `False`.

    A mask on `inputs` is passed on unchanged and not used.

    Raises:
        ValueError: an argument is not one of those above, `ratio` is larger than C, the input does
            not have rank 4, or its number of channels is undefined.

    Example:
    >>> x = keras.random.normal((8, 56, 56, 256))
    >>> y = cbam_ops.CBAM(ratio=16)(x)
    >>> y.shape
    TensorShape([8, 56, 56, 256])

    The end of a residual block, `relu(cbam(x) + shortcut)`, as one op:

    >>> y = cbam_ops.CBAM(activation="relu")(x, residual=shortcut)

    References:
        - [Woo et al., 2018](https://arxiv.org/abs/1807.06521)
    """

    def __init__(
        self,
        ratio: int = 16,
        kernel_size: int = 7,
        spatial_batch_norm: bool = False,
        *,
        order: str = "channel_first",
        hidden: int | None = None,
        mlp_activation: str | None = None,
        use_bias: bool = True,
        spatial_use_bias: bool | None = None,
        activation: str | None = None,
        data_format: str | None = None,
        mlp_kernel_initializer: Any = "glorot_uniform",
        mlp_bias_initializer: Any = "zeros",
        spatial_kernel_initializer: Any = "glorot_uniform",
        spatial_bias_initializer: Any = "zeros",
        mlp_kernel_regularizer: Any = None,
        mlp_bias_regularizer: Any = None,
        spatial_kernel_regularizer: Any = None,
        spatial_bias_regularizer: Any = None,
        mlp_kernel_constraint: Any = None,
        mlp_bias_constraint: Any = None,
        spatial_kernel_constraint: Any = None,
        spatial_bias_constraint: Any = None,
        batch_norm_momentum: float = 0.99,
        batch_norm_epsilon: float = 1e-5,
        batch_norm_gamma_initializer: Any = "ones",
        batch_norm_beta_initializer: Any = "zeros",
        batch_norm_gamma_regularizer: Any = None,
        batch_norm_beta_regularizer: Any = None,
        batch_norm_gamma_constraint: Any = None,
        batch_norm_beta_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(activation=activation, data_format=data_format, **kwargs)
        self.order = self._option("order", order, ("channel_first", "spatial_first", "parallel"))
        self._set_mlp(ratio, hidden, mlp_activation, use_bias)
        self._set_spatial(
            kernel_size,
            spatial_use_bias,
            spatial_batch_norm,
            batch_norm_momentum,
            batch_norm_epsilon,
        )
        self._set_weight(
            "mlp_kernel", mlp_kernel_initializer, mlp_kernel_regularizer, mlp_kernel_constraint
        )
        self._set_weight(
            "mlp_bias", mlp_bias_initializer, mlp_bias_regularizer, mlp_bias_constraint
        )
        self._set_weight(
            "spatial_kernel",
            spatial_kernel_initializer,
            spatial_kernel_regularizer,
            spatial_kernel_constraint,
        )
        self._set_weight(
            "spatial_bias",
            spatial_bias_initializer,
            spatial_bias_regularizer,
            spatial_bias_constraint,
        )
        self._set_weight(
            "batch_norm_gamma",
            batch_norm_gamma_initializer,
            batch_norm_gamma_regularizer,
            batch_norm_gamma_constraint,
        )
        self._set_weight(
            "batch_norm_beta",
            batch_norm_beta_initializer,
            batch_norm_beta_regularizer,
            batch_norm_beta_constraint,
        )

    def build(self, input_shape: Any) -> None:
        """Creates the weights for a feature map of this shape."""
        self._add_mlp(self._channels(input_shape))
        self._add_spatial()

    def _gated(self, inputs: Any, residual: Any, training: bool) -> tuple[Any, ...]:
        mlp = (self.w0, self.b0, self.w1, self.b1)
        arguments = {
            "data_format": self._layout,
            "mlp_activation": self.mlp_activation,
            "residual": residual,
            "activation": self.activation,
            "order": self.order,
            "return_gates": True,
        }
        if self.spatial_batch_norm and training:
            y, mean, variance, *gates = ops.cbam_with_batch_norm(
                inputs,
                *mlp,
                self.spatial_kernel,
                self.batch_norm_gamma,
                self.batch_norm_beta,
                epsilon=self.batch_norm_epsilon,
                **arguments,
            )
            self._update_moving(inputs, mean, variance)
            return (y, *gates)
        kernel, bias = self.spatial_kernel, self.spatial_bias
        if self.spatial_batch_norm:
            kernel, bias = self._folded_batch_norm()
        return ops.cbam(inputs, *mlp, kernel, bias, **arguments)

    def _gate_shapes(self, input_shape: tuple[int | None, ...]) -> list[tuple[int | None, ...]]:
        sizes = dict(zip(self._layout, input_shape, strict=True))
        return [(sizes["N"], sizes["C"]), (sizes["N"], sizes["H"], sizes["W"])]

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor."""
        config = super().get_config()
        config.update(order=self.order, **self._mlp_config(), **self._spatial_config())
        return config


@keras.saving.register_keras_serializable(package="cbam_ops")
class ChannelAttention(_Attention):
    """The channel part of CBAM, or squeeze and excitation, as one fused op.

    `y = activation(inputs * channel_gate(inputs) + residual)`, the gate `[N, C]` being the sigmoid
    of a two-layer MLP of the chosen descriptors over positions, summed if there are two.

    Args:
        ratio: Integer, reduction ratio of the MLP: it has `C // ratio` hidden units. At most C.
            Defaults to 16.
        pooling: `"avg+max"` (CBAM), `"avg"` (squeeze and excitation) or `"max"`. Defaults to
            `"avg+max"`.
        hidden: Integer or `None`, number of hidden units; overrides `ratio`. Defaults to `None`.
        mlp_activation: `None` or `"relu"`, applied to each MLP output before their sum. Defaults to
            `None`.
        use_bias: Boolean, whether the MLP has biases. Defaults to `True`.
        activation: `None` or `"relu"`, applied last. Defaults to `None`.
        data_format: `"channels_last"`, `"channels_first"` or `None` for
            `keras.config.image_data_format()`. Defaults to `None`.
        mlp_kernel_initializer: Initializer of both MLP kernels. Defaults to `"glorot_uniform"`.
        mlp_bias_initializer: Initializer of both MLP biases. Defaults to `"zeros"`.
        mlp_kernel_regularizer: Optional regularizer of the MLP kernels.
        mlp_bias_regularizer: Optional regularizer of the MLP biases.
        mlp_kernel_constraint: Optional constraint of the MLP kernels.
        mlp_bias_constraint: Optional constraint of the MLP biases.
        **kwargs: Base layer keyword arguments (`name`, `dtype`, `trainable`).

    Input shape:
        4D tensor: `(batch, height, width, channels)` with `data_format="channels_last"`,
        `(batch, channels, height, width)` with `"channels_first"`.

    Output shape:
        That of the input. With `return_gates`, the tuple of the result and the channel gate
        `(batch, channels)`.

    Call arguments:
        inputs: The feature map.
        residual: Optional tensor like `inputs`, added to the gated map before `activation`.
        training: Boolean; of no effect.
        return_gates: Boolean, whether to return the gate too. Defaults to `False`.

    A mask on `inputs` is passed on unchanged and not used.

    Raises:
        ValueError: as :class:`CBAM`.

    Example:
    >>> x = keras.random.normal((8, 56, 56, 256))
    >>> y = cbam_ops.ChannelAttention(ratio=16, pooling="avg")(x)
    >>> y.shape
    TensorShape([8, 56, 56, 256])

    References:
        - [Woo et al., 2018](https://arxiv.org/abs/1807.06521)
        - [Hu et al., 2018](https://arxiv.org/abs/1709.01507), for `pooling="avg"`
    """

    def __init__(
        self,
        ratio: int = 16,
        *,
        pooling: str = "avg+max",
        hidden: int | None = None,
        mlp_activation: str | None = None,
        use_bias: bool = True,
        activation: str | None = None,
        data_format: str | None = None,
        mlp_kernel_initializer: Any = "glorot_uniform",
        mlp_bias_initializer: Any = "zeros",
        mlp_kernel_regularizer: Any = None,
        mlp_bias_regularizer: Any = None,
        mlp_kernel_constraint: Any = None,
        mlp_bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(activation=activation, data_format=data_format, **kwargs)
        self.pooling = self._option("pooling", pooling, ("avg+max", "avg", "max"))
        self._set_mlp(ratio, hidden, mlp_activation, use_bias)
        self._set_weight(
            "mlp_kernel", mlp_kernel_initializer, mlp_kernel_regularizer, mlp_kernel_constraint
        )
        self._set_weight(
            "mlp_bias", mlp_bias_initializer, mlp_bias_regularizer, mlp_bias_constraint
        )

    def build(self, input_shape: Any) -> None:
        """Creates the weights for a feature map of this shape."""
        self._add_mlp(self._channels(input_shape))

    def _gated(self, inputs: Any, residual: Any, training: bool) -> tuple[Any, ...]:
        return ops.channel_attention(
            inputs,
            self.w0,
            self.b0,
            self.w1,
            self.b1,
            pooling=self.pooling,
            data_format=self._layout,
            mlp_activation=self.mlp_activation,
            residual=residual,
            activation=self.activation,
            return_gates=True,
        )

    def _gate_shapes(self, input_shape: tuple[int | None, ...]) -> list[tuple[int | None, ...]]:
        return [(input_shape[0], input_shape[self._layout.index("C")])]

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor."""
        config = super().get_config()
        config.update(pooling=self.pooling, **self._mlp_config())
        return config


@keras.saving.register_keras_serializable(package="cbam_ops")
class SpatialAttention(_Attention):
    """The spatial part of CBAM as one fused op.

    `y = activation(inputs * spatial_gate(inputs) + residual)`, the gate `[N, H, W]` being the
    sigmoid of a convolution of the mean and the maximum over channels.

    Args:
        kernel_size: Odd integer, size of the convolution. Defaults to 7.
        spatial_batch_norm: Boolean, whether to normalise the convolution's output before its
            sigmoid; see :class:`CBAM`. Defaults to `False`.
        spatial_use_bias: Boolean or `None`, whether the convolution has a bias; `None` means one
            exactly without `spatial_batch_norm`. Defaults to `None`.
        activation: `None` or `"relu"`, applied last. Defaults to `None`.
        data_format: `"channels_last"`, `"channels_first"` or `None` for
            `keras.config.image_data_format()`. Defaults to `None`.
        spatial_kernel_initializer: Initializer of the kernel. Defaults to `"glorot_uniform"`.
        spatial_bias_initializer: Initializer of the bias. Defaults to `"zeros"`.
        spatial_kernel_regularizer: Optional regularizer of the kernel.
        spatial_bias_regularizer: Optional regularizer of the bias.
        spatial_kernel_constraint: Optional constraint of the kernel.
        spatial_bias_constraint: Optional constraint of the bias.
        batch_norm_momentum: Number, momentum of the moving statistics. Defaults to 0.99.
        batch_norm_epsilon: Number added to the variance. Defaults to 1e-5.
        batch_norm_gamma_initializer: Initializer of the batch norm's scale. Defaults to `"ones"`.
        batch_norm_beta_initializer: Initializer of the batch norm's offset. Defaults to `"zeros"`.
        batch_norm_gamma_regularizer: Optional regularizer of the scale.
        batch_norm_beta_regularizer: Optional regularizer of the offset.
        batch_norm_gamma_constraint: Optional constraint of the scale.
        batch_norm_beta_constraint: Optional constraint of the offset.
        **kwargs: Base layer keyword arguments (`name`, `dtype`, `trainable`).

    Input shape:
        4D tensor: `(batch, height, width, channels)` with `data_format="channels_last"`,
        `(batch, channels, height, width)` with `"channels_first"`.

    Output shape:
        That of the input. With `return_gates`, the tuple of the result and the spatial gate
        `(batch, height, width)`.

    Call arguments:
        inputs: The feature map.
        residual: Optional tensor like `inputs`, added to the gated map before `activation`.
        training: Boolean; matters only with `spatial_batch_norm`.
        return_gates: Boolean, whether to return the gate too. Defaults to `False`.

    A mask on `inputs` is passed on unchanged and not used.

    Raises:
        ValueError: as :class:`CBAM`.

    Example:
    >>> x = keras.random.normal((8, 56, 56, 256))
    >>> y = cbam_ops.SpatialAttention(kernel_size=7)(x)
    >>> y.shape
    TensorShape([8, 56, 56, 256])

    References:
        - [Woo et al., 2018](https://arxiv.org/abs/1807.06521)
    """

    def __init__(
        self,
        kernel_size: int = 7,
        spatial_batch_norm: bool = False,
        *,
        spatial_use_bias: bool | None = None,
        activation: str | None = None,
        data_format: str | None = None,
        spatial_kernel_initializer: Any = "glorot_uniform",
        spatial_bias_initializer: Any = "zeros",
        spatial_kernel_regularizer: Any = None,
        spatial_bias_regularizer: Any = None,
        spatial_kernel_constraint: Any = None,
        spatial_bias_constraint: Any = None,
        batch_norm_momentum: float = 0.99,
        batch_norm_epsilon: float = 1e-5,
        batch_norm_gamma_initializer: Any = "ones",
        batch_norm_beta_initializer: Any = "zeros",
        batch_norm_gamma_regularizer: Any = None,
        batch_norm_beta_regularizer: Any = None,
        batch_norm_gamma_constraint: Any = None,
        batch_norm_beta_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(activation=activation, data_format=data_format, **kwargs)
        self._set_spatial(
            kernel_size,
            spatial_use_bias,
            spatial_batch_norm,
            batch_norm_momentum,
            batch_norm_epsilon,
        )
        self._set_weight(
            "spatial_kernel",
            spatial_kernel_initializer,
            spatial_kernel_regularizer,
            spatial_kernel_constraint,
        )
        self._set_weight(
            "spatial_bias",
            spatial_bias_initializer,
            spatial_bias_regularizer,
            spatial_bias_constraint,
        )
        self._set_weight(
            "batch_norm_gamma",
            batch_norm_gamma_initializer,
            batch_norm_gamma_regularizer,
            batch_norm_gamma_constraint,
        )
        self._set_weight(
            "batch_norm_beta",
            batch_norm_beta_initializer,
            batch_norm_beta_regularizer,
            batch_norm_beta_constraint,
        )

    def build(self, input_shape: Any) -> None:
        """Creates the weights for a feature map of this shape."""
        self._channels(input_shape)
        self._add_spatial()

    def _gated(self, inputs: Any, residual: Any, training: bool) -> tuple[Any, ...]:
        arguments = {
            "data_format": self._layout,
            "residual": residual,
            "activation": self.activation,
            "return_gates": True,
        }
        if self.spatial_batch_norm and training:
            y, mean, variance, gate = ops.spatial_attention_with_batch_norm(
                inputs,
                self.spatial_kernel,
                self.batch_norm_gamma,
                self.batch_norm_beta,
                epsilon=self.batch_norm_epsilon,
                **arguments,
            )
            self._update_moving(inputs, mean, variance)
            return y, gate
        kernel, bias = self.spatial_kernel, self.spatial_bias
        if self.spatial_batch_norm:
            kernel, bias = self._folded_batch_norm()
        return ops.spatial_attention(inputs, kernel, bias, **arguments)

    def _gate_shapes(self, input_shape: tuple[int | None, ...]) -> list[tuple[int | None, ...]]:
        sizes = dict(zip(self._layout, input_shape, strict=True))
        return [(sizes["N"], sizes["H"], sizes["W"])]

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor."""
        config = super().get_config()
        config.update(self._spatial_config())
        return config
