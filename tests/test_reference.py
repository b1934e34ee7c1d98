"""The reference against definitions that share no code with it.

Everything else is measured against `cbam_ops.reference`, so here it is measured itself: values
against loops over numbers and against stock Keras layers, gradients against finite differences and
against the chain rule written out in `numpy_oracle`.
"""

from __future__ import annotations

import itertools
import math

import keras
import numpy as np
import numpy_oracle
import pytest
import tensorflow as tf

from cbam_ops import reference, testing

N, H, W, C, HIDDEN, K = 2, 4, 3, 6, 2, 3
ORDERS = ("channel_first", "spatial_first", "parallel")
MLP = ("w0", "b0", "w1", "b1")


def arguments(
    seed: int = 0,
    n: int = N,
    h: int = H,
    w: int = W,
    c: int = C,
    hidden: int = HIDDEN,
    k: int | tuple[int, int] = K,
    dtype: str = "float64",
) -> dict[str, np.ndarray]:
    """Arguments of every function by name, NHWC."""
    rng = np.random.default_rng(seed)
    shapes = testing.Case(size=(n, h, w, c), hidden=hidden, kernel_size=k).shapes()
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def layout(value: np.ndarray, data_format: str) -> np.ndarray:
    return np.ascontiguousarray(numpy_oracle.from_nhwc(value, data_format))


