"""cbam_ops.fuse: hand-written attention in the styles that people publish, and what is none."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl
from keras import ops

import cbam_ops
from cbam_ops import __main__ as command
from cbam_ops import fusing
from cbam_ops.testing import FLOAT32, assert_close

C = 12


# --- how people write it --------------------------------------------------------------------------


def dense_mlp(units=3, **options) -> Callable:
    """Two dense layers, shared by what it is called on."""
    first = kl.Dense(units, activation="relu", **options)
    second = kl.Dense(C, **options)
    return lambda t: second(first(t))


def channel_gate(x, mlp=None) -> Any:
    """As in kobiso/CBAM-keras, whose layers most Keras code repeats."""
    mlp = mlp or dense_mlp(kernel_initializer="he_normal")
    mean = mlp(kl.Reshape((1, 1, C))(kl.GlobalAveragePooling2D()(x)))
    maximum = mlp(kl.Reshape((1, 1, C))(kl.GlobalMaxPooling2D()(x)))
    return kl.Activation("sigmoid")(kl.Add()([mean, maximum]))


def spatial_gate(x, size=7, maximum_first=False, **options) -> Any:
    descriptors = [
        kl.Lambda(lambda t: tf.reduce_mean(t, axis=3, keepdims=True))(x),
        kl.Lambda(lambda t: tf.reduce_max(t, axis=3, keepdims=True))(x),
    ]
    joined = kl.Concatenate(axis=3)(descriptors[::-1] if maximum_first else descriptors)
    options = {"activation": "sigmoid", "use_bias": False, **options}
    return kl.Conv2D(1, size, padding="same", **options)(joined)


def kobiso(x):
    u = kl.multiply([x, channel_gate(x)])
    return kl.multiply([u, spatial_gate(u)])


def with_operators(x):
    """Bare ops and operators; dense layers on [N, C]; convolution with a bias."""
    mlp = dense_mlp()
    gate = ops.sigmoid(mlp(ops.mean(x, axis=(1, 2))) + mlp(ops.max(x, axis=(1, 2))))
    u = x * gate[:, None, None, :]
    descriptors = ops.concatenate(
        [ops.mean(u, axis=-1, keepdims=True), ops.max(u, axis=-1, keepdims=True)], axis=-1
    )
    return u * ops.sigmoid(kl.Conv2D(1, (5, 3), padding="same")(descriptors))


def official(x):
    """The authors' release in Keras: maximum first, batch norm before the spatial sigmoid."""
    u = kl.multiply([x, channel_gate(x)])
    z = spatial_gate(u, maximum_first=True, activation=None)
    z = kl.BatchNormalization(epsilon=1e-5)(z)
    return u * kl.Activation("sigmoid")(z)


def convolutions(x):
    """1x1 convolutions in a Sequential, no biases, a ReLU after each MLP, padding by hand."""
    mlp = keras.Sequential(
        [
            kl.Conv2D(4, 1, use_bias=False),
            kl.ReLU(),
            kl.Conv2D(C, 1, use_bias=False, activation="relu"),
        ]
    )
    pools = kl.GlobalAveragePooling2D(keepdims=True), kl.GlobalMaxPooling2D(keepdims=True)
    u = x * ops.sigmoid(sum(mlp(pool(x)) for pool in pools))
    descriptors = ops.stack([ops.mean(u, -1), ops.amax(u, -1)], -1)
    descriptors = kl.ZeroPadding2D(1)(descriptors)
    return kl.Multiply()([u, kl.Conv2D(1, 3, activation="sigmoid")(descriptors)])


def spatial_first(x):
    u = kl.multiply([x, spatial_gate(x, size=3)])
    return kl.multiply([u, channel_gate(u)])


def parallel(x):
    return x * (channel_gate(x) * spatial_gate(x, size=3))


def squeeze_excite(x):
    """As in titu1994/keras-squeeze-excite-network."""
    gate = kl.Reshape((1, 1, C))(kl.GlobalAveragePooling2D()(x))
    gate = kl.Dense(2, activation="relu", use_bias=False)(gate)
    return kl.multiply([x, kl.Dense(C, activation="sigmoid", use_bias=False)(gate)])


def gate_of_each_pool(x):
    """As many write it: the sigmoid is the second layer's activation."""
    mlp = keras.Sequential([kl.Dense(3, "relu"), kl.Dense(C, "sigmoid")])
    gate = kl.Add()([mlp(kl.GlobalAveragePooling2D()(x)), mlp(kl.GlobalMaxPooling2D()(x))])
    u = kl.multiply([x, kl.Reshape((1, 1, C))(gate)])
    return u * spatial_gate(u)


def sum_of_hidden_units(x):
    hidden, last = kl.Dense(3, "relu"), kl.Dense(C)
    units = hidden(ops.max(x, (1, 2), keepdims=True)) + hidden(ops.mean(x, (1, 2), keepdims=True))
    u = x * ops.sigmoid(last(units))
    return u * spatial_gate(u)


def efficient_net(x):
    """As in keras.applications: swish, and 1x1 convolutions with biases."""
    gate = kl.Reshape((1, 1, C))(kl.GlobalAveragePooling2D()(x))
    gate = kl.Conv2D(2, 1, padding="same", activation="swish")(gate)
    return kl.multiply([x, kl.Conv2D(C, 1, padding="same", activation="sigmoid")(gate)])


def mobile_net(x):
    """As in keras.applications: a hard sigmoid by hand, of a ReLU with a limit."""
    gate = kl.Conv2D(8, 1)(kl.GlobalAveragePooling2D(keepdims=True)(x))
    gate = kl.Conv2D(C, 1)(kl.ReLU()(gate))
    return kl.Multiply()([x, kl.ReLU(6.0)(gate + 3.0) * (1.0 / 6.0)])


def yolo(x):
    """As ultralytics' module: one layer of the mean."""
    gate = kl.Conv2D(C, 1, activation="sigmoid")(ops.mean(x, (1, 2), keepdims=True))
    return spatial_only(x * gate)


def gelu_of_the_maximum(x):
    mlp = keras.Sequential(
        [kl.Dense(3, activation="gelu", use_bias=False), kl.Dense(C, use_bias=False)]
    )
    return x * ops.sigmoid(mlp(ops.max(x, (1, 2), keepdims=True)))


def first_of_ties(x):
    """A max-pool gives the gradient to the first of equal maxima."""
    mlp = dense_mlp()
    maximum = kl.MaxPooling2D((9, 6))(x)
    return x * ops.sigmoid(mlp(ops.mean(x, (1, 2), keepdims=True)) + mlp(maximum))


