"""The demo's networks and their data: handwritten digits, and patches of two photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

PATCH = 64
PATCH_BATCH = 32
OBJECTS = ("tower", "flower")
_NEITHER = -1


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits, `[N, 8, 8, 1]` in [0, 1], split once and for all."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits() -> Digits:
    """1797 real scans: 1347 to train on, 450 to test on.

    The split is stratified by digit and drawn with the fixed seed 0, whatever `--seed` says: two
    runs report on the same test images.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    images = (data.images / 16.0).astype("float32")[..., np.newaxis]
    labels = data.target.astype("int64")
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=450, stratify=labels, random_state=0
    )
    return Digits(train_x, train_y, test_x, test_y)


@dataclasses.dataclass(frozen=True)
class _Region:
    """A box in a photograph (rows and columns of its pixels) and what it shows."""

    photograph: str
    top: int
    left: int
    bottom: int
    right: int
    label: int  # index into OBJECTS


# Boxes drawn by hand in scikit-learn's two photographs (both 427 x 640 pixels).
_REGIONS = (
    _Region("china", 40, 95, 340, 330, 0),
    _Region("china", 0, 360, 200, 580, _NEITHER),  # sky and lake
    _Region("china", 310, 350, 427, 640, _NEITHER),  # trees
    _Region("flower", 100, 200, 330, 450, 1),
    _Region("flower", 0, 0, 427, 160, _NEITHER),  # leaves
    _Region("flower", 0, 490, 427, 640, _NEITHER),  # leaves
)


def load_photographs() -> dict[str, np.ndarray]:
    """scikit-learn's "china" and "flower", each `[427, 640, 3]` in [0, 1].

    By danielbuechele and by vultilion on Flickr, CC BY 2.0.
    """
    from sklearn.datasets import load_sample_image

    return {
        name: np.asarray(load_sample_image(f"{name}.jpg"), "float32") / 255
        for name in ("china", "flower")
    }


def draw_patches(
    photographs: dict[str, np.ndarray], seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches without end of square patches, with a target per object: 1 where a patch shows it.

    Half of the patches show an object. Brightness and left-right vary.

    Yields:
      `[PATCH_BATCH, PATCH, PATCH, 3]` images and `[PATCH_BATCH, objects]` targets.
    """
    random = np.random.default_rng(seed)
    with_object = [region for region in _REGIONS if region.label != _NEITHER]
    without = [region for region in _REGIONS if region.label == _NEITHER]
    while True:
        images = np.empty((PATCH_BATCH, PATCH, PATCH, 3), "float32")
        targets = np.zeros((PATCH_BATCH, len(OBJECTS)), "float32")
        for i in range(PATCH_BATCH):
            choice = with_object if i % 2 else without
            region = choice[random.integers(len(choice))]
            top = random.integers(region.top, region.bottom - PATCH + 1)
            left = random.integers(region.left, region.right - PATCH + 1)
            patch = photographs[region.photograph][top : top + PATCH, left : left + PATCH]
            if random.integers(2):
                patch = patch[:, ::-1]
            images[i] = patch * random.uniform(0.75, 1.25) + random.uniform(-0.1, 0.1)
            if region.label != _NEITHER:
                targets[i, region.label] = 1
        yield images, targets


def _convolution(x: Any, filters: int, size: int, stride: int = 1) -> Any:
    from keras import layers

    x = layers.Conv2D(filters, size, strides=stride, padding="same", use_bias=False)(x)
    return layers.BatchNormalization(momentum=0.9)(x)


def _block(x: Any, filters: int, stride: int, name: str, **options: Any) -> tuple[Any, Any]:
    """A basic residual block; the CBAM gates the branch, adds the shortcut and takes the ReLU.

    Returns:
      The block's output, and the spatial gate of its CBAM.
    """
    from keras import layers

    import cbam_ops

    shortcut = x
    if stride != 1 or x.shape[-1] != filters:
        shortcut = _convolution(x, filters, 1, stride)
    y = layers.ReLU()(_convolution(x, filters, 3, stride))
    y = _convolution(y, filters, 3)
    module = cbam_ops.CBAM(ratio=8, activation="relu", name=name, **options)
    y, _, spatial_gate = module(y, residual=shortcut, return_gates=True)
    return y, spatial_gate


def _network(
    name: str, shape: tuple[Any, ...], filters: int, stride: int, logits: int, **options: Any
) -> tuple[Any, Any]:
    """Stem and two residual blocks with CBAM.

    Returns:
      The model, and another on the same layers that maps images to the spatial gates by name.
    """
    import keras
    from keras import layers

    gates = {}
    image = keras.Input(shape, name="image")
    x = layers.ReLU()(_convolution(image, filters, 3, stride))
    x, gates["cbam_1"] = _block(x, filters, 1, "cbam_1", **options)
    x, gates["cbam_2"] = _block(x, 2 * filters, 2, "cbam_2", **options)
    x = layers.Dense(logits, name="logits")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, x, name=name), keras.Model(image, gates, name=f"{name}_gates")


def digits_network() -> tuple[Any, Any]:
    """For 8 x 8 images: logits of the ten digits; see `_network`."""
    return _network("cbam_digits", (8, 8, 1), 32, 1, 10, kernel_size=3)


def photograph_network() -> tuple[Any, Any]:
    """For images of any size: a logit per object; see `_network`.

    As in the authors' release, a batch norm follows the spatial convolution.
    """
    return _network(
        "cbam_photographs", (None, None, 3), 16, 2, len(OBJECTS),
        spatial_batch_norm=True, batch_norm_momentum=0.9,
    )  # fmt: skip
