"""The ops on a real GPU, under TensorFlow: `pytest -m gpu` where there is one.

Numbers against the float64 reference and the CPU op, where the results lie, the order of the
stream, the same bits every time. Everything is skipped where TensorFlow sees no GPU. There
CBAM_OPS_TEST_DEVICE=CPU runs the tests themselves on another device (test_cuda_ops_on_cpu.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf
from numpy_oracle import gradient_magnitudes

import cbam_ops
from cbam_ops import ops, options
from cbam_ops.testing import (
    OPTIONS,
    SIZES,
    Case,
    assert_same_bits,
    cast,
)

DEVICE = os.environ.get("CBAM_OPS_TEST_DEVICE", "GPU")
REPEATS = 50 if DEVICE == "GPU" else 2

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Native or an error, on the GPU or an error."""
    if not tf.config.list_physical_devices(DEVICE):
        pytest.skip("TensorFlow sees no GPU")
    with cbam_ops.use_implementation("native"):
        yield


def moved(tensors: dict[str, tf.Tensor], device: str) -> dict[str, tf.Tensor]:
    with tf.device(device):
        return {name: tf.identity(tensor) for name, tensor in tensors.items()}


def assert_there(tensors: list[tf.Tensor]) -> None:
    for tensor in tensors:
        place = tf.DeviceSpec.from_string(tensor.device)
        assert place.device_type == DEVICE, f"computed on {tensor.device}"


def check(case: Case) -> None:
    """Outputs and gradients, against the float64 reference and the CPU op in float64."""
    with tf.device("CPU"):
        tensors = case.draw()
        magnitudes = gradient_magnitudes(case, tensors)
        cpu = case.evaluate(ops, cast(tensors, "float64"))
    with tf.device(DEVICE):
        actual = case.evaluate(ops, moved(tensors, DEVICE))
    assert_there(list(actual.values()))
    with tf.device("CPU"):
        for truth in (None, cpu):
            found = case.compare(actual, tensors, magnitudes=magnitudes, truth=truth)
            assert not [finding.fault for finding in found if finding.fault]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_option_is_accurate(case, dtype, data_format):
    """Fails where an option, a type or a layout computes something else than the definition."""
    check(case.replace(dtype=dtype, data_format=data_format))


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("size_dtype", ["float32", "float16"])
def test_every_size_is_accurate(case, size_dtype, data_format):
    """Fails where a tail of a vector, an edge of a tile or a halo is handled wrongly."""
    check(case.replace(dtype=size_dtype, data_format=data_format))


# Maps of several blocks and, on devices that have them, of clusters of several blocks.
_SIZE = (4, 28, 28, 128) if DEVICE == "GPU" else (2, 9, 8, 32)
SEVERAL_BLOCKS = Case(size=_SIZE, hidden=8, kernel_size=7, residual=True)


@pytest.mark.parametrize("map_dtype", ["float32", "bfloat16"])
def test_a_map_of_several_blocks_is_accurate(map_dtype, data_format):
    check(SEVERAL_BLOCKS.replace(dtype=map_dtype, data_format=data_format))


def bits(values: list[tf.Tensor]) -> list[np.ndarray]:
    return [value.numpy() for value in values]


def everything(tensors: dict[str, tf.Tensor]) -> list[tf.Tensor]:
    with tf.device(DEVICE):
        outputs = SEVERAL_BLOCKS.call(ops, tensors)
        return [*outputs, *SEVERAL_BLOCKS.gradients(ops, tensors).values()]


def test_results_have_the_same_bits_every_time():
    tensors = moved(SEVERAL_BLOCKS.draw(), DEVICE)
    expected = bits(everything(tensors))
    for _ in range(3):
        for index, value in enumerate(bits(everything(tensors))):
            assert_same_bits(value, expected[index], f"result {index}")


def ones_to_wait_for() -> tf.Tensor:
    with tf.device(DEVICE):
        return tf.ones([2**26 if DEVICE == "GPU" else 2**10])


def zero_after_a_while(ones: tf.Tensor) -> tf.Tensor:
    """A long op, without the libraries that a product of matrices needs."""
    for _ in range(16):
        ones = tf.sin(ones * (math.pi / 2))
    return tf.round(tf.reduce_max(ones)) - 1.0


