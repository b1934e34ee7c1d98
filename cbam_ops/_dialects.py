"""How published code differs from the paper and from each other: options of the layers by name.

A dialect says what a module computes and which weights it has. It does not say where a network puts
it, nor where the gradient of a maximum goes among equals (`ties`): the latter is "even" here unless
it is asked for, as in the fused ops.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Dialect", "dialects"]


class Dialect(dict[str, Any]):
    """The arguments of a layer that make it compute what some published code does.

    A plain dictionary: `cbam_ops.CBAM(**cbam_ops.dialects["timm"])`. Arguments that it leaves out
    have the layer's defaults.

    Attributes:
        about: what the code does, in a sentence.
        source: where it is.
        maximum_first: whether it stacks the maximum over channels before the mean. Here the mean is
            first, so that a spatial kernel of that code is to be copied with its two input channels
            swapped.
        layer: the layer whose arguments these are, "CBAM" or "ChannelAttention".
    """

    def __init__(
        self,
        about: str,
        source: str,
        *,
        layer: str = "CBAM",
        maximum_first: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(options)
        self.about = about
        self.source = source
        self.layer = layer
        self.maximum_first = maximum_first


def _squeeze_excite(about: str, source: str, **options: Any) -> Dialect:
    return Dialect(about, source, layer="ChannelAttention", pooling="avg", **options)


class _Table(Mapping[str, Dialect]):
    """Dialects by name, each given as a copy: what a user changes in it is the user's alone."""

    def __init__(self, dialects: dict[str, Dialect]) -> None:
        self._dialects = dialects

    def __getitem__(self, name: str) -> Dialect:
        return copy.copy(self._dialects[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dialects)

    def __len__(self) -> int:
        return len(self._dialects)

    def __repr__(self) -> str:
        return repr(self._dialects)


dialects: Mapping[str, Dialect] = _Table(
    {
        "paper": Dialect(
            "The module as the paper describes it; the layers' defaults.",
            "Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, section 3",
            ratio=16,
            kernel_size=7,
        ),
        "official": Dialect(
            "The authors' release: batch norm before the spatial sigmoid, whose scale starts at 0; "
            "the maximum is stacked first, and the first of equals takes its gradient.",
            "Jongchan/attention-module, MODELS/cbam.py",
            maximum_first=True,
            spatial_batch_norm=True,
            batch_norm_gamma_initializer="zeros",
        ),
        "pytorchcv": Dialect(
            "The authors' module with other initial weights and moving averages; the maximum is "
            "stacked first, and the first of equals takes its gradient.",
            "osmr/imgclsmob, pytorch/pytorchcv/models/cbamresnet.py",
            maximum_first=True,
            spatial_batch_norm=True,
            batch_norm_momentum=0.9,
        ),
        "tf2cv": Dialect(
            "pytorchcv's module in TensorFlow; the maximum is stacked first.",
            "osmr/imgclsmob, tensorflow2/tf2cv/models/cbamresnet.py",
            maximum_first=True,
            spatial_batch_norm=True,
            batch_norm_momentum=0.9,
        ),
        "timm": Dialect(
            "No biases in the MLP, C / 16 rounded half up, batch norm before the spatial sigmoid.",
            "huggingface/pytorch-image-models, timm/layers/cbam.py, CbamModule",
            hidden_rounding="half_up",
            use_bias=False,
            spatial_batch_norm=True,
            batch_norm_momentum=0.9,
        ),
        "luuuyi": Dialect(
            "No biases at all and no batch norm; the first of equals takes a maximum's gradient.",
            "luuuyi/CBAM.PyTorch, model/resnet_cbam.py",
            use_bias=False,
            spatial_use_bias=False,
        ),
        "kobiso": Dialect(
            "Reduction ratio 8, no bias in the spatial convolution, He-normal kernels.",
            "kobiso/CBAM-keras, models/attention_module.py, cbam_block",
            ratio=8,
            spatial_use_bias=False,
            mlp_kernel_initializer="he_normal",
            spatial_kernel_initializer="he_normal",
        ),
        "seed": Dialect(
            "A ReLU after each of the MLP's two outputs, so that no channel gate is below 0.5.",
            "the Keras text that this project grew from: cbam_ops.models.SeedCBAMResNet50",
            mlp_activation="relu",
        ),
        "ultralytics": Dialect(
            "The channel gate is one layer of the mean, without hidden units; of equal channels "
            "the first takes the maximum's gradient.",
            "ultralytics/ultralytics (YOLOv8), ultralytics/nn/modules/conv.py, CBAM",
            pooling="avg",
            hidden=0,
            spatial_use_bias=False,
        ),
        "squeeze_excite": _squeeze_excite(
            "Squeeze and excitation: the channel gate of the mean alone.",
            "Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, section 3",
            ratio=16,
        ),
        "mobilenet_v3": _squeeze_excite(
            "Squeeze and excitation with a hard sigmoid and C / 4 hidden units, in multiples of 8.",
            "Howard et al., Searching for MobileNetV3, ICCV 2019, section 5.3; keras.applications",
            ratio=4,
            hidden_rounding="multiple_of_8",
            gate_activation="hard_sigmoid",
        ),
        "efficientnet": _squeeze_excite(
            "Squeeze and excitation with swish and a quarter of the block's *input* channels, "
            "which is C // 24 where the block expands them by 6: give `hidden` elsewhere.",
            "Tan and Le, EfficientNet, ICML 2019, section 4; keras.applications",
            ratio=24,
            hidden_activation="swish",
        ),
    }
)


def options_of_dialect(layer: str, name: str) -> Dialect:
    """The dialect of that name, if it is one of the layer; SpatialAttention is half of a CBAM.

    Raises:
        ValueError: there is no such dialect, or it has no such layer.
    """
    if name not in tuple(dialects):
        raise ValueError(f"`dialect` must be one of {', '.join(dialects)}, got {name!r}")
    dialect = dialects[name]
    if dialect.layer not in ("CBAM", layer):
        raise ValueError(f"`dialect` {name!r} is one of {dialect.layer} alone, not of {layer}")
    return dialect
