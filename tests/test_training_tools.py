"""What users do to models with Keras's own tools works with our layers as with Keras's."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import cbam_ops
from cbam_ops import testing
from cbam_ops.testing import assert_close, assert_same_bits

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


pytestmark = pytest.mark.usefixtures("native")


def network(**arguments) -> keras.Model:
    keras.utils.set_random_seed(1)
    image = keras.Input((9, 8, 3))
    x = keras.layers.Conv2D(16, 3, padding="same", activation="relu")(image)
    x = cbam_ops.CBAM(4, 3, name="cbam", **arguments)(x)
    x = keras.layers.Dense(16, activation="relu")(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, keras.layers.Dense(4)(x))


def batch(size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    return random.standard_normal((size, 9, 8, 3), np.float32), random.integers(4, size=size)


def gradients_of(model: keras.Model) -> list[tf.Tensor]:
    images, labels = batch()
    with tf.GradientTape() as tape:
        loss = LOSS(labels, model(images, training=True))
    return tape.gradient(loss, model.trainable_weights)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantize(tmp_path):
    """The dense layers compute in int8; attention stays as it is, as Conv2D does."""
    model = network()
    images, _ = batch()
    before = model.predict(images, verbose=0)
    weights = model.get_layer("cbam").get_weights()
    model.quantize("int8")
    quantized = model.predict(images, verbose=0)
    assert model.layers[-1].kernel.dtype == "int8"
    assert_close(quantized, before, testing.EXPORTED["float16"], "logits")
    for actual, expected in zip(model.get_layer("cbam").get_weights(), weights, strict=True):
        assert_same_bits(actual, expected, "a weight of the attention")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded.predict(images, verbose=0), quantized, "logits of the loaded model")


class Pruned(keras.constraints.Constraint):
    """Keeps at 0 whatever is 0: a mask of pruning."""

    def __init__(self) -> None:
        self.mask = None

    def __call__(self, weight):
        self.mask = tf.cast(weight != 0, weight.dtype) if self.mask is None else self.mask
        return weight * self.mask


class Clustered(keras.constraints.Constraint):
    """Weights of few different values."""

    def __call__(self, weight):
        return keras.ops.round(weight * 64) / 64


@pytest.mark.parametrize("constraint", [Pruned, Clustered])
def test_pruned_and_clustered_weights_stay_so(constraint):
    """Fails when a weight is trained past its constraint."""
    model = network()
    layer = model.get_layer("cbam")
    kernels = [layer.w0, layer.w1, layer.spatial_kernel]
    for kernel in kernels:
        kernel.constraint = constraint()  # each mask is of one weight
        values = kernel.numpy()
        values[np.abs(values) < np.median(np.abs(values))] = 0
        kernel.assign(values)
        kernel.assign(kernel.constraint(kernel.value))
    before = [kernel.numpy() for kernel in kernels]
    model.compile(keras.optimizers.Adam(0.05), LOSS)
    model.fit(*batch(), epochs=3, verbose=0)
    for kernel, old in zip(kernels, before, strict=True):
        new = kernel.numpy()
        assert (new != old).any(), "nothing was trained"
        if constraint is Pruned:
            assert not new[old == 0].any()
        else:
            assert_same_bits(new, np.round(new * 64) / 64, "clustered weights")


def test_moving_averages_of_weights():
    """Those of the layer's weights are what they should be after every step."""
    model = network()
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.75)
    model.compile(optimizer, LOSS)
    weights = model.get_layer("cbam").trainable_weights
    model.train_on_batch(*batch())
    averages = [weight.numpy() for weight in weights]  # they begin after the first step
    for _ in range(3):
        model.train_on_batch(*batch())
        averages = [0.75 * a + 0.25 * w.numpy() for a, w in zip(averages, weights, strict=True)]
    optimizer.finalize_variable_values(model.trainable_variables)
    for weight, average in zip(weights, averages, strict=True):
        assert_close(weight.numpy(), average, testing.FLOAT32, weight.path)


def test_rematerialized_layers_have_the_same_gradients():
    expected = gradients_of(network(spatial_batch_norm=True))
    with keras.RematScope(mode="full"):
        actual = gradients_of(network(spatial_batch_norm=True))
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one.numpy(), other.numpy(), "a gradient")


@pytest.mark.parametrize(
    "layer", [lambda: cbam_ops.CBAM(1, 3, spatial_batch_norm=True), keras.layers.BatchNormalization]
)
def test_rematerialized_layers_in_fit(layer):
    """Ours as Keras's: not in a graph, and eagerly the forward pass that is repeated counts twice.

    When this fails, Keras or TensorFlow has learned, and docs/scale.md is to be mended.
    """

    def fitted(scope, eagerly):
        keras.utils.set_random_seed(1)
        image = keras.Input((9, 8, 3))
        with scope:
            own = layer()
        x = keras.layers.GlobalAveragePooling2D()(own(image))
        model = keras.Model(image, keras.layers.Dense(4)(x))
        model.compile(keras.optimizers.SGD(0.5), LOSS, run_eagerly=eagerly)
        model.fit(*batch(), verbose=0)
        return model

    with pytest.raises(ValueError, match="supports keywords arguments only when eager execution"):
        fitted(keras.RematScope(mode="full"), eagerly=False)
    actual = fitted(keras.RematScope(mode="full"), eagerly=True)
    expected = fitted(contextlib.nullcontext(), eagerly=True)
    for one, other in zip(actual.trainable_weights, expected.trainable_weights, strict=True):
        assert_same_bits(one.numpy(), other.numpy(), one.path)
    statistics = zip(actual.non_trainable_weights, expected.non_trainable_weights, strict=True)
    for start, (twice, once) in zip((0, 1), statistics, strict=True):  # mean, variance
        assert_close(twice.numpy(), 1.99 * once.numpy() - 0.99 * start, testing.FLOAT32, once.path)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    images, labels = batch()
    whole, parts = network(), network()
    whole.compile(keras.optimizers.SGD(0.5), LOSS)
    parts.compile(keras.optimizers.SGD(0.5, gradient_accumulation_steps=4), LOSS)
    before = whole.get_weights()
    whole.fit(images, labels, batch_size=16, shuffle=False, verbose=0)
    parts.fit(images, labels, batch_size=4, shuffle=False, verbose=0)
    for one, other, old in zip(parts.weights, whole.weights, before, strict=True):
        assert (other.numpy() != old).any() or not old.any()
        assert_close(one.numpy(), other.numpy(), testing.FLOAT32, one.path)


def test_weight_decay_leaves_out_what_is_named():
    """Of ours the kernels decay; biases, scales and offsets do not."""
    model = network(spatial_batch_norm=True, batch_norm_beta_initializer="ones")
    optimizer = keras.optimizers.AdamW(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    weights = model.get_layer("cbam").trainable_weights
    before = {weight.path: weight.numpy() for weight in weights}
    optimizer.apply([tf.zeros(weight.shape) for weight in weights], weights)
    for weight in weights:
        decays = weight.name.endswith("kernel") or "kernel_" in weight.name
        expected = before[weight.path] * (0.75 if decays else 1.0)
        assert_close(weight.numpy(), expected, testing.FLOAT32, weight.path)
