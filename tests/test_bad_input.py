"""Arguments that do not fit: each is refused in words that name it, what fits and what came."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import cbam_ops
from cbam_ops import ops, reference
from cbam_ops.testing import OPTIONS, Case, options


@pytest.fixture
def module(implementation):
    """The public functions, with either implementation."""
    return ops


CBAM = Case(residual=True)
BATCH_NORM = Case("cbam_with_batch_norm")
CHANNEL = Case("channel_attention")
SPATIAL = Case("spatial_attention")


def zeros(*shape: int, dtype: str = "float32") -> tf.Tensor:
    return tf.zeros(shape, dtype)


class Broken:
    dtype = np.dtype("float32")

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("gone")


BAD = [
    # case, changed arguments, changed options, message
    (
        CBAM,
        {"x": zeros(7, 13)},
        {},
        "cbam: `x` must have shape [N, L, C] or [N, H, W, C] or [N, D, H, W, C], got [7, 13]",
    ),
    (
        Case("spatial_attention"),
        {"x": zeros(5, 7, 13)},
        {},
        "spatial_attention: `kernel` must have shape [k, 2, 1], got [3, 3, 2, 1]",
    ),
    (
        Case("spatial_attention"),
        {"x": zeros(2, 4, 5, 7, 13)},
        {},
        "`kernel` must have shape [kd, kh, kw, 2, 1], got [3, 3, 2, 1]",
    ),
    (
        Case("channel_pool"),
        {"x": zeros(2, 0, 5, 7, 3)},
        {},
        "`x` must have D >= 1, got shape [2, 0",
    ),
    (
        Case("channel_pool"),
        {"x": zeros(5, 7, 13)},
        {"data_format": "NDHWC"},
        "`data_format` must be 'NHWC' or 'NCHW' or 'NWC' or 'NCW', got 'NDHWC'",
    ),
    (CBAM, {"x": None}, {}, "cbam: `x` must be a tensor, got None"),
    (
        CBAM,
        {"x": Broken()},
        {},
        "cbam: `x` must be a tensor or what converts to one, got Broken: gone",
    ),
    (
        CBAM,
        {"x": tf.RaggedTensor.from_tensor(zeros(2, 5, 7, 13))},
        {},
        "cbam: `x` must be a tensor or what converts to one, got RaggedTensor: its method",
    ),
    (
        CBAM,
        {"x": tf.sparse.from_dense(zeros(2, 5, 7, 13))},
        {},
        "cbam: `x` must be a tensor or what converts to one, got SparseTensor: tf.sparse.to_dense",
    ),
    (
        CBAM,
        {"x": keras.Input((5, 7, 13))},
        {},
        "cbam: `x` must be a tensor or what converts to one, got KerasTensor: in a model",
    ),
    (
        CBAM,
        {"x": zeros(2, 5, 7, 13, dtype="int32")},
        {},
        "cbam: `x` must have dtype float16 or bfloat16 or float32 or float64, got int32",
    ),
    (
        CBAM,
        {"x": zeros(2, 5, 7, 13, dtype="complex64")},
        {},
        "cbam: `x` must have dtype float16 or bfloat16 or float32 or float64, got complex64",
    ),
    (CBAM, {"x": zeros(2, 0, 7, 13)}, {}, "cbam: `x` must have H >= 1, got shape [2, 0, 7, 13]"),
    (CBAM, {"x": zeros(2, 5, 0, 13)}, {}, "cbam: `x` must have W >= 1, got shape [2, 5, 0, 13]"),
    (CBAM, {"x": zeros(2, 5, 7, 0)}, {}, "cbam: `x` must have C >= 1, got shape [2, 5, 7, 0]"),
    (
        CBAM,
        {"x": zeros(2, 0, 5, 7)},
        {"data_format": "NCHW"},
        "cbam: `x` must have C >= 1, got shape [2, 0, 5, 7]",
    ),
    (
        CBAM,
        {"w0": zeros(12, 3)},
        {},
        "cbam: `w0` must have shape [C, hidden] = [13, hidden], got [12, 3]",
    ),
    (CBAM, {"w0": zeros(13, 0)}, {}, "cbam: `w0` must have hidden >= 1, got shape [13, 0]"),
    (
        CBAM,
        {"w0": zeros(13)},
        {},
        "cbam: `w0` must have shape [C, hidden] = [13, hidden], got [13]",
    ),
    (
        CBAM,
        {"w1": zeros(4, 13)},
        {},
        "cbam: `w1` must have shape [hidden, C] = [3, 13], got [4, 13]",
    ),
    (
        CBAM,
        {"w1": zeros(3, 12)},
        {},
        "cbam: `w1` must have shape [hidden, C] = [3, 13], got [3, 12]",
    ),
    (CBAM, {"b0": zeros(4)}, {}, "cbam: `b0` must have shape [hidden] = [3], got [4]"),
    (CBAM, {"b1": zeros(1)}, {}, "cbam: `b1` must have shape [C] = [13], got [1]"),
    (
        CBAM,
        {"kernel": zeros(2, 2, 2, 1)},
        {},
        "cbam: `kernel` must have an odd kh, got shape [2, 2",
    ),
    (
        CBAM,
        {"kernel": zeros(0, 0, 2, 1)},
        {},
        "cbam: `kernel` must have an odd kh, got shape [0, 0",
    ),
    (
        CBAM,
        {"kernel": zeros(3, 4, 2, 1)},
        {},
        "cbam: `kernel` must have an odd kw, got shape [3, 4, 2, 1]",
    ),
    (
        CBAM,
        {"kernel": zeros(3, 3, 3, 1)},
        {},
        "cbam: `kernel` must have shape [kh, kw, 2, 1], got [3, 3, 3, 1]",
    ),
    (CBAM, {"bias": zeros(2)}, {}, "cbam: `bias` must have shape [1], got [2]"),
    (
        CBAM,
        {"w0": zeros(13, 3, dtype="float64")},
        {},
        "cbam: `w0` must have dtype float32 beside `x` of dtype float32, got float64",
    ),
    (
        CHANNEL,
        {"x": zeros(2, 5, 7, 13, dtype="float16"), "w0": zeros(13, 3, dtype="bfloat16")},
        {},
        "channel_attention: `w0` must have dtype float16 or float32 beside `x` of dtype float16, "
        "got bfloat16",
    ),
    (
        CBAM,
        {"residual": zeros(2, 5, 7, 1)},
        {},
        "cbam: `residual` must have shape [N, H, W, C] = [2, 5, 7, 13], got [2, 5, 7, 1]",
    ),
    (
        CBAM,
        {"residual": zeros(2, 5, 7, 13, dtype="float16")},
        {},
        "cbam: `residual` must have the dtype of `x`, float32, got float16",
    ),
    (CBAM, {}, {"data_format": "NWHC"}, "cbam: `data_format` must be 'NHWC' or 'NCHW', got 'NWHC'"),
    (CBAM, {}, {"activation": "gelu"}, "cbam: `activation` must be None or 'relu', got 'gelu'"),
    (CBAM, {}, {"mlp_activation": 1}, "cbam: `mlp_activation` must be None or 'relu', got 1"),
    (
        CBAM,
        {},
        {"order": "channel"},
        "cbam: `order` must be 'channel_first' or 'spatial_first' or 'parallel', got 'channel'",
    ),
    (
        CHANNEL,
        {},
        {"pooling": "lse"},
        "channel_attention: `pooling` must be 'avg+max' or 'avg' or 'max', got 'lse'",
    ),
    (CHANNEL, {"w1": None}, {}, "channel_attention: `b1` must be None as `w1` is, got shape [13]"),
    (
        CHANNEL,
        {"w1": None, "b1": None},
        {},
        "channel_attention: `w0` must have shape [C, C] = [13, 13], got [13, 3]",
    ),
    (
        CHANNEL,
        {"w1": None, "b1": None},
        {"mlp_merge": "hidden"},
        "channel_attention: `mlp_merge` must be 'logits' or 'gates' where `w1` is None, got 'hid",
    ),
    (CHANNEL, {}, {"ties": "last"}, "channel_attention: `ties` must be 'even' or 'first', got 'la"),
    (
        CHANNEL,
        {},
        {"gate_activation": None},
        "channel_attention: `gate_activation` must be 'sigmoid' or 'hard_sigmoid', got None",
    ),
    (SPATIAL, {"kernel": "three"}, {}, "spatial_attention: `kernel` must"),
    (BATCH_NORM, {"gamma": None}, {}, "cbam_with_batch_norm: `gamma` must be a tensor, got None"),
    (BATCH_NORM, {"beta": zeros(3)}, {}, "cbam_with_batch_norm: `beta` must have shape [1]"),
    (
        BATCH_NORM,
        {},
        {"epsilon": -1e-3},
        "cbam_with_batch_norm: `epsilon` must be a number >= 0, got -0.001",
    ),
    (
        BATCH_NORM,
        {},
        {"epsilon": "small"},
        "cbam_with_batch_norm: `epsilon` must be a number >= 0, got 'small'",
    ),
    (Case("channel_pool"), {"x": zeros(3)}, {}, "channel_pool: `x` must have shape [N, L, C] or"),
    (Case("spatial_pool"), {"x": zeros(1, 1, 1, 0)}, {}, "spatial_pool: `x` must have C >= 1"),
]


@pytest.mark.parametrize(("case", "arguments", "keywords", "message"), BAD, ids=lambda v: None)
def test_the_message_names_the_argument(module, case, arguments, keywords, message):
    """Fails where a user is not told which argument is wrong, or either implementation takes it."""
    tensors = {**case.draw(), **arguments}
    words = dict(keywords)
    data_format = words.pop("data_format", "NHWC")
    case = case.replace(options=tuple(words.items()), data_format=data_format)
    with pytest.raises(ValueError, match=re.escape(message)):
        case.call(module, tensors)


def test_all_weights_have_one_type(module):
    case = Case(dtype="float16")
    tensors = case.draw()
    tensors["kernel"] = tf.cast(tensors["kernel"], "float16")
    message = "cbam: `kernel` must have the dtype of `w0`, float32, got float16"
    with pytest.raises(ValueError, match=re.escape(message)):
        case.call(module, tensors)


def test_good_types_beside_half_maps(module):
    """float32 weights beside a half map are what mixed precision gives: they must be taken."""
    for half_weights in (False, True):
        case = Case(half_weights=half_weights, dtype="float16")
        y = case.call(module, case.draw())[0]
        assert y.dtype == tf.float16


# --- where shapes are known only when the graph runs ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 0, 7, 13), "`x` must have H >= 1, got shape [2, 0, 7, 13]"),
        ("w0", (12, 3), "`w0` must have shape [C, hidden] = [13, hidden], got [12, 3]"),
        ("w0", (13, 0), "`w0` must have hidden >= 1, got shape [13, 0]"),
        ("w1", (3, 12), "`w1` must have shape [hidden, C] = [3, 13], got [3, 12]"),
        ("kernel", (4, 4, 2, 1), "`kernel` must have an odd kh, got shape [4, 4, 2, 1]"),
        ("kernel", (3, 4, 2, 1), "`kernel` must have an odd kw, got shape [3, 4, 2, 1]"),
        ("residual", (2, 5, 1, 13), "`residual` must have shape [N, H, W, C] = [2, 5, 7, 13], got"),
    ],
)
def test_the_kernel_checks_what_the_graph_could_not(name, shape, message):
    """Fails where a wrong size gets past Python, as an unknown one does, and then past the op."""
    tensors = {**CBAM.draw(), name: tf.zeros(shape)}
    specs = {n: tf.TensorSpec(None, tensor.dtype) for n, tensor in tensors.items()}

    @tf.function(input_signature=[specs])
    def function(tensors):
        return CBAM.call(ops, tensors)[0]

    with cbam_ops.use_implementation("native"):
        with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)) as caught:
            function(tensors)
    assert "CbamOps>Cbam: " in str(caught.value)


def test_a_wrong_rank_is_refused_at_run_time():
    with cbam_ops.use_implementation("native"):
        function = tf.function(
            lambda x: ops.channel_pool(x)[0], input_signature=[tf.TensorSpec(None, tf.float32)]
        )
        message = (
            "CbamOps>ChannelPool: `x` must have shape [N, H, W, C] or [N, D, H, W, C], got [2, 3]"
        )
        with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
            function(tf.zeros((2, 3)))


def test_the_eager_op_checks_itself(native_ops):
    """Shape functions do not run in eager mode: fails where a kernel would read past a buffer."""
    tensors = SPATIAL.draw()
    good = native_ops.cbam_ops_spatial_attention(**tensors, gamma=[], residual=[])
    gradient = {
        **tensors,
        "dy": tensors["x"],
        "y": [],
        "gamma": [],
        "spatial_gate": good.spatial_gate,
        "spatial_descriptors": good.spatial_descriptors,
        "batch_statistics": good.batch_statistics,
        "d_spatial_gate": good.spatial_gate,
    }
    native_ops.cbam_ops_spatial_attention_grad(**gradient)
    for name, value in gradient.items():
        if name in ("x", "y", "gamma"):
            continue
        wrong = tf.zeros([3, *value.shape])
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"`{name}` must have shape"):
            native_ops.cbam_ops_spatial_attention_grad(**{**gradient, name: wrong})
    message = "`y` must hold 1 tensors with activation='relu', got 0"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        native_ops.cbam_ops_spatial_attention_grad(**gradient, activation="relu")
    with pytest.raises(tf.errors.InvalidArgumentError, match="`d_residual` is `dy` itself"):
        native_ops.cbam_ops_spatial_attention_grad(**gradient, num_d_residual=1)
    two = [tensors["bias"]] * 2
    with pytest.raises(tf.errors.InvalidArgumentError, match="`gamma` must hold at most 1 tensor"):
        native_ops.cbam_ops_spatial_attention(**tensors, gamma=two, residual=[])


def test_the_op_refuses_weights_of_another_type(native_ops):
    tensors = SPATIAL.draw()
    tensors["x"] = tf.cast(tensors["x"], tf.float64)
    message = "the weights must have type float64 beside `x` of type float64, got float32"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        native_ops.cbam_ops_spatial_attention(**tensors, gamma=[], residual=[])


# --- what is odd but good -------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_an_empty_batch_is_legal(module, case, data_format):
    case = case.replace(size=(0, *case.size[1:]), data_format=data_format)
    tensors = case.draw()
    assert case.call(module, tensors)[0].shape[0] == 0
    for name, gradient in case.gradients(module, tensors).items():
        assert gradient.shape == tensors[name].shape
        assert not np.any(gradient.numpy()), name


def test_nan_stays_in_its_sample(module):
    """A NaN is not an error: it reaches what it belongs to, where a user finds it, and no more."""
    case = Case(options=options(activation="relu"))
    tensors = case.draw()
    x = tensors["x"].numpy()
    x[1, 0, 0, 0] = np.nan
    y, channel_gate, spatial_gate = (
        t.numpy() for t in case.call(module, {**tensors, "x": tf.constant(x)})
    )
    assert np.isnan(y[1]).all() and np.isnan(channel_gate[1]).all()
    for value in (y[0], channel_gate[0], spatial_gate[0]):
        assert np.isfinite(value).all()


def test_the_reference_speaks_for_itself():
    """The reference called by its own name refuses the same things."""
    with pytest.raises(ValueError, match="spatial_pool: `x` must have shape"):
        reference.spatial_pool(tf.zeros((2, 2)))
