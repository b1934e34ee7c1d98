"""What published code does otherwise: the options for it, and the table of names."""

from __future__ import annotations

import inspect
import pickle
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy_oracle import evaluate, gradient_magnitudes

import cbam_ops
from cbam_ops import _loader, dialects, reference, testing
from cbam_ops.testing import Case, options

HIDDEN = ("swish", "gelu", "elu", "mish")
# Every option that no native op has, alone and beside others, in every function that takes it.
CASES = [
    *(Case("channel_attention", options=options(hidden_activation=name)) for name in HIDDEN),
    Case("channel_attention", hidden=0, residual=True, options=options(pooling="avg")),
    Case("channel_attention", options=options(pooling="avg", gate_activation="hard_sigmoid")),
    Case("channel_attention", fill="steps", options=options(ties="first", pooling="max")),
    Case("spatial_attention", fill="relu", residual=True, options=options(ties="first")),
    Case("spatial_attention_with_batch_norm", options=options(gate_activation="hard_sigmoid")),
    Case(options=options(pooling="avg"), residual=True),
    Case(options=options(pooling="max", order="parallel")),
    Case(hidden=0, options=options(pooling="avg", activation="relu"), residual=True),
    Case(hidden=0, biases=False, options=options(mlp_activation="relu", order="parallel")),
    Case(options=options(hidden_activation="swish", order="spatial_first"), residual=True),
    Case(fill="steps", options=options(ties="first", order="parallel")),
    Case("cbam_with_batch_norm", fill="steps", options=options(ties="first", pooling="avg")),
    Case("cbam_with_batch_norm", hidden=0, options=options(order="spatial_first")),
    Case("cbam_with_batch_norm", options=options(hidden_activation="gelu", order="parallel")),
    Case("channel_attention", residual=True, options=options(mlp_merge="hidden")),
    Case("channel_attention", options=options(mlp_merge="gates", gate_activation="hard_sigmoid")),
    Case("channel_attention", hidden=0, fill="relu", options=options(mlp_merge="gates")),
    Case(options=options(mlp_merge="hidden", order="parallel", activation="relu")),
    Case(options=options(mlp_merge="gates", order="spatial_first"), residual=True),
    Case(options=options(mlp_merge="hidden", mlp_activation="relu", hidden_activation="elu")),
    Case("cbam_with_batch_norm", options=options(mlp_merge="gates", mlp_activation="relu")),
    Case("cbam_with_batch_norm", biases=False, options=options(mlp_merge="hidden")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_options_by_native_ops_and_by_the_reference(implementation, case):
    """A composition's outputs and gradients are as near the truth as a single op's."""
    tensors = case.draw()
    case.check(cbam_ops, tensors, magnitudes=gradient_magnitudes(case, tensors))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_definition_in_numpy(case):
    """The truth of the other tests, by a second definition written from the equations."""
    case = case.replace(dtype="float64")
    tensors = case.draw()
    expected = evaluate(case, tensors)
    for name, actual in case.evaluate(reference, tensors).items():
        testing.assert_close(actual.numpy(), expected[name], testing.MODEL_FORWARD, name)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_the_options_in_every_type_and_layout(dtype, data_format, case):
    case = case.replace(dtype=dtype, data_format=data_format)
    tensors = case.draw()
    if dtype in ("float32", "float64"):
        case.check(cbam_ops, tensors, magnitudes=gradient_magnitudes(case, tensors))
        return
    # A composition rounds what it hands on to the type of the map.
    truth, _ = testing.truth_and_stock(case, tensors, "evaluate")
    for name, actual in case.evaluate(cbam_ops, tensors).items():
        actual = tf.cast(actual, tf.float64)
        testing.assert_close(actual, truth[name], 8 * testing.EPSILON[dtype], name)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_the_options_in_a_graph_and_inside_xla(case):
    tensors = case.draw()
    expected = case.call(reference, tensors)
    for jit_compile in (False, True) if _loader.build_record()["xla"] else (False,):
        compiled = tf.function(lambda t: case.call(cbam_ops, t), jit_compile=jit_compile)
        for a, e, name in zip(compiled(tensors), expected, case.output_names(), strict=True):
            testing.assert_close(a, e, testing.FLOAT32, name)


def test_the_composition_reads_the_map_by_fused_pools():
    """Fails when an option quietly leaves all native ops, or the other half of the module."""

    def ops_of(**arguments) -> list[str]:
        layer = cbam_ops.CBAM(4, **arguments)
        x = tf.zeros((2, 5, 6, 8))
        layer.build(x.shape)
        graph = tf.function(lambda t: layer(t)).get_concrete_function(x).graph
        return [o.type.partition(">")[2] for o in graph.get_operations() if "CbamOps>" in o.type]

    with cbam_ops.use_implementation("native"):
        assert ops_of() == ["Cbam"]
        assert ops_of(pooling="avg") == ["ChannelAttention", "SpatialAttention"]
        assert ops_of(hidden_activation="swish") == ["ChannelPool", "SpatialAttention"]
        assert ops_of(mlp_merge="hidden") == ops_of(mlp_merge="gates") == ["Cbam"]
        assert ops_of(mlp_merge="gates", mlp_activation="relu") == ["Cbam"]
        assert ops_of(mlp_merge="gates", pooling="max") == ["ChannelAttention", "SpatialAttention"]
        assert ops_of(hidden=0, order="spatial_first") == ["SpatialAttention", "ChannelPool"]
        assert ops_of(hidden=0, pooling="avg") == ["SpatialAttention"]
        assert ops_of(hidden=0, order="parallel") == ["ChannelPool", "SpatialPool"]
        assert ops_of(ties="first") == []
        assert ops_of(pooling="max", order="parallel") == ["ChannelPool", "SpatialPool"]


# --- against other definitions --------------------------------------------------------------------


def _keras_cbam(layer: cbam_ops.CBAM, x: tf.Tensor) -> tf.Tensor:
    """The module of stock Keras functions, in the order of the paper."""
    gate = keras.activations.get(layer.gate_activation)

    def hidden(t: tf.Tensor) -> tf.Tensor:
        t = t @ layer.w0 + layer.b0
        return t if layer.w1 is None else keras.activations.get(layer.hidden_activation)(t)

    def last(t: tf.Tensor) -> tf.Tensor:
        return t if layer.w1 is None else t @ layer.w1 + layer.b1

    mean, maximum = hidden(tf.reduce_mean(x, (1, 2))), hidden(tf.reduce_max(x, (1, 2)))
    one = {"avg": mean, "max": maximum}.get(layer.pooling)
    if one is not None:
        channel_gate = gate(last(one))
    elif layer.mlp_merge == "hidden":
        channel_gate = gate(last(mean + maximum))
    elif layer.mlp_merge == "gates":
        channel_gate = gate(last(mean)) + gate(last(maximum))
    else:
        channel_gate = gate(last(mean) + last(maximum))
    u = x * channel_gate[:, None, None, :]
    descriptors = tf.stack([tf.reduce_mean(u, 3), tf.reduce_max(u, 3)], 3)
    z = tf.nn.conv2d(descriptors, layer.spatial_kernel, 1, "SAME") + layer.spatial_bias
    return u * gate(z)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"hidden_activation": name} for name in ("relu", *HIDDEN)),
        {"gate_activation": "hard_sigmoid"},
        {"mlp_merge": "hidden"},
        {"mlp_merge": "gates"},
        {"hidden": 0},
        {"pooling": "avg", "hidden": 0, "mlp_merge": "gates"},
        {"pooling": "max", "hidden_activation": "mish", "gate_activation": "hard_sigmoid"},
    ],
    ids=str,
)
def test_the_options_are_keras_s_functions(implementation, arguments):
    layer = cbam_ops.CBAM(**{"hidden": 3, **arguments}, dtype="float64")
    rng = np.random.default_rng(1)
    x, dy = (tf.constant(rng.normal(size=(2, 5, 6, 8))) for _ in range(2))
    layer.build(x.shape)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))

    def evaluate(function):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        weights = [weight.value for weight in layer.weights]
        return [y, *tape.gradient(y, [x, *weights], output_gradients=dy)]

    expected = evaluate(lambda t: _keras_cbam(layer, t))
    names = ["y", "dx", *(weight.name for weight in layer.weights)]
    for name, a, e in zip(names, evaluate(layer), expected, strict=True):
        testing.assert_close(a, e, testing.FLOAT32, name)  # Keras's GELU has a constant of 24 bits


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_the_first_of_equals_takes_the_gradient(implementation, data_format):
    """Rows before columns, channels in their order; the last equal one, or a share, is wrong."""
    x = np.zeros((1, 2, 3, 4), np.float32)
    x[0, :, 1:, 2] = 1  # channel 2 has four maxima, the others six
    x = np.moveaxis(x, 3, 1) if data_format == "NCHW" else x
    eye, nought = np.eye(4, dtype=np.float32), None

    def gradient(function, *weights, gate: int) -> np.ndarray:
        with tf.GradientTape() as tape:
            t = tf.constant(x)
            tape.watch(t)
            outputs = function(
                t, *weights, data_format=data_format, ties="first", return_gates=True
            )
            loss = tf.reduce_sum(outputs[gate])
        dx = tape.gradient(loss, t).numpy()
        return np.moveaxis(dx, 1, 3)[0] if data_format == "NCHW" else dx[0]

    dx = gradient(cbam_ops.channel_attention, eye, nought, eye, nought, gate=1)
    mean = dx[1, 2]  # nobody's first
    places = [tuple(p) for p in np.argwhere(np.abs(dx - mean) > 1e-3)]
    assert places == [(0, 1, 2)]  # a ReLU stops the gradient of the others, whose maximum is 0
    kernel = np.zeros((1, 1, 2, 1), np.float32)
    kernel[..., 1, 0] = 1
    dx = gradient(cbam_ops.spatial_attention, kernel, gate=1)
    first = np.argmax(dx, axis=2)
    np.testing.assert_array_equal(first, [[0, 2, 2], [0, 2, 2]])
    assert np.count_nonzero(dx) == 6


