"""A look inside models with this package's layers: :func:`gates`."""

from __future__ import annotations

import collections
import contextlib
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from cbam_ops import layers

__all__ = ["gates"]


class Call(NamedTuple):
    """A call of one of this package's layers.

    Attributes:
      name: the layer's, after those of the models and layers that it is in, with "/"; a second call
        of the same layer has "#2" behind it, and so on.
      layer: the layer.
      result: what it returned.
      channel_gate: `[N, C]`, or None.
      spatial_gate: `[N, H, W]`, or None.
    """

    name: str
    layer: Any
    result: tf.Tensor
    channel_gate: tf.Tensor | None
    spatial_gate: tf.Tensor | None


def _names(parent: Any, path: str = "") -> Iterator[tuple[int, str]]:
    """The ids of the layers inside a layer, and their names."""
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        yield id(layer), path + layer.name
        yield from _names(layer, f"{path}{layer.name}/")


@contextlib.contextmanager
def calls(model: Any) -> Iterator[list[Call]]:
    """A list of the calls of a model's attention layers, which fills while the block calls it.

    Functions of TensorFlow run eagerly meanwhile, in the whole process.

    Raises:
      ValueError: `model` is no model of Keras, or has no layer of this package.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"gates: `model` must be a keras.Model, got {type(model).__name__}")
    if not any(isinstance(layer, layers._Attention) for layer in model._flatten_layers()):
        raise ValueError(
            f"gates: `model` must have a layer of cbam_ops, {model.name} has none; cbam_ops.fuse "
            "replaces hand-written attention by such layers"
        )
    names: dict[int, str] = {}
    for key, name in _names(model):
        names.setdefault(key, name)
    times: collections.Counter[str] = collections.Counter()
    found: list[Call] = []

    def listen(layer: Any, result: Any, both: list[Any]) -> None:
        if not tf.executing_eagerly():
            return  # Keras traces a call only to learn the shapes
        name = names.get(id(layer), layer.name)
        times[name] += 1
        name += f"#{times[name]}" if times[name] > 1 else ""
        gates = iter(both)
        channel = next(gates) if not isinstance(layer, layers.SpatialAttention) else None
        found.append(Call(name, layer, result, channel, next(gates, None)))

    eagerly = tf.config.functions_run_eagerly()
    token = layers.listener.set(listen)
    tf.config.run_functions_eagerly(True)
    try:
        yield found
    finally:
        tf.config.run_functions_eagerly(eagerly)
        layers.listener.reset(token)


def _input_shapes(model: Any) -> list[tuple[int | None, ...]]:
    """Those of a model with one input; else empty."""
    inputs = getattr(model, "inputs", None) or []
    return [tuple(tensor.shape) for tensor in inputs] if len(inputs) == 1 else []


def gates(
    model: Any, images: Any, batch_size: int = 32
) -> dict[str, tuple[np.ndarray | None, np.ndarray | None]]:
    """The gates of every attention layer of a model, for given images.

    The model may be trained, loaded or subclassed, with models and layers of your own inside. It
    runs at inference, and is left as it is. No other thread may use TensorFlow meanwhile: its
    functions run eagerly.

    Args:
        model: A `keras.Model` with layers of this package.
        images: What the model takes: `[N, H, W, channels]`, or a structure of such arrays.
        batch_size: How many images the model takes at a time. Defaults to 32.

    Returns:
        `{name: (channel gate, spatial gate)}` in the order in which the layers are called. The
        channel gate is an array `[N, C]`, the spatial gate `[N, H, W]`, both float32 (float64 where
        the layer computes in it); that which a layer does not have is `None`. A layer inside
        others has their names before its own, as in `backbone/cbam_1`. A layer called more than
        once has an entry per call: `cbam`, `cbam#2`, and so on.

    Raises:
        ValueError: `model` is no model of Keras or has no layer of this package, `images` are no
            arrays or have another shape than its input, or `batch_size` is less than 1.

    Example:
    >>> model = cbam_ops.models.CBAMResNet18(input_shape=(64, 64, 3), classes=10)
    >>> gates = cbam_ops.gates(model, np.zeros((2, 64, 64, 3)))
    >>> channel_gate, spatial_gate = gates["conv2_block1_cbam"]
    >>> channel_gate.shape, spatial_gate.shape
    ((2, 64), (2, 16, 16))
    """
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"gates: `batch_size` must be a positive integer, got {batch_size!r}")
    try:
        images = keras.tree.map_structure(keras.ops.convert_to_tensor, images)
    except (TypeError, ValueError) as error:
        kind = type(images).__name__
        raise ValueError(f"gates: `images` must be an array, or several, got {kind}") from error
    shapes = [tuple(image.shape) for image in keras.tree.flatten(images)]
    for expected, shape in zip(_input_shapes(model), shapes, strict=False):
        if len(shapes) > 1:
            raise ValueError(
                f"gates: `images` must be one array of shape {expected}, got {len(shapes)} values"
            )
        if len(shape) != len(expected) or any(
            known not in (None, size) for known, size in zip(expected, shape, strict=True)
        ):
            raise ValueError(f"gates: `images` must have shape {expected}, got {shape}")
    parts: dict[str, list[Call]] = collections.defaultdict(list)
    for start in range(0, max(1, shapes[0][0]), batch_size):
        here = slice(start, start + batch_size)
        with calls(model) as found:
            model(keras.tree.map_structure(operator.itemgetter(here), images), training=False)
        for call in found:
            parts[call.name].append(call)

    def joined(gate: str, found: list[Call]) -> np.ndarray | None:
        arrays = [getattr(call, gate) for call in found]
        return None if arrays[0] is None else np.concatenate(arrays)

    return {
        name: (joined("channel_gate", found), joined("spatial_gate", found))
        for name, found in parts.items()
    }