def channel_only(x):
    return kl.multiply([x, channel_gate(x)])


def spatial_only(x):
    return kl.multiply([x, spatial_gate(x)])


def series(x):
    """Of rank 3, with its maximum first."""
    mlp, x = dense_mlp(), kl.Reshape((54, C))(x)
    pools = kl.GlobalAveragePooling1D(keepdims=True), kl.GlobalMaxPooling1D(keepdims=True)
    u = x * ops.sigmoid(sum(mlp(pool(x)) for pool in pools))
    descriptors = ops.stack([ops.max(u, -1), ops.mean(u, -1)], -1)
    u = u * kl.Conv1D(1, 5, padding="same", activation="sigmoid")(descriptors)
    return kl.Reshape((9, 6, C))(u)


def volume(x):
    """Of rank 5, with its channels first."""
    mlp, sides = dense_mlp(), (2, 3, 4)
    x = kl.Reshape((C, 3, 3, 6))(kl.Permute((3, 1, 2))(x))
    gate = ops.sigmoid(mlp(ops.mean(x, sides)) + mlp(ops.max(x, sides)))
    u = x * kl.Reshape((C, 1, 1, 1))(gate)
    descriptors = kl.Permute((2, 3, 4, 1))(ops.stack([ops.mean(u, 1), ops.max(u, 1)], 1))
    gate = kl.Conv3D(1, (1, 3, 5), padding="same", activation="sigmoid")(descriptors)
    u = u * kl.Permute((4, 1, 2, 3))(gate)
    return kl.Permute((2, 3, 1))(kl.Reshape((C, 9, 6))(u))


