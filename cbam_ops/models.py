"""Networks with a CBAM in every block, in the manner of `keras.applications`.

- `CBAMResNet18/34/50/101/152`: the network of the paper as its authors released it (the PyTorch
  repository Jongchan/attention-module): no biases in the convolutions, symmetric padding, stride on
  the 3x3 convolution, a projection shortcut with batch norm only where the shape changes, and a
  batch norm on the spatial attention's convolution. One thing differs: the spatial descriptors are
  mean first here, maximum first there. Weights of the release need the two input planes of every
  spatial kernel swapped, as `cbam_ops.from_torch` does. `width=1.5` and `width=2` are the paper's
  WideResNet-18.
- `CBAMResNeXt50/101`: the same with 32 groups of 4 in the 3x3 convolutions.
- `CBAMMobileNet`: MobileNet with a module after each of its 27 convolutions' batch norms, as in the
  paper; `width` is its alpha.
- `CBAMCIFARResNet20/32/44/56/110`: the same blocks in the network of He et al. (2016) for images of
  32 x 32: three stages of 16, 32 and 64 filters, no pooling before them.
- `SeedCBAMResNet50/101/152`: an older TensorFlow network that this project grew from: biases
  everywhere, TensorFlow's `same` padding, stride on the first 1x1 convolution, a projection
  shortcut without batch norm in every block, a ReLU after the second dense layer of the channel
  attention.

The module is after the last batch norm of a block and before the addition; one fused op computes
the module, the addition and the ReLU after it (`CBAM(activation="relu")(x, residual=shortcut)`).

No pretrained weights are published for them. `build_resnet` is what all of them call: it can also
build the same network without attention, with squeeze and excitation, or with the module made of
stock Keras layers, which is what comparisons need. `summary` counts the parameters and
multiply-adds of any model.
"""

from __future__ import annotations

import inspect
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from cbam_ops._counting import Summary, summary
from cbam_ops._dialects import options_of_dialect
from cbam_ops.layers import CBAM, ChannelAttention

__all__ = [
    "CBAMCIFARResNet20",
    "CBAMCIFARResNet32",
    "CBAMCIFARResNet44",
    "CBAMCIFARResNet56",
    "CBAMCIFARResNet110",
    "CBAMMobileNet",
    "CBAMResNeXt50",
    "CBAMResNeXt101",
    "CBAMResNet18",
    "CBAMResNet34",
    "CBAMResNet50",
    "CBAMResNet101",
    "CBAMResNet152",
    "SeedCBAMResNet50",
    "SeedCBAMResNet101",
    "SeedCBAMResNet152",
    "Summary",
    "build_resnet",
    "decode_predictions",
    "preprocess_input",
    "summary",
]

BOTTLENECK_EXPANSION = 4


class Architecture(NamedTuple):
    """What tells the residual networks of a family apart.

    Attributes:
        blocks: of each stage.
        bottleneck: whether a block has three convolutions (1x1, 3x3, 1x1) or two 3x3.
        filters: of each stage's blocks; a bottleneck ends with four times as many.
        stem: filters of the first convolution.
        groups: of a bottleneck's 3x3 convolution.
        group_width: filters of each group in a stage of 64 `filters`, else in proportion.
    """

    blocks: tuple[int, ...]
    bottleneck: bool
    filters: tuple[int, ...] = (64, 128, 256, 512)
    stem: int = 64
    groups: int = 1
    group_width: int = 64

    def outputs(self, stage: int) -> int:
        """Channels of a stage's result."""
        return self.filters[stage] * (BOTTLENECK_EXPANSION if self.bottleneck else 1)


DEPTHS = {
    18: Architecture((2, 2, 2, 2), bottleneck=False),
    34: Architecture((3, 4, 6, 3), bottleneck=False),
    50: Architecture((3, 4, 6, 3), bottleneck=True),
    101: Architecture((3, 4, 23, 3), bottleneck=True),
    152: Architecture((3, 8, 36, 3), bottleneck=True),
}
_MINIMUM_SIZE = 32  # five halvings, as in keras.applications