def gradients(function, *inputs, upstream=None):
    """The result of `function` and its gradients, in a graph."""

    @tf.function
    def run(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = function(*tensors)
        return y, tape.gradient(y, tensors, output_gradients=upstream)

    y, grads = run(*map(tf.constant, inputs))
    return y.numpy(), [g.numpy() for g in grads]


# --- values, one number at a time -----------------------------------------------------------------


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def loops_channel_gate(x, w0, b0, w1, b1, pooling, mlp_activation):
    n, h, w, c = x.shape
    hidden = w0.shape[1]
    gate = np.zeros((n, c))
    for i in range(n):
        pooled = []
        if "avg" in pooling:
            pooled.append([sum(x[i, p, q, j] for p in range(h) for q in range(w)) / (h * w)
                           for j in range(c)])  # fmt: skip
        if "max" in pooling:
            pooled.append([max(x[i, p, q, j] for p in range(h) for q in range(w))
                           for j in range(c)])  # fmt: skip
        for j in range(c):
            logit = 0.0
            for t in pooled:
                branch = b1[j]
                for m in range(hidden):
                    branch += max(0.0, sum(t[a] * w0[a, m] for a in range(c)) + b0[m]) * w1[m, j]
                logit += max(0.0, branch) if mlp_activation == "relu" else branch
            gate[i, j] = sigmoid(logit)
    return gate


def loops_spatial_gate(x, kernel, bias):
    n, h, w, c = x.shape
    height, width = kernel.shape[:2]
    gate = np.zeros((n, h, w))
    for i, p, q in itertools.product(range(n), range(h), range(w)):
        z = bias[0]
        for a, b in itertools.product(range(height), range(width)):
            row, column = p + a - height // 2, q + b - width // 2
            if 0 <= row < h and 0 <= column < w:
                values = [x[i, row, column, j] for j in range(c)]
                z += kernel[a, b, 0, 0] * sum(values) / c + kernel[a, b, 1, 0] * max(values)
        gate[i, p, q] = sigmoid(z)
    return gate


def loops(v, order, mlp_activation, activation, with_residual):
    x, mlp, spatial = v["x"], [v[name] for name in MLP], (v["kernel"], v["bias"])
    if order == "spatial_first":
        g_s = loops_spatial_gate(x, *spatial)
        u = x * g_s[..., None]
        g_c = loops_channel_gate(u, *mlp, "avg+max", mlp_activation)
        y = u * g_c[:, None, None, :]
    else:
        g_c = loops_channel_gate(x, *mlp, "avg+max", mlp_activation)
        u = x * g_c[:, None, None, :]
        g_s = loops_spatial_gate(x if order == "parallel" else u, *spatial)
        y = u * g_s[..., None]
    if with_residual:
        y = y + v["residual"]
    return np.maximum(y, 0) if activation == "relu" else y, g_c, g_s


@pytest.mark.parametrize("k", [1, 3, 7, (7, 1), (1, 3)])  # 7 is larger than the map
@pytest.mark.parametrize("options", [(None, None, False), ("relu", "relu", True)])
@pytest.mark.parametrize("order", ORDERS)
def test_cbam_is_the_definition(order, options, k, data_format):
    """The definition itself would be wrong, and with it every test that trusts it."""
    v = arguments(k=k)
    mlp_activation, activation, with_residual = options
    expected = loops(v, order, mlp_activation, activation, with_residual)
    actual = reference.cbam(
        layout(v["x"], data_format),
        *(v[name] for name in (*MLP, "kernel", "bias")),
        data_format=data_format,
        mlp_activation=mlp_activation,
        residual=layout(v["residual"], data_format) if with_residual else None,
        activation=activation,
        order=order,
        return_gates=True,
    )
    names = ("y", "channel gate", "spatial gate")
    for name, a, e in zip(names, actual, expected, strict=True):
        e = layout(e, data_format) if name == "y" else e
        testing.assert_close(a, e, testing.FLOAT64, name)


@pytest.mark.parametrize("mlp_activation", [None, "relu"])
@pytest.mark.parametrize("pooling", ["avg+max", "avg", "max"])
def test_channel_attention_is_the_definition(pooling, mlp_activation, data_format):
    v = arguments(1)
    gate = loops_channel_gate(v["x"], *(v[name] for name in MLP), pooling, mlp_activation)
    y, actual = reference.channel_attention(
        layout(v["x"], data_format),
        *(v[name] for name in MLP),
        pooling=pooling,
        mlp_activation=mlp_activation,
        data_format=data_format,
        return_gates=True,
    )
    testing.assert_close(actual, gate, testing.FLOAT64, "channel gate")
    expected = layout(v["x"] * gate[:, None, None, :], data_format)
    testing.assert_close(y, expected, testing.FLOAT64, "y")


def test_spatial_attention_is_the_definition(data_format):
    v = arguments(2, k=5)
    gate = loops_spatial_gate(v["x"], v["kernel"], v["bias"])
    y, actual = reference.spatial_attention(
        layout(v["x"], data_format),
        v["kernel"],
        v["bias"],
        data_format=data_format,
        return_gates=True,
    )
    testing.assert_close(actual, gate, testing.FLOAT64, "spatial gate")
    expected = layout(v["x"] * gate[..., None], data_format)
    testing.assert_close(y, expected, testing.FLOAT64, "y")


def test_pools_are_the_definition(data_format):
    x = arguments(3)["x"]
    mean, maximum = reference.channel_pool(layout(x, data_format), data_format=data_format)
    testing.assert_close(mean, x.mean((1, 2)), testing.FLOAT64, "mean")
    testing.assert_same_bits(maximum.numpy(), x.max((1, 2)), "maximum")
    pooled = reference.spatial_pool(layout(x, data_format), data_format=data_format)
    expected = layout(np.stack([x.mean(3), x.max(3)], 3), data_format)
    testing.assert_close(pooled, expected, testing.FLOAT64, "descriptors")


def test_absent_biases_are_zero_biases(data_format):
    v = arguments(4)
    x = layout(v["x"], data_format)
    without = reference.cbam(x, v["w0"], None, v["w1"], None, v["kernel"], data_format=data_format)
    b0, b1, bias = np.zeros(HIDDEN), np.zeros(C), np.zeros(1)
    zero = reference.cbam(x, v["w0"], b0, v["w1"], b1, v["kernel"], bias, data_format=data_format)
    testing.assert_same_bits(without.numpy(), zero.numpy(), "y")


# --- stock Keras layers ---------------------------------------------------------------------------


def stock_layers(v, spatial_batch_norm: bool):
    """The ten layers of a Keras model that CBAM replaces, with the weights of `v`."""
    channels = v["x"].shape[-1]
    dense = {"dtype": v["x"].dtype.name}
    inputs = keras.Input((None, None, channels), dtype=v["x"].dtype.name)
    mean = keras.layers.GlobalAveragePooling2D(**dense)(inputs)
    maximum = keras.layers.GlobalMaxPool2D(**dense)(inputs)
    first = keras.layers.Dense(v["w0"].shape[1], activation="relu", **dense)
    second = keras.layers.Dense(channels, **dense)
    gate = keras.layers.Add(**dense)([second(first(mean)), second(first(maximum))])
    gate = keras.layers.Activation("sigmoid", **dense)(gate)
    gate = keras.layers.Reshape((1, 1, channels), **dense)(gate)
    u = keras.layers.Multiply(**dense)([inputs, gate])
    mean = keras.ops.mean(u, axis=3, keepdims=True)
    maximum = keras.ops.max(u, axis=3, keepdims=True)
    planes = keras.layers.Concatenate(**dense)([mean, maximum])
    conv = keras.layers.Conv2D(
        1, v["kernel"].shape[0], padding="same", use_bias=not spatial_batch_norm, **dense
    )
    z = conv(planes)
    norm = keras.layers.BatchNormalization(**dense)
    z = norm(z) if spatial_batch_norm else z
    z = keras.layers.Activation("sigmoid", **dense)(z)
    model = keras.Model(inputs, keras.layers.Multiply(**dense)([u, z]))
    first.set_weights([v["w0"], v["b0"]])
    second.set_weights([v["w1"], v["b1"]])
    conv.set_weights([v["kernel"]] + ([] if spatial_batch_norm else [v["bias"]]))
    if spatial_batch_norm:
        norm.set_weights([v["gamma"], v["beta"], np.zeros(1), np.ones(1)])
    weights = [*first.weights, *second.weights, conv.kernel]
    weights += [norm.gamma, norm.beta] if spatial_batch_norm else [conv.bias]
    return model, weights, norm


@pytest.mark.parametrize("spatial_batch_norm", [False, True])
def test_cbam_equals_the_stock_keras_layers(spatial_batch_norm):
    """A user who replaces the ten layers by one would get other numbers or other gradients."""
    v = arguments(5, n=3, h=6, w=5, c=8, k=7)
    model, weights, norm = stock_layers(v, spatial_batch_norm)
    upstream = np.random.default_rng(6).standard_normal(v["x"].shape)
    x = tf.constant(v["x"])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=True)
    expected = tape.gradient(y, [x, *(w.value for w in weights)], output_gradients=upstream)

    names = (*MLP, "kernel") + (("gamma", "beta") if spatial_batch_norm else ("bias",))
    if spatial_batch_norm:
        # The ops' epsilon has 24 bits: Keras's 1e-3 in float64 is another number.
        norm.epsilon = float(np.float32(norm.epsilon))

        def function(*tensors):
            return reference.cbam_with_batch_norm(*tensors, epsilon=1e-3)[0]
    else:
        function = reference.cbam
    actual_y, actual = gradients(function, v["x"], *(v[name] for name in names), upstream=upstream)
    testing.assert_close(actual_y, y, 10 * testing.FLOAT64, "y")
    for name, a, e in zip(("x", *names), actual, expected, strict=True):
        testing.assert_close(a, e, 100 * testing.FLOAT64, f"gradient of {name}")


