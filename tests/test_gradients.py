"""Gradients of the native ops: two more independent ways (test_ops.py has the first), every order,
both modes."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from cbam_ops import ops, reference
from cbam_ops.testing import (
    DOT_PRODUCT_TOLERANCE,
    FINITE_DIFFERENCE_STEP,
    FINITE_DIFFERENCE_TOLERANCE,
    MAPS,
    OPTIONS,
    SECOND_ORDER_TOLERANCE,
    STATISTICS,
    Case,
    assert_close,
    assert_same_bits,
    cast,
    options,
    truth_and_stock,
)

pytestmark = pytest.mark.usefixtures("native")


def loss(case: Case, module, tensors) -> tf.Tensor:
    """A number that depends on every output in a curved way; batch statistics give no gradient."""
    outputs = case.call(module, tensors)
    statistics = STATISTICS.get(case.function, ())
    outputs = [output for i, output in enumerate(outputs) if i not in statistics]
    return tf.add_n([tf.reduce_sum(tf.sin(3.0 * tf.cast(y, tf.float64))) for y in outputs])


# --- finite differences in float64 ----------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_finite_differences(case):
    """Fails where ours and the reference's gradient are wrong together."""
    data_format = "NCHW" if case.residual else "NHWC"
    size = (2, *(3, 2, 2)[: len(case.size) - 2], 4)
    # Distinct values: at equal maxima a function has no derivative to compare with.
    case = case.replace(
        size=size, hidden=2, kernel_size=3, half_weights=False, fill="normal",
        dtype="float64", data_format=data_format,
    )  # fmt: skip
    tensors = case.draw()

    def function(*values):
        return loss(case, ops, dict(zip(tensors, values, strict=True)))

    theoretical, numerical = tf.test.compute_gradient(
        function, list(tensors.values()), delta=FINITE_DIFFERENCE_STEP
    )
    for name, ours, theirs in zip(tensors, theoretical, numerical, strict=True):
        assert_close(ours, theirs, FINITE_DIFFERENCE_TOLERANCE, name)


# --- the dot-product identity on a large map -------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(size=(4, 56, 56, 96), hidden=6, kernel_size=7, residual=True),
        Case("cbam_with_batch_norm", size=(4, 28, 28, 256), hidden=16, kernel_size=7),
        Case("channel_pool", size=(2, 113, 97, 64)),
        Case("spatial_pool", size=(2, 56, 57, 130)),
    ],
    ids=str,
)
@pytest.mark.parametrize("map_dtype", ["float32", "float64"])
def test_dot_product_identity_on_large_maps(case, map_dtype, data_format):
    """<J v, w> = <v, J' w>: fails where a gradient loses a part of a map too large to print.

    J v comes from the reference in float64, forward mode; J' w from the native gradient ops.
    """
    case = case.replace(dtype=map_dtype, data_format=data_format)
    tensors = case.draw()
    generator = np.random.default_rng(3)
    tangents = {
        name: tf.constant(generator.normal(size=tensor.shape)) for name, tensor in tensors.items()
    }
    exact = cast(tensors, "float64")
    with tf.autodiff.ForwardAccumulator(exact, tangents) as accumulator:
        outputs = case.call(reference, exact)
    products = [accumulator.jvp(output) for output in outputs]
    forward = [
        tf.reduce_sum(product * weight)
        for product, weight in zip(products, case.cotangents(outputs), strict=True)
        if product is not None
    ]
    gradients = cast(case.gradients(ops, tensors), "float64")
    terms = [gradients[name] * tangents[name] for name in tensors]
    backward = tf.add_n([tf.reduce_sum(term) for term in terms])
    size = tf.sqrt(tf.add_n([tf.reduce_sum(term * term) for term in terms]))
    error = abs(float(tf.add_n(forward) - backward)) / float(size)
    assert error <= DOT_PRODUCT_TOLERANCE[map_dtype], f"relative error {error:.2g}"