_ARGUMENTS_DOC = """
    Args:
        include_top: whether to end in global average pooling and a dense classifier.
        weights: `None` (random initialization) or the path of a weights file of this very network,
            as `Model.save_weights` writes it. No pretrained weights exist by name.
        input_tensor: optional Keras tensor (the output of `keras.Input()` or of another layer) to
            use as the image input.
        input_shape: optional shape without the batch, `(H, W, channels)` for `channels_last` or
            `(channels, H, W)` for `channels_first` (`keras.config.image_data_format()` decides).
            H and W are at least 32, or `None` for any size, with or without the top. Default:
            {size} x {size} x 3 with the top, any size and 3 channels without it.
        pooling: what follows the last block when `include_top` is `False`: `None` (the 4-D
            feature map is the output), `"avg"` or `"max"` (global pooling, 2-D output). Ignored
            with the top.
        classes: number of classes, with the top only.
        classifier_activation: activation of the classifier, with the top only; `None` returns
            logits. The classifier computes in the type of the variables, so that a mixed precision
            policy still gives float32 probabilities.
        name: name of the model.
        ratio: reduction ratio of the channel attention: hidden units = C // ratio. `None`: that of
            the dialect, 16 where it names none.
        kernel_size: odd size of the spatial attention's convolution.
        dialect: whose module the blocks have: one of `cbam_ops.dialects` that is of a CBAM. `None`:
            this network's own, `"{dialect}"`.
        width: what the filters of the blocks are multiplied by (rounded down); the stem has its
            own.

    Returns:
        A `keras.Model`. Its input is a batch of images as `preprocess_input` makes them; its
        output has shape `[N, classes]`, or without the top `[N, H/{step}, W/{step}, F]` (`[N, F,
        H/{step}, W/{step}]` for `channels_first`; sizes rounded up) or `[N, F]`, F = {features} at
        width 1.

    Raises:
        ValueError: for a `weights` that is neither `None` nor a file of this very network, an
            `input_shape` or `input_tensor` that does not fit, an unknown `pooling`, `classes` below
            1, a `ratio` larger than the channels of the narrowest block, an even `kernel_size`, an
            unknown `dialect`, a `width` of 0 or less.

    TensorFlow's CPU kernels convolve `channels_last` images only: a `channels_first` model can be
    built anywhere, and runs on a GPU.

    Source: {source}
    """


def preprocess_input(x: Any, data_format: str | None = None) -> Any:
    """Scales images from [0, 255] as the released networks were trained: ImageNet mean and std.

    The pixels are divided by 255, then each channel (RGB order) is centred and scaled by ImageNet's
    mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225): the mode `"torch"` of
    `keras.applications.imagenet_utils`. The seed's network names no preprocessing; this one serves.

    Args:
        x: numpy array or tensor, `[H, W, 3]` or `[N, H, W, 3]` (channels first: `[3, H, W]` or
            `[N, 3, H, W]`), RGB, values in [0, 255], of any integer or floating type.
        data_format: `"channels_last"`, `"channels_first"` or `None`
            (`keras.config.image_data_format()`).

    Returns:
        Array or tensor of the shape of `x`; of its type where that is floating, else
        `keras.config.floatx()`. Unlike in `keras.applications`, an array `x` is never written to.

    Raises:
        ValueError: for a `data_format` not named above, or an `x` without 3 channels.
    """
    data_format = _data_format(data_format)
    kind = type(x).__name__
    try:
        if isinstance(x, np.ndarray):
            kind = f"an array of {x.dtype}"
            floating = np.issubdtype(x.dtype, np.floating)
            x = np.array(x, dtype=x.dtype if floating else keras.config.floatx())  # always a copy
        else:
            x = keras.ops.convert_to_tensor(x) if not keras.utils.is_keras_tensor(x) else x
            dtype = keras.backend.standardize_dtype(x.dtype)
            if dtype == "string":
                raise TypeError(dtype)
            if "float" not in dtype:
                x = keras.ops.cast(x, keras.config.floatx())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"preprocess_input: `x` must be an array or a tensor of numbers, got {kind}"
        ) from error
    rank = len(x.shape)
    channels = x.shape[-1 if data_format == "channels_last" else -3] if rank in (3, 4) else None
    if channels != 3:
        raise ValueError(
            f"preprocess_input: `x` must be a {data_format} image or batch of images with "
            f"3 channels, got shape {tuple(x.shape)}"
        )
    return keras.applications.imagenet_utils.preprocess_input(
        x, data_format=data_format, mode="torch"
    )


def decode_predictions(preds: Any, top: int = 5) -> list[list[tuple[str, str, float]]]:
    """Names the ImageNet classes with the highest scores: `keras.applications`' own function.

    The names come from a small file that Keras downloads at the first call.

    Args:
        preds: scores `[N, 1000]`, array or tensor, from a model trained on ImageNet in its usual
            order of classes.
        top: how many classes to return per image.

    Returns:
        For each image a list of `(class_name, class_description, score)`, best first.

    Raises:
        ValueError: for scores of another shape.
    """
    return keras.applications.imagenet_utils.decode_predictions(preds, top=top)