# --- gradients ------------------------------------------------------------------------------------

FUNCTIONS = {
    "cbam": ("x", *MLP, "kernel", "bias", "residual"),
    "cbam_with_batch_norm": ("x", *MLP, "kernel", "gamma", "beta", "residual"),
    "channel_attention": ("x", *MLP, "residual"),
    "spatial_attention": ("x", "kernel", "bias", "residual"),
    "spatial_attention_with_batch_norm": ("x", "kernel", "gamma", "beta", "residual"),
    "channel_pool": ("x",),
    "spatial_pool": ("x",),
}
CASES = [
    *(("cbam", {"order": order}) for order in ORDERS),
    *(("cbam_with_batch_norm", {"order": order}) for order in ORDERS),
    ("cbam", {"mlp_activation": "relu", "activation": "relu"}),
    *(("channel_attention", {"pooling": pooling}) for pooling in ("avg+max", "avg", "max")),
    ("spatial_attention", {}),
    ("spatial_attention_with_batch_norm", {}),
    ("channel_pool", {}),
    ("spatial_pool", {}),
]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v.values())
)
def test_gradients_by_finite_differences(name, options, data_format):
    """Training by the fallback would go astray, and the oracle of all gradients with it."""
    v = arguments(7, n=2, h=2, w=3, c=3, hidden=2)
    names = FUNCTIONS[name]
    upstream = np.random.default_rng(25).standard_normal(100)
    values = [layout(v[n], data_format) if n in ("x", "residual") else v[n] for n in names]

    @tf.function
    def function(*tensors):
        named = dict(zip(names, tensors, strict=True))
        more = {"return_gates": True} if "residual" in named else {}
        out = getattr(reference, name)(**named, data_format=data_format, **options, **more)
        # All results in one weighted sum, so that gradients through gates are checked too; batch
        # statistics have none by design.
        out = [out] if tf.is_tensor(out) else list(out)
        if "batch_norm" in name:
            out = [out[0], *out[3:]]
        out = tf.concat([tf.reshape(t, [-1]) for t in out], 0)
        return tf.reduce_sum(out * upstream[: len(out)])

    step = testing.FINITE_DIFFERENCE_STEP
    theoretical, numerical = tf.test.compute_gradient(function, values, delta=step)
    for n, t, e in zip(names, theoretical, numerical, strict=True):
        testing.assert_close(t, e, testing.FINITE_DIFFERENCE_TOLERANCE, n)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_at_ties_equal_the_chain_rule(order, batch_norm, data_format):
    """After a ReLU many maxima are equal: a gradient given to one of them alone is another one."""
    v = arguments(8, h=5, w=5)
    v["x"] = np.maximum(np.round(v["x"]), 0)
    v["x"][0] = 0
    v["x"][1, :, :, :3] = 1
    upstream = layout(np.random.default_rng(9).standard_normal(v["x"].shape), data_format)
    x = layout(v["x"], data_format)
    names = (*MLP, "kernel") + (("gamma", "beta") if batch_norm else ("bias",))

    def function(*tensors):
        if batch_norm:
            return reference.cbam_with_batch_norm(*tensors, data_format=data_format, order=order)[0]
        return reference.cbam(*tensors, data_format=data_format, order=order)

    y, actual = gradients(function, x, *(v[n] for n in names), upstream=upstream)
    shared = {n: v[n] for n in (*MLP, "kernel")}
    options = {"layout": data_format, "gates": order, "batch_norm": batch_norm}
    options["epsilon"] = float(np.float32(1e-5))
    norm = {"gamma": v["gamma"], "bias": v["beta"]} if batch_norm else {"bias": v["bias"]}
    expected_y = numpy_oracle.forward(x, **shared, **norm, **options)["y"]
    expected = numpy_oracle.backward(x, upstream, **shared, **norm, **options)
    testing.assert_close(y, expected_y, testing.FLOAT64, "y")
    keys = ["dx", *(f"d{n}" for n in names)]
    for key, a in zip(keys, actual, strict=True):
        e = expected["dbias" if key == "dbeta" else key]
        testing.assert_close(a, e, 100 * testing.FLOAT64, key)


