"""What a model costs: its parameters and multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class Summary(NamedTuple):
    """What a model costs for one sample.

    Attributes:
      parameters: of all weights, moving statistics included.
      trainable_parameters: of those that are trained.
      multiply_adds: of convolutions and matrix products, those inside attention included; biases,
        activations, pooling and products value by value are not counted.
    """

    parameters: int
    trainable_parameters: int
    multiply_adds: int


def summary(model: Any, input_shape: Sequence[int] | None = None) -> Summary:
    """Counts the parameters and multiply-adds of a model, with this package's layers or without.

    The count is read off the graph that TensorFlow traces of the model at inference, for one
    sample.

    Args:
        model: A built `keras.Model`.
        input_shape: The shape of its one input without the batch; needed where the model leaves it
            open.

    Returns:
        A :class:`Summary`.

    Raises:
        ValueError: `model` is no built model of Keras, or `input_shape` does not fit its input, or
            is missing where that is open.

    Example:
    >>> cbam_ops.models.summary(cbam_ops.models.CBAMResNet18()).multiply_adds
    1815063764
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"summary: `model` must be a built keras.Model, got {model!r}")
    tensors = getattr(model, "inputs", None)
    if tensors:
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
    else:  # a subclassed model
        shapes = [*(model._build_shapes_dict or {}).values()]
        specs = [tf.TensorSpec(shape, model.input_dtype) for shape in shapes]
    if input_shape is not None:
        try:
            given = tf.TensorShape([None, *input_shape])
        except (TypeError, ValueError):
            given = None
        if given is None or len(specs) != 1 or not specs[0].shape.is_compatible_with(given):
            raise ValueError(
                "summary: `input_shape` must fit the model's input, "
                f"{', '.join(str(tuple(spec.shape[1:])) for spec in specs)}, got {input_shape}"
            )
        specs = [tf.TensorSpec(given, specs[0].dtype)]
    specs = [tf.TensorSpec([1, *spec.shape[1:]], spec.dtype) for spec in specs]
    if not all(spec.shape.is_fully_defined() for spec in specs):
        raise ValueError(
            f"summary: `input_shape` must be given, {model.name} takes inputs of the shape "
            f"{tuple(specs[0].shape[1:])}"
        )
    return Summary(
        _size(model.weights), _size(model.trainable_weights), _multiply_adds(model, specs)
    )


def _size(weights: Sequence[Any]) -> int:
    return sum(math.prod(weight.shape) for weight in weights)


def _multiply_adds(model: Any, specs: Sequence[tf.TensorSpec]) -> int:
    def call(*inputs: Any) -> Any:
        struct = getattr(model, "_inputs_struct", None)
        packed = inputs[0] if struct is None else keras.tree.pack_sequence_as(struct, inputs)
        return model(packed, training=False)

    eagerly = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)  # functions inside become part of the graph
    try:
        graph = tf.function(call, autograph=False).get_concrete_function(*specs).graph
    finally:
        tf.config.run_functions_eagerly(eagerly)
    return sum(_of_op(op) for op in graph.get_operations())


def _of_op(op: Any) -> int:
    if op.type.startswith("CbamOps>"):
        return _of_attention(op)
    if op.type not in _COUNTS:
        return 0
    shapes = ([*map(int, tensor.shape)] for tensor in (*op.outputs[:1], *op.inputs))
    return _COUNTS[op.type](op, *shapes)


def _of_convolution(op: Any, y: list[int], x: list[int], kernel: list[int]) -> int:
    return math.prod(y) * math.prod(kernel[:-1])


def _of_transposed(op: Any, y: list[int], size: list[int], kernel: list[int], x: list[int]) -> int:
    return math.prod(x) * math.prod(kernel[:-1])


def _of_depthwise(op: Any, y: list[int], x: list[int], kernel: list[int]) -> int:
    return math.prod(y) * math.prod(kernel[:2])


def _of_product(op: Any, y: list[int], a: list[int], b: list[int]) -> int:
    transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
    return math.prod(y) * a[-2 if transposed else -1]


def _of_einsum(op: Any, y: list[int], *sources: list[int]) -> int:
    terms = op.get_attr("equation").decode().split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, sources, strict=True):
        sizes.update(zip(term, shape, strict=True))
    return math.prod(sizes.values())


_COUNTS: dict[str, Callable[..., int]] = {
    "Conv2D": _of_convolution,
    "Conv3D": _of_convolution,
    "Conv2DBackpropInput": _of_transposed,
    "Conv3DBackpropInputV2": _of_transposed,
    "DepthwiseConv2dNative": _of_depthwise,
    "MatMul": _of_product,
    "BatchMatMulV2": _of_product,
    "Einsum": _of_einsum,
}


def _of_attention(op: Any) -> int:
    """Of an op of this package's: the MLP of each pool, and the spatial convolution."""
    shapes = {
        argument.name: [*map(int, tensor.shape)]
        for argument, tensor in zip(op.op_def.input_arg, op.inputs, strict=False)
    }
    x = shapes["x"]
    count = 0
    if "w0" in shapes:
        pools = 1
        if "pooling" not in op.node_def.attr or op.get_attr("pooling") == b"avg+max":
            pools = 2
        outer = 1 if op.get_attr("mlp_merge") == b"hidden" else pools
        count += x[0] * (pools * math.prod(shapes["w0"]) + outer * math.prod(shapes["w1"]))
    if "kernel" in shapes:
        channels = x[1 if op.get_attr("data_format") == b"NCHW" else -1]
        count += math.prod(x) // channels * math.prod(shapes["kernel"])
    return count
