"""The Keras layers: Keras's own layer checks, training, saving, precision policies, batch norm."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src import testing as keras_testing

import cbam_ops
from cbam_ops import reference, testing

LAYERS = (cbam_ops.CBAM, cbam_ops.ChannelAttention, cbam_ops.SpatialAttention)
ORDERS = ("channel_first", "spatial_first", "parallel")
SHAPE = (2, 5, 6, 8)


def feature_map(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: str = "float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def randomise(layer: keras.layers.Layer, seed: int = 1) -> None:
    """Weights without zeros and ones, so that each of them matters; variances positive."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        value = rng.standard_normal(weight.shape)
        weight.assign(np.abs(value) + 0.5 if "variance" in weight.name else value)


def make(layer_class=cbam_ops.CBAM, shape=SHAPE, **arguments) -> keras.layers.Layer:
    """A built layer with random weights."""
    if layer_class is not cbam_ops.SpatialAttention and "hidden" not in arguments:
        arguments.setdefault("ratio", 4)
    layer = layer_class(**arguments)
    layer.build(shape)
    randomise(layer)
    return layer


def functional(layer: keras.layers.Layer, **kwargs) -> keras.Model:
    inputs = keras.Input((None, None, SHAPE[-1]))
    return keras.Model(inputs, layer(inputs, **kwargs))


# --- Keras's own checks ---------------------------------------------------------------------------

KERAS_CASES = [
    (cbam_ops.CBAM, {"ratio": 4}, 6, 0),
    (cbam_ops.CBAM, {"ratio": 4, "order": "spatial_first", "activation": "relu"}, 6, 0),
    (cbam_ops.CBAM, {"ratio": 4, "order": "parallel", "data_format": "channels_first"}, 6, 0),
    (cbam_ops.CBAM, {"hidden": 3, "use_bias": False, "spatial_use_bias": False}, 3, 0),
    (cbam_ops.CBAM, {"ratio": 4, "spatial_batch_norm": True, "mlp_activation": "relu"}, 7, 2),
    (cbam_ops.ChannelAttention, {"ratio": 2, "pooling": "avg"}, 4, 0),
    (cbam_ops.ChannelAttention, {"ratio": 2, "pooling": "max", "use_bias": False}, 2, 0),
    (cbam_ops.SpatialAttention, {"kernel_size": 3}, 2, 0),
    (cbam_ops.SpatialAttention, {"kernel_size": (5, 1)}, 2, 0),
    (cbam_ops.SpatialAttention, {"spatial_batch_norm": True, "activation": "relu"}, 3, 2),
]


@pytest.mark.filterwarnings("ignore:.shuffle=True. was passed")  # Keras's own check passes it
@pytest.mark.parametrize(("layer_class", "arguments", "trainable", "fixed"), KERAS_CASES)
def test_keras_layer_checks(layer_class, arguments, trainable, fixed):
    """Keras's suite: configuration, build, symbolic, eager, a training step, mixed precision."""
    keras_testing.TestCase().run_layer_test(
        layer_class,
        init_kwargs=arguments,
        input_shape=SHAPE if "data_format" not in arguments else (2, 8, 5, 6),
        expected_output_shape=SHAPE if "data_format" not in arguments else (2, 8, 5, 6),
        expected_num_trainable_weights=trainable,
        expected_num_non_trainable_weights=fixed,
        expected_num_losses=0,
        supports_masking=True,
    )


SERIES, VOLUME = (3, 9, 8), (2, 3, 4, 5, 8)


@pytest.mark.filterwarnings("ignore:.shuffle=True. was passed")
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("shape", [SERIES, VOLUME], ids=["series", "volume"])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_series_and_volumes(layer_class, shape, data_format):
    """Keras's suite again; then the layer is the function, gates and statistics included."""
    arguments = {"data_format": data_format, "activation": "relu"}
    kernel = (3, 5, 1)[: len(shape) - 2]
    if layer_class is not cbam_ops.SpatialAttention:
        arguments["ratio"] = 4
    if layer_class is not cbam_ops.ChannelAttention:
        arguments |= {"kernel_size": kernel, "spatial_batch_norm": True}
    size = shape if data_format == "channels_last" else (shape[0], 8, *shape[1:-1])
    keras_testing.TestCase().run_layer_test(
        layer_class,
        init_kwargs=arguments,
        input_shape=size,
        expected_output_shape=size,
        expected_num_losses=0,
        supports_masking=True,
    )
    layer, x, residual = layer_class(**arguments), feature_map(shape=size), feature_map(1, size)
    symbolic = layer(keras.Input(size[1:]), residual=keras.Input(size[1:]), return_gates=True)
    results = layer(x, residual=residual, training=True, return_gates=True)
    for ours, expected in zip(results, symbolic, strict=True):
        assert (shape[0], *expected.shape[1:]) == ours.shape
    weights = [w.value for w in layer.trainable_weights]
    function = {
        cbam_ops.CBAM: reference.cbam_with_batch_norm,
        cbam_ops.ChannelAttention: reference.channel_attention,
        cbam_ops.SpatialAttention: reference.spatial_attention_with_batch_norm,
    }[layer_class]
    expected = function(
        x, *weights, residual=residual, activation="relu", return_gates=True,
        data_format="NHWC" if data_format == "channels_last" else "NCHW",
    )  # fmt: skip
    if layer_class is not cbam_ops.ChannelAttention:
        assert layer.spatial_kernel.shape == (*kernel, 2, 1)
        y, mean, variance, *gates = expected
        expected = (y, *gates)
        for moving, start, new in (
            (layer.moving_mean, 0.0, mean),
            (layer.moving_variance, 1.0, variance),
        ):
            value = start * 0.99 + 0.01 * new
            testing.assert_close(moving.numpy(), value.numpy(), testing.FLOAT32, "moving")
    for ours, theirs in zip(results, expected, strict=True):
        testing.assert_close(ours.numpy(), theirs.numpy(), testing.FLOAT32, "result")