# --- ties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["relu", "equal"])
def test_equal_maxima_share_as_reduce_max_shares(fill, dtype, data_format):
    """Fails where one of several equal maxima gets all: after a ReLU that biases every step."""
    case = Case("channel_pool", fill=fill, dtype=dtype, data_format=data_format)
    x = case.draw()["x"]
    positions, channels = ([1, 2], 3) if data_format == "NHWC" else ([2, 3], 1)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        over_positions = ops.channel_pool(x, data_format=data_format)[1]
        over_channels = tf.gather(ops.spatial_pool(x, data_format=data_format), 1, axis=channels)
        expected_positions = tf.reduce_max(x, positions)
        expected_channels = tf.reduce_max(x, channels)
    for ours, theirs in (
        (over_positions, expected_positions),
        (over_channels, expected_channels),
    ):
        assert_same_bits(ours.numpy(), theirs.numpy(), "maximum")
        assert_close(
            tape.gradient(ours, x).numpy(), tape.gradient(theirs, x).numpy(), 2.0**-7, "gradient"
        )


@pytest.mark.parametrize("case", [Case(fill="equal"), Case(fill="equal", half_weights=True)])
def test_equal_maxima_of_a_gated_map(case, dtype, data_format):
    """Fails where forward and backward disagree on what is equal (a fused multiply-add in one)."""
    case = case.replace(dtype=dtype, data_format=data_format)
    tensors = case.draw()
    # Equal channels of weights give equal gates, so all of u is equal too.
    for name in ("w0", "b0", "w1", "b1"):
        tensors[name] = tf.fill(tensors[name].shape, tf.cast(0.3, tensors[name].dtype))
    gradient = case.gradients(ops, tensors)["x"].numpy()
    truth, _ = truth_and_stock(case, tensors, "gradients")
    bound = 2.0**-7 if dtype in ("bfloat16", "float16") else 1e-5
    assert_close(gradient.astype(np.float64), truth["x"].numpy(), bound, "gradient of x")


# --- what a training step holds -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "maps"),
    [
        (Case(), ["dy", "x"]),
        (Case(residual=True), ["dy", "x"]),
        (Case(residual=True, options=options(activation="relu")), ["dy", "x", "y"]),
        (Case("cbam_with_batch_norm"), ["dy", "x"]),
        (Case("channel_attention"), ["dy", "x"]),
        (Case("spatial_attention"), ["dy", "x"]),
        (Case("channel_pool"), ["x"]),
        (Case("spatial_pool"), ["x"]),
    ],
    ids=str,
)
def test_no_other_map_is_kept_for_the_gradient(case, maps):
    """Fails where a tensor as large as x, other than x and y, lives from forward to backward."""
    tensors = case.draw()

    @tf.function
    def step(tensors):
        return case.gradients(ops, tensors)

    graph = step.get_concrete_function(tensors).graph
    gradients = [op for op in graph.get_operations() if op.type.startswith("CbamOps>")]
    gradients = [op for op in gradients if op.type.endswith("Grad")]
    assert len(gradients) == 1
    elements = np.prod(case.size)
    large = {
        tensor.name for tensor in gradients[0].inputs if tensor.shape.num_elements() >= elements
    }
    assert len(large) == len(maps)
    # Only x, y and the incoming gradient feed on to the gradient; the forward op gives only small
    # ones besides y.
    forward = [op for op in graph.get_operations() if f"{op.type}Grad" == gradients[0].type]
    held = [t for t in gradients[0].inputs if t.op is forward[0] and t.name in large]
    assert len(held) == ("y" in maps)


def test_the_gradient_of_a_residual_is_dy_itself():
    """Fails where a map is copied that need not be."""
    case = Case(residual=True)
    tensors = case.draw()
    with tf.GradientTape() as tape:
        tape.watch(tensors["residual"])
        y = case.call(ops, tensors)[0]
    dy = tf.ones_like(y)
    assert tape.gradient(y, tensors["residual"], output_gradients=dy) is dy


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_the_gradient_of_a_gate_alone(in_graph):
    """Fails where y has no gradient of its own, as with a loss on the attention maps."""
    case = Case(residual=True, options=options(activation="relu"), dtype="float64")
    tensors = case.draw()

    def gradients(module):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            spatial_gate = case.call(module, tensors)[2]
        return tape.gradient(spatial_gate, tensors)

    actual = (tf.function(gradients) if in_graph else gradients)(ops)
    expected = gradients(reference)
    for name in set(tensors) - {"residual"}:
        assert_close(actual[name].numpy(), expected[name].numpy(), 1e-12, name)


