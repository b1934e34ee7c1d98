"""Keras layers over the fused ops: :class:`CBAM`, :class:`ChannelAttention`, `SpatialAttention`.

Each is one layer with its weights, and one op when it is called. The weights keep the variable type
of the layer's dtype policy (float32 under ``mixed_float16`` and ``mixed_bfloat16``) and are handed
to the op in that type; feature maps have the compute type.

The layers are registered for saving under the package name ``cbam_ops``. They need Keras's
TensorFlow backend.
"""

from __future__ import annotations

import contextvars
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import keras
import tensorflow as tf

from cbam_ops import _call, ops, options
from cbam_ops._dialects import options_of_dialect
from cbam_ops._loader import check_backend

__all__ = ["CBAM", "ChannelAttention", "SpatialAttention"]

_DATA_FORMATS = {"channels_last": "NHWC", "channels_first": "NCHW"}
# The constructors' arguments that the ops take too, and the words they may be.
_WORDS = {name: words for name, words in _call.WORDS.items() if name != "data_format"}
_KERAS_WORDS = {"linear": None, "silu": "swish"}  # its names of ours
# ... and those that describe a weight, by the end of their names.
_DESCRIPTIONS = {
    "initializer": keras.initializers,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}
_Layer = TypeVar("_Layer", bound="_Attention")
# Who wants to see every layer's result and gates (`cbam_ops.gates`): called with both.
listener: contextvars.ContextVar[Callable[[Any, Any, list[Any]], None] | None]
listener = contextvars.ContextVar("listener", default=None)