@pytest.mark.filterwarnings("ignore:Keras leaves XLA out")  # before TensorFlow 2.20
def test_a_series_and_a_volume_are_saved_and_trained(tmp_path):
    """Compiled by XLA, in mixed precision, with residual and batch norm; then from a file."""
    for shape in (SERIES, VOLUME):
        inputs = keras.Input(shape[1:])
        layer = cbam_ops.CBAM(
            4, kernel_size=3, spatial_batch_norm=True, activation="relu", dtype="mixed_bfloat16"
        )
        pool = (keras.layers.GlobalAveragePooling1D, keras.layers.GlobalAveragePooling3D)
        y = pool[len(shape) == 5](dtype="float32")(layer(inputs, residual=inputs))
        model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(y))
        model.compile("sgd", "mse", jit_compile=layer.supports_jit)
        x, before = feature_map(shape=shape), [w.numpy() for w in model.trainable_weights]
        assert np.isfinite(model.fit(x, np.ones(len(x)), verbose=0).history["loss"][0])
        for old, weight in zip(before, model.trainable_weights, strict=True):
            assert not np.array_equal(old, weight.numpy()), weight.path
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        testing.assert_same_bits(loaded(x).numpy(), model(x).numpy(), "loaded")


def test_a_kernel_has_the_sides_of_the_inputs():
    expected = r"`kernel_size` must be an odd positive integer or 3 of them for inputs of rank 5"
    with pytest.raises(ValueError, match=rf"CBAM: {expected}, got \(7, 1\)"):
        cbam_ops.CBAM(ratio=4, kernel_size=(7, 1)).build(VOLUME)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_the_configuration_holds_every_argument(layer_class):
    """An argument that is missing there is silently reset when a model is loaded."""
    names = set(inspect.signature(layer_class.__init__).parameters) - {"self", "kwargs"}
    assert set(layer_class().get_config()) == names | {"name", "trainable", "dtype"}


@pytest.mark.parametrize("layer_class", LAYERS)
def test_every_argument_is_documented(layer_class):
    text = inspect.getdoc(layer_class)
    for name in set(inspect.signature(layer_class.__init__).parameters) - {"self", "kwargs"}:
        assert f"\n    {name}: " in text, name
    for name in ("inputs", "residual", "training", "return_gates"):
        assert f"\n    {name}: " in text, name


def test_the_default_epsilon_is_that_of_the_ops():
    for layer, function in (
        (cbam_ops.CBAM, cbam_ops.cbam_with_batch_norm),
        (cbam_ops.SpatialAttention, cbam_ops.spatial_attention_with_batch_norm),
    ):
        default = inspect.signature(function).parameters["epsilon"].default
        assert layer().batch_norm_epsilon == default


UNUSUAL = {
    "ratio": 2, "kernel_size": 5, "spatial_batch_norm": True, "order": "parallel", "hidden": 3,
    "mlp_activation": "relu", "use_bias": False, "spatial_use_bias": False, "activation": "relu",
    "data_format": "channels_first", "pooling": "max", "mlp_kernel_initializer": "he_normal",
    "hidden_rounding": "half_up", "hidden_activation": "gelu", "gate_activation": "hard_sigmoid",
    "ties": "first", "mlp_merge": "gates",
    "mlp_bias_initializer": "ones", "spatial_kernel_initializer": "he_uniform",
    "spatial_bias_initializer": "ones", "mlp_kernel_regularizer": keras.regularizers.L2(0.5),
    "mlp_bias_regularizer": keras.regularizers.L1(0.25), "spatial_kernel_regularizer": "l1",
    "spatial_bias_regularizer": "l2", "mlp_kernel_constraint": "max_norm",
    "mlp_bias_constraint": "non_neg", "spatial_kernel_constraint": "unit_norm",
    "spatial_bias_constraint": keras.constraints.MaxNorm(3), "batch_norm_momentum": 0.5,
    "batch_norm_epsilon": 0.125, "batch_norm_gamma_initializer": "zeros",
    "batch_norm_beta_initializer": "ones", "batch_norm_gamma_regularizer": "l2",
    "batch_norm_beta_regularizer": "l1", "batch_norm_gamma_constraint": "non_neg",
    "batch_norm_beta_constraint": "non_neg",
}  # fmt: skip