def test_batch_statistics_have_no_gradient():
    case = Case("cbam_with_batch_norm")
    tensors = case.draw()
    for module in (ops, reference):
        with tf.GradientTape() as tape:
            tape.watch(tensors["x"])
            _, mean, variance, *_ = case.call(module, tensors)
        assert tape.gradient([mean, variance], tensors["x"]) is None


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_gradients_in_a_graph_with_unknown_shapes(case, data_format):
    """Fails where a gradient function needs a size that only the running graph knows."""
    case = case.replace(data_format=data_format)
    tensors = case.draw()
    specs = {
        name: tf.TensorSpec([None] * tensor.shape.rank, tensor.dtype)
        for name, tensor in tensors.items()
    }

    def gradients(tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = loss(case, ops, tensors)
        return tape.gradient(value, tensors)

    expected = gradients(tensors)
    for name, ours in tf.function(gradients, input_signature=[specs])(tensors).items():
        # Not the same bits: a graph may compute the loss around the op in another order.
        assert_close(ours.numpy(), expected[name].numpy(), 1e-5, name)


# --- second order and forward mode ----------------------------------------------------------------


def second_order(case: Case, module, tensors):
    """The gradient of the squared length of the gradient."""
    with tf.GradientTape() as outer:
        outer.watch(tensors)
        with tf.GradientTape() as inner:
            inner.watch(tensors)
            value = loss(case, module, tensors)
        gradients = inner.gradient(value, tensors)
        length = tf.add_n([tf.reduce_sum(tf.cast(g, tf.float64) ** 2) for g in gradients.values()])
    return outer.gradient(length, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def check_second_order(case: Case, function) -> None:
    tensors = case.draw()
    ours = function(case, ops, tensors)
    theirs = second_order(case, reference, cast(tensors, "float64"))
    for name, value in ours.items():
        assert value.dtype == tensors[name].dtype
        tolerance = SECOND_ORDER_TOLERANCE[case.dtype]
        assert_close(value.numpy().astype(np.float64), theirs[name].numpy(), tolerance, name)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_second_order(case, data_format):
    """Fails where a gradient penalty or a Hessian comes out wrong, or not at all."""
    case = case.replace(dtype="float64", data_format=data_format)
    check_second_order(case, second_order)


@pytest.mark.parametrize("case", [OPTIONS[3], OPTIONS[6], OPTIONS[-1]], ids=str)
def test_second_order_in_a_graph(case):
    """Fails where the gradient of the gradient works by the eager tape only."""
    check_second_order(case, tf.function(second_order))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_second_order_of_half_types_runs(half):
    """Fails where the gradient's gradient mixes up the map's type and the weights'."""
    for case in (OPTIONS[2], OPTIONS[3], OPTIONS[7]):
        case = case.replace(dtype=half)
        tensors = case.draw()
        for name, value in second_order(case, ops, tensors).items():
            assert value.dtype == tensors[name].dtype
            assert np.isfinite(value.numpy().astype(np.float32)).all(), name


def test_second_order_by_finite_differences():
    """Fails where ours and the reference's second gradient are wrong together."""
    case = Case(
        "cbam_with_batch_norm",
        size=(2, 2, 2, 3),
        hidden=2,
        residual=True,
        options=options(activation="relu", mlp_activation="relu"),
    )
    case = case.replace(dtype="float64")
    tensors = case.draw()

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        with tf.GradientTape() as tape:
            tape.watch(named)
            value = loss(case, ops, named)
        gradients = tape.gradient(value, named)
        return tf.add_n([tf.reduce_sum(tf.sin(gradient)) for gradient in gradients.values()])

    theoretical, numerical = tf.test.compute_gradient(
        function, list(tensors.values()), delta=FINITE_DIFFERENCE_STEP
    )
    for name, ours, theirs in zip(tensors, theoretical, numerical, strict=True):
        assert_close(ours, theirs, FINITE_DIFFERENCE_TOLERANCE, name)


@pytest.mark.parametrize("case", [OPTIONS[0], OPTIONS[3], OPTIONS[10], *OPTIONS[-2:]], ids=str)
def test_forward_mode(case, data_format):
    """Fails where a gradient is not linear in dy, or depends on it where it must not."""
    case = case.replace(dtype="float64", data_format=data_format)
    tensors = case.draw()
    generator = np.random.default_rng(5)
    tangents = {n: tf.constant(generator.normal(size=t.shape)) for n, t in tensors.items()}
    products = []
    for module in (ops, reference):
        with tf.autodiff.ForwardAccumulator(tensors, tangents) as accumulator:
            outputs = case.call(module, tensors)
        products.append([accumulator.jvp(output) for output in outputs])
    for name, ours, theirs in zip(case.output_names(), *products, strict=True):
        assert_close(ours.numpy(), theirs.numpy(), SECOND_ORDER_TOLERANCE["float64"], name)


def test_forward_over_reverse():
    """A Hessian-vector product, the cheap way."""
    case = Case(
        size=(2, 3, 4, 5), residual=True, options=options(activation="relu"), dtype="float64"
    )
    tensors = case.draw()
    tangents = {n: tf.ones_like(t) for n, t in tensors.items()}
    products = []
    for module in (ops, reference):
        with tf.autodiff.ForwardAccumulator(tensors, tangents) as accumulator:
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = loss(case, module, tensors)
            gradients = tape.gradient(value, tensors)
        products.append({name: accumulator.jvp(g) for name, g in gradients.items()})
    for name in tensors:
        ours, theirs = products[0][name].numpy(), products[1][name].numpy()
        assert_close(ours, theirs, SECOND_ORDER_TOLERANCE["float64"], name)


def test_a_hessian():
    """Fails where the tape of a loop over rows (tape.jacobian) cannot be run twice."""
    case = Case(
        "channel_attention",
        size=(1, 2, 2, 3),
        hidden=2,
        options=options(pooling="avg"),
        dtype="float64",
    )
    tensors = case.draw()
    hessians = []
    for module in (ops, reference):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(tensors["x"])
            with tf.GradientTape() as inner:
                inner.watch(tensors["x"])
                value = loss(case, module, tensors)
            gradient = inner.gradient(value, tensors["x"])
        hessians.append(outer.jacobian(gradient, tensors["x"], experimental_use_pfor=False))
    assert hessians[0].shape == (1, 2, 2, 3, 1, 2, 2, 3)
    ours, theirs = (hessian.numpy() for hessian in hessians)
    assert_close(ours, theirs, SECOND_ORDER_TOLERANCE["float64"], "hessian")


def test_special_values_in_gradients():
    """Fails where a NaN gets into another sample's gradient, or is lost before a weight's."""
    case = Case()
    tensors = case.draw()
    x = tensors["x"].numpy()
    x[0, 1, 1, 1] = np.nan
    tensors["x"] = tf.constant(x)
    gradients = case.gradients(ops, tensors)
    expected = case.gradients(reference, tensors)
    assert np.isfinite(gradients["x"][1].numpy()).all()
    for name in set(tensors) - set(MAPS):
        ours, theirs = (np.isnan(g[name].numpy()) for g in (gradients, expected))
        assert (ours <= theirs).all(), f"{name}: a NaN that the reference does not have"
        # A ReLU gives 0 or 0 * NaN where it cuts a gradient off; TensorFlow's own devices differ.
        if name not in ("w0", "b0"):
            assert (ours == theirs).all(), f"{name}: a NaN is lost"