def _data_format(data_format: str | None = None) -> str:
    if data_format is None:
        return keras.config.image_data_format()
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(
            f'`data_format` must be "channels_last", "channels_first" or None, got {data_format!r}'
        )
    return data_format


# --- the module's four forms ----------------------------------------------------------------------
#
# Each takes the block's last feature map, the shortcut or None, the name of the CBAM layer, the
# name of the closing ReLU and the arguments of the `CBAM` layer, and returns relu(cbam(x) +
# shortcut).


def _fused_module(x: Any, shortcut: Any, name: str, out_name: str, options: dict[str, Any]) -> Any:
    return CBAM(activation="relu", name=name, **options)(x, residual=shortcut)


def _squeeze_excite(
    x: Any, shortcut: Any, name: str, out_name: str, options: dict[str, Any]
) -> Any:
    name = f"{name.removesuffix('cbam')}se"
    known = inspect.signature(ChannelAttention).parameters
    options = {key: value for key, value in options.items() if key in known}
    options |= {"pooling": "avg", "activation": "relu"}
    return ChannelAttention(name=name, **options)(x, residual=shortcut)


def _no_module(x: Any, shortcut: Any, name: str, out_name: str, options: dict[str, Any]) -> Any:
    if shortcut is not None:
        x = keras.layers.Add(name=f"{out_name}_add")([x, shortcut])
    return keras.layers.ReLU(name=out_name)(x)


def _stock_module(x: Any, shortcut: Any, name: str, out_name: str, options: dict[str, Any]) -> Any:
    """The stock layers that one CBAM layer stands for, with weights of the same shapes."""
    cbam = CBAM(name=name, **options)
    axis = _channel_axis(cbam.data_format)
    channels = x.shape[axis]
    column = (1, 1, channels) if axis == -1 else (channels, 1, 1)

    def dense(units: int, activation: str | None, part: str) -> Any:
        return keras.layers.Dense(
            units,
            activation,
            use_bias=cbam.use_bias,
            kernel_initializer=cbam.mlp_kernel_initializer.clone(),
            name=f"{name}_{part}",
        )

    average = keras.layers.GlobalAveragePooling2D(cbam.data_format, name=f"{name}_channel_mean")
    maximum = keras.layers.GlobalMaxPooling2D(cbam.data_format, name=f"{name}_channel_max")
    pools = {"avg": [average], "max": [maximum], "avg+max": [average, maximum]}[cbam.pooling]
    hidden = cbam._hidden_units(channels)
    steps = {"hidden": dense(hidden, cbam.hidden_activation, "mlp_0")} if hidden else {}
    steps["logits"] = dense(channels, cbam.mlp_activation, f"mlp_{len(steps)}")
    steps["gates"] = keras.layers.Activation(cbam.gate_activation, name=f"{name}_channel_gate")
    branches = [pool(x) for pool in pools]
    for step, layer in steps.items():
        branches = [layer(branch) for branch in branches]
        if step == cbam.mlp_merge and len(branches) > 1:
            branches = [keras.layers.Add(name=f"{name}_mlp_sum")(branches)]
    gate = keras.layers.Reshape(column, name=f"{name}_channel_gate_map")(branches[0])
    x = keras.layers.Multiply(name=f"{name}_channel_scale")([x, gate])

    descriptors = keras.layers.Concatenate(axis, name=f"{name}_spatial_descriptors")(
        [keras.ops.mean(x, axis, keepdims=True), keras.ops.max(x, axis, keepdims=True)]
    )
    gate = keras.layers.Conv2D(
        1,
        cbam.kernel_size,
        padding="same",
        use_bias=cbam._has_spatial_bias,
        data_format=cbam.data_format,
        kernel_initializer=cbam.spatial_kernel_initializer,
        name=f"{name}_spatial_conv",
    )(descriptors)
    if cbam.spatial_batch_norm:
        gate = keras.layers.BatchNormalization(
            axis,
            cbam.batch_norm_momentum,
            cbam.batch_norm_epsilon,
            gamma_initializer=cbam.batch_norm_gamma_initializer,
            name=f"{name}_spatial_bn",
        )(gate)
    gate = keras.layers.Activation(cbam.gate_activation, name=f"{name}_spatial_gate")(gate)
    x = keras.layers.Multiply(name=f"{name}_spatial_scale")([x, gate])
    return _no_module(x, shortcut, name, out_name, options)