@pytest.mark.parametrize("layer_class", LAYERS)
def test_every_argument_survives_the_round_trip(layer_class):
    names = set(inspect.signature(layer_class.__init__).parameters) - {"self", "kwargs"}
    assert names <= set(UNUSUAL)
    layer = layer_class(**{n: UNUSUAL[n] for n in names}, name="attention", dtype="mixed_float16")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert config["registered_name"] == f"cbam_ops>{layer_class.__name__}"
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is layer_class
    assert again.get_config() == layer.get_config()
    plain = layer_class().get_config()
    unchanged = [n for n in names if again.get_config()[n] == plain[n]]
    assert not unchanged


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mlp_activation": "relu", "activation": "relu"}])
@pytest.mark.parametrize("order", ORDERS)
def test_cbam_computes_the_reference(order, options, implementation):
    x, residual = feature_map(2), feature_map(3)
    layer = make(order=order, **options)
    weights = (layer.w0, layer.b0, layer.w1, layer.b1, layer.spatial_kernel, layer.spatial_bias)
    expected = reference.cbam(
        x, *weights, residual=residual, order=order, **options, return_gates=True
    )
    actual = layer(x, residual=residual, return_gates=True)
    for a, e in zip(actual, expected, strict=True):
        testing.assert_close(a, e, testing.FLOAT32, order)
    testing.assert_same_bits(
        layer(x, residual=residual).numpy(), actual[0].numpy(), "without gates"
    )


@pytest.mark.parametrize("pooling", ["avg+max", "avg", "max"])
def test_channel_attention_computes_the_reference(pooling, implementation):
    x = feature_map(4)
    layer = make(cbam_ops.ChannelAttention, pooling=pooling)
    weights = (layer.w0, layer.b0, layer.w1, layer.b1)
    expected = reference.channel_attention(x, *weights, pooling=pooling, return_gates=True)
    for a, e in zip(layer(x, return_gates=True), expected, strict=True):
        testing.assert_close(a, e, testing.FLOAT32, pooling)


def test_spatial_attention_computes_the_reference(implementation):
    x = feature_map(5)
    layer = make(cbam_ops.SpatialAttention)
    weights = (layer.spatial_kernel, layer.spatial_bias)
    expected = reference.spatial_attention(x, *weights, return_gates=True)
    for a, e in zip(layer(x, return_gates=True), expected, strict=True):
        testing.assert_close(a, e, testing.FLOAT32, "spatial")


@pytest.mark.parametrize("layer_class", LAYERS)
def test_channels_first_on_the_cpu(layer_class, implementation):
    """Stock Keras cannot train channels-first convolutions on CPUs; these layers can."""
    x = feature_map(6)
    last = make(layer_class, data_format="channels_last")
    first = make(layer_class, shape=(2, 8, 5, 6), data_format="channels_first")
    results = []
    for layer, t in ((last, x), (first, x.transpose(0, 3, 1, 2))):
        t = tf.constant(t)
        with tf.GradientTape() as tape:
            tape.watch(t)
            y = layer(t)
        results.append((y, tape.gradient(y, t)))
    for a, e in zip(results[1], results[0], strict=True):
        transposed = tf.transpose(a, (0, 2, 3, 1))
        testing.assert_close(transposed, e, 10 * testing.FLOAT32, "channels first")


def test_the_default_layout_is_that_of_keras():
    before = keras.config.image_data_format()
    try:
        keras.config.set_image_data_format("channels_first")
        layer = cbam_ops.CBAM(ratio=2)
    finally:
        keras.config.set_image_data_format(before)
    assert layer.data_format == "channels_first"
    assert layer(feature_map(shape=(1, 4, 3, 3))).shape == (1, 4, 3, 3)


def test_sizes_may_differ_from_call_to_call(implementation):
    """One layer, any batch and any picture size, in one traced function; the empty batch too."""
    model = functional(make())
    assert model.output_shape == (None, None, None, 8)
    call = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, 8), tf.float32)])
    for shape in [(1, 1, 1, 8), (3, 9, 4, 8), (2, 16, 16, 8), (0, 4, 4, 8)]:
        x = feature_map(7, shape)
        assert call(x).shape == shape
        testing.assert_close(call(x), model.layers[-1](x), testing.FLOAT32, str(shape))