def test_equal_maxima_share_their_gradient_evenly():
    x = np.zeros((1, 2, 2, 3))
    _, (dx,) = gradients(lambda t: reference.channel_pool(t)[1], x)
    testing.assert_same_bits(dx, np.full(x.shape, 1 / 4), "over positions")
    _, (dx,) = gradients(lambda t: reference.spatial_pool(t)[..., 1], x)
    testing.assert_close(dx, np.full(x.shape, 1 / 3), testing.FLOAT64, "over channels")


def test_batch_statistics_have_no_gradient():
    """Moving averages would otherwise pull on the weights."""
    v = arguments(10)
    x = tf.constant(v["x"])
    with tf.GradientTape() as tape:
        tape.watch(x)
        _, mean, variance = reference.cbam_with_batch_norm(
            x, *(v[n] for n in (*MLP, "kernel", "gamma", "beta"))
        )
        total = mean + variance
    assert tape.gradient(total, x) is None


def test_second_order_by_finite_differences(data_format):
    v = arguments(11, n=1, h=2, w=2, c=3)
    weights = [tf.constant(v[n]) for n in (*MLP, "kernel", "bias")]
    upstream = tf.constant(layout(v["residual"], data_format))

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = reference.cbam(x, *weights, data_format=data_format)
        return tape.gradient(y, x, output_gradients=upstream)

    step = testing.FINITE_DIFFERENCE_STEP
    x = layout(v["x"], data_format)
    (theoretical,), (numerical,) = tf.test.compute_gradient(gradient, [x], delta=step)
    testing.assert_close(
        theoretical, numerical, 10 * testing.FINITE_DIFFERENCE_TOLERANCE, "second order"
    )