_MODULES: dict[str | None, Callable[[Any, Any, str, str, dict[str, Any]], Any]] = {
    "cbam": _fused_module,
    "se": _squeeze_excite,
    "stock": _stock_module,
    None: _no_module,
}
_PREFIXES = {"cbam": "cbam_", "se": "se_", "stock": "stock_cbam_", None: ""}


# --- the networks ---------------------------------------------------------------------------------


def _channel_axis(data_format: str) -> int:
    return -1 if data_format == "channels_last" else 1


def _he_normal(mode: str = "fan_out") -> Any:
    # A new object every time: a Keras initializer draws the same values again at every call.
    return keras.initializers.VarianceScaling(2.0, mode, "untruncated_normal")


def _torch_default() -> Any:
    # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), what PyTorch gives a convolution or a dense layer.
    return keras.initializers.VarianceScaling(1.0 / 3.0, "fan_in", "uniform")


class _Network:
    """The layers of a network, from the images to the last feature map."""

    rows: dict[int, Architecture]  # by depth
    name: str  # without that of the attention, as is the next, of the constructor
    constructor: str
    size: int = 224  # of images
    step: int = 32  # pixels of an image to one of the last feature map
    classes: int = 1000
    title: str  # in the constructors' docstrings, as is the next
    source: str
    classifier: str  # name of the last layer
    dialect: str  # of its modules

    def __init__(
        self,
        architecture: Architecture,
        attention: str | None,
        dialect: str | None,
        options: Mapping[str, Any],
        of_block: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """A network whose modules have further options: all of them, and those of some blocks."""
        self.architecture = architecture
        self.module = _MODULES[attention]
        self.data_format = _data_format()
        self.channel_axis = _channel_axis(self.data_format)
        self.of_block = of_block or {}
        self.options = {
            **options_of_dialect("CBAM", self.dialect if dialect is None else dialect),
            **options,
            "data_format": self.data_format,
        }

    @classmethod
    def widened(cls, depth: int, width: float) -> Architecture:
        """A row with more filters in its blocks, or fewer."""
        row = cls.rows[depth]
        return row._replace(filters=tuple(max(1, int(count * width)) for count in row.filters))

    def features(self, x: Any) -> Any:
        x = self.stem(x)
        for stage, blocks in enumerate(self.architecture.blocks):
            for block in range(blocks):
                x = self.block(x, stage, block, 2 if stage > 0 and block == 0 else 1)
        return x

    def stem(self, x: Any) -> Any:
        raise NotImplementedError

    def block(self, x: Any, stage: int, block: int, stride: int) -> Any:
        raise NotImplementedError

    def top(self, x: Any, classes: int, activation: Any) -> Any:
        """The classifier of the last feature map."""
        x = keras.layers.GlobalAveragePooling2D(self.data_format, name="avg_pool")(x)
        return keras.layers.Dense(
            classes,
            activation=activation,
            kernel_initializer=self.classifier_initializer(),
            dtype=keras.config.dtype_policy().variable_dtype,
            name=self.classifier,
        )(x)

    def classifier_initializer(self) -> Any:
        return "glorot_uniform"


class Released(_Network):
    rows = DEPTHS
    name = "{attention}resnet{depth}"
    constructor = "CBAMResNet{depth}"
    title = "ResNet-{depth} with a CBAM in every block, as the paper's authors released it"
    source = (
        "Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, sections 3 and 4.1;\n"
        "    the authors' release, Jongchan/attention-module, `MODELS/model_resnet.py`, which\n"
        "    stacks the spatial descriptors maximum first, where this package has the mean first."
    )
    classifier = "predictions"
    dialect = "official"

    def conv(
        self,
        x: Any,
        filters: int | None,
        size: int,
        stride: int,
        name: str,
        initializer: Any,
        groups: int = 1,
    ) -> Any:
        """Convolution and batch norm; no bias, zeros of size // 2 on every side (not `same`).

        Without `filters` a depthwise convolution.
        """
        padding = "same"  # at stride 1, TensorFlow's is symmetric
        if stride > 1 and size > 1:
            x = keras.layers.ZeroPadding2D(
                size // 2, data_format=self.data_format, name=f"{name}_pad"
            )(x)
            padding = "valid"
        options: dict[str, Any] = {
            "strides": stride,
            "padding": padding,
            "use_bias": False,
            "data_format": self.data_format,
            "name": f"{name}_conv",
        }
        if filters is None:
            layer = keras.layers.DepthwiseConv2D(size, depthwise_initializer=initializer, **options)
        else:
            layer = keras.layers.Conv2D(
                filters, size, groups=groups, kernel_initializer=initializer, **options
            )
        x = layer(x)
        return keras.layers.BatchNormalization(
            axis=self.channel_axis, momentum=0.9, epsilon=1e-5, name=f"{name}_bn"
        )(x)

    def stem(self, x: Any) -> Any:
        x = self.conv(x, self.architecture.stem, 7, 2, "conv1", _he_normal())
        x = keras.layers.ReLU(name="conv1_relu")(x)
        # The release pads its max-pool with -inf. After a ReLU zeros give the same output, and the
        # same gradient: where a padded zero wins the window is all zeros, whose gradient the ReLU
        # stops.
        x = keras.layers.ZeroPadding2D(1, data_format=self.data_format, name="pool1_pad")(x)
        return keras.layers.MaxPooling2D(3, 2, data_format=self.data_format, name="pool1_pool")(x)

    def block(self, x: Any, stage: int, block: int, stride: int) -> Any:
        name = f"conv{stage + 2}_block{block + 1}"
        filters, out = self.architecture.filters[stage], self.architecture.outputs(stage)
        groups = self.architecture.groups
        if self.architecture.bottleneck:
            width = filters * self.architecture.group_width // 64 * groups
            convs = [(width, 1, 1, 1), (width, 3, stride, groups), (out, 1, 1, 1)]
        else:
            convs = [(out, 3, stride, 1), (out, 3, 1, 1)]
        shortcut = x
        if stride != 1 or x.shape[self.channel_axis] != out:
            shortcut = self.conv(x, out, 1, stride, f"{name}_0", _torch_default())
        for index, (width, size, steps, groups) in enumerate(convs, start=1):
            if index > 1:
                x = keras.layers.ReLU(name=f"{name}_{index - 1}_relu")(x)
            x = self.conv(x, width, size, steps, f"{name}_{index}", _he_normal(), groups)
        return self.gated(x, shortcut, name)

    def gated(self, x: Any, shortcut: Any, name: str) -> Any:
        """The module, the addition and the ReLU at the end of a block."""
        options = {
            "mlp_kernel_initializer": _torch_default(),
            "spatial_kernel_initializer": _he_normal(),
            **self.options,
            **self.of_block.get(name, {}),
        }
        return self.module(x, shortcut, f"{name}_cbam", f"{name}_out", options)

    def classifier_initializer(self) -> Any:
        return _he_normal("fan_in")


class _ResNeXt(Released):
    rows = {depth: DEPTHS[depth]._replace(groups=32, group_width=4) for depth in (50, 101)}
    name = "{attention}resnext{depth}"
    constructor = "CBAMResNeXt{depth}"
    title = "ResNeXt-{depth} (32x4d) with a CBAM in every block, as the paper has it"


class _CIFAR(Released):
    rows = {
        6 * blocks + 2: Architecture((blocks,) * 3, False, (16, 32, 64), 16)
        for blocks in (3, 5, 7, 9, 18)
    }
    name = "{attention}cifar_resnet{depth}"
    constructor = "CBAMCIFARResNet{depth}"
    size, step, classes = 32, 4, 10
    title = "ResNet-{depth} for images of 32 x 32, with a CBAM in every block"
    source = (
        "He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, with\n"
        "    projections where the shape changes; the module as in `CBAMResNet18`."
    )

    def stem(self, x: Any) -> Any:
        x = self.conv(x, self.architecture.stem, 3, 1, "conv1", _he_normal())
        return keras.layers.ReLU(name="conv1_relu")(x)


class _MobileNet(Released):
    rows = {28: Architecture((1, 2, 2, 6, 2), False, (64, 128, 256, 512, 1024), 32)}
    name = "{attention}mobilenet"
    constructor = "CBAMMobileNet"
    title = "MobileNet with a CBAM after every batch norm, as the paper has it"
    source = (
        "Howard et al., MobileNets, 2017, table 1; Woo et al. 2018, section 4.1, which put the\n"
        "    module after each of the 27 convolutions."
    )

    @classmethod
    def widened(cls, depth: int, width: float) -> Architecture:
        row = super().widened(depth, width)
        return row._replace(stem=max(1, int(row.stem * width)))

    def stem(self, x: Any) -> Any:
        x = self.conv(x, self.architecture.stem, 3, 2, "conv1", _he_normal())
        return self.gated(x, None, "conv1")

    def block(self, x: Any, stage: int, block: int, stride: int) -> Any:
        number = sum(self.architecture.blocks[:stage]) + block + 1
        for name, size in ((f"conv_dw_{number}", 3), (f"conv_pw_{number}", 1)):
            filters = None if size == 3 else self.architecture.filters[stage]
            x = self.conv(x, filters, size, stride if size == 3 else 1, name, _he_normal())
            x = self.gated(x, None, name)
        return x


class _Seed(_Network):
    rows = {depth: DEPTHS[depth] for depth in (50, 101, 152)}
    name = "seed_{attention}resnet{depth}"
    constructor = "SeedCBAMResNet{depth}"
    title = "the seed's ResNet-{depth} with a CBAM in every block"
    source = (
        "the Keras network this project grew from (module docstring); the module itself is\n"
        "    Woo et al. 2018, section 3, with a ReLU added after the MLP."
    )
    classifier = "fc"
    dialect = "seed"

    def conv(self, x: Any, filters: int, size: int, stride: int, name: str) -> Any:
        return keras.layers.Conv2D(
            filters, size, stride, padding="same", data_format=self.data_format, name=name
        )(x)

    def batch_norm(self, x: Any, name: str) -> Any:
        return keras.layers.BatchNormalization(axis=self.channel_axis, name=name)(x)

    def stem(self, x: Any) -> Any:
        x = self.batch_norm(self.conv(x, 64, 7, 2, "stem_conv"), "stem_bn")
        x = keras.layers.ReLU(name="stem_relu")(x)
        return keras.layers.MaxPooling2D(
            3, 2, "same", data_format=self.data_format, name="stem_pool"
        )(x)

    def block(self, x: Any, stage: int, block: int, stride: int) -> Any:
        name = f"conv{stage + 1}" + (f"_block{block}" if block else "")
        filters, out = self.architecture.filters[stage], self.architecture.outputs(stage)
        shortcut = self.conv(x, out, 1, stride, f"{name}_residual")
        convs = [(filters, 1, stride), (filters, 3, 1), (out, 1, 1)]
        for index, conv in enumerate(convs, start=1):
            if index > 1:
                x = keras.layers.ReLU(name=f"{name}_relu{index - 1}")(x)
            x = self.conv(x, *conv, f"{name}_conv{index}")
            x = self.batch_norm(x, f"{name}_bn{index}")
        return self.module(x, shortcut, f"{name}_cbam", f"{name}_relu3", self.options)


_NETWORKS: dict[str, type[_Network]] = {
    "released": Released,
    "resnext": _ResNeXt,
    "cifar": _CIFAR,
    "mobilenet": _MobileNet,
    "seed": _Seed,
}


def name_of(architecture: Architecture) -> str:
    """What a network with CBAM is called by default; of no row's architecture "cbam_resnet"."""
    for family in _NETWORKS.values():
        for depth, row in family.rows.items():
            if row == architecture:
                return family.name.format(attention=_PREFIXES["cbam"], depth=depth)
    return "cbam_resnet"


# --- around the network ---------------------------------------------------------------------------


def image_input(
    input_tensor: Any,
    input_shape: Any,
    include_top: bool,
    data_format: str,
    channels: int = 3,
    default_size: int = _Network.size,
) -> Any:
    """The Keras tensor of the images, checked."""
    layout = "(H, W, channels)" if data_format == "channels_last" else "(channels, H, W)"
    channel_index = 2 if data_format == "channels_last" else 0

    def check(argument: str, shape: Any) -> tuple[int | None, ...]:
        try:
            sizes = tuple(None if size is None else operator.index(size) for size in shape)
        except TypeError:
            sizes = ()
        if len(sizes) != 3:
            raise ValueError(
                f"`{argument}` must have shape {layout} for {data_format}, without the batch, "
                f"got {shape}"
            )
        for index, size in enumerate(sizes):
            if index == channel_index and (size is None or size < 1):
                raise ValueError(
                    f"`{argument}` must have a known number of channels, at least 1, at index "
                    f"{index} ({layout} for {data_format}), got {sizes}"
                )
            if index != channel_index and size is not None and size < _MINIMUM_SIZE:
                raise ValueError(
                    f"`{argument}` must be at least {_MINIMUM_SIZE} x {_MINIMUM_SIZE} pixels "
                    f"({layout} for {data_format}), got {sizes}"
                )
        return sizes

    if input_shape is not None:
        input_shape = check("input_shape", input_shape)
    if input_tensor is not None:
        if not keras.utils.is_keras_tensor(input_tensor):
            raise ValueError(
                "`input_tensor` must be a Keras tensor, as keras.Input() returns it, got "
                f"{type(input_tensor).__name__}"
            )
        shape = check("input_tensor", tuple(input_tensor.shape)[1:])
        if input_shape is not None and input_shape != shape:
            raise ValueError(
                "`input_shape` must be left out or equal the shape of `input_tensor`, "
                f"{shape}, got {input_shape}"
            )
        return input_tensor
    if input_shape is None:
        size = default_size if include_top else None
        sizes = (size, size)
        input_shape = (*sizes, channels) if channel_index == 2 else (channels, *sizes)
    return keras.Input(shape=input_shape)


def build_resnet(
    depth: int,
    *,
    network: str = "released",
    attention: str | None = "cbam",
    include_top: bool = True,
    weights: str | os.PathLike[str] | None = None,
    input_tensor: Any = None,
    input_shape: Sequence[int | None] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: Any = "softmax",
    name: str | None = None,
    ratio: int | None = None,
    kernel_size: int = 7,
    dialect: str | None = None,
    width: float = 1.0,
) -> keras.Model:
    """Builds a network of one family and depth with the wanted attention in its blocks.

    The constructors `CBAMResNet50` and so on call it; call it yourself to compare a network with
    its plain form, with squeeze and excitation or with its form in stock Keras layers, all else
    equal.

    Args:
        depth: 18, 34, 50, 101 or 152 of the released network, 50 or 101 of ResNeXt, 20, 32, 44, 56
            or 110 of that for CIFAR's images, 50, 101 or 152 of the seed's; 28 of MobileNet, which
            is no residual network.
        network: `"released"` (the paper's, as its authors released it), `"resnext"`, `"cifar"`,
            `"mobilenet"` or `"seed"`.
        attention: `"cbam"` (the fused layer), `"se"` (squeeze and excitation in its place, with the
            same hidden units), `"stock"` (CBAM in stock Keras layers, whose weights have the same
            shapes) or `None` (the plain network).
        include_top: this and the next six as in `CBAMResNet50`.
        weights: path of a weights file, or `None`.
        input_tensor: Keras tensor of the images, or `None`.
        input_shape: shape of the images, or `None`.
        pooling: `None`, `"avg"` or `"max"`.
        classes: number of classes; `None` is 1000, for the network for CIFAR's images 10.
        classifier_activation: activation of the classifier.
        name: name of the model; default e.g. `cbam_resnet50`, `se_resnet50`, `stock_cbam_resnet50`,
            `resnet50`, with `seed_` before it for the seed's network.
        ratio: reduction ratio of the channel attention, or `None`.
        kernel_size: size of the spatial attention's convolution.
        dialect: whose module the blocks have, or `None` for the network's own.
        width: what the filters of the blocks are multiplied by.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: for an argument that is none of the above, and as `CBAMResNet50` raises.
    """
    if network not in tuple(_NETWORKS):
        known = " or ".join(f'"{name}"' for name in _NETWORKS)
        raise ValueError(f"`network` must be {known}, got {network!r}")
    family = _NETWORKS[network]
    if depth not in tuple(family.rows):
        raise ValueError(
            f"`depth` must be one of {tuple(family.rows)} for the {network} network, got {depth}"
        )
    if attention not in tuple(_MODULES):
        raise ValueError(f'`attention` must be "cbam", "se", "stock" or None, got {attention!r}')
    is_path = isinstance(weights, (str, os.PathLike))
    if weights is not None and not (is_path and os.path.isfile(weights)):
        raise ValueError(
            "`weights` must be None (random initialization) or the path of an existing weights "
            f"file; no pretrained weights exist by name; got {weights!r}"
        )
    if pooling not in (None, "avg", "max"):
        raise ValueError(f'`pooling` must be None, "avg" or "max", got {pooling!r}')
    classes = family.classes if classes is None else classes
    number = isinstance(classes, (int, np.integer)) and not isinstance(classes, bool)
    if include_top and not (number and classes > 0):
        raise ValueError(f"`classes` must be a positive integer, got {classes!r}")
    if not (isinstance(width, (int, float, np.number)) and width > 0):
        raise ValueError(f"`width` must be a number above 0, got {width!r}")
    if name is None:
        name = family.name.format(attention=_PREFIXES[attention], depth=depth)

    data_format = _data_format()
    images = image_input(
        input_tensor, input_shape, include_top, data_format, default_size=family.size
    )
    options = {"kernel_size": kernel_size} | ({} if ratio is None else {"ratio": ratio})
    layers = family(family.widened(depth, width), attention, dialect, options)
    x = layers.features(images)

    if include_top:
        x = layers.top(x, classes, classifier_activation)
    elif pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(data_format, name="avg_pool")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(data_format, name="max_pool")(x)

    inputs = images
    if input_tensor is not None:  # the model starts where that tensor comes from
        inputs = keras.utils.get_source_inputs(input_tensor)
        inputs = inputs[0] if len(inputs) == 1 else inputs
    model = keras.Model(inputs, x, name=name)
    if weights is not None:
        _load_weights(model, weights, keras.Model(inputs, images))
    return model


def _load_weights(
    model: keras.Model, path: str | os.PathLike[str], before_images: keras.Model
) -> None:
    """Loads the weights; if that fails, the layers that the user put before stay as they were."""
    own = before_images.get_weights()
    try:
        model.load_weights(path)
    except Exception as error:  # Keras raises many kinds, after some layers have been loaded
        before_images.set_weights(own)
        # Whole arrays and lists of layers follow what Keras says first.
        cause = re.split("Target variable:|List of objects", str(error))[0]
        raise ValueError(
            f"`weights` must be a weights file of {model.name} with these arguments, got "
            f"{os.fspath(path)!r}: {' '.join(cause.split())}"
        ) from error


class _Constructor(Protocol):
    def __call__(
        self,
        include_top: bool = True,
        weights: str | os.PathLike[str] | None = None,
        input_tensor: Any = None,
        input_shape: Sequence[int | None] | None = None,
        pooling: str | None = None,
        classes: int = ...,
        classifier_activation: Any = "softmax",
        name: str = ...,
        *,
        ratio: int | None = None,
        kernel_size: int = 7,
        dialect: str | None = None,
        width: float = 1.0,
    ) -> keras.Model: ...


def _constructor(network: str, depth: int) -> _Constructor:
    """The public function that builds a network with CBAM; the protocol is for type checkers."""
    family = _NETWORKS[network]

    def construct(
        include_top: bool = True,
        weights: str | os.PathLike[str] | None = None,
        input_tensor: Any = None,
        input_shape: Sequence[int | None] | None = None,
        pooling: str | None = None,
        classes: int = family.classes,
        classifier_activation: Any = "softmax",
        name: str = family.name.format(attention=_PREFIXES["cbam"], depth=depth),
        *,
        ratio: int | None = None,
        kernel_size: int = 7,
        dialect: str | None = None,
        width: float = 1.0,
    ) -> keras.Model:
        return build_resnet(
            depth,
            network=network,
            include_top=include_top,
            weights=weights,
            input_tensor=input_tensor,
            input_shape=input_shape,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            name=name,
            ratio=ratio,
            kernel_size=kernel_size,
            dialect=dialect,
            width=width,
        )

    construct.__name__ = construct.__qualname__ = family.constructor.format(depth=depth)
    title = family.title.format(depth=depth)
    construct.__doc__ = f"Instantiates {title}.\n" + _ARGUMENTS_DOC.format(
        features=family.rows[depth].outputs(-1),
        source=family.source,
        dialect=family.dialect,
        size=family.size,
        step=family.step,
    )
    return construct


CBAMResNet18 = _constructor("released", 18)
CBAMResNet34 = _constructor("released", 34)
CBAMResNet50 = _constructor("released", 50)
CBAMResNet101 = _constructor("released", 101)
CBAMResNet152 = _constructor("released", 152)
CBAMResNeXt50 = _constructor("resnext", 50)
CBAMResNeXt101 = _constructor("resnext", 101)
CBAMMobileNet = _constructor("mobilenet", 28)
CBAMCIFARResNet20 = _constructor("cifar", 20)
CBAMCIFARResNet32 = _constructor("cifar", 32)
CBAMCIFARResNet44 = _constructor("cifar", 44)
CBAMCIFARResNet56 = _constructor("cifar", 56)
CBAMCIFARResNet110 = _constructor("cifar", 110)
SeedCBAMResNet50 = _constructor("seed", 50)
SeedCBAMResNet101 = _constructor("seed", 101)
SeedCBAMResNet152 = _constructor("seed", 152)
