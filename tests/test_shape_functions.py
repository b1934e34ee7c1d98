"""Shapes as a graph is built: what is known is used and checked, what is not is left open."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.python.framework import op_def_registry

from cbam_ops.testing import ARGUMENTS

N, H, W, C, HIDDEN, KH, KW = 2, 5, 7, 13, 3, 3, 9
D, KD = 4, 5


def shapes(data_format: str, volume: bool = False) -> dict[str, list[int]]:
    """The shape of every input and output of every op; see csrc/ops/signature.h."""
    sides, kernel = ([D, H, W], [KD, KH, KW]) if volume else ([H, W], [KH, KW])
    x = [N, *sides, C] if data_format == "NHWC" else [N, C, *sides]
    weights = {
        "w0": [C, HIDDEN],
        "b0": [HIDDEN],
        "w1": [HIDDEN, C],
        "b1": [C],
        "kernel": [*kernel, 2, 1],
        "bias": [1],
        "gamma": [1],
    }
    small = {
        "channel_gate": [N, C],
        "spatial_gate": [N, *sides],
        "channel_descriptors": [2, N, C],
        "spatial_descriptors": [N, 2, *sides],
    }
    planes = [N, *sides, 2] if data_format == "NHWC" else [N, 2, *sides]
    return {
        **dict.fromkeys(("x", "y", "dy", "residual", "dx", "d_residual"), x),
        **weights,
        **{f"d{name}": shape for name, shape in weights.items()},
        **small,
        "d_channel_gate": small["channel_gate"],
        "d_spatial_gate": small["spatial_gate"],
        **{name: [N, C] for name in ("mean", "maximum", "d_mean", "d_maximum")},
        "descriptors": planes,
        "d_descriptors": planes,
    }


MLP = ["w0", "b0", "w1", "b1"]
CONVOLUTION = ["kernel", "bias"]
# op: (inputs, outputs, lists), lists being optional inputs by their name.
OPS = {
    "cbam": (
        ["x", *MLP, *CONVOLUTION],
        ["y", "channel_gate", "spatial_gate", "channel_descriptors", "spatial_descriptors"],
        ["gamma", "residual"],
    ),
    "channel_attention": (
        ["x", *MLP],
        ["y", "channel_gate", "channel_descriptors"],
        ["residual"],
    ),
    "spatial_attention": (
        ["x", *CONVOLUTION],
        ["y", "spatial_gate", "spatial_descriptors"],
        ["gamma", "residual"],
    ),
    "channel_pool": (["x"], ["mean", "maximum"], []),
    "spatial_pool": (["x"], ["descriptors"], []),
    "cbam_grad": (
        [
            *("x", "dy", *MLP, *CONVOLUTION, "channel_gate", "spatial_gate"),
            *("channel_descriptors", "spatial_descriptors", "d_channel_gate", "d_spatial_gate"),
        ],
        ["dx", "dw0", "db0", "dw1", "db1", "dkernel", "dbias"],
        ["gamma", "y"],
    ),
    "channel_attention_grad": (
        ["x", "dy", *MLP, "channel_gate", "channel_descriptors", "d_channel_gate"],
        ["dx", "dw0", "db0", "dw1", "db1"],
        ["y"],
    ),
    "spatial_attention_grad": (
        ["x", "dy", *CONVOLUTION, "spatial_gate", "spatial_descriptors", "d_spatial_gate"],
        ["dx", "dkernel", "dbias"],
        ["gamma", "y"],
    ),
    "channel_pool_grad": (["x", "maximum", "d_mean", "d_maximum"], ["dx"], []),
    "spatial_pool_grad": (["x", "descriptors", "d_descriptors"], ["dx"], []),
}


def build(native_ops, op: str, given: dict, data_format: str, optional: bool = False) -> dict:
    """Builds the op in a graph from placeholders of the given shapes; the outputs by name."""
    inputs, outputs, lists = OPS[op]
    with tf.Graph().as_default():

        def placeholder(name: str) -> tf.Tensor:
            return tf.compat.v1.placeholder(tf.float32, given[name])

        arguments = {name: placeholder(name) for name in inputs}
        for name in lists:
            arguments[name] = [placeholder(name)] if optional else []
        spatial = "kernel" in inputs
        if op.endswith("_grad") and spatial:
            arguments["batch_statistics"] = tf.compat.v1.placeholder(tf.float32)
        if op.endswith("_grad") and lists and optional:
            arguments["activation"] = "relu"
            arguments["num_d_residual"] = 1
        result = getattr(native_ops, f"cbam_ops_{op}")(data_format=data_format, **arguments)
    if isinstance(result, tf.Tensor):
        return {outputs[0]: result.shape}
    return {
        name: value[0].shape if isinstance(value, list) and value else value
        for name, value in result._asdict().items()
    } | {
        name: getattr(result, name).shape
        for name in result._fields
        if isinstance(getattr(result, name), tf.Tensor)
    }


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("volume", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_known_shapes_give_known_shapes(native_ops, op, data_format, optional, volume):
    """Fails where Keras would build a layer on a wrong or an unknown shape."""
    known = shapes(data_format, volume)
    result = build(native_ops, op, known, data_format, optional)
    for name in OPS[op][1]:
        assert result[name].as_list() == known[name], name
    if "batch_statistics" in result:
        assert result["batch_statistics"].as_list() == [2 if optional else 0]
    if optional and op == "cbam_grad":
        assert result["dgamma"].as_list() == [1]
        assert result["d_residual"].as_list() == known["x"]


@pytest.mark.parametrize("op", OPS)
def test_unknown_ranks_give_the_rank(native_ops, op, data_format):
    """Fails where the shape function demands what a graph need not know."""
    known = shapes(data_format)
    result = build(native_ops, op, dict.fromkeys(known), data_format)
    for name in OPS[op][1]:
        assert result[name].rank == len(known[name]), name
    if "y" in result:
        assert result["y"].as_list() == [None] * 4


def test_sizes_are_learnt_from_any_argument(native_ops):
    """Fails where a size that one argument knows is not used for another."""
    unknown = {name: [None] * len(shape) for name, shape in shapes("NHWC").items()}
    result = build(native_ops, "cbam", {**unknown, "w0": [C, None]}, "NHWC")
    assert result["y"].as_list() == [None, None, None, C]
    assert result["channel_gate"].as_list() == [None, C]
    result = build(native_ops, "cbam", {**unknown, "x": [None, H, W, None]}, "NHWC")
    assert result["spatial_gate"].as_list() == [None, H, W]
    result = build(native_ops, "cbam", {**unknown, "residual": [N, H, None, C]}, "NHWC", True)
    assert result["y"].as_list() == [N, H, None, C]
    nothing = dict.fromkeys(unknown)
    result = build(native_ops, "cbam", {**nothing, "kernel": [3, 3, 3, 2, 1]}, "NHWC")
    assert result["y"].rank == 5  # that it is a volume too


WRONG = {
    "x": ([[N, H, W], [N, 1, H, W, C, 1], [N, H, W, 0], [N, 0, W, C]], "x"),
    "w0": ([[C + 1, HIDDEN], [C], [C, 0]], "w0"),
    "b0": ([[HIDDEN + 1], [1, HIDDEN]], "b0"),
    "w1": ([[HIDDEN, C + 1], [HIDDEN + 1, C]], "w1"),
    "b1": ([[C - 1]], "b1"),
    "kernel": (
        [[KH, KW, 2], [KD, KH, KW, 2, 1], [KH, KW, 1, 1], [4, 3, 2, 1], [3, 4, 2, 1], [3, 3, 2, 2]],
        "kernel",
    ),
    "bias": ([[2], []], "bias"),
    "gamma": ([[2]], "gamma"),
    "residual": ([[N, H, W, 1], [N + 1, H, W, C]], "residual"),
    "dy": ([[N, H, W, C + 1]], "dy"),
    "y": ([[N, H + 1, W, C]], "y"),
    "channel_gate": ([[N, C, 1]], "channel_gate"),
    "channel_descriptors": ([[1, N, C]], "channel_descriptors"),
    "spatial_descriptors": ([[N, 1, H, W]], "spatial_descriptors"),
    "d_spatial_gate": ([[N, H * W]], "d_spatial_gate"),
}


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        (op, name, shape)
        for op, (inputs, _, lists) in OPS.items()
        for name, shape in itertools.chain.from_iterable(
            [(name, shape) for shape in WRONG.get(name, ([], ""))[0]] for name in inputs + lists
        )
    ],
)
def test_shapes_that_do_not_fit_are_named(native_ops, op, name, shape):
    """Fails where a mistake shows only when the graph runs, or does not say what is wrong."""
    given = {**shapes("NHWC"), name: shape}
    with pytest.raises(ValueError, match=f"`{name}` must have") as caught:
        build(native_ops, op, given, "NHWC", optional=True)
    assert f"got {'shape ' if 0 in shape or (name == 'kernel' and 4 in shape) else ''}[" in str(
        caught.value
    )


def test_every_function_s_op_is_here():
    """Fails where a new op has no test of its shape function."""
    functions = {name.removesuffix("_with_batch_norm") for name in ARGUMENTS}
    assert functions | {f"{name}_grad" for name in functions} == set(OPS)


# Arguments in their order, and attributes: saved graphs name both, and leave out an attribute that
# has its default. Arguments may grow at the end, attributes by those with a default; nothing that
# is here may change.
WEIGHTS = "w0: U, b0: U, w1: U, b1: U"
GATED = (
    "T: type = None of half, bfloat16, float, double; U: type = None of float, double; "
    "data_format: string = NHWC of NHWC, NCHW; "
)
MLP_ACTIVATION = "mlp_activation: string = none of none, relu; "
POOLING = "pooling: string = avg+max of avg+max, avg, max; "
ORDER = "order: string = channel_first of channel_first, parallel; "
ACTIVATION = "activation: string = none of none, relu"
# Behind the activation.
MLP_MERGE = ACTIVATION + "; mlp_merge: string = logits of logits, hidden, gates"
# What a graph meant when it left epsilon out; everywhere else the default is 1e-5.
EPSILON = "; epsilon: float = 0.001"
COUNT = "num_{}: int >= 0 = 0; "
NUM_GAMMA, NUM_RESIDUAL = COUNT.format("gamma"), COUNT.format("residual")
NUM_Y, NUM_D_RESIDUAL = COUNT.format("y"), COUNT.format("d_residual")
POOL = "T: type = None of half, bfloat16, float, double; data_format: string = NHWC of NHWC, NCHW"
DEFINITIONS = {
    "Cbam": (
        f"x: T, {WEIGHTS}, kernel: U, bias: U, gamma: num_gamma * U, residual: num_residual * T",
        "y: T, channel_gate: U, spatial_gate: U, channel_descriptors: U, spatial_descriptors: U, "
        "batch_statistics: U",
        NUM_GAMMA + NUM_RESIDUAL + GATED + MLP_ACTIVATION + ORDER + MLP_MERGE + EPSILON,
    ),
    "CbamGrad": (
        f"x: T, dy: T, y: num_y * T, {WEIGHTS}, kernel: U, bias: U, gamma: num_gamma * U, "
        "channel_gate: U, spatial_gate: U, channel_descriptors: U, spatial_descriptors: U, "
        "batch_statistics: U, d_channel_gate: U, d_spatial_gate: U",
        "dx: T, dw0: U, db0: U, dw1: U, db1: U, dkernel: U, dbias: U, dgamma: num_gamma * U, "
        "d_residual: num_d_residual * T",
        NUM_Y + NUM_GAMMA + NUM_D_RESIDUAL + GATED + MLP_ACTIVATION + ORDER + MLP_MERGE + EPSILON,
    ),
    "ChannelAttention": (
        f"x: T, {WEIGHTS}, residual: num_residual * T",
        "y: T, channel_gate: U, channel_descriptors: U",
        NUM_RESIDUAL + GATED + MLP_ACTIVATION + POOLING + MLP_MERGE,
    ),
    "ChannelAttentionGrad": (
        f"x: T, dy: T, y: num_y * T, {WEIGHTS}, channel_gate: U, channel_descriptors: U, "
        "d_channel_gate: U",
        "dx: T, dw0: U, db0: U, dw1: U, db1: U, d_residual: num_d_residual * T",
        NUM_Y + NUM_D_RESIDUAL + GATED + MLP_ACTIVATION + POOLING + MLP_MERGE,
    ),
    "SpatialAttention": (
        "x: T, kernel: U, bias: U, gamma: num_gamma * U, residual: num_residual * T",
        "y: T, spatial_gate: U, spatial_descriptors: U, batch_statistics: U",
        NUM_GAMMA + NUM_RESIDUAL + GATED + ACTIVATION + EPSILON,
    ),
    "SpatialAttentionGrad": (
        "x: T, dy: T, y: num_y * T, kernel: U, bias: U, gamma: num_gamma * U, spatial_gate: U, "
        "spatial_descriptors: U, batch_statistics: U, d_spatial_gate: U",
        "dx: T, dkernel: U, dbias: U, dgamma: num_gamma * U, d_residual: num_d_residual * T",
        NUM_Y + NUM_GAMMA + NUM_D_RESIDUAL + GATED + ACTIVATION + EPSILON,
    ),
    "ChannelPool": ("x: T", "mean: T, maximum: T", POOL),
    "ChannelPoolGrad": ("x: T, maximum: T, d_mean: T, d_maximum: T", "dx: T", POOL),
    "SpatialPool": ("x: T", "descriptors: T", POOL),
    "SpatialPoolGrad": ("x: T, descriptors: T, d_descriptors: T", "dx: T", POOL),
}


def arguments_of(arguments) -> str:
    return ", ".join(
        f"{a.name}: {f'{a.number_attr} * ' if a.number_attr else ''}{a.type_attr}"
        for a in arguments
    )


def attribute_of(attribute) -> str:
    allowed = attribute.allowed_values.list
    names = [types_pb2.DataType.Name(t).removeprefix("DT_").lower() for t in allowed.type]
    names += [word.decode() for word in allowed.s]
    default = None
    if attribute.HasField("default_value"):
        default = getattr(attribute.default_value, attribute.default_value.WhichOneof("value"))
    if isinstance(default, float):
        default = str(np.float32(default))
    return (
        f"{attribute.name}: {attribute.type}"
        f"{f' >= {attribute.minimum}' if attribute.has_minimum else ''}"
        f" = {default.decode() if isinstance(default, bytes) else default}"
        f"{' of ' if names else ''}{', '.join(names)}"
    )


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("op", DEFINITIONS)
def test_definitions_are_those_that_saved_graphs_rely_on(op):
    """Fails where a graph that was saved before does not load, or computes something else."""
    registered = op_def_registry.get(f"CbamOps>{op}")
    inputs, outputs, attributes = DEFINITIONS[op]
    assert arguments_of(registered.input_arg) == inputs
    assert arguments_of(registered.output_arg) == outputs
    assert "; ".join(map(attribute_of, registered.attr)) == attributes
    assert not registered.is_stateful


def test_every_op_is_defined_here():
    """Fails where a new op is not held to its definition."""
    snake = {re.sub("(?<=[a-z])(?=[A-Z])", "_", op).lower() for op in DEFINITIONS}
    assert snake == set(OPS)
