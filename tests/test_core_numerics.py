"""Inputs that hurt: infinities, saturated gates, large means, empty and tiny maps.

Through the public operations. The truth is the reference in float64 on the same inputs, and the
tolerances are those of every other test.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from numpy_oracle import evaluate, gradient_magnitudes
from programs import run_python

from cbam_ops import ops
from cbam_ops.testing import Case, assert_accurate, options, truth_and_stock, worst_of

Tensors = dict[str, tf.Tensor]


pytestmark = pytest.mark.usefixtures("native")


# --- infinities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("infinity", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "case",
    [
        Case("channel_attention", size=(3, 4, 4, 40), hidden=4, options=options(**words))
        for words in (
            {},
            {"pooling": "avg"},
            {"pooling": "max"},
            {"mlp_merge": "hidden"},
            {"mlp_merge": "gates"},
        )
    ]
    + [Case(size=(3, 4, 4, 40), hidden=4, biases=False, options=options(order="parallel"))],
    ids=str,
)
def test_infinite_weights_of_the_gate(instruction_set, case, infinity, data_format):
    """Fails where a hidden unit that one branch switches off hides 0 times infinity, a NaN."""
    case = case.replace(data_format=data_format)
    kinds = set()
    for unit in range(case.hidden):
        tensors = case.draw()
        w1 = tensors["w1"].numpy()
        w1[unit, 5::7] = infinity
        tensors["w1"] = tf.constant(w1)
        truth, stock = truth_and_stock(case, tensors, "call")
        actual = case.call(ops, tensors)
        for name, *values in zip(case.output_names(), actual, truth, stock, strict=True):
            assert_accurate(*(value.numpy() for value in values), name)
        kinds |= set(np.isnan(truth[1].numpy()[:, 5::7]).ravel())
    assert np.isnan(infinity) or kinds == {True, False}, "the case shows nothing"


# --- saturated gates ------------------------------------------------------------------------------


def with_bias(tensors: Tensors, name: str, value: float) -> Tensors:
    bias = tensors[name]
    return {**tensors, name: bias * 0.25 + tf.cast(value, bias.dtype)}


SATURATED = [
    Case("spatial_attention", size=(4, 8, 9, 32)),
    Case("spatial_attention", size=(3, 20, 5, 3), kernel_size=7),
    Case("spatial_attention_with_batch_norm", size=(4, 8, 9, 32)),
    *(
        Case("channel_attention", size=(4, 8, 8, 72), hidden=4, options=options(**words))
        for words in (
            {},
            {"pooling": "max"},
            {"mlp_activation": "relu"},
            {"mlp_activation": "relu", "pooling": "avg"},
            {"mlp_merge": "gates"},
            {"mlp_merge": "hidden"},
            {"mlp_merge": "hidden", "mlp_activation": "relu"},
            {"mlp_merge": "gates", "mlp_activation": "relu"},
        )
    ),
    Case("channel_attention", size=(4, 8, 8, 72), hidden=4, dtype="bfloat16"),
    Case("channel_attention", size=(4, 8, 8, 72), hidden=4, dtype="float64"),
    Case(size=(4, 8, 8, 16), kernel_size=7),
    Case(size=(4, 8, 8, 16), dtype="float16", options=options(order="parallel")),
]


@pytest.mark.parametrize("logit", [4.0, 7.0, 10.0, 14.0])
@pytest.mark.parametrize("case", SATURATED, ids=str)
def test_saturated_gates(instruction_set, case, logit, data_format):
    """Fails where 1 - gate is a difference from 1, which has lost the digits that count."""
    case = case.replace(data_format=data_format)
    tensors = case.draw()
    if "b1" in tensors:  # added once per branch
        words = dict(case.options)
        both = words.get("pooling", "avg+max") == "avg+max" and "mlp_merge" not in words
        tensors = with_bias(tensors, "b1", logit / 2 if both else logit)
    for name in ("bias", "beta"):
        if name in tensors:
            tensors = with_bias(tensors, name, logit)
    # The reference in float64 is no truth for float64: it takes the difference itself.
    truth = evaluate(case, tensors, dtype=np.longdouble) if case.dtype == "float64" else None
    magnitudes = gradient_magnitudes(case, tensors)
    findings = case.compare(
        case.evaluate(ops, tensors), tensors, magnitudes=magnitudes, truth=truth
    )
    faults = [finding.fault for finding in findings if finding.fault]
    assert not faults, "\n".join(faults)


def test_saturated_gates_do_better_than_stock(instruction_set):
    """The derivative itself, of gates of which the stock one has at most a dozen bits."""
    case = Case("spatial_attention", size=(1, 64, 64, 1), kernel_size=1)
    x = np.linspace(8.0, 16.0, 64 * 64, dtype=np.float32).reshape(case.size)
    kernel = np.array([0.75, 0.25], np.float32).reshape(1, 1, 2, 1)
    tensors = {"x": tf.constant(x), "kernel": tf.constant(kernel), "bias": tf.constant([0.0])}
    truth, stock = truth_and_stock(case, tensors, "gradients")
    exact = truth["x"].numpy()
    reached = exact != 0.0  # by a gradient that is not
    error, stock_error = (
        np.abs(gradients["x"].numpy()[reached] / exact[reached] - 1.0)
        for gradients in (case.gradients(ops, tensors), stock)
    )
    # dx = dy * (gate + x * gate * (1 - gate)): the second term is up to 3e-3 of the first.
    assert np.median(error) <= np.median(stock_error)
    assert error.max() <= stock_error.max()


# --- large means ----------------------------------------------------------------------------------


def with_large_mean(case: Case, offset: float) -> Tensors:
    tensors = case.draw()
    tensors["x"] = tf.constant(offset + 0.01 * tensors["x"].numpy(), tf.float32)
    if "w0" in tensors:
        tensors["w0"] *= 1 / (1 + offset)
    return tensors


@pytest.mark.parametrize("function", ["spatial_attention_with_batch_norm", "cbam_with_batch_norm"])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0, 100.0, 1000.0])
def test_batch_norm_of_descriptors_with_a_large_mean(
    instruction_set, function, kernel_size, offset, data_format
):
    """Fails where a rounded mean moves every centred value of the convolution to one side."""
    case = Case(
        function, size=(4, 8, 8, 16), hidden=2, kernel_size=kernel_size, data_format=data_format
    )
    draws = []
    for seed in range(8):  # of a single number, dbeta, most of the error is in one draw of several
        tensors = with_large_mean(case.replace(seed=seed), offset)
        magnitudes = gradient_magnitudes(case, tensors)
        draws.append(case.compare(case.evaluate(ops, tensors), tensors, magnitudes=magnitudes))
    faults = [finding.fault for finding in worst_of(draws) if finding.fault]
    faults += [f.fault for found in draws for f in found if f.name == "dkernel" and f.fault]
    assert not faults, faults


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_batch_norm_of_a_large_mean_does_better_than_stock(instruction_set, offset, data_format):
    """Fails where logits are rounded to float32 before their mean is taken off."""
    errors = []
    for seed in range(4):
        case = Case("spatial_attention_with_batch_norm", size=(4, 8, 8, 16), kernel_size=7)
        case = case.replace(seed=seed, data_format=data_format)
        tensors = with_large_mean(case, offset)
        truth, stock = truth_and_stock(case, tensors, "evaluate")
        results = case.evaluate(ops, tensors)
        name = "spatial_gate"
        errors.append([each[name].numpy() - truth[name].numpy() for each in (results, stock)])
    ours, stocks = np.sqrt(np.mean(np.square(errors), axis=(0, 2, 3, 4)))
    assert ours < 0.5 * stocks


# --- sizes ----------------------------------------------------------------------------------------

EMPTY_BATCHES = """
    import tensorflow as tf
    import cbam_ops
    from cbam_ops import ops
    import sys

    def call(name, x, w0, w1, kernel, one):
        with tf.GradientTape() as tape:
            tape.watch([w0, w1, kernel, one])
            if name == "channel_attention":
                y = ops.channel_attention(x, w0, None, w1, None)
            elif name == "spatial_attention":
                y = ops.spatial_attention(x, kernel, one)
            elif name == "cbam":
                y = ops.cbam(x, w0, None, w1, None, kernel, one)
            elif name == "cbam_with_batch_norm":
                y = ops.cbam_with_batch_norm(x, w0, None, w1, None, kernel, one, one)[0]
            elif name == "channel_pool":
                y = ops.channel_pool(x)[0]
            else:
                y = ops.spatial_pool(x)
            total = tf.reduce_sum(y)
        return y, tape.gradient(total, [w0, w1, kernel, one])

    names = ("cbam", "cbam_with_batch_norm", "channel_attention", "spatial_attention",
             "channel_pool", "spatial_pool")
    with cbam_ops.use_implementation("native"):
        for size, channels in ((2**30, 1), (65536, 1), (65536, 256)):
            for jit in (False, True):
                for name in names:
                    x = tf.zeros([0, size, size, channels])
                    w0, w1 = tf.ones([channels, 2]), tf.ones([2, channels])
                    arguments = (x, w0, w1, tf.ones([7, 7, 2, 1]), tf.ones([1]))
                    run = tf.function(lambda *a: call(name, *a), jit_compile=jit)
                    y, gradients = run(*arguments)
                    assert y.shape[0] == 0
                    for gradient in gradients:
                        assert gradient is None or not gradient.numpy().any(), (name, size, jit)
    print("fine")