def test_the_residual_may_be_a_symbolic_tensor(implementation):
    """The end of a residual block in a functional model, and in its clone."""
    inputs, shortcut = keras.Input((None, None, 8)), keras.Input((None, None, 8))
    layer = make(activation="relu")
    model = keras.Model([inputs, shortcut], layer(inputs, residual=shortcut))
    x, r = feature_map(8), feature_map(9)
    y, g_c, g_s = layer(x, return_gates=True)
    expected = np.maximum(x * g_c[:, None, None, :] * g_s[..., None] + r, 0)
    testing.assert_close(model([x, r]), expected, testing.FLOAT32, "residual")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    testing.assert_same_bits(clone([x, r]).numpy(), model([x, r]).numpy(), "clone")
    with pytest.raises(ValueError, match="`residual` must have the shape of `inputs`"):
        layer(keras.Input((4, 4, 8)), residual=keras.Input((4, 4, 7)))


def test_gates_are_outputs_of_a_functional_model(implementation):
    """Attention maps for a picture, from a trained model."""
    layer = make()
    model = functional(layer, return_gates=True)
    assert [t.shape for t in model.outputs] == [
        (None, None, None, 8), (None, 8), (None, None, None)
    ]  # fmt: skip
    y, g_c, g_s = model(feature_map(10))
    assert (g_c.shape, g_s.shape) == ((2, 8), (2, 5, 6))
    product = feature_map(10) * g_c[:, None, None, :] * g_s[..., None]
    testing.assert_close(y, product, testing.FLOAT32, "gates")


def test_a_shared_layer_has_one_set_of_weights(implementation):
    layer = make()
    first, second = keras.Input((4, 4, 8)), keras.Input((None, None, 8))
    model = keras.Model([first, second], [layer(first), layer(second)])
    assert len(model.trainable_weights) == 6
    x = feature_map(11, (2, 4, 4, 8))
    one, two = model([x, x])
    testing.assert_same_bits(one.numpy(), two.numpy(), "both uses")


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "ratio", "k"), [(64, 16, 7), (24, 8, 3), (48, 16, 1)])
def test_parameter_counts(channels, ratio, k):
    hidden = channels // ratio
    mlp = 2 * channels * hidden + hidden + channels
    shape = (None, None, None, channels)
    plain, normed = (
        make(shape=shape, ratio=ratio, kernel_size=k, spatial_batch_norm=b) for b in (False, True)
    )
    count = sum(int(np.prod(w.shape)) for w in plain.trainable_weights)
    assert count == plain.count_params() == mlp + 2 * k * k + 1
    count = sum(int(np.prod(w.shape)) for w in normed.trainable_weights)
    assert count == mlp + 2 * k * k + 2
    assert [w.name for w in normed.non_trainable_weights] == ["moving_mean", "moving_variance"]
    bare = make(shape=shape, ratio=ratio, kernel_size=k, use_bias=False, spatial_use_bias=False)
    assert bare.count_params() == 2 * channels * hidden + 2 * k * k


@pytest.mark.parametrize(
    ("rounding", "ratio", "units"),
    [
        ("floor", 16, {24: 1, 40: 2, 72: 4}),
        ("half_up", 16, {4: 1, 24: 2, 40: 3, 72: 5}),  # timm's CBAM
        ("multiple_of_8", 4, {16: 8, 64: 16, 72: 24, 96: 24, 120: 32, 576: 144}),  # MobileNetV3
    ],
)
def test_hidden_units(rounding, ratio, units):
    for channels, hidden in units.items():
        layer = cbam_ops.CBAM(ratio, hidden_rounding=rounding)
        layer.build((1, 2, 2, channels))
        assert layer.w0.shape == (channels, hidden)
        layer = make(shape=(1, 2, 2, channels), hidden=hidden + 1, hidden_rounding=rounding)
        assert layer.w1.shape == (hidden + 1, channels)


def test_no_hidden_layer():
    layer = make(hidden=0)
    assert [w.name for w in layer.weights][:2] == ["mlp_kernel_0", "mlp_bias_0"]
    assert (layer.w0.shape, layer.b0.shape, layer.w1, layer.b1) == ((8, 8), (8,), None, None)


def test_the_weights_do_not_start_alike():
    """One initializer serves both MLP kernels, but must not draw the same numbers twice."""
    layer = cbam_ops.CBAM(ratio=1)
    layer.build((None, None, None, 8))
    assert not np.array_equal(layer.w0.numpy(), layer.w1.numpy())