# --- batch norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_batch_statistics_are_those_of_the_convolution(order, data_format):
    """Moving statistics, and so every prediction after training, would be off."""
    v = arguments(12, h=5, w=5)
    weights = {n: v[n] for n in (*MLP, "kernel", "gamma")}
    epsilon = 0.25
    expected = numpy_oracle.forward(
        v["x"], **weights, bias=v["beta"], gates=order, batch_norm=True, epsilon=epsilon
    )
    y, mean, variance, g_c, g_s = reference.cbam_with_batch_norm(
        layout(v["x"], data_format),
        **weights,
        beta=v["beta"],
        epsilon=epsilon,
        order=order,
        data_format=data_format,
        return_gates=True,
    )
    assert mean.shape == variance.shape == [1]
    statistics = np.concatenate([mean, variance])
    testing.assert_close(statistics, expected["batch_statistics"], testing.FLOAT64, "statistics")
    expected_y = layout(expected["y"], data_format)
    testing.assert_close(y, expected_y, testing.FLOAT64, "y")
    testing.assert_close(g_c, expected["channel_gate"], testing.FLOAT64, "channel gate")
    testing.assert_close(g_s, expected["spatial_gate"], testing.FLOAT64, "spatial gate")


# --- special values and sizes ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_special_values_stay_in_their_sample(value, data_format):
    """One broken picture must not spoil the batch, nor be hidden."""
    v = arguments(13, h=9, w=9)
    spoilt = v["x"].copy()
    spoilt[0, 4, 4, 2] = value
    weights = [v[n] for n in (*MLP, "kernel", "bias")]
    clean = reference.cbam(layout(v["x"], data_format), *weights, data_format=data_format)
    y = reference.cbam(layout(spoilt, data_format), *weights, data_format=data_format).numpy()
    testing.assert_same_bits(y[1], clean[1].numpy(), "the other sample")
    with np.errstate(invalid="ignore"):
        expected = numpy_oracle.forward(layout(spoilt, data_format), *weights, layout=data_format)[
            "y"
        ]
    testing.assert_close(y, expected, testing.FLOAT64, "y")
    assert np.isnan(y[0]).any()


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 1, 5, 3), (1, 3, 2, 17)])
def test_small_maps(size, data_format):
    """A kernel larger than the map, one position, one channel."""
    n, h, w, c = size
    v = arguments(14, n=n, h=h, w=w, c=c, hidden=1, k=7)
    weights = [v[name] for name in (*MLP, "kernel", "bias")]
    expected, *_ = loops(v, "channel_first", None, None, False)
    y = reference.cbam(layout(v["x"], data_format), *weights, data_format=data_format)
    testing.assert_close(y, layout(expected, data_format), testing.FLOAT64, "y")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_empty_batch(name, data_format):
    """The last batch of a filtered data set: empty results, and gradients of zero, not NaN."""
    v = arguments(15, n=0)
    names = FUNCTIONS[name]
    tensors = [
        tf.constant(layout(v[n], data_format) if n in ("x", "residual") else v[n]) for n in names
    ]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        out = getattr(reference, name)(
            **dict(zip(names, tensors, strict=True)), data_format=data_format
        )
        y = out if tf.is_tensor(out) else out[0]
    assert y.shape[0] == 0
    for n, g in zip(names, tape.gradient(y, tensors), strict=True):
        assert not np.any(g.numpy()), n  # NaN counts as true


def test_layouts_agree_in_every_type(dtype):
    v = {n: tf.cast(t, dtype) for n, t in arguments(16, h=6, w=5).items()}
    weights = [v[n] for n in (*MLP, "kernel", "bias")]
    nhwc = reference.cbam(v["x"], *weights).numpy()
    x = tf.transpose(v["x"], (0, 3, 1, 2))
    nchw = tf.transpose(reference.cbam(x, *weights, data_format="NCHW"), (0, 2, 3, 1)).numpy()
    testing.assert_close(
        nchw, nhwc, 64 * testing.EPSILON[dtype], "NCHW against NHWC, a few roundings"
    )