@keras.saving.register_keras_serializable("test_fusing")
class ChannelGate(kl.Layer):
    """As in luuuyi/CBAM.TensorFlow2.0: a layer returns the gate, 1x1 convolutions with decay."""

    def __init__(self, units=2, **kwargs):
        super().__init__(**kwargs)
        options = {"kernel_regularizer": keras.regularizers.L2(5e-4)}
        self.units = units
        self.mean, self.maximum = kl.GlobalAveragePooling2D(), kl.GlobalMaxPooling2D()
        self.conv1 = kl.Conv2D(units, 1, activation="relu", **options)
        self.conv2 = kl.Conv2D(C, 1, **options)

    def call(self, x):
        def mlp(t):
            return self.conv2(self.conv1(kl.Reshape((1, 1, C))(t)))

        return tf.nn.sigmoid(mlp(self.mean(x)) + mlp(self.maximum(x)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("test_fusing")
class SpatialGate(kl.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = kl.Conv2D(1, 7, padding="same", use_bias=False, activation=tf.nn.sigmoid)

    def call(self, x):
        descriptors = tf.stack([tf.reduce_mean(x, axis=3), tf.reduce_max(x, axis=3)], axis=3)
        return self.conv(descriptors)


def gates_of_layers(x):
    x = ChannelGate()(x) * x
    return SpatialGate()(x) * x


@keras.saving.register_keras_serializable("test_fusing")
class WholeModule(kl.Layer):
    """One layer for all, with layers made in `build`, and one made in every call."""

    def build(self, shape):
        self.dense_1 = kl.Dense(3, activation="relu")
        self.dense_2 = kl.Dense(shape[-1])
        self.conv = kl.Conv2D(1, 7, padding="same")
        self.norm = kl.BatchNormalization(momentum=0.9)

    def call(self, x):
        mean, maximum = tf.reduce_mean(x, axis=[1, 2]), tf.reduce_max(x, axis=[1, 2])
        gate = self.dense_2(self.dense_1(mean)) + self.dense_2(self.dense_1(maximum))
        u = x * tf.reshape(tf.sigmoid(gate), [-1, 1, 1, x.shape[-1]])
        descriptors = kl.Concatenate()([
            tf.reduce_max(u, axis=-1, keepdims=True), tf.reduce_mean(u, axis=-1, keepdims=True)
        ])  # fmt: skip
        return u * tf.sigmoid(self.norm(self.conv(descriptors)))


@keras.saving.register_keras_serializable("test_fusing")
class WithoutBias(WholeModule):
    def build(self, shape):
        super().build(shape)
        self.conv = kl.Conv2D(1, 7, padding="same", use_bias=False)


class Traced(kl.Layer):
    """Weights of its own, and a call that TensorFlow traces."""

    def build(self, shape):
        self.first = self.add_weight(shape=(shape[-1], shape[-1]), name="first")
        self.second = self.add_weight(shape=(shape[-1], shape[-1]), name="second")
        self.offset = self.add_weight(shape=(1, 1, 1, shape[-1]), name="offset")
        self.other = self.add_weight(shape=(1, 1, 1, shape[-1]), name="other")

    @tf.function
    def call(self, x):
        t = tf.reduce_mean(x, axis=[1, 2], keepdims=True)
        t = tf.nn.relu(tf.einsum("nijc,cd->nijd", t, self.first) + self.offset)
        return x * tf.sigmoid(tf.einsum("nijc,cd->nijd", t, self.second) + self.other)


def chained_layers(x):
    class Channels(kl.Layer):
        def build(self, shape):
            self.gate = ChannelGate(3)

        def call(self, x):
            return x * self.gate(x)

    class Positions(kl.Layer):
        def build(self, shape):
            self.gate = SpatialGate()

        def call(self, x):
            return self.gate(x) * x

    return Positions(name="positions")(Channels()(x))


@keras.saving.register_keras_serializable("test_fusing")
class AddsItsInput(kl.Layer):
    """As in xmu-xiaoma666/External-Attention-tensorflow and k3_addons."""

    def __init__(self, relu=False, **kwargs):
        super().__init__(**kwargs)
        self.relu = relu
        self.mlp = keras.Sequential(
            [
                kl.Conv2D(2, 1, use_bias=False),
                kl.Activation("relu"),
                kl.Conv2D(C, 1, use_bias=False),
            ]
        )
        self.conv = kl.Conv2D(1, 3, padding="same")

    def call(self, x):
        pools = ops.max(x, (1, 2), keepdims=True), ops.mean(x, (1, 2), keepdims=True)
        u = x * ops.sigmoid(self.mlp(pools[0]) + self.mlp(pools[1]))
        descriptors = [ops.max(u, axis=3, keepdims=True), ops.mean(u, axis=3, keepdims=True)]
        y = u * ops.sigmoid(self.conv(ops.concatenate(descriptors, 3))) + x
        return ops.relu(y) if self.relu else y


class ModelAsLayer(keras.Model):
    """A subclassed model in the place of a layer, with pools of the size of its input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mlp = keras.Sequential([kl.Flatten(), kl.Dense(3, activation="relu"), kl.Dense(C)])

    def call(self, x, training=False):
        pool = kl.AveragePooling2D(pool_size=x.shape[1:3])
        scale = tf.sigmoid(self.mlp(pool(x)))[:, tf.newaxis, tf.newaxis]
        return x * tf.tile(scale, [1, x.shape[1], x.shape[2], 1])


class Style(NamedTuple):
    write: Callable
    found: str
    dialect: str
    options: dict[str, Any] = {}
    size: tuple = (None, None)
    reads: tuple = (6, 1)
    dtype: str = "float64"


SE = "squeeze and excitation"
STYLES = {
    "kobiso": Style(kobiso, "CBAM", "kobiso", {"hidden": 3, "kernel_size": 7}),
    "with_operators": Style(with_operators, "CBAM", "paper", {"kernel_size": (5, 3)}),
    "official": Style(official, "CBAM", "official", {"batch_norm_epsilon": 1e-5}),
    "convolutions": Style(convolutions, "CBAM", "", {"mlp_activation": "relu", "hidden": 4}),
    "spatial_first": Style(spatial_first, "CBAM", "", {"order": "spatial_first"}, reads=(6, 2)),
    "parallel": Style(parallel, "CBAM", "", {"order": "parallel"}),
    "squeeze_excite": Style(squeeze_excite, SE, "", {"hidden": 2, "use_bias": False}, reads=(2, 1)),
    "gate_of_each_pool": Style(gate_of_each_pool, "CBAM", "", {"mlp_merge": "gates"}),
    "sum_of_hidden_units": Style(sum_of_hidden_units, "CBAM", "", {"mlp_merge": "hidden"}),
    "efficient_net": Style(efficient_net, SE, "efficientnet", {"hidden": 2}, reads=(2, 2)),
    "mobile_net": Style(mobile_net, SE, "mobilenet_v3", {"hidden": 8}, reads=(2, 2)),
    "yolo": Style(yolo, "CBAM", "ultralytics", {"hidden": 0}, reads=(5, 3)),
    "gelu": Style(
        gelu_of_the_maximum, "channel gate", "", {"pooling": "max"}, reads=(2, 2), dtype="float32"
    ),  # where TensorFlow has the square root of 2
    "ties": Style(first_of_ties, "channel gate", "paper", {"ties": "first"}, (9, 6), (3, 3)),
    "channel_only": Style(channel_only, "channel gate", "paper", reads=(3, 1)),
    "spatial_only": Style(spatial_only, "spatial gate", "luuuyi", reads=(3, 1)),
    "gates_of_layers": Style(gates_of_layers, "CBAM", "kobiso", {"hidden": 2}),
    "adds_its_input": Style(
        lambda x: AddsItsInput()(x), "CBAM + residual", "", {"hidden": 2}, reads=(8, 2)
    ),
    "adds_and_clips": Style(
        lambda x: AddsItsInput(relu=True)(x), "CBAM + residual + ReLU", "", reads=(9, 2)
    ),
    "model_as_layer": Style(
        lambda x: ModelAsLayer()(x), SE, "squeeze_excite", size=(9, 6), reads=(2, 1)
    ),
    "layer": Style(lambda x: WithoutBias()(x), "CBAM", "official", {"batch_norm_momentum": 0.9}),
    "traced": Style(lambda x: Traced()(x), SE, "squeeze_excite", {"hidden": C}, reads=(2, 1)),
    "series": Style(series, "CBAM", "", {"kernel_size": 5}, (9, 6)),
    "volume": Style(
        volume, "CBAM", "paper", {"kernel_size": (1, 3, 5), "data_format": "channels_first"}, (9, 6)
    ),
    "chained_layers": Style(chained_layers, "CBAM", "kobiso", {"hidden": 3}),
}


# --- models ---------------------------------------------------------------------------------------


def model_of(*writers: Callable, size=(None, None), **options) -> keras.Model:
    """A network with these between its convolutions, and no weight as it was initialized."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((*size, 3), **options)
    x = inputs
    for write in writers:
        x = write(kl.Conv2D(C, 3, padding="same")(x))
    model = keras.Model(inputs, kl.Dense(2, name="logits")(kl.GlobalAveragePooling2D()(x)))
    randomize(model)
    return model


def randomize(model: keras.Model) -> None:
    random = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(weight + random.uniform(0.05, 0.3, weight.shape))


def images(size=(9, 6)) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((4, *size, 3)).astype("float32")


def values_of(model: keras.Model) -> list[np.ndarray]:
    """All weights, in an order that does not depend on their names."""
    arrays = [np.ravel(weight) for weight in model.weights]
    return sorted(arrays, key=lambda array: (array.size, np.sort(array)[0]))


def step(model: keras.Model, x: np.ndarray) -> float:
    """One step of training; the loss."""
    model.compile(keras.optimizers.SGD(1e-3), "mse", run_eagerly=True)
    return model.train_on_batch(x, np.ones((len(x), 2), "float32"))


def assert_same_model(fused: keras.Model, model: keras.Model, x=None) -> None:
    """The same outputs and weights, before and after a step of training."""
    x = images() if x is None else x
    for when in ("before", "after"):
        assert_close(fused(x), model(x), FLOAT32, f"output {when} training")
        old, new = values_of(model), values_of(fused)
        assert len(old) == len(new)
        for a, b in zip(new, old, strict=True):
            assert_close(np.sort(a), np.sort(b), FLOAT32, f"weights {when} training")
        assert_close(step(fused, x), step(model, x), FLOAT32, "loss")


# The others differ in one thing from one of these.
QUICK = {
    "kobiso", "with_operators", "official", "convolutions", "spatial_first", "parallel", "yolo",
    "squeeze_excite", "efficient_net", "gate_of_each_pool", "sum_of_hidden_units", "ties",
    "gates_of_layers", "layer", "adds_its_input", "series", "volume",
}  # fmt: skip


@pytest.mark.parametrize(
    "style",
    [
        pytest.param(style, id=name, marks=[] if name in QUICK else pytest.mark.long)
        for name, style in STYLES.items()
    ],
)
def test_style_is_found(style):
    """Fails when attention written this way is not found, or is replaced by something else."""
    model = model_of(style.write, size=style.size)
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert (row.found, row.reason) == (style.found, "")
    assert (row.dialect, row.reads) == (style.dialect, style.reads)
    assert style.options.items() <= row.options.items()
    assert row.dtype == style.dtype
    ours = [layer for layer in fused.layers if type(layer).__module__ == "cbam_ops.layers"]
    assert [layer.name for layer in ours] == [row.layer]
    assert_same_model(fused, model)


@pytest.mark.parametrize(
    ("write", "dialect", "calls", "most"),
    [
        (lambda x: efficient_net(ops.silu(x)), "efficientnet", 5, 40),
        (lambda x: kobiso(ops.relu(x)), "kobiso", 14, 40),
        # The ReLU that it may end with, out of sight, could be the one before it.
        (lambda x: WithoutBias()(ops.relu(x)), "official", 1, 700),
    ],
    ids=["silu", "relu", "layer"],
)
def test_few_candidates_are_tried(monkeypatch, write, dialect, calls, most):
    """Fails when all gates are tried on an activation before the real ones."""
    attention = cbam_ops.CBAM.__base__
    call, compare = attention.call, fusing._compare
    tried, proving = [], []

    @functools.wraps(call)  # Keras reads what it takes
    def counted(self, *arguments, **how):
        if not proving:
            tried.append(self)
        return call(self, *arguments, **how)

    def proof(*arguments):
        proving.append(arguments)
        try:
            return compare(*arguments)
        finally:
            proving.pop()

    model = model_of(write)
    monkeypatch.setattr(attention, "call", counted)
    monkeypatch.setattr(fusing, "_compare", proof)
    _, (row,) = fusing.fuse(model, return_report=True)
    assert (row.dialect, len(row.replaced)) == (dialect, calls)
    assert len(tried) < most


@pytest.mark.parametrize("residual", [False, True])
def test_what_gates_can_give(residual):
    """Fails when the few values that a ReLU left of a small map are taken for no gate's."""
    region = fusing._Region((), None, "a tensor" if residual else None, None)
    random = np.random.default_rng(0)

    def possible(y, *inputs, **activation):
        options = {"data_format": "channels_last", **activation}
        candidate = fusing._Candidate(cbam_ops.CBAM, options, {})
        return fusing._is_possible(region, candidate, [*map(tf.constant, inputs)], tf.constant(y))

    for positions, channels in [(4, 4), (9, 2), (16, 3), (35, 12)] * 25:
        x, more = random.standard_normal((2, 2, 1, positions, channels))
        gate = 1 / (1 + np.exp(-3 * random.standard_normal((2, 1, positions, 1))))
        gate = gate / (1 + np.exp(-3 * random.standard_normal((2, 1, 1, channels))))
        inputs, add = ((x, more), more) if residual else ((x,), 0.0)
        assert possible(x * gate + add, *inputs)
        assert possible(np.maximum(x * gate + add, 0), *inputs, activation="relu")
        if positions == 35:
            assert not possible(np.maximum(x, 0) * gate + add, *inputs)
            assert not possible(x / (1 + np.exp(-x)) * gate + add, *inputs)


# --- what follows attention, and where it is ------------------------------------------------------


def residual_block(x):
    shortcut = x
    x = kobiso(kl.Conv2D(C, 3, padding="same")(x))
    return kl.Activation("relu", name="block_out")(kl.Add()([x, shortcut]))


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (residual_block, "CBAM + residual + ReLU"),
        (lambda x: ops.relu(x + kobiso(x)), "CBAM + residual + ReLU"),
        (lambda x: kl.add([spatial_only(x), x]), "spatial gate + residual"),
        (lambda x: kl.ReLU()(channel_only(x)), "channel gate + ReLU"),
        (lambda x: kl.ReLU(6.0)(x + squeeze_excite(x)), "squeeze and excitation + residual"),
        (lambda x: kl.ReLU(300.0)(channel_only(x)), "channel gate"),
        (lambda x: kl.Add()([x, kobiso(x), x]), "CBAM"),
        (lambda x: x - kobiso(x), "CBAM"),
        (lambda x: kobiso(x) + ops.mean(x, (1, 2), keepdims=True), "CBAM"),
    ],
    ids=[
        "block",
        "operators",
        "residual",
        "relu",
        "relu6",
        "relu300",
        "sum_of_three",
        "difference",
        "broadcast",
    ],
)
def test_what_follows_is_one_op_with_it(write, found):
    """Fails when an addition or a ReLU is left out of the op, or one that it has not is taken."""
    model = model_of(write)
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert row.found == found
    assert_same_model(fused, model)


def test_names_stay():
    """Fails when a layer that stays gets another name, or the last of a region loses its own."""
    model = model_of(residual_block, kobiso)
    fused, report = fusing.fuse(model, return_report=True)
    gone = {name for row in report for name in row.replaced}
    kept = [layer.name for layer in model.layers if layer.name not in gone]
    assert [layer.name for layer in fused.layers if layer.name in kept] == kept
    assert {layer.name for layer in fused.layers} == {*kept, *(row.layer for row in report)}
    x = images()
    before, after = (
        keras.Model(m.input, m.get_layer("block_out").output)(x) for m in (model, fused)
    )
    assert_close(after, before, FLOAT32, "output of block_out")


def test_nested_models_and_sequentials():
    """Fails when attention inside an inner model is missed, or an inner model is made twice."""
    keras.utils.set_random_seed(0)
    inside = keras.Input((None, None, C))
    block = keras.Model(inside, kobiso(kl.Conv2D(C, 3, padding="same")(inside)), name="block")
    chain = keras.Sequential(
        [keras.Input((None, None, C)), kl.Conv2D(C, 1), WithoutBias(name="attention"), kl.ReLU()],
        name="chain",
    )
    inputs = keras.Input((None, None, 3))
    x = block(kl.Conv2D(C, 1)(inputs))
    x = chain(block(x))
    model = keras.Model(inputs, kl.Dense(2)(kl.GlobalAveragePooling2D()(x)))
    randomize(model)
    fused, report = fusing.fuse(model, return_report=True)
    assert [row.found for row in report] == ["CBAM", "CBAM + ReLU"]
    assert [row.layer.split("/")[0] for row in report] == ["block", "chain"]
    assert [layer.name for layer in fused.layers] == [layer.name for layer in model.layers]
    names = [[layer.name for layer in m.get_layer("chain").layers] for m in (fused, model)]
    assert names[0] == names[1]
    assert_same_model(fused, model)


class OfEachFrame(Traced):
    def compute_output_shape(self, shape):
        return shape


def test_attention_of_each_step_of_time():
    """Fails when attention in a TimeDistributed is missed, or left without a word."""
    keras.utils.set_random_seed(0)
    frame, video = keras.Input((9, 6, 3)), keras.Input((None, 9, 6, 3))
    x = kobiso(kl.Conv2D(C, 3, padding="same")(frame))
    of_frames = kl.TimeDistributed(keras.Model(frame, x, name="network"))
    x = of_frames(video)
    inner = [kl.TimeDistributed(kl.Conv2D(C, 3)), kl.TimeDistributed(OfEachFrame(name="gate"))]
    x = kl.GlobalAveragePooling3D()(inner[1](inner[0](x)))
    model = keras.Model(video, kl.Dense(2)(x))
    randomize(model)
    fused, (gate, network) = fusing.fuse(model, return_report=True)
    assert (network.found, network.layer.split("/")[0]) == ("CBAM", "network")
    assert not gate.found and "gate in it is what cbam_ops.ChannelAttention(hidden=" in gate.reason
    assert [layer.name for layer in fused.layers] == [layer.name for layer in model.layers]
    x = np.random.default_rng(2).standard_normal((2, 3, 9, 6, 3)).astype("float32")
    assert_same_model(fused, model, x)
    of_frames.trainable = False
    frozen = fusing.fuse(model).get_layer(of_frames.name)
    assert not frozen.trainable_weights


def test_sequential_with_two_layers_for_one_module():
    """Fails when two layers in a row that are one CBAM stay two, or a name goes."""
    keras.utils.set_random_seed(0)
    gated = chained_layers(keras.Input((None, None, C)))
    second = gated._keras_history.operation
    first = second._inbound_nodes[0].input_tensors[0]._keras_history.operation
    model = keras.Sequential(
        [keras.Input((None, None, 3)), kl.Conv2D(C, 1), first, second,
         kl.GlobalAveragePooling2D(), kl.Dense(2)]
    )  # fmt: skip
    randomize(model)
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert isinstance(fused, keras.Sequential)
    assert (row.layer, row.found) == ("positions", "CBAM")
    assert [layer.name for layer in fused.layers] == [layer.name for layer in model.layers]
    assert_same_model(fused, model)


def test_sequential_with_a_layer_that_adds_its_input():
    """Fails when the residual of a layer of a Sequential is lost."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((None, None, C)), AddsItsInput()])
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert "Sequential" in row.reason
    x = np.random.default_rng(0).standard_normal((2, 5, 6, C)).astype("float32")
    assert_close(fused(x), model(x), FLOAT32, "output")


class Subclassed(keras.Model):
    def __init__(self, branch=False, **kwargs):
        super().__init__(**kwargs)
        self.branch = branch
        self.conv = kl.Conv2D(C, 3, name="conv")
        self.gate = ChannelGate()
        self.drop = kl.Dropout(0.5)
        self.pool = kl.GlobalAveragePooling2D()
        self.top = kl.Dense(2, name="top")

    def call(self, x, training=False):
        x = self.conv(x)
        x = x * self.gate(x)
        if not self.branch or training:
            x = self.drop(x, training=training)
        return self.top(self.pool(x))


def test_subclassed_model_that_only_calls_layers():
    """Fails when such a model is refused, or is frozen in inference."""
    model = Subclassed()
    x = images()
    before = model(x)
    randomize(model)
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert row.found == "channel gate"
    assert isinstance(fused.get_layer(row.layer), cbam_ops.ChannelAttention)
    assert not np.allclose(before, model(x))
    assert_close(fused(x), model(x), FLOAT32, "output")
    assert not np.allclose(fused(x, training=True), fused(x))


@pytest.mark.parametrize("size", [(10, 7), (None, 7)], ids=["fixed", "half_fixed"])
def test_pools_of_a_fixed_size(size):
    """Fails when a region is not tried at the size that the model gives it."""

    def write(x):
        flat = kl.Reshape((-1, C))(x) if size[0] is None else kl.Reshape((70, C))(x)
        mean = kl.GlobalAveragePooling1D()(flat)
        gate = kl.Dense(C, activation="sigmoid")(kl.Dense(2, activation="relu")(mean))
        return x * kl.Reshape((1, 1, C))(gate)

    model = model_of(write, size=size)
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert row.found == "squeeze and excitation"
    assert_same_model(fused, model, images((10, 7)))


@pytest.mark.parametrize("fixed_pool", [False, True])
def test_large_map(fixed_pool):
    """Fails when a large map is compared at another size only, or one of a fixed size is not."""
    inputs = keras.Input((96, 64, C))
    mlp = dense_mlp()
    pool = kl.AveragePooling2D((96, 64)) if fixed_pool else kl.GlobalAveragePooling2D(keepdims=True)
    model = keras.Model(inputs, inputs * kl.Activation("sigmoid")(mlp(pool(inputs))))
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert (row.found, row.dtype) == (SE, "float64")
    cropped = keras.Model(inputs, inputs * ops.sigmoid(mlp(kl.AveragePooling2D((95, 64))(inputs))))
    (row,) = fusing.fuse(cropped, return_report=True)[1]
    assert "differs" in row.reason


def test_open_channels():
    """Fails when a map whose channels are not known stops it, or the report does not say so."""
    inputs = keras.Input((None, None, None))
    fused, (row,) = fusing.fuse(keras.Model(inputs, spatial_only(inputs)), return_report=True)
    assert row.reason == "its number of channels is open"


def test_fixed_batch():
    """Fails when a probe has another batch than the model allows."""
    inputs = keras.Input(batch_shape=(4, 9, 6, C))
    model = keras.Model(inputs, kobiso(inputs))
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert row.found == "CBAM"
    x = np.random.default_rng(0).standard_normal((4, 9, 6, C)).astype("float32")
    assert_close(fused(x), model(x), FLOAT32, "output")


@pytest.mark.parametrize("found", ["CBAM", "spatial gate"])
def test_channels_first(found):
    """Fails when the axis of the channels is not told from the weights, or an open one is tried."""
    inputs = keras.Input((C, None, None))
    mlp = dense_mlp()
    gate = ops.sigmoid(mlp(ops.mean(inputs, (2, 3))) + mlp(ops.max(inputs, (2, 3))))
    u = inputs * gate[:, :, None, None] if found == "CBAM" else inputs
    descriptors = ops.stack([ops.mean(u, 1), ops.max(u, 1)], -1)
    z = kl.Conv2D(1, 3, padding="same", data_format="channels_last")(descriptors)
    model = keras.Model(inputs, u * ops.transpose(ops.sigmoid(z), (0, 3, 1, 2)))
    randomize(model)
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert (row.found, row.options["data_format"]) == (found, "channels_first")
    x = np.random.default_rng(0).standard_normal((2, C, 5, 6)).astype("float32")
    assert_close(fused(x), model(x), FLOAT32, "output")


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["module", "all", "none"])
def test_trainability(part):
    """Fails when frozen weights become trainable, or the reverse."""
    model = model_of(official)
    convolution = model.layers[1]
    if part != "none":
        for layer in model.layers if part == "all" else model.layers[2:-2]:
            layer.trainable = False
    fused = fusing.fuse(model)
    count = [sum(w.shape.num_elements() for w in m.trainable_weights) for m in (model, fused)]
    assert count[0] == count[1]
    assert fused.get_layer(convolution.name).trainable == convolution.trainable
    if part == "module":
        assert_same_model(fused, model)


def test_shared_layers_without_weights():
    """Fails when a Multiply or a ReLU that serves several blocks leads to equal names."""
    multiply, relu = kl.Multiply(), kl.ReLU()

    def write(x):
        y = multiply([x, channel_gate(x)])
        return relu(kl.Add()([multiply([y, spatial_gate(y)]), x]))

    model = model_of(write, write, lambda x: relu(x))
    fused, report = fusing.fuse(model, return_report=True)
    assert [row.found for row in report] == ["CBAM + residual + ReLU"] * 2
    for row in report:
        assert isinstance(fused.get_layer(row.layer), cbam_ops.CBAM)
    assert_close(fused(images()), model(images()), FLOAT32, "output")


def test_bias_before_a_batch_norm():
    """Fails when such a bias, of no effect in training, is lost at inference."""
    model = model_of(lambda x: WholeModule()(x))
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert (row.found, row.dialect, row.dtype) == ("CBAM", "official", "float64")
    x = images()
    for when in ("before", "after"):
        assert_close(fused(x), model(x), FLOAT32, f"output {when} training")
        assert_close(step(fused, x), step(model, x), FLOAT32, "loss")


def test_several_inputs_and_outputs():
    """Fails when the structure of inputs or outputs changes."""
    keras.utils.set_random_seed(0)
    inputs = {name: keras.Input((5, 6, C), name=name) for name in ("a", "b")}
    x = kobiso(inputs["a"] + inputs["b"])
    model = keras.Model(inputs, {"map": x, "mean": [ops.mean(x), kl.Dense(2, name="top")(x)]})
    randomize(model)
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert row.found == "CBAM"
    random = np.random.default_rng(0)
    values = {name: random.standard_normal((2, 5, 6, C)).astype("float32") for name in "ab"}
    results = [m(values) for m in (fused, model)]
    keras.tree.assert_same_structure(*results)
    for ours, stock in zip(*map(keras.tree.flatten, results), strict=True):
        assert_close(ours, stock, FLOAT32, "output")


def test_compiled_with_a_loss_of_its_own():
    """Fails when a loss that has no config stops it, or goes without a word."""
    model = model_of(squeeze_excite)

    def difference(y, z):
        return ops.mean(y - z)

    model.compile("sgd", difference)
    with pytest.warns(UserWarning, match="not compiled"):
        fused = fusing.fuse(model)
    assert not fused.compiled


def test_partly_frozen_stays():
    """Fails when a module of which a part is frozen is thawed or frozen as a whole."""
    model = model_of(kobiso)
    next(layer for layer in model.layers if layer.name.startswith("dense")).trainable = False
    left, replaced = fusing.fuse(model, return_report=True)[1]
    assert "frozen" in left.reason
    assert replaced.found == "spatial gate"


def test_regularizers_and_constraints():
    """Fails when a loss or a constraint of a weight is lost."""
    mlp = dense_mlp(kernel_regularizer=keras.regularizers.L2(1e-2), kernel_constraint="non_neg")
    model = model_of(lambda x: x * channel_gate(x, mlp)[:, 0, 0][:, None, None])
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert row.found
    assert isinstance(row.options["mlp_kernel_constraint"], keras.constraints.NonNeg)
    assert len(model.losses) == len(fused.losses) == 2
    assert_close(sum(fused.losses), sum(model.losses), FLOAT32, "losses")
    assert_same_model(fused, model)


def test_save_load_compile(tmp_path):
    """Fails when the new model is not compiled as the old one, or does not survive its file."""
    model = model_of(residual_block, lambda x: WithoutBias()(x))
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    fused = fusing.fuse(model)
    assert float(fused.optimizer.learning_rate) == pytest.approx(0.02)
    x = images()
    y = np.zeros((4, 2), "float32")
    fused.fit(x, y, verbose=0)
    fused.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded(x), fused(x), FLOAT32, "loaded output")
    assert len(loaded.evaluate(x, y, verbose=0)) == 2


class Block(kl.Layer):
    """A residual block with a module in it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = kl.Conv2D(C, 3, strides=2, padding="same")
        self.attention = WithoutBias(name="attention")

    def call(self, x):
        return ops.relu(self.attention(self.conv(x)))


def test_attention_inside_a_layer_is_named():
    """Fails when the report is silent about a module that only its class can replace."""
    model = model_of(lambda x: Block(name="block")(x))
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert (row.layer, row.found) == ("block", "")
    assert "block/attention in it is what cbam_ops.CBAM(hidden=3, kernel_size=7" in row.reason
    assert_same_model(fused, model)


def test_model_in_hand_is_unchanged():
    """Fails when weights, types, graph or global settings of the caller's model are touched."""
    model = model_of(official, lambda x: WithoutBias()(x), convolutions)

    def state():
        layers = model._flatten_layers()
        return (
            [w.numpy().tobytes() for w in model.weights],
            [(layer.name, layer.dtype_policy.name, len(layer._inbound_nodes)) for layer in layers],
            [t.dtype for layer in layers if isinstance(layer, keras.Model) for t in layer.inputs],
            keras.config.dtype_policy().name,
            tf.config.functions_run_eagerly(),
        )

    before = state()
    fused = fusing.fuse(model)
    assert state() == before
    step(fused, images())
    assert state() == before


def test_traced_functions_keep_nothing_of_a_probe():
    """Fails when a `tf.function` in a layer keeps a probe's weights, or does not take them."""
    inputs = keras.Input((5, 7, C))
    model = keras.Model(inputs, Traced()(inputs))
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert row.found == SE
    x = np.random.default_rng(0).standard_normal((2, 5, 7, C)).astype("float32")
    assert_close(model(x), fused(x), FLOAT32, "output")


def test_mixed_precision():
    """Fails when the new layer has another dtype policy than the old ones."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = model_of(kobiso, lambda x: WithoutBias()(x))
        fused, report = fusing.fuse(model, return_report=True)
    finally:
        keras.config.set_dtype_policy("float32")
    assert [row.found for row in report] == ["CBAM"] * 2
    for row in report:
        layer = fused.get_layer(row.layer)
        assert layer.dtype_policy.name == "mixed_bfloat16"
        assert layer.w0.dtype == "float32"
    x = images()
    difference = np.abs(np.subtract(fused(x), model(x), dtype="float32")).max()
    assert difference < cbam_ops.testing.MIXED_MODEL["mixed_bfloat16"]


@pytest.fixture
def float64() -> Iterator[None]:
    keras.config.set_floatx("float64")  # of losses
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def test_shared_layers(float64):
    """Fails when weights that two modules share are no longer shared."""
    attention = WithoutBias(name="attention")
    gate = ChannelGate()
    model = model_of(
        attention, lambda x: kl.ReLU()(attention(x)), lambda x: x * gate(x), lambda x: x * gate(x)
    )
    fused, report = fusing.fuse(model, return_report=True)
    assert [row.found for row in report] == ["CBAM"] * 2 + ["channel gate"] * 2
    assert fused.count_params() == model.count_params()
    assert_same_model(fused, model)


# --- what is none ---------------------------------------------------------------------------------


def mlp_gate(x, first="relu", second="sigmoid"):
    gate = kl.Dense(3, activation=first)(ops.mean(x, (1, 2), keepdims=True))
    return x * kl.Dense(C, activation=second)(gate)


def not_shared(x):
    mean, maximum = ops.mean(x, (1, 2), keepdims=True), ops.max(x, (1, 2), keepdims=True)
    return x * ops.sigmoid(dense_mlp()(mean) + dense_mlp()(maximum))


def difference_of_pools(x):
    """The weights of a channel gate, and another function of them."""
    pools = ops.max(x, (1, 2), keepdims=True) - ops.mean(x, (1, 2), keepdims=True)
    return x * ops.sigmoid(dense_mlp()(pools))


def efficient_channels(x):
    """ECA-Net's gate."""
    mean = kl.GlobalAveragePooling2D()(x)[:, :, None]
    gate = kl.Conv1D(1, 3, padding="same", activation="sigmoid", use_bias=False)(mean)
    return x * gate[:, None, None, :, 0]


def gate_from_elsewhere(x):
    """Attention U-Net's."""
    other = kl.Conv2D(C, 3, padding="same")(x)
    other = kl.Conv2D(C, 3, padding="same")(other)
    x = kl.Conv2D(C, 1)(x)
    return x * kl.Conv2D(1, 1, activation="sigmoid")(ops.relu(other + x))


def with_dropout(x):
    hidden = kl.Dropout(0.3)(kl.Dense(3, activation="relu")(ops.mean(x, (1, 2), keepdims=True)))
    return x * kl.Dense(C, activation="sigmoid")(hidden)


def one_bias(x):
    gate = kl.Dense(3, activation="relu", use_bias=False)(ops.mean(x, (1, 2), keepdims=True))
    return x * kl.Dense(C, activation="sigmoid")(gate)


def gate_is_used_twice(x):
    gate = channel_gate(x)
    return x * gate + ops.mean(gate)


def activity_regularizer(x):
    mlp = dense_mlp(activity_regularizer="l2")
    return x * channel_gate(x, mlp)


class AddsLoss(WholeModule):
    def call(self, x):
        y = super().call(x)
        self.add_loss(ops.mean(y))
        return y

    def build(self, shape):
        super().build(shape)
        self.conv.use_bias = False


def gate_in_float32(x):
    """Of a bfloat16 map."""
    x = kl.Conv2D(C, 1, dtype="mixed_bfloat16")(x)
    gate = kl.Dense(2, activation="relu")(ops.mean(ops.cast(x, "float32"), (1, 2), keepdims=True))
    return x * ops.cast(kl.Dense(C, activation="sigmoid")(gate), "bfloat16")


class Scale(kl.Layer):
    """A constant for each channel, as of a frozen batch norm."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), trainable=False)

    def call(self, x):
        return x * self.scale


def norm_of_inference(x):
    """A batch norm that uses its moving statistics in training too."""
    z = kl.BatchNormalization()(spatial_gate(x, activation=None), training=False)
    return x * ops.sigmoid(z)


NONE = [
    (lambda x: mlp_gate(x, second="softmax"), "softmax"),
    (lambda x: mlp_gate(x, first="tanh"), "tanh"),
    (lambda x: mlp_gate(x, first="relu6"), "relu6"),
    (not_shared, "not shared"),
    (difference_of_pools, "differs"),
    (efficient_channels, "(3, 1, 1)"),
    (with_dropout, "random"),
    (one_bias, "shapes"),
    (gate_is_used_twice, "used elsewhere"),
    (gate_from_elsewhere, "map alone"),
    (activity_regularizer, "activity regularizer"),
    (lambda x: AddsLoss()(x), "adds a loss"),
    (norm_of_inference, "(training, float64"),
    (gate_in_float32, "compute in float32"),
    (lambda x: Scale()(x), "can be trained"),
]


@pytest.mark.parametrize(
    ("write", "reason"), NONE,
    ids=["softmax", "tanh", "relu6", "not_shared", "difference", "eca", "dropout",
         "one_bias", "leaks", "elsewhere", "activity", "loss", "norm", "types", "frozen"],
)  # fmt: skip
def test_what_is_no_cbam_stays(write, reason):
    """Fails when something else is replaced, or the report does not say why it stays."""
    model = model_of(write, size=(9, 6))
    fused, (row,) = fusing.fuse(model, return_report=True)
    assert not row.found and reason in row.reason
    assert [layer.name for layer in fused.layers] == [layer.name for layer in model.layers]
    assert_same_model(fused, model)


# --- bad input, and what is printed ---------------------------------------------------------------


class OwnStep(keras.Model):
    def __init__(self, classes):
        inputs = keras.Input((4, 4, C))
        super().__init__(inputs, kl.Dense(classes)(kobiso(inputs)))

    def train_step(self, data):
        return {}


class Tensors(keras.Model):
    def call(self, x):
        return tf.nn.relu(x)


def called(model: keras.Model) -> keras.Model:
    model(np.ones((1, 8, 8, 3), "float32"))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kl.Dense(3), "must be a model of Keras 3"),
        (lambda: keras.Sequential([kl.Dense(3)]), "no input shape yet"),
        (lambda: Subclassed(), "no input shape yet"),
        (lambda: called(Subclassed(branch=True)), "other layers in training"),
        (
            lambda: called(Tensors()),
            "functions of TensorFlow, where those of keras.ops can be traced",
        ),
        (lambda: OwnStep(3), "methods of its own (train_step)"),
    ],
    ids=["layer", "no_shape", "not_called", "branch", "tensors", "own_step"],
)
def test_bad_input(make, words):
    """Fails when a model that cannot be fused is, or the message does not say why not."""
    with pytest.raises(ValueError) as caught:
        fusing.fuse(make())
    assert words in str(caught.value)


def test_layer_without_config():
    """Fails when a layer that stays, and cannot be made again, is not named."""

    class Opaque(kl.Layer):
        def __init__(self, function, **kwargs):
            super().__init__(**kwargs)
            self.function = function

        def call(self, x):
            return self.function(x)

    model = model_of(Opaque(ops.relu, name="opaque"))
    with pytest.raises(ValueError, match="opaque cannot be made again"):
        fusing.fuse(model)


def test_class_made_of_a_graph_stays():
    """Fails when a model of one's own class, made of inputs and outputs, loses its methods."""

    class Trained(keras.Model):
        def train_step(self, data):
            return {"own": 1.0}

    inputs = keras.Input((4, 4, C))
    fused = fusing.fuse(Trained(inputs, kobiso(inputs)))
    assert type(fused) is Trained
    assert "kobiso" not in fused.name


def test_table(capsys):
    """Fails when the table lacks a line."""
    fusing.fuse(model_of(residual_block, not_shared), verbose=1)
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "block_out" in line]
    for word in ("CBAM + residual + ReLU", "hidden=3", "float64", "9 -> 2"):
        assert word in line
    assert "its MLPs are not shared" in text
    fusing.fuse(model_of(not_shared), verbose=1)
    assert "Nothing was replaced." in capsys.readouterr().out