def test_regularizers_add_losses_and_constraints_are_kept():
    layer = cbam_ops.CBAM(
        ratio=4,
        mlp_kernel_regularizer=keras.regularizers.L2(0.5),
        mlp_bias_regularizer=keras.regularizers.L1(2.0),
        spatial_kernel_regularizer=keras.regularizers.L2(0.25),
        spatial_bias_regularizer=keras.regularizers.L1(1.0),
        mlp_kernel_constraint="non_neg",
        spatial_kernel_constraint="non_neg",
    )
    layer.build(SHAPE)
    randomise(layer)
    w = {v.name: v.numpy() for v in layer.weights}
    expected = (
        0.5 * np.sum(w["mlp_kernel_0"] ** 2)
        + 0.5 * np.sum(w["mlp_kernel_1"] ** 2)
        + 2.0 * np.sum(np.abs(w["mlp_bias_0"]))
        + 2.0 * np.sum(np.abs(w["mlp_bias_1"]))
        + 0.25 * np.sum(w["spatial_kernel"] ** 2)
        + np.sum(np.abs(w["spatial_bias"]))
    )
    assert len(layer.losses) == 6
    testing.assert_close(sum(layer.losses), expected, testing.FLOAT32, "losses")
    model = functional(layer)
    model.compile("sgd", "mse")
    model.fit(feature_map(), feature_map(1), verbose=0)
    for name in ("w0", "w1", "spatial_kernel"):
        assert np.min(getattr(layer, name).numpy()) >= 0, name


# --- batch norm -----------------------------------------------------------------------------------


def unfused(layer: cbam_ops.CBAM) -> keras.layers.BatchNormalization:
    """Keras's batch norm with the layer's weights."""
    norm = keras.layers.BatchNormalization(
        momentum=layer.batch_norm_momentum, epsilon=layer.batch_norm_epsilon, dtype="float64"
    )
    norm.build((None, None, None, 1))
    norm.set_weights(
        [
            layer.batch_norm_gamma.numpy(),
            layer.batch_norm_beta.numpy(),
            layer.moving_mean.numpy(),
            layer.moving_variance.numpy(),
        ]
    )
    return norm


def unfused_cbam(layer, norm, x, training):
    """The layer's function out of reference parts and Keras's batch norm."""
    mlp = (layer.w0, layer.b0, layer.w1, layer.b1)

    def channel(t):
        return reference.channel_attention(t, *mlp, return_gates=True)

    def spatial(t):
        z = tf.nn.conv2d(reference.spatial_pool(t), layer.spatial_kernel, 1, "SAME")
        return tf.sigmoid(norm(z, training=training))

    if layer.order == "spatial_first":
        return channel(x * spatial(x))[0]
    u, _ = channel(x)
    return u * spatial(x if layer.order == "parallel" else u)


@pytest.mark.parametrize("order", ORDERS)
def test_batch_norm_in_training_equals_keras(order, implementation):
    """Values, moving statistics and every gradient; the epsilon is a power of two on purpose."""
    layer = make(
        order=order,
        spatial_batch_norm=True,
        batch_norm_epsilon=2.0**-7,
        batch_norm_momentum=0.75,
        dtype="float64",
    )
    norm = unfused(layer)
    x, upstream = tf.constant(feature_map(12, dtype="float64")), feature_map(13, dtype="float64")
    weights = [w.value for w in layer.trainable_weights]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    actual = tape.gradient(y, [x, *weights], output_gradients=upstream)
    common = [w.value for w in layer.trainable_weights if "batch_norm" not in w.name]
    with tf.GradientTape() as tape:
        tape.watch(x)
        expected_y = unfused_cbam(layer, norm, x, True)
    expected = tape.gradient(
        expected_y, [x, *common, norm.gamma.value, norm.beta.value], output_gradients=upstream
    )
    testing.assert_close(y, expected_y, testing.MODEL_FORWARD, "y")
    names = ["x", *(w.name for w in layer.trainable_weights)]
    for name, a, e in zip(names, actual, expected, strict=True):
        testing.assert_close(a, e, testing.MODEL_FORWARD, f"gradient of {name}")
    for name in ("moving_mean", "moving_variance"):
        a, e = getattr(layer, name), getattr(norm, name)
        testing.assert_close(a.numpy(), e.numpy(), testing.MODEL_FORWARD, name)


@pytest.mark.parametrize("order", ORDERS)
def test_batch_norm_is_folded_at_inference(order, implementation):
    layer = make(order=order, spatial_batch_norm=True, dtype="float64")
    x = tf.constant(feature_map(14, dtype="float64"))
    before = [w.numpy() for w in layer.weights]
    expected = unfused_cbam(layer, unfused(layer), x, False)
    for y in (layer(x), layer(x, training=False)):
        testing.assert_close(y, expected, testing.MODEL_FORWARD, "y")
    for weight, value in zip(layer.weights, before, strict=True):
        testing.assert_same_bits(weight.numpy(), value, weight.name)