# --- types and compilation ------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["same", "float32"])
def test_types_of_results_and_gradients(dtype, weights, data_format):
    """Mixed precision: the map's type goes through, gates have at least float32."""
    if weights == "float32" and dtype == "float64":
        pytest.skip("float64 maps take float64 weights")
    weight_type = dtype if weights == "same" else "float32"
    v = arguments(17)
    names = (*MLP, "kernel", "bias")
    x = tf.cast(layout(v["x"], data_format), dtype)
    tensors = [x, *(tf.cast(v[n], weight_type) for n in names)]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y, g_c, g_s = reference.cbam(*tensors, data_format=data_format, return_gates=True)
    assert y.dtype == dtype
    assert g_c.dtype == g_s.dtype == testing.compute_type(dtype)
    for tensor, gradient in zip(tensors, tape.gradient(y, tensors), strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.shape == tensor.shape
    exact = numpy_oracle.forward(
        x.numpy().astype("float64"),
        *(t.numpy().astype("float64") for t in tensors[1:]),
        layout=data_format,
    )
    error = 64 * testing.EPSILON[dtype]
    testing.assert_close(y.numpy().astype("float64"), exact["y"], error, "y")


@pytest.mark.parametrize(
    ("order", "data_format"),
    [("channel_first", "NHWC"), ("channel_first", "NCHW"), ("spatial_first", "NHWC")],
)
def test_compiles_by_xla(order, data_format):
    """Inside XLA the reference computes where the native ops cannot, and where it is asked for."""
    v = arguments(18, dtype="float32")
    names = (*MLP, "kernel", "gamma", "beta")
    x = layout(v["x"], data_format)

    def step(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y, mean, variance = reference.cbam_with_batch_norm(
                *tensors, data_format=data_format, order=order, activation="relu"
            )
        return y, mean, variance, *tape.gradient(y, tensors)

    tensors = [tf.constant(t) for t in (x, *(v[n] for n in names))]
    expected = step(*tensors)
    actual = tf.function(step, jit_compile=True)(*tensors)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        testing.assert_close(a, e, 10 * testing.FLOAT32, f"result {i}")


@pytest.mark.parametrize("shape", [None, [None] * 4])
@pytest.mark.parametrize("name", ["cbam", "cbam_with_batch_norm"])
def test_unknown_sizes_in_a_graph(name, shape, data_format):
    v = arguments(19, dtype="float32")
    names = FUNCTIONS[name][:-1]
    values = [layout(v[n], data_format) if n == "x" else v[n] for n in names]
    signature = [tf.TensorSpec(shape, tf.float32)] + [tf.TensorSpec(None, tf.float32)] * (
        len(names) - 1
    )

    @tf.function(input_signature=signature)
    def function(*tensors):
        return getattr(reference, name)(*tensors, data_format=data_format, return_gates=True)

    expected = getattr(reference, name)(*values, data_format=data_format, return_gates=True)
    for a, e in zip(function(*values), expected, strict=True):
        testing.assert_close(a, e, testing.FLOAT32, name)


def test_the_graph_is_stock_tensorflow():
    """The baseline of the benchmarks must be what a user would have written."""
    v = arguments(20, dtype="float32")
    tensors = [tf.constant(v[n]) for n in ("x", *MLP, "kernel", "bias")]
    graph = tf.function(reference.cbam).get_concrete_function(*tensors).graph
    counts: dict[str, int] = {}
    for op in graph.get_operations():
        if op.type not in ("Const", "Placeholder", "Identity", "NoOp"):
            counts[op.type] = counts.get(op.type, 0) + 1
    assert counts == {
        "Mean": 2, "Max": 2, "MatMul": 4, "AddV2": 6, "Relu": 2, "Sigmoid": 2, "StridedSlice": 1,
        "Mul": 2, "Pack": 1, "Conv2D": 1, "Squeeze": 1, "ExpandDims": 1,
    }  # fmt: skip


@pytest.mark.parametrize("order", ["channel_first", "spatial_first"])
def test_the_whole_is_the_composition_of_its_parts(order):
    v = arguments(21)
    parts = [
        lambda t: reference.channel_attention(t, *(v[n] for n in MLP)),
        lambda t: reference.spatial_attention(t, v["kernel"], v["bias"]),
    ]
    first, second = parts if order == "channel_first" else reversed(parts)
    weights = [v[n] for n in (*MLP, "kernel", "bias")]
    whole = reference.cbam(v["x"], *weights, order=order).numpy()
    testing.assert_same_bits(whole, second(first(v["x"])).numpy(), order)


# --- bad input ------------------------------------------------------------------------------------

BAD = [
    ({"x": np.zeros((4, 6))}, r"`x` must have shape \[N, L, C\] or .*, got \[4, 6\]"),
    ({"x": np.zeros((2, 4, 3, 6), int)}, r"`x` must have dtype float16 or .*, got int64"),
    ({"x": np.zeros((2, 0, 3, 6))}, r"`x` must have H >= 1, got shape \[2, 0, 3, 6\]"),
    ({"x": np.zeros((2, 4, 3, 0))}, r"`x` must have C >= 1"),
    ({"x": None}, "`x` must be a tensor, got None"),
    ({"x": "map"}, "`x` must have dtype"),
    ({"w0": np.zeros((5, 2))}, r"`w0` must have shape \[C, hidden\] = \[6, hidden\], got \[5, 2\]"),
    ({"w0": np.zeros((6, 0))}, r"`w0` must have hidden >= 1, got shape \[6, 0\]"),
    ({"w1": np.zeros((2, 5))}, r"`w1` must have shape \[hidden, C\] = \[2, 6\], got \[2, 5\]"),
    ({"b0": np.zeros(3)}, r"`b0` must have shape \[hidden\] = \[2\], got \[3\]"),
    ({"b1": np.zeros((6, 1))}, r"`b1` must have shape \[C\] = \[6\], got \[6, 1\]"),
    ({"kernel": np.zeros((2, 2, 2, 1))}, r"`kernel` must have an odd kh, got shape \[2, 2, 2, 1\]"),
    ({"kernel": np.zeros((0, 0, 2, 1))}, "`kernel` must have an odd kh"),
    ({"kernel": np.zeros((3, 4, 2, 1))}, r"`kernel` must have an odd kw"),
    ({"kernel": np.zeros((3, 3, 1, 1))}, r"`kernel` must have shape .*, got \[3, 3, 1, 1\]"),
    ({"bias": np.zeros(2)}, r"`bias` must have shape \[1\], got \[2\]"),
    ({"w1": np.zeros((2, 6), "float32")}, "`w1` must have dtype float64 .*, got float32"),
    ({"residual": np.zeros((2, 4, 3, 5))}, r"`residual` must have shape .*, got \[2, 4, 3, 5\]"),
    ({"residual": np.zeros((2, 4, 3, 6), "float32")}, "`residual` must have the dtype of `x`"),
    ({"data_format": "NCWH"}, "`data_format` must be 'NHWC' or 'NCHW', got 'NCWH'"),
    ({"mlp_activation": "tanh"}, "`mlp_activation` must be None or 'relu', got 'tanh'"),
    ({"activation": "gelu"}, "`activation` must be None or 'relu', got 'gelu'"),
    ({"order": "serial"}, "`order` must be 'channel_first' or .*, got 'serial'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change, message):
    """The message names the argument, what was expected and what was received."""
    v = arguments(22)
    named = {n: v[n] for n in FUNCTIONS["cbam"]} | change
    with pytest.raises(ValueError, match=f"cbam: {message}"):
        reference.cbam(**named)


def test_mixed_weight_types_are_named():
    v = {n: tf.cast(t, tf.float16) for n, t in arguments(23).items()}
    named = {n: v[n] for n in FUNCTIONS["cbam"]}
    named["kernel"] = tf.cast(v["kernel"], tf.float32)
    with pytest.raises(ValueError, match="`kernel` must have the dtype of `w0`, float16"):
        reference.cbam(**named)
    with pytest.raises(ValueError, match="`w0` must have dtype float16 or float32 .* bfloat16"):
        reference.cbam(**(named | {"w0": tf.cast(v["w0"], tf.bfloat16)}))


def test_bad_pooling_and_epsilon_are_named():
    v = arguments(24)
    with pytest.raises(ValueError, match="`pooling` must be 'avg.max' or .*, got 'min'"):
        reference.channel_attention(v["x"], *(v[n] for n in MLP), pooling="min")
    with pytest.raises(ValueError, match="`epsilon` must be a number >= 0, got -1"):
        reference.spatial_attention_with_batch_norm(
            v["x"], v["kernel"], v["gamma"], v["beta"], epsilon=-1
        )
