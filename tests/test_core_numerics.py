"""Inputs that hurt: infinities, saturated gates, large means, empty and tiny maps.

Through the public operations. The truth is the reference in float64 on the same inputs, and the
tolerances are those of every other test.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf
from test_ops import run_python

import cbam_ops
from cbam_ops import _core, ops
from cbam_ops.testing import Case, assert_accurate, options, truth_and_stock

Tensors = dict[str, tf.Tensor]


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    with cbam_ops.use_implementation("native"):
        yield


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in _core.available_instruction_sets():
        pytest.skip(f"this machine or this build has no {request.param}")
    before = _core.instruction_set()
    _core.set_instruction_set(request.param)
    yield request.param
    _core.set_instruction_set(before)


# --- infinities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("infinity", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "case",
    [
        Case("channel_attention", size=(3, 4, 4, 40), hidden=4, options=options(pooling=pooling))
        for pooling in ("avg+max", "avg", "max")
    ]
    + [Case(size=(3, 4, 4, 40), hidden=4, biases=False, options=options(order="parallel"))],
    ids=str,
)
def test_infinite_weights_of_the_gate(instruction_set, case, infinity, data_format):
    """Fails where a hidden unit that one branch switches off hides 0 times infinity, a NaN."""
    case = case.replace(data_format=data_format)
    drawn = case.draw()
    kinds = set()
    for unit in range(case.hidden):
        tensors = dict(drawn)
        w1 = drawn["w1"].numpy()
        w1[unit, 5::7] = infinity
        tensors["w1"] = tf.constant(w1)
        truth, stock = truth_and_stock(case, tensors, "call")
        actual = case.call(ops, tensors)
        for name, *values in zip(case.output_names(), actual, truth, stock, strict=True):
            assert_accurate(*(value.numpy() for value in values), name)
        kinds |= set(np.isnan(truth[1].numpy()[:, 5::7]).ravel())
    assert np.isnan(infinity) or kinds == {True, False}, "the case shows nothing"


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
    assert run_python(EMPTY_BATCHES) == "fine"