def test_spatial_attention_with_batch_norm(implementation):
    layer = make(cbam_ops.SpatialAttention, spatial_batch_norm=True, dtype="float64")
    norm = unfused(layer)
    x = tf.constant(feature_map(15, dtype="float64"))
    z = tf.nn.conv2d(reference.spatial_pool(x), layer.spatial_kernel, 1, "SAME")
    for training in (False, True):
        expected = x * tf.sigmoid(norm(z, training=training))
        y, gate = layer(x, training=training, return_gates=True)
        # The ops' epsilon has 24 bits.
        testing.assert_close(y, expected, 10 * testing.MODEL_FORWARD, "y")
        assert gate.shape == (2, 5, 6)
    moving, expected = layer.moving_variance.numpy(), norm.moving_variance.numpy()
    testing.assert_close(moving, expected, testing.FLOAT64, "variance")


def test_a_frozen_layer_uses_and_keeps_its_moving_statistics(implementation):
    """As keras.layers.BatchNormalization: fine-tuning must not shift a frozen network."""
    layer = make(spatial_batch_norm=True)
    model = functional(layer)
    layer.trainable = False
    before = [w.numpy() for w in layer.weights]
    x = feature_map(16)
    y = model(x, training=True)
    testing.assert_same_bits(y.numpy(), model(x, training=False).numpy(), "y")
    for weight, value in zip(layer.weights, before, strict=True):
        testing.assert_same_bits(weight.numpy(), value, weight.name)
    assert not model.trainable_weights
    assert len(model.non_trainable_weights) == 9
    layer.trainable = True
    model(x, training=True)
    assert not np.array_equal(layer.moving_mean.numpy(), before[-2])


def test_an_empty_batch_leaves_the_moving_statistics(implementation):
    layer = make(spatial_batch_norm=True)
    before = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
    assert layer(feature_map(shape=(0, 4, 4, 8)), training=True).shape == (0, 4, 4, 8)
    for moving, value in zip((layer.moving_mean, layer.moving_variance), before, strict=True):
        testing.assert_same_bits(moving.numpy(), value, moving.name)


def test_gamma_zero_starts_every_spatial_gate_at_a_half():
    layer = cbam_ops.CBAM(ratio=4, spatial_batch_norm=True, batch_norm_gamma_initializer="zeros")
    for training in (False, True):
        _, _, gate = layer(feature_map(), training=training, return_gates=True)
        assert np.all(gate.numpy() == 0.5)


# --- training, precision, saving ------------------------------------------------------------------