# --- the command ----------------------------------------------------------------------------------


def fuse_file(capsys, *arguments: Any) -> tuple[int, str, str]:
    code = command.main(["fuse", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_command(tmp_path, capsys):
    """Fails when the command does not do on files what the function does."""
    model = model_of(squeeze_excite)
    source, target = tmp_path / "model.keras", tmp_path / "fused.keras"
    model.save(source)
    code, out, err = fuse_file(capsys, source, target)
    assert (code, err) == (0, "")
    assert "squeeze and excitation" in out and "1 of 1 replaced" in out
    fused = keras.models.load_model(target)
    assert any(isinstance(layer, cbam_ops.ChannelAttention) for layer in fused.layers)
    assert_close(fused(images()), model(images()), FLOAT32, "output")


def test_command_imports_and_trusts(tmp_path, capsys, monkeypatch):
    """Fails when a file with classes or Lambdas cannot be fused, or runs code unasked."""
    (tmp_path / "own_layers.py").write_text(
        "import keras\n"
        "class Half(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return x / 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    half = importlib.import_module("own_layers").Half
    model_of(squeeze_excite, half()).save("own.keras")
    model_of(squeeze_excite, kl.Lambda(lambda t: t + 1)).save("code.keras")
    model_of(kobiso).save("names.keras")
    code, _, err = fuse_file(capsys, "own.keras", "out.keras")
    assert code == 2 and "Half" in err and "--import" in err and err.count("\n") == 1
    path = list(sys.path)
    assert fuse_file(capsys, "own.keras", "out.keras", "--import", "own_layers")[0] == 0
    assert sys.path == path, "what is imported later would come from the current folder"
    code, _, err = fuse_file(capsys, "code.keras", "out.keras")
    assert code == 2 and "--trust" in err and err.count("\n") == 1
    assert fuse_file(capsys, "code.keras", "out.keras", "--trust")[0] == 0
    code, _, err = fuse_file(capsys, "names.keras", "out.keras", "--trust")
    assert code == 2 and "'tf' is not defined" in err and "make the model in Python" in err


def test_command_without_the_metric_of_a_model(tmp_path, capsys, monkeypatch):
    """Fails when a function that only training needs keeps a file from being fused."""
    monkeypatch.chdir(tmp_path)
    model = model_of(squeeze_excite)

    def worst(y, z):
        return ops.max(ops.abs(y - z))

    model.compile("adam", "mse", metrics=[worst])
    model.save("model.keras")
    code, out, _ = fuse_file(capsys, "model.keras", "out.keras")
    assert code == 0 and "--import MODULE imports: left out" in out
    assert not keras.models.load_model("out.keras").compiled


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("missing.keras", "out.keras", "there is no file missing.keras"),
        ("broken.keras", "out.keras", "cannot load broken.keras"),
        ("model.keras", "out.h5", "must be a .keras file, got out.h5"),
        ("model.keras", "folder/out.keras", "cannot write folder/out.keras"),
        ("model.keras", "out.keras --import nowhere", "cannot import nowhere"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, capsys, monkeypatch, source, target, words):
    """Fails when bad input is a traceback, another exit code, or leaves a file."""
    monkeypatch.chdir(tmp_path)
    model_of(squeeze_excite).save("model.keras")
    Path("broken.keras").write_bytes(b"no model")
    code, _, err = fuse_file(capsys, source, *target.split())
    assert code == 2 and words in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.keras", "model.keras"]


def test_command_finds_nothing(tmp_path, capsys):
    """Fails when a file is written though nothing was replaced."""
    model_of(not_shared).save(tmp_path / "model.keras")
    code, out, _ = fuse_file(capsys, tmp_path / "model.keras", tmp_path / "out.keras")
    assert code == 1 and "Nothing was replaced." in out
    assert not (tmp_path / "out.keras").exists()


# --- networks that others wrote -------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "dialect", "count"),
    [
        (keras.applications.EfficientNetB0, "efficientnet", 16),
        (keras.applications.MobileNetV3Small, "mobilenet_v3", 9),
    ],
)
def test_networks_of_keras(make, dialect, count):
    """Fails when squeeze and excitation in keras.applications is not found."""
    keras.utils.set_random_seed(0)
    model = make(weights=None, input_shape=(64, 64, 3), classes=2)
    fused, report = fusing.fuse(model, return_report=True)
    assert [row.dialect for row in report] == [dialect] * count
    x = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    assert_close(fused(x), model(x), FLOAT32, "output")