def test_a_nan_is_the_maximum_with_ties_first(implementation):
    x = np.ones((1, 2, 2, 3), np.float32)
    x[0, 1, 0, 1] = np.nan
    eye = tf.eye(3)
    _, gate = cbam_ops.channel_attention(x, eye, None, eye, None, ties="first", return_gates=True)
    assert np.isnan(gate[0]).all()  # the MLP spreads it


def test_second_order_gradients_of_a_composition(implementation):
    """Higher orders go through the pools' own second gradients."""
    case = Case("channel_attention", size=(1, 2, 3, 4), hidden=2, dtype="float64")
    tensors = case.draw()
    x = tensors.pop("x")

    def gradient(module, t):
        with tf.GradientTape() as outer:
            outer.watch(t)
            with tf.GradientTape() as inner:
                inner.watch(t)
                y = module.channel_attention(t, **tensors, hidden_activation="swish")
                loss = tf.reduce_sum(y * y)
            dx = inner.gradient(loss, t)
        return outer.gradient(dx, t)

    tolerance = testing.SECOND_ORDER_TOLERANCE["float64"]
    testing.assert_close(gradient(cbam_ops, x), gradient(reference, x), tolerance, "ddx")


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dialects)
def test_a_dialect_makes_a_layer(name):
    """A dictionary of arguments, which a saved model keeps; overrides go first."""
    dialect = dialects[name]
    assert dialect.about.endswith(".") and dialect.source and isinstance(dialect, dict)
    layer_class = getattr(cbam_ops, dialect.layer)
    assert set(dialect) <= set(inspect.signature(layer_class.__init__).parameters)
    layer = layer_class.from_dialect(name)
    assert layer.get_config() == layer_class(**dialect, name=layer.name).get_config()
    again = layer_class.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    changed = layer_class.from_dialect(name, ratio=3, name="mine")
    assert (changed.ratio, changed.name) == (3, "mine")
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 48)).astype(np.float32)
    assert layer(x).shape == x.shape


