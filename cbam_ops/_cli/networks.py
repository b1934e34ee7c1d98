"""The demo's networks and their data: handwritten digits, and patches of two photographs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


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


def _convolution(x: Any, filters: int, size: int, stride: int = 1) -> Any:
    from keras import layers

    x = layers.Conv2D(filters, size, strides=stride, padding="same", use_bias=False)(x)
    return layers.BatchNormalization(momentum=0.9)(x)


def _block(x: Any, filters: int, stride: int, gates: dict[str, Any], **options: Any) -> Any:
    """A basic residual block; the CBAM gates the branch, adds the shortcut and takes the ReLU.

    Adds the module's spatial gate to `gates`, for a model that shows the gates.
    """
    from keras import layers

    import cbam_ops

    shortcut = x
    if stride != 1 or x.shape[-1] != filters:
        shortcut = _convolution(x, filters, 1, stride)
    y = layers.ReLU()(_convolution(x, filters, 3, stride))
    y = _convolution(y, filters, 3)
    name = f"cbam_{len(gates) + 1}"
    module = cbam_ops.CBAM(ratio=8, activation="relu", name=name, **options)
    y, _, gates[name] = module(y, residual=shortcut, return_gates=True)
    return y


def digits_network() -> tuple[Any, Any]:
    """Stem and two residual blocks with CBAM, for logits of the ten digits.

    Returns:
      The model, and another on the same layers that maps images to the spatial gates by name.
    """
    import keras
    from keras import layers

    gates: dict[str, Any] = {}
    image = keras.Input((8, 8, 1), name="image")
    x = layers.ReLU()(_convolution(image, 32, 3))
    x = _block(x, 32, 1, gates, kernel_size=3)
    x = _block(x, 64, 2, gates, kernel_size=3)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(10, name="logits")(x), name="cbam_digits")
    return model, keras.Model(image, gates, name="digits_gates")


# --- Photographs ---------------------------------------------------------------------------------

PATCH = 64
OBJECTS = ("tower", "flower")
_NEITHER = -1


@dataclasses.dataclass(frozen=True)
class Region:
    """A box in a photograph (rows and columns of its pixels) and what it shows."""

    photograph: int
    top: int
    left: int
    bottom: int
    right: int
    label: int  # index into OBJECTS


# Boxes drawn by hand in scikit-learn's two photographs (both 427 x 640 pixels).
_REGIONS = (
    Region(0, 40, 95, 340, 330, 0),
    Region(0, 0, 360, 200, 580, _NEITHER),  # sky and lake
    Region(0, 310, 350, 427, 640, _NEITHER),  # trees
    Region(1, 100, 200, 330, 450, 1),
    Region(1, 0, 0, 427, 160, _NEITHER),  # leaves
    Region(1, 0, 490, 427, 640, _NEITHER),  # leaves
)


def load_photographs() -> list[np.ndarray]:
    """scikit-learn's "china" and "flower", each `[427, 640, 3]` in [0, 1].

    Both by danielbuechele resp. vultilion on Flickr, CC BY 2.0.
    """
    from sklearn.datasets import load_sample_images

    return [np.asarray(image, "float32") / 255 for image in load_sample_images().images]


def photograph_network() -> tuple[Any, Any]:
    """Stem and two residual blocks with CBAM, for images of any size; a logit per object.

    As in the authors' release, a batch norm follows the spatial convolution.

    Returns:
      The model, and another on the same layers that maps images to the spatial gates by name.
    """
    import keras
    from keras import layers

    gates: dict[str, Any] = {}
    options = {"spatial_batch_norm": True, "batch_norm_momentum": 0.9}
    image = keras.Input((None, None, 3), name="image")
    x = layers.ReLU()(_convolution(image, 16, 3, 2))
    x = _block(x, 16, 1, gates, **options)
    x = _block(x, 32, 2, gates, **options)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(len(OBJECTS), name="logits")(x)
    model = keras.Model(image, logits, name="cbam_photographs")
    return model, keras.Model(image, gates, name="photograph_gates")


class Patches:
    """Batches of square patches with a target per object: 1 where the patch shows it."""

    def __init__(self, photographs: list[np.ndarray], seed: int) -> None:
        self._photographs = photographs
        self._random = np.random.default_rng(seed)

    def batch(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`[size, PATCH, PATCH, 3]` images and `[size, objects]` targets.

        Half of the patches show an object. Brightness and left-right vary.
        """
        random = self._random
        with_object = [region for region in _REGIONS if region.label >= 0]
        without = [region for region in _REGIONS if region.label < 0]
        images = np.empty((size, PATCH, PATCH, 3), "float32")
        targets = np.zeros((size, len(OBJECTS)), "float32")
        for i in range(size):
            choice = with_object if i % 2 else without
            region = choice[random.integers(len(choice))]
            top = random.integers(region.top, region.bottom - PATCH + 1)
            left = random.integers(region.left, region.right - PATCH + 1)
            patch = self._photographs[region.photograph][top : top + PATCH, left : left + PATCH]
            if random.integers(2):
                patch = patch[:, ::-1]
            images[i] = patch * random.uniform(0.75, 1.25) + random.uniform(-0.1, 0.1)
            if region.label >= 0:
                targets[i, region.label] = 1
        return images, targets
