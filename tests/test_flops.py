"""TensorFlow's profiler counts the same for the fused ops as for stock ones."""

from __future__ import annotations

import keras
import pytest
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import cbam_ops
from cbam_ops import ops, reference
from cbam_ops.testing import OPTIONS, Case


def count(graph: tf.Graph) -> int:
    """What the profiler says."""
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops


def graph_of(case: Case, module, gradients: bool) -> tf.Graph:
    def function(*values):
        outputs = case.call(module, dict(zip(case.names, values, strict=True)))
        if case.function.endswith("pool"):
            return tf.gradients(outputs, values) if gradients else outputs
        return tf.gradients(outputs[0], values) if gradients else outputs

    specs = [tf.TensorSpec(value.shape, value.dtype) for value in case.draw().values()]
    return tf.function(function, autograph=False).get_concrete_function(*specs).graph


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_the_profiler_counts_what_stock_ops_take(case, gradients):
    """Fails where a table of networks shows attention as free, or as dearer than it is."""
    with cbam_ops.use_implementation("native"):
        graph = graph_of(case, ops, gradients)
    assert any(operation.type.startswith("CbamOps>") for operation in graph.get_operations())
    more = count(graph) - count(graph_of(case, reference, gradients))
    # Beside series, gradients of stock ops also compute with shapes: a few operations.
    few = 4 if len(case.size) == 3 else 0
    assert abs(more) <= few
    assert count(graph) > 0


def test_open_sizes_count_as_those_of_stock_ops_do():
    """Not at all, and without an error."""
    x = tf.TensorSpec([None, 5, 7, 13])

    def function(x):
        return cbam_ops.channel_pool(x)

    with cbam_ops.use_implementation("native"):
        graph = tf.function(function, autograph=False).get_concrete_function(x).graph
    assert count(graph) == 0


def test_a_frozen_model_counts_as_its_stock_layers():
    """The way that is common for Keras models; biases that are zeros still count as biases."""
    layer = cbam_ops.CBAM(ratio=4, kernel_size=3)
    inputs = keras.Input((6, 5, 8), batch_size=1)
    model = keras.Model(inputs, layer(inputs))
    counts = []
    for implementation in ("native", "reference"):
        with cbam_ops.use_implementation(implementation):
            call = tf.function(model, autograph=False).get_concrete_function(
                tf.TensorSpec((1, 6, 5, 8))
            )
        counts.append(count(convert_variables_to_constants_v2(call).graph))
    assert counts[0] == counts[1] > 0
