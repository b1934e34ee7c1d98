"""What TensorFlow's profiler counts for the ops: the floating-point operations of stock ones.

The profiler knows an op by its registered statistics and counts 0 for others. Here the same block
is built of stock ops, from the definition, and counted by TensorFlow's own statistics. Importing
this module registers that for every op and its gradient.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops as framework

from cbam_ops import _call, _gradients

_STATISTIC = "flops"


def _count(graph: tf.Graph, node: Any) -> Any:
    """The registered statistic of every op. Open sizes are a ValueError, as for stock ops."""
    from tensorflow.python.profiler.internal import flops_registry  # noqa: F401  (stock ops' own)

    op = graph.get_operation_by_name(node.name)
    forward = op.type.removesuffix("Grad")
    taken, _, attributes = _call.signature(op.type)
    given = _gradients.named(op, taken, op.inputs)
    words = _gradients.attributes_of(op, attributes)
    block = tf.Graph()
    with block.as_default():
        inputs = {name: given[name] for name in _call.signature(forward).inputs if name in given}
        inputs = {name: _like(value) for name, value in inputs.items()}
        outputs = _call.by_definition(forward, {**words, **inputs})
        counted = block.get_operations()
        if op.type != forward:
            sources = [value for value in _gradients.flat(inputs.values()) if value is not None]
            results = [outputs["y"]] if "y" in outputs else list(outputs.values())
            tf.gradients(results, sources)
            counted = block.get_operations()[len(counted) :]
    statistics = (
        framework.get_stats_for_node_def(block, operation.node_def, _STATISTIC).value
        for operation in counted
    )
    return framework.OpStats(_STATISTIC, sum(int(value) for value in statistics if value))


def _like(value: Any) -> Any:
    """Placeholders; none for a bias that was not given, which the op takes as zeros."""
    if isinstance(value, list):
        return [_like(tensor) for tensor in value]
    value.shape.assert_is_fully_defined()
    if value.op.name.rpartition("/")[2].startswith(_call.NO_BIAS):
        return None
    return tf.compat.v1.placeholder(value.dtype, value.shape)


for _op in _gradients.OPS:
    for _name in (_op, f"{_op}Grad"):
        framework.RegisterStatistics(_name, _STATISTIC)(_count)