def test_dialects_differ_where_their_code_does():
    """A wrong row computes something else without a word."""
    x = np.zeros((1, 3, 3, 72), np.float32)
    shapes = {}
    for name, dialect in dialects.items():
        layer = getattr(cbam_ops, dialect.layer).from_dialect(name)
        layer(x)
        shapes[name] = [tuple(weight.shape) for weight in layer.weights]
    mlp, norm, kernel = [(72, 4), (4,), (4, 72), (72,)], [(1,)] * 4, [(7, 7, 2, 1)]
    assert shapes["paper"] == shapes["seed"] == [*mlp, *kernel, (1,)]
    assert shapes["official"] == shapes["pytorchcv"] == shapes["tf2cv"] == [*mlp, *kernel, *norm]
    assert shapes["timm"] == [(72, 5), (5, 72), *kernel, *norm]
    assert shapes["luuuyi"] == [(72, 4), (4, 72), *kernel]
    assert shapes["kobiso"] == [(72, 9), (9,), (9, 72), (72,), *kernel]
    assert shapes["ultralytics"] == [(72, 72), (72,), *kernel]
    assert shapes["squeeze_excite"] == mlp
    assert shapes["mobilenet_v3"] == [(72, 24), (24,), (24, 72), (72,)]
    assert shapes["efficientnet"] == [(72, 3), (3,), (3, 72), (72,)]
    first = {name for name, dialect in dialects.items() if dialect.maximum_first}
    assert first == {"official", "pytorchcv", "tf2cv"}


def test_a_dialect_may_be_changed_by_who_asked_for_it():
    """Fails when a ratio that a user puts into his options becomes everybody's."""
    options = dialects["timm"]
    before = dict(options)
    options["ratio"] = 8
    assert cbam_ops.CBAM(**options).ratio == 8
    assert dialects["timm"] == before and dialects["timm"].about == options.about
    again = pickle.loads(pickle.dumps(dialects))
    assert again == dialects and again["official"].source == dialects["official"].source


def test_the_halves_take_their_part_of_a_dialect():
    channel = cbam_ops.ChannelAttention.from_dialect("timm")
    assert (channel.hidden_rounding, channel.use_bias) == ("half_up", False)
    assert cbam_ops.SpatialAttention.from_dialect("timm").batch_norm_momentum == 0.9
    with pytest.raises(ValueError, match="'mobilenet_v3' is one of ChannelAttention alone"):
        cbam_ops.CBAM.from_dialect("mobilenet_v3")
    for unknown in ("tim", ["timm"], None):
        text = re.escape(repr(unknown))
        with pytest.raises(ValueError, match=f"`dialect` must be one of paper, .*, got {text}"):
            cbam_ops.CBAM.from_dialect(unknown)