def _multiple_of_8(channels: int, ratio: int) -> int:
    """The nearest multiple of 8, or the next if that is less than 90 % of it (MobileNetV3)."""
    units = max(8, int(channels / ratio + 4) // 8 * 8)
    return units if units >= 0.9 * channels / ratio else units + 8


# `hidden_rounding`: the number of hidden units of C channels.
_ROUNDINGS: dict[str, Callable[[int, int], int]] = {
    "floor": lambda channels, ratio: channels // ratio,
    "half_up": lambda channels, ratio: max(1, int(channels / ratio + 0.5)),
    "multiple_of_8": _multiple_of_8,
}
# From here on, one hidden unit is more likely a mistake (`CBAM(channels)`) than meant.
_MANY_CHANNELS = 32


class _Weight(NamedTuple):
    """A weight of a layer."""

    attribute: str  # of the layer, which holds it
    name: str  # in saved files
    shape: tuple[str | int, ...]
    arguments: str | None  # `{arguments}_initializer` and so on describe it
    condition: str | None = None  # the attribute that says whether there is such a weight
    initializer: str | None = None  # of a moving statistic, which no arguments describe


# In the order of saved files.
_MLP = (
    _Weight("w0", "mlp_kernel_0", ("C", "hidden"), "mlp_kernel"),
    _Weight("b0", "mlp_bias_0", ("hidden",), "mlp_bias", "use_bias"),
    _Weight("w1", "mlp_kernel_1", ("hidden", "C"), "mlp_kernel"),
    _Weight("b1", "mlp_bias_1", ("C",), "mlp_bias", "use_bias"),
)
_SECOND_LAYER = _MLP[2:]
_BATCH_NORM = "spatial_batch_norm"
_SPATIAL = (
    _Weight("spatial_kernel", "spatial_kernel", ("sides", 2, 1), "spatial_kernel"),
    _Weight("spatial_bias", "spatial_bias", (1,), "spatial_bias", "_has_spatial_bias"),
    _Weight("batch_norm_gamma", "batch_norm_gamma", (1,), "batch_norm_gamma", _BATCH_NORM),
    _Weight("batch_norm_beta", "batch_norm_beta", (1,), "batch_norm_beta", _BATCH_NORM),
    _Weight("moving_mean", "moving_mean", (1,), None, _BATCH_NORM, "zeros"),
    _Weight("moving_variance", "moving_variance", (1,), None, _BATCH_NORM, "ones"),
)


class _Attention(keras.layers.Layer):
    """What the layers share.

    A subclass has a constructor, which passes its `locals()` on, and these four:
    """

    _table: tuple[_Weight, ...]  # its weights
    _op: Callable[..., Any]
    _op_with_batch_norm: Callable[..., Any]  # of the batch's own statistics
    _gates: tuple[str, ...]

    # Where they are no arguments.
    spatial_batch_norm = False
    spatial_use_bias: bool | None = False

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Keeps every argument of a constructor as an attribute."""
        check_backend(type(self).__name__)
        super().__init__(**arguments["kwargs"])
        floating = [dtype.name for dtype in _call.FLOATING]
        if self.compute_dtype not in floating:
            raise self._error("dtype", f"a policy of {' or '.join(floating)}", self.compute_dtype)
        self._arguments = tuple(n for n in arguments if n not in ("self", "kwargs", "__class__"))
        for name in self._arguments:
            setattr(self, name, self._checked(name, arguments[name]))
        if self.spatial_batch_norm and self.spatial_use_bias:
            raise self._error(
                "spatial_use_bias",
                "None or False with spatial_batch_norm=True, whose beta is the bias",
                self.spatial_use_bias,
            )
        if "hidden" in self._arguments and (self.hidden, self.mlp_merge) == (0, "hidden"):
            raise self._error("mlp_merge", "'logits' or 'gates' with hidden=0", self.mlp_merge)
        self.input_spec = keras.layers.InputSpec(min_ndim=3, max_ndim=5)
        self.supports_masking = True

    # --- arguments ---------------------------------------------------------------------------

    def _error(self, name: str, expected: str, received: Any) -> ValueError:
        return ValueError(f"{type(self).__name__}: `{name}` must be {expected}, got {received!r}")

    def _checked(self, name: str, value: Any) -> Any:
        """An argument of the constructor as the layer keeps it."""
        end = name.rpartition("_")[2]
        if end in _DESCRIPTIONS:
            return _DESCRIPTIONS[end].get(value)
        if name in _WORDS:
            if isinstance(value, str):
                known = _KERAS_WORDS.get(value, value)
                value = known if known in _WORDS[name] else value
            return self._word(name, value, _WORDS[name])
        match name:
            case "data_format":
                value = keras.config.image_data_format() if value is None else value
                return self._word(name, value, tuple(_DATA_FORMATS))
            case "hidden_rounding":
                return self._word(name, value, tuple(_ROUNDINGS))
            case "hidden" if value is None:
                return None
            case "hidden":
                return self._integer(name, value, "a positive integer, 0 or None", least=0)
            case "ratio":
                return self._integer(name, value, "a positive integer")
            case "kernel_size":
                return self._kernel_size(value)
            case "use_bias" | "spatial_batch_norm":
                return bool(value)
            case "batch_norm_momentum":
                return self._number(name, value, "a number between 0 and 1", most=1.0)
            case "batch_norm_epsilon":
                return self._number(name, value, "a finite number of at least 0")
        return value

    def _word(self, name: str, value: Any, allowed: tuple[str | None, ...]) -> str | None:
        if (value is None or isinstance(value, str)) and value in allowed:
            return value
        raise self._error(name, " or ".join(repr(choice) for choice in allowed), value)

    def _integer(self, name: str, value: Any, expected: str, least: int = 1) -> int:
        try:
            number = int(value)
            if number != value or number < least or isinstance(value, bool):
                raise ValueError
        except (TypeError, ValueError):
            raise self._error(name, expected, value) from None
        return number

    def _number(
        self, name: str, value: Any, expected: str, most: float = sys.float_info.max
    ) -> float:
        try:
            if 0.0 <= (number := float(value)) <= most and not isinstance(value, str):
                return number
        except (TypeError, ValueError):
            pass
        raise self._error(name, expected, value)

    def _kernel_size(self, value: Any) -> int | tuple[int, ...]:
        """A number stays one; a list, as from a file, becomes a tuple."""
        several = isinstance(value, list | tuple)
        try:
            sides = tuple(self._integer("", side, "") for side in (value if several else [value]))
            if not (1 <= len(sides) <= 3 and all(side % 2 for side in sides)):
                raise ValueError
        except ValueError:
            expected = "an odd positive integer, or one for each side, as (height, width)"
            raise self._error("kernel_size", expected, value) from None
        return sides if several else sides[0]

    @classmethod
    def from_dialect(cls: type[_Layer], dialect: str, /, **overrides: Any) -> _Layer:
        """The layer that computes what some published code does.

        Args:
            dialect: one of `cbam_ops.dialects`, which has a sentence and the source of each.
            **overrides: arguments of the layer, which go before the dialect's.

        Returns:
            The layer. :class:`ChannelAttention` and :class:`SpatialAttention` take their part of a
            dialect of :class:`CBAM`.

        Raises:
            ValueError: there is no such dialect, or it has no such layer; and as the layer itself.
        """
        options = options_of_dialect(cls.__name__, dialect)
        taken = inspect.signature(cls.__init__).parameters
        return cls(**{name: v for name, v in options.items() if name in taken} | overrides)

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor."""
        config = super().get_config()
        for name in self._arguments:
            value, end = getattr(self, name), name.rpartition("_")[2]
            config[name] = _DESCRIPTIONS[end].serialize(value) if end in _DESCRIPTIONS else value
        return config

    # --- weights -----------------------------------------------------------------------------

    def build(self, input_shape: Any) -> None:
        """Creates the weights for a feature map of this shape."""
        channels = self._channels(input_shape)
        sizes: dict[str, tuple[int, ...]] = {"C": (channels,)}
        if "kernel_size" in self._arguments:
            sizes["sides"] = self._kernel_sides(len(input_shape) - 2)
        if "ratio" in self._arguments:
            sizes["hidden"] = (self._hidden_units(channels) or channels,)
        for weight in self._table:
            shape: tuple[int, ...] = ()
            for size in weight.shape:
                shape += sizes[size] if isinstance(size, str) else (size,)
            setattr(self, weight.attribute, self._add(weight, shape) if self._has(weight) else None)

    def _kernel_sides(self, count: int) -> tuple[int, ...]:
        """The kernel's sides for maps with so many."""
        if isinstance(self.kernel_size, int):
            return (self.kernel_size,) * count
        if len(self.kernel_size) != count:
            expected = f"an odd positive integer or {count} of them for inputs of rank {count + 2}"
            raise self._error("kernel_size", expected, self.kernel_size)
        return self.kernel_size

    def _has(self, weight: _Weight) -> bool:
        if weight in _SECOND_LAYER and self.hidden == 0:
            return False
        return weight.condition is None or getattr(self, weight.condition)

    @property
    def _has_spatial_bias(self) -> bool:
        """`spatial_use_bias=None` is a bias exactly without batch norm."""
        wanted = self.spatial_use_bias
        return not self.spatial_batch_norm if wanted is None else wanted

    def _add(self, weight: _Weight, shape: tuple[int, ...]) -> Any:
        """A weight that is never autocast: the ops take float32 weights beside half types."""
        if weight.arguments is None:
            options = {"initializer": weight.initializer, "trainable": False}
        else:
            options = {end: getattr(self, f"{weight.arguments}_{end}") for end in _DESCRIPTIONS}
            if isinstance(options["initializer"], keras.initializers.Initializer):
                # An initializer without a seed would draw the same numbers each time it is used.
                options["initializer"] = options["initializer"].clone()
        return self.add_weight(name=weight.name, shape=shape, autocast=False, **options)

    def _hidden_units(self, channels: int) -> int:
        if self.hidden is not None:
            return self.hidden
        hidden = _ROUNDINGS[self.hidden_rounding](channels, self.ratio)
        if hidden < 1:
            raise ValueError(
                f"{type(self).__name__}: `ratio` must be at most the number of channels, "
                f"C = {channels}, so that the hidden layer has C // ratio >= 1 units, got "
                f"ratio={self.ratio}; give a smaller `ratio`, or the size itself as `hidden`."
            )
        if hidden == 1 and channels >= _MANY_CHANNELS:
            warnings.warn(
                f"{type(self).__name__}: ratio={self.ratio} leaves one hidden unit of C = "
                f"{channels} channels. `ratio` is what C is divided by; the number of channels is "
                "taken from the input. Give `hidden=1` if one unit is meant.",
                stacklevel=2,
            )
        return hidden

    # --- batch norm --------------------------------------------------------------------------

    def _kernel_and_bias(self) -> tuple[Any, Any]:
        """Those of the spatial convolution, with the moving statistics folded in."""
        if not self.spatial_batch_norm:
            return self.spatial_kernel, self.spatial_bias
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

    def _letters(self, rank: int) -> tuple[str, ...]:
        """The names of a map's dimensions."""
        sides = _call.SIDES[rank]
        return ("N", *sides, "C") if self._layout == "NHWC" else ("N", "C", *sides)

    def _channels(self, input_shape: Any) -> int:
        """The number of channels; sets the input spec that goes with it."""
        rank = len(input_shape)
        if rank not in _call.SIDES:
            expected = " or ".join(f"[{', '.join(self._letters(rank))}]" for rank in _call.SIDES)
            raise ValueError(
                f"{type(self).__name__}: `inputs` must have shape {expected}, got shape "
                f"{tuple(input_shape)}"
            )
        axis = self._letters(rank).index("C")
        channels = input_shape[axis]
        if channels is None or channels < 1:
            raise ValueError(
                f"{type(self).__name__}: `inputs` must have a defined, positive number of channels "
                f"(axis {axis} with data_format={self.data_format!r}), got shape "
                f"{tuple(input_shape)}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes={axis: channels})
        return channels

    def call(
        self,
        inputs: Any,
        residual: Any = None,
        training: bool | None = None,
        return_gates: bool = False,
    ) -> Any:
        """See the class."""
        for name, tensor in (("inputs", inputs), ("residual", residual)):
            if type(tensor).__name__ == "KerasTensor":  # those of Keras 3 do not come here
                raise ValueError(
                    f"{type(self).__name__}: `{name}` must be a tensor of Keras 3, got one of "
                    f"Keras 2 ({type(tensor).__module__}), whose models would not train this "
                    "layer; build the model with `import keras` and without TF_USE_LEGACY_KERAS."
                )
        keywords = {name: getattr(self, name) for name in self._arguments if name in _WORDS}
        keywords.update(data_format=self._layout, residual=residual, return_gates=True)
        arguments = [inputs, *(getattr(self, w.attribute) for w in self._table if w in _MLP)]
        # A frozen layer runs as at inference, as keras.layers.BatchNormalization does.
        if self.spatial_batch_norm and training and self.trainable:
            arguments += [self.spatial_kernel, self.batch_norm_gamma, self.batch_norm_beta]
            keywords["epsilon"] = self.batch_norm_epsilon
            y, mean, variance, *gates = self._op_with_batch_norm(*arguments, **keywords)
            self._update_moving(inputs, mean, variance)
        else:
            if "kernel_size" in self._arguments:
                arguments += self._kernel_and_bias()
            y, *gates = self._op(*arguments, **keywords)
        if (listen := listener.get()) is not None:
            listen(self, y, gates)
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
        letters = self._letters(len(shape))
        sizes = dict(zip(letters, shape, strict=True))
        dimensions = {"channel": ("N", "C"), "spatial": ("N", *_call.SIDES[len(shape)])}
        gates = (
            keras.KerasTensor(tuple(sizes[d] for d in dimensions[gate]), dtype=gate_type)
            for gate in self._gates
        )
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
        cause = _call.cause_in_xla() if _call.native_runs() else None
        if cause is not None:
            options.warn_once(cause, "Keras leaves XLA out for models with cbam_ops layers.")
        return cause is None

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        self._supports_jit = value


@keras.saving.register_keras_serializable(package="cbam_ops")
class CBAM(_Attention):
    """Convolutional block attention module (Woo et al., 2018), as one fused op.

    `y = activation(u * spatial_gate(u) + residual)` with `u = inputs * channel_gate(inputs)`. The
    channel gate `[N, C]` is the sigmoid of a shared two-layer MLP summed over the mean and the
    maximum over positions; the spatial gate `[N, H, W]` is the sigmoid of a convolution of the mean
    and the maximum over channels. The layer replaces ten stock layers.

    Args:
        ratio: Integer, what the input's C is divided by: the MLP has `C // ratio` hidden units. At
            most C. Defaults to 16.
        kernel_size: Odd integer, or a tuple with one for each side of the input, such as
            `(height, width)`: size of the spatial convolution. Defaults to 7.
        spatial_batch_norm: Boolean, whether to normalise the spatial convolution's output before
            its sigmoid, as the paper's released code does. In training the batch's own statistics
            are used and the moving ones updated; at inference the moving ones are folded into the
            kernel. As with `keras.layers.BatchNormalization`, a frozen layer
            (`trainable = False`) uses its moving statistics. Defaults to `False`.
        order: `"channel_first"` (the paper), `"spatial_first"` (the spatial gate is taken from the
            inputs and the channel gate from the result) or `"parallel"` (both gates are taken from
            the inputs). Defaults to `"channel_first"`.
        pooling: `"avg+max"` (the paper), `"avg"` or `"max"`: which descriptors feed the MLP.
            Defaults to `"avg+max"`.
        hidden: Integer or `None`, number of hidden units; overrides `ratio`. 0 leaves one layer, of
            C units, and its bias (`b0`). Defaults to `None`.
        hidden_rounding: What is made of C / `ratio` where `hidden` does not say it: `"floor"`,
            `"half_up"` (timm; at least 1) or `"multiple_of_8"` (MobileNetV3: the nearest, but at
            least 8 and 90 % of it). Defaults to `"floor"`.
        hidden_activation: `"relu"`, `"swish"` (or `"silu"`), `"gelu"` (by the error function),
            `"elu"` or `"mish"`, what follows the hidden layer. Defaults to `"relu"`.
        mlp_activation: `None` or `"relu"`, applied to each of the two MLP outputs before their sum.
            Defaults to `None` (the paper).
        gate_activation: `"sigmoid"` or `"hard_sigmoid"` (`relu6(z + 3) / 6`), of both gates.
            Defaults to `"sigmoid"`.
        mlp_merge: Where the MLP's two branches are added: `"logits"` (the paper: one gate of the
            sum of both outputs), `"hidden"` (both branches' hidden units, before the second layer,
            whose bias and `mlp_activation` then come once) or `"gates"` (a gate of each output;
            their sum is between 0 and 2). Of no effect where `pooling` leaves one branch. Defaults
            to `"logits"`.
        ties: `"even"` or `"first"`: whether equal maxima share the gradient, as in TensorFlow, or
            the first takes it, as in PyTorch's `max_pool2d` and `max` over a dimension. Defaults to
            `"even"`.
        use_bias: Boolean, whether the MLP has biases. Defaults to `True`.
        spatial_use_bias: Boolean or `None`, whether the spatial convolution has a bias. `None`
            means one exactly without `spatial_batch_norm`, with which there can be none (`beta`
            takes its place). Defaults to `None`.
        activation: `None` (or `"linear"`) or `"relu"`, applied last. Defaults to `None`.
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
        undefined; the batch may be empty. Or a series, `(batch, length, channels)`, or a volume,
        `(batch, depth, height, width, channels)`, in either format; the convolution then has one or
        three dimensions.

    Output shape:
        That of the input. With `return_gates`, the tuple of the result, the channel gate
        `(batch, channels)` and the spatial gate `(batch, height, width)`, without channels the
        shape of the input; gates are float32 (float64 under a float64 policy).

    Call arguments:
        inputs: The feature map; float16, bfloat16, float32 or float64, by the dtype policy.
        residual: Optional tensor like `inputs`, added to the gated map before `activation`.
        training: Boolean; matters only with `spatial_batch_norm`.
        return_gates: Boolean, whether to return the gates too. Defaults to `False`. For a model
            that is made already see :func:`cbam_ops.gates`: Keras 3.15 makes no model of the result
            of a layer called again with more outputs.

    Not fused is a part, channel or spatial, with another `hidden_activation` than `"relu"`, another
    `gate_activation` than `"sigmoid"` or `hidden=0`, and in the order `"parallel"` both parts if
    one has these or `pooling` is not `"avg+max"`: there the layer is composed of the fused pools
    and stock TensorFlow. `ties="first"` is stock TensorFlow alone.

    A mask on `inputs` is passed on unchanged and not used.

    Raises:
        ValueError: an argument is not one of those above, `ratio` is larger than C, the input does
            not have rank 3, 4 or 5, `kernel_size` has not as many sides as it, or its number of
            channels is undefined.

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

    _table = (*_MLP, *_SPATIAL)
    _op = staticmethod(ops.cbam)
    _op_with_batch_norm = staticmethod(ops.cbam_with_batch_norm)
    _gates = ("channel", "spatial")

    def __init__(
        self,
        ratio: int = 16,
        kernel_size: int | tuple[int, ...] = 7,
        spatial_batch_norm: bool = False,
        *,
        order: str = "channel_first",
        pooling: str = "avg+max",
        hidden: int | None = None,
        hidden_rounding: str = "floor",
        hidden_activation: str = "relu",
        gate_activation: str = "sigmoid",
        mlp_merge: str = "logits",
        ties: str = "even",
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
        super().__init__(locals())


@keras.saving.register_keras_serializable(package="cbam_ops")
class ChannelAttention(_Attention):
    """The channel part of CBAM, or squeeze and excitation, as one fused op.

    `y = activation(inputs * channel_gate(inputs) + residual)`, the gate `[N, C]` being the sigmoid
    of a two-layer MLP of the chosen descriptors over positions, summed if there are two.

    Args:
        ratio: Integer, what the input's C is divided by: the MLP has `C // ratio` hidden units. At
            most C. Defaults to 16.
        pooling: `"avg+max"` (CBAM), `"avg"` (squeeze and excitation) or `"max"`. Defaults to
            `"avg+max"`.
        hidden: Integer or `None`, number of hidden units; overrides `ratio`. 0 leaves one layer.
            Defaults to `None`.
        hidden_rounding: `"floor"`, `"half_up"` or `"multiple_of_8"`; see :class:`CBAM`. Defaults to
            `"floor"`.
        hidden_activation: `"relu"`, `"swish"` (or `"silu"`), `"gelu"`, `"elu"` or `"mish"`.
            Defaults to `"relu"`.
        mlp_activation: `None` or `"relu"`, applied to each MLP output before their sum. Defaults to
            `None`.
        gate_activation: `"sigmoid"` or `"hard_sigmoid"`. Defaults to `"sigmoid"`.
        mlp_merge: `"logits"`, `"hidden"` or `"gates"`; see :class:`CBAM`. Defaults to `"logits"`.
        ties: `"even"` or `"first"`; see :class:`CBAM`, also for what is not fused. Defaults to
            `"even"`.
        use_bias: Boolean, whether the MLP has biases. Defaults to `True`.
        activation: `None` (or `"linear"`) or `"relu"`, applied last. Defaults to `None`.
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
        `(batch, channels, height, width)` with `"channels_first"`; or a series or a volume, see
        :class:`CBAM`.

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

    _table = _MLP
    _op = staticmethod(ops.channel_attention)
    _gates = ("channel",)

    def __init__(
        self,
        ratio: int = 16,
        *,
        pooling: str = "avg+max",
        hidden: int | None = None,
        hidden_rounding: str = "floor",
        hidden_activation: str = "relu",
        gate_activation: str = "sigmoid",
        mlp_merge: str = "logits",
        ties: str = "even",
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
        super().__init__(locals())


@keras.saving.register_keras_serializable(package="cbam_ops")
class SpatialAttention(_Attention):
    """The spatial part of CBAM as one fused op.

    `y = activation(inputs * spatial_gate(inputs) + residual)`, the gate `[N, H, W]` being the
    sigmoid of a convolution of the mean and the maximum over channels.

    Args:
        kernel_size: Odd integer, or a tuple with one for each side of the input, such as
            `(height, width)`: size of the convolution. Defaults to 7.
        spatial_batch_norm: Boolean, whether to normalise the convolution's output before its
            sigmoid; see :class:`CBAM`. Defaults to `False`.
        spatial_use_bias: Boolean or `None`, whether the convolution has a bias; `None` means one
            exactly without `spatial_batch_norm`. Defaults to `None`.
        gate_activation: `"sigmoid"` or `"hard_sigmoid"`. Defaults to `"sigmoid"`.
        ties: `"even"` or `"first"`; see :class:`CBAM`, also for what is not fused. Defaults to
            `"even"`.
        activation: `None` (or `"linear"`) or `"relu"`, applied last. Defaults to `None`.
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
        `(batch, channels, height, width)` with `"channels_first"`; or a series or a volume, see
        :class:`CBAM`.

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

    _table = _SPATIAL
    _op = staticmethod(ops.spatial_attention)
    _op_with_batch_norm = staticmethod(ops.spatial_attention_with_batch_norm)
    _gates = ("spatial",)

    def __init__(
        self,
        kernel_size: int | tuple[int, ...] = 7,
        spatial_batch_norm: bool = False,
        *,
        spatial_use_bias: bool | None = None,
        gate_activation: str = "sigmoid",
        ties: str = "even",
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
        super().__init__(locals())