@pytest.mark.parametrize("spatial_batch_norm", [False, True])
@pytest.mark.parametrize(
    "policy", ["float32", "float64", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16"]
)
def test_a_training_step_under_every_policy(policy, spatial_batch_norm, implementation):
    """Weights stay in the variable type, maps have the compute type, every weight moves."""
    layer = cbam_ops.CBAM(
        ratio=4, spatial_batch_norm=spatial_batch_norm, activation="relu", dtype=policy
    )
    variable = "float32" if policy.startswith("mixed") else policy
    compute = policy.removeprefix("mixed_")
    inputs = keras.Input((5, 6, 8))
    outputs, g_c, g_s = layer(inputs, residual=inputs, return_gates=True)
    assert outputs.dtype == compute
    assert {w.dtype for w in layer.weights} == {variable}
    y, *gates = layer(feature_map(17), return_gates=True)
    assert y.dtype == compute
    expected = "float64" if policy == "float64" else "float32"
    assert {g_c.dtype, g_s.dtype} == {g.dtype.name for g in gates} == {expected}

    model = keras.Model(inputs, keras.layers.Activation("linear", dtype="float32")(outputs))
    randomise(layer)
    before = [w.numpy().astype("float64") for w in layer.weights]
    model.compile(keras.optimizers.SGD(0.5), "mse")
    history = model.fit(feature_map(17, (8, 5, 6, 8)), feature_map(18, (8, 5, 6, 8)), verbose=0)
    assert np.isfinite(history.history["loss"][0])
    for weight, value in zip(layer.weights, before, strict=True):
        after = weight.numpy().astype("float64")
        assert np.isfinite(after).all(), weight.name
        assert not np.array_equal(after, value), weight.name


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_near_float32(policy, implementation):
    x = feature_map(19)
    exact, mixed = make(), make(dtype=policy)
    y = mixed(x)
    error = 8 * testing.EPSILON[policy.removeprefix("mixed_")]
    testing.assert_close(tf.cast(y, tf.float32), exact(x), error, policy)


KERAS_FILE = """
import numpy as np
import cbam_ops
import keras
model = keras.models.load_model("model.keras")
data = np.load("data.npz")
np.testing.assert_array_equal(model.predict([data["x"], data["r"]], verbose=0), data["y"])
model.fit([data["x"], data["r"]], data["y"], verbose=0)
"""
SERVED = """
import numpy as np
import tensorflow as tf
data = np.load("data.npz")
def check(name):
    model = tf.saved_model.load(name)
    y = model.serve([data["x"], data["r"]])
    np.testing.assert_allclose(y, data["y"], rtol=1e-5, atol=1e-6)
check("reference")
import keras
import cbam_ops
check("native")
keras.models.load_model("model.keras")
"""


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in every form that leaves the process, with inputs and outputs."""
    folder = tmp_path_factory.mktemp("saved")
    inputs, shortcut = keras.Input((None, None, 8)), keras.Input((None, None, 8))
    y = make(spatial_batch_norm=True)(inputs)
    y = make(cbam_ops.ChannelAttention)(y)
    y = make(cbam_ops.SpatialAttention, activation="relu")(y, residual=shortcut)
    model = keras.Model([inputs, shortcut], y)
    model.compile("sgd", "mse")
    x, r = feature_map(20), feature_map(21)
    model.save(folder / "model.keras")
    np.savez(folder / "data.npz", x=x, r=r, y=model.predict([x, r], verbose=0))
    for implementation in ("native", "reference"):
        with cbam_ops.use_implementation(implementation):
            model.export(folder / implementation, verbose=False)
    return folder


@pytest.mark.parametrize("code", [KERAS_FILE, SERVED], ids=["keras", "served"])
def test_a_fresh_process_takes_a_saved_model(code, saved_model):
    """`import cbam_ops` is enough, before or after Keras; a reference's export needs nothing."""
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True, text=True, check=False, cwd=saved_model,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_weights_alone_are_saved_and_loaded(tmp_path):
    model = functional(make(spatial_batch_norm=True))
    model.save_weights(tmp_path / "model.weights.h5")
    other = functional(cbam_ops.CBAM(ratio=4, spatial_batch_norm=True))
    other.load_weights(tmp_path / "model.weights.h5")
    x = feature_map(23)
    testing.assert_same_bits(other(x).numpy(), model(x).numpy(), "y")


# --- masks, XLA, distribution ---------------------------------------------------------------------


@pytest.mark.parametrize("layer_class", LAYERS)
def test_a_mask_is_passed_on(layer_class):
    """The layer neither uses nor loses it."""
    x = tf.constant(feature_map(24))
    mask = tf.constant(np.random.default_rng(25).random(SHAPE[:2]) > 0.5)
    layer = make(layer_class)
    expected = layer(x).numpy()
    x._keras_mask = mask
    y = layer(x)
    assert y._keras_mask is mask
    testing.assert_same_bits(y.numpy(), expected, "y")


def test_jit_compile_of_the_reference():
    """Keras compiles the model by XLA where the layer computes by stock TensorFlow."""
    model = functional(make(spatial_batch_norm=True))
    x = feature_map(26)
    with cbam_ops.use_implementation("reference"):
        expected = model(x)
        model.compile("sgd", "mse", jit_compile=True)
        y = model.predict(x, verbose=0)
        assert np.isfinite(model.fit(x, x, verbose=0).history["loss"][0])
    testing.assert_close(y, expected, testing.FLOAT32, "predict")


def test_stateless_calls_return_the_new_statistics(implementation):
    layer = make(spatial_batch_norm=True)
    x = feature_map(27)
    trainable = [w.value for w in layer.trainable_variables]
    fixed = [tf.identity(w.value) for w in layer.non_trainable_variables]
    y, updated = layer.stateless_call(trainable, fixed, x, training=True)
    for new, old, weight in zip(updated, fixed, layer.non_trainable_variables, strict=True):
        assert not np.array_equal(new, old)
        testing.assert_same_bits(weight.numpy(), old.numpy(), weight.name)
    testing.assert_close(y, layer(x, training=True), testing.FLOAT32, "y")


# --- bad input ------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ({"ratio": 0}, "`ratio` must be a positive integer, got 0"),
    ({"dtype": "int32"}, "`dtype` must be a policy of float16 or .* or float64, got 'int32'"),
    ({"ratio": 2.5}, "`ratio` must be a positive integer, got 2.5"),
    ({"hidden": -1}, "`hidden` must be a positive integer, 0 or None, got -1"),
    ({"hidden_rounding": "up"}, "`hidden_rounding` must be 'floor' or 'half_up' or .*, got 'up'"),
    ({"hidden_activation": "linear"}, "`hidden_activation` must be 'relu' or .*, got 'linear'"),
    (
        {"mlp_merge": "outputs"},
        "`mlp_merge` must be 'logits' or 'hidden' or 'gates', got 'outputs'",
    ),
    ({"mlp_merge": "hidden", "hidden": 0}, "`mlp_merge` must be .* with hidden=0, got 'hidden'"),
    ({"gate_activation": "tanh"}, "`gate_activation` must be 'sigmoid' or .*, got 'tanh'"),
    ({"kernel_size": 4}, r"`kernel_size` must be an odd .*, or one for each side, .*, got 4"),
    ({"kernel_size": (7, 2)}, r"`kernel_size` must be an odd .*, got \(7, 2\)"),
    ({"kernel_size": (3, 3, 3, 3)}, r"`kernel_size` must be an odd .*, got \(3, 3, 3, 3\)"),
    ({"order": "serial"}, "`order` must be 'channel_first' or .*, got 'serial'"),
    ({"activation": "tanh"}, "`activation` must be None or 'relu', got 'tanh'"),
    ({"mlp_activation": "tanh"}, "`mlp_activation` must be None or 'relu', got 'tanh'"),
    ({"data_format": "NHWC"}, "`data_format` must be 'channels_last' or .*, got 'NHWC'"),
    ({"spatial_batch_norm": True, "spatial_use_bias": True}, "`spatial_use_bias` must be None or"),
    ({"batch_norm_momentum": 1.5}, "`batch_norm_momentum` must be a number between .*, got 1.5"),
    ({"batch_norm_momentum": "0.9"}, "`batch_norm_momentum` must be a number .*, got '0.9'"),
    ({"batch_norm_epsilon": -1}, "`batch_norm_epsilon` must be a finite number .*, got -1"),
    ({"batch_norm_epsilon": None}, "`batch_norm_epsilon` must be a finite number .*, got None"),
    ({"batch_norm_epsilon": math.inf}, "`batch_norm_epsilon` must be a finite number .*, got inf"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"CBAM: {message}"):
        cbam_ops.CBAM(**arguments)


def test_bad_pooling_is_named():
    with pytest.raises(ValueError, match="ChannelAttention: `pooling` must be .*, got 'min'"):
        cbam_ops.ChannelAttention(pooling="min")


def test_a_ratio_larger_than_the_channels_is_explained():
    with pytest.raises(ValueError, match=r"C = 8, .* got ratio=16; give a smaller `ratio`, or"):
        cbam_ops.CBAM(ratio=16)(feature_map())


@pytest.mark.parametrize("layer_class", [cbam_ops.CBAM, cbam_ops.ChannelAttention])
def test_the_number_of_channels_as_ratio_warns(layer_class):
    """As in PyTorch's modules, whose first argument is the number of channels."""
    with pytest.warns(UserWarning, match="ratio=32 leaves one hidden unit of C = 32 channels.*`h"):
        layer_class(32).build((None, None, None, 32))
    # Nobody is warned of what is asked for, of few channels, and of two units.
    for arguments, channels in (({"hidden": 1}, 32), ({"ratio": 31}, 31), ({"ratio": 16}, 32)):
        layer_class(**arguments).build((None, None, None, channels))


def test_linear_activations_are_none():
    layer = cbam_ops.CBAM(4, activation="linear", mlp_activation="linear")
    assert layer.activation is layer.mlp_activation is layer.get_config()["activation"] is None
    with pytest.raises(ValueError, match="`order` must be .*, got 'linear'"):
        cbam_ops.CBAM(order="linear")


def test_tensors_of_keras_2_are_refused():
    """Its functional models take the layer, count no parameters of it and never train it."""

    class KerasTensor:  # what Keras 3 sees of one
        shape, dtype, is_tensor_like = SHAPE, "float32", True

    for arguments, name in (
        ((KerasTensor(),), "inputs"),
        ((feature_map(), KerasTensor()), "resid"),
    ):
        with pytest.raises(ValueError, match=f"CBAM: `{name}.* of Keras 3, got one of Keras 2"):
            make()(*arguments)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_bad_inputs_are_named(layer_class):
    arguments = {} if layer_class is cbam_ops.SpatialAttention else {"ratio": 4}
    with pytest.raises(ValueError, match="expected min_ndim=3, found ndim=2"):
        layer_class(**arguments)(feature_map(shape=(2, 8)))
    with pytest.raises(ValueError, match=r"`inputs` must have shape \[N, L, C\] or .*, got shape"):
        layer_class(**arguments).build((2, 8))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        make(layer_class)(feature_map(shape=(2, 5, 8)))
    with pytest.raises(ValueError, match="`inputs` must have a defined, positive number of chan"):
        layer_class(**arguments)(keras.Input((4, 4, None)))
    with pytest.raises(ValueError, match="axis -1|axis 3|incompatible"):
        make(layer_class)(feature_map(shape=(2, 5, 6, 7)))
    with pytest.raises(ValueError, match="`x` must have H >= 1"):
        layer_class(**arguments)(feature_map(shape=(2, 0, 6, 8)))
    with pytest.raises(ValueError, match="`x` must have dtype .*, got int32"):
        layer_class(**arguments)(np.zeros(SHAPE, "int32"))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_another_backend_of_keras_is_refused(backend, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    model = keras.Sequential([keras.Input((4, 4, 3))])
    for use in (cbam_ops.CBAM, lambda: cbam_ops.fuse(model), lambda: cbam_ops.export(model, "x")):
        with pytest.raises(RuntimeError, match=f"needs the TensorFlow backend.*'{backend}'"):
            use()