def test_ours_waits_for_what_came_before():
    """A long op ahead on TensorFlow's stream, 50 times: a kernel on another stream would not wait.

    The input is the long op's result, so that reading it too early gives other numbers.
    """
    drawn = SEVERAL_BLOCKS.draw()
    tensors = moved(drawn, DEVICE)
    expected = bits(everything(tensors))

    @tf.function
    def program(big: tf.Tensor, tensors: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        return everything({**tensors, "x": tensors["x"] + zero_after_a_while(big)})

    big = ones_to_wait_for()
    for _ in range(REPEATS):
        for index, value in enumerate(bits(program(big, tensors))):
            assert_same_bits(value, expected[index], f"result {index}")


def test_what_comes_after_waits_for_ours():
    """The workspace and the outputs are used again at once by the next ops on the stream."""
    tensors = moved(SEVERAL_BLOCKS.draw(), DEVICE)
    expected = everything(tensors)[0]

    @tf.function
    def program(tensors: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        with tf.device(DEVICE):
            return [SEVERAL_BLOCKS.call(ops, tensors)[0] * 1.0 for _ in range(8)]

    for _ in range(REPEATS):
        for y in program(tensors):
            assert_same_bits(y.numpy(), expected.numpy(), "y")


def test_a_function_s_ops_are_placed_there():
    """Fails where the placer finds no kernel, and moves the op with copies either way."""
    tensors = moved(SEVERAL_BLOCKS.draw(), DEVICE)
    soft = tf.config.get_soft_device_placement()
    tf.config.set_soft_device_placement(False)
    try:
        function = tf.function(lambda tensors: everything(tensors))
        assert_there(function(tensors))
    finally:
        tf.config.set_soft_device_placement(soft)


def test_bad_shapes_are_refused_there_too():
    with tf.device(DEVICE), pytest.raises(tf.errors.InvalidArgumentError, match="kernel"):
        native = options.loaded_ops()
        zeros = tf.zeros
        native.cbam_ops_spatial_attention(
            x=zeros((1, 4, 4, 8)),
            kernel=zeros((2, 2, 2, 1)),
            bias=zeros((1,)),
            gamma=[],
            residual=[],
        )


def test_a_layer_trains_in_mixed_precision():
    import keras

    model = keras.Sequential(
        [
            keras.Input((8, 8, 16)),
            cbam_ops.CBAM(ratio=4, dtype="mixed_bfloat16"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    model.compile("sgd", "mse", jit_compile=False)
    x = np.random.default_rng(0).standard_normal((16, 8, 8, 16)).astype("float32")
    with tf.device(DEVICE):
        history = model.fit(x, x.mean((1, 2, 3)), epochs=3, batch_size=8, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_more_than_two_to_the_31_elements():
    """Fails where an index has 32 bits. The last sample alone must give the same bits."""
    if DEVICE != "GPU":
        pytest.skip("it takes 9 GB on a GPU")
    case = Case(size=(2, 32, 32, 1024), hidden=8, kernel_size=7, dtype="bfloat16")
    tensors = moved(case.draw(), DEVICE)
    with tf.device(DEVICE):
        few = case.call(ops, tensors)[0]
        try:
            many = case.call(ops, {**tensors, "x": tf.tile(tensors["x"], (1025, 1, 1, 1))})
        except tf.errors.ResourceExhaustedError:
            pytest.skip("the GPU has too little memory")
        assert tf.size(many[0], tf.int64) > 2**31
        assert_same_bits(many[0][-2:].numpy(), few.numpy(), "y")


# --- inside XLA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS, ids=str)
@pytest.mark.parametrize("xla_dtype", ["float32", "bfloat16"])
def test_inside_xla_the_bits_are_the_same(case, xla_dtype, data_format):
    """Fails where XLA's stream, its scratch memory or its command buffers change a result."""
    case = case.replace(dtype=xla_dtype, data_format=data_format)
    tensors = moved(case.draw(), DEVICE)

    def function(tensors):
        outputs = case.call(ops, tensors)
        return [*outputs, *case.gradients(ops, tensors).values()]

    compiled = tf.function(function, autograph=False, jit_compile=True)
    with tf.device(DEVICE):
        expected = bits(function(tensors))
        for _ in range(3):  # XLA records a program once it has run
            results = compiled(tensors)
            assert_there(results)
            for index, value in enumerate(bits(results)):
                assert_same_bits(value, expected[index], f"result {index}")


def test_inside_xla_ours_waits_for_what_came_before():
    """Fails where the kernels run on another stream than the rest of XLA's program."""
    tensors = moved(SEVERAL_BLOCKS.draw(), DEVICE)

    @tf.function(autograph=False, jit_compile=True)
    def program(big, tensors):
        return everything({**tensors, "x": tensors["x"] + zero_after_a_while(big)})

    with tf.device(DEVICE):
        expected = bits(everything(tensors))
        big = ones_to_wait_for()
        for _ in range(REPEATS):
            for index, value in enumerate(bits(program(big, tensors))):
                assert_same_bits(value, expected[index], f"result {index}")