"""


def test_empty_batches_of_huge_maps():
    """Fails (by the process's death) where a workspace is sized for a sample that is not there."""
    assert run_python(EMPTY_BATCHES) == ["fine"]


@pytest.mark.parametrize("data_type", ["float32", "float64"])
@pytest.mark.parametrize(
    "case",
    [
        Case(size=(300, 1, 1, 2), kernel_size=31),
        Case(size=(70, 2, 3, 2), hidden=1, kernel_size=9),
        Case("spatial_attention", size=(5, 3, 2, 5), kernel_size=401),
        Case("spatial_attention", size=(2, 40, 1, 3), kernel_size=7),
        Case("spatial_attention_with_batch_norm", size=(130, 2, 2, 1), kernel_size=7),
        Case("spatial_attention_with_batch_norm", size=(3, 1, 37, 4), kernel_size=9),
        Case("spatial_pool", size=(150, 1, 2, 3)),
    ],
    ids=str,
)
def test_kernels_larger_than_the_map(instruction_set, case, data_type, data_format):
    """Fails where a tap that touches padding only is taken for another, or samples share badly."""
    case = case.replace(dtype=data_type, data_format=data_format)
    tensors = case.draw()
    case.check(ops, tensors, magnitudes=gradient_magnitudes(case, tensors))
