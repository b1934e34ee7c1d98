"""The kernels on their own, on numpy arrays, against the definition in float64.

Everything runs poisoned: outputs and workspace are full of NaN before the kernels run, and guards
around them are looked at afterwards. A value that is never written, or read before it is written,
is a NaN in a result here.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import numpy_oracle as oracle
import pytest
from kernel_calls import DTYPES, LAYOUTS, MLPS, MODULES, Problem, Tensors, check, check_infinity

from cbam_ops import _core, testing
from cbam_ops.testing import Case, assert_accurate, assert_same_bits


class Poisoned:
    """The functions of `_core`, poisoned, with further keywords of running."""

    def __init__(self, **running: Any) -> None:
        self._running = {"poison": True, **running}

    def __getattr__(self, name: str) -> Any:
        return functools.partial(getattr(_core, name), **self._running)


CORE = Poisoned()


def type_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def make(
    module: str,
    size: tuple[int, int, int, int],
    dtype: str = "float32",
    layout: str = "NHWC",
    *,
    batch_norm: bool = False,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """A case of one of `MODULES`."""
    case = MODULES[module].replace(size=size, dtype=dtype, data_format=layout, **changes)
    if batch_norm:
        case = case.replace(function=f"{case.function}_with_batch_norm")
    return case.replace(options=case.options + testing.options(**options or {}))


# --- options --------------------------------------------------------------------------------------


def option_cases(dtype: str, layout: str, module: str) -> list[tuple[Case, bool]]:
    """Every combination of options, with whether gradients of the gates come back too."""
    has_channel, has_spatial = module != "spatial_only", module != "channel_only"
    cases = []
    for number, (mlp, activation, residual, batch_norm, biases) in enumerate(
        itertools.product(
            MLPS if has_channel else ({},),
            ("none", "relu"),
            (False, True),
            (False, True) if has_spatial else (False,),
            (True, False),
        )
    ):
        case = make(
            module,
            # Odd and even sizes, whole vectors and tails, in turn.
            ((2, 5, 3, 19), (3, 4, 4, 8), (1, 7, 7, 5))[number % 3],
            dtype,
            layout,
            options={"activation": activation, **mlp},
            residual=residual,
            batch_norm=batch_norm,
            biases=biases,
            kernel_size=(3, 7, 5)[number % 3],
            fill=("normal", "relu", "steps", "normal")[number % 4],
            seed=number,
        )
        cases.append((case, number % 5 < 2))
    return cases


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(instruction_set: str, dtype: str, layout: str, module: str) -> None:
    """A seventh of all combinations of options, another in each type and layout. Fails: some option
    is computed wrongly in this form.
    """
    first = 2 * DTYPES.index(dtype) + LAYOUTS.index(layout)
    for case, gate_gradients in option_cases(dtype, layout, module)[first % 7 :: 7]:
        check(case, CORE, gate_gradients=gate_gradients, threads=1 + case.seed % 2)


@pytest.mark.long
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_combination_of_options(
    instruction_set: str, dtype: str, layout: str, module: str
) -> None:
    """As above; all of them. (The half types differ in loading and storing only: a fifth.)"""
    step = 1 if dtype in ("float32", "float64") else 5
    for case, gate_gradients in option_cases(dtype, layout, module)[::step]:
        check(case, CORE, gate_gradients=gate_gradients, threads=1 + case.seed % 2)


# --- shapes ---------------------------------------------------------------------------------------

SHAPES = (
    # one of everything, and every size around the width of a vector
    (1, 1, 1, 1),
    (2, 1, 9, 2),
    (1, 9, 1, 3),
    (3, 5, 5, 7),
    (2, 7, 7, 8),
    (1, 3, 5, 15),
    (2, 4, 4, 16),
    (1, 9, 4, 17),
    (2, 5, 5, 31),
    (1, 1, 1, 32),
    (2, 3, 3, 33),
    (1, 7, 7, 64),
    (5, 4, 3, 65),
    (1, 5, 5, 257),
    # more positions than a tile takes, more channels, and both
    (1, 56, 3, 33),
    (1, 3, 111, 5),
    (1, 2, 601, 3),
    (2, 33, 31, 18),
    (1, 2, 2, 1030),
    (17, 2, 3, 6),
    (2, 23, 29, 130),
)
KERNEL_SIZES = (1, 3, 7, (1, 7), (11, 3))  # up to larger than the map


def check_shape(dtype: str, layout: str, shape: tuple[int, int, int, int], number: int) -> None:
    """With one of the kernel sizes; both orders take turns."""
    module, hidden = ("channel_first", "parallel")[number % 2], max(1, shape[3] // 8)
    kernel_size = KERNEL_SIZES[number % len(KERNEL_SIZES)]
    case = make(module, shape, dtype, layout, hidden=hidden, kernel_size=kernel_size)
    check(case, CORE, threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(instruction_set: str, dtype: str, layout: str) -> None:
    """Fails: a tail, a tile border or a tiny map goes wrong."""
    for number, shape in enumerate(SHAPES):
        check_shape(dtype, layout, shape, number + DTYPES.index(dtype))


# Volumes and kernels: of one slice, one row or one column, smaller than the kernel, cut into blocks
# of rows.
VOLUMES = (
    ((2, 3, 5, 7, 9), (3, 3, 5)),
    ((2, 1, 7, 5, 4), 3),
    ((1, 4, 1, 6, 5), (5, 3, 3)),
    ((1, 5, 6, 1, 3), 3),
    ((3, 6, 1, 1, 5), (3, 1, 1)),
    ((1, 2, 3, 2, 18), (7, 7, 1)),
    ((1, 11, 17, 13, 6), 5),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_volumes(instruction_set: str, dtype: str, layout: str) -> None:
    """Fails: what lies beside the border of a slice is taken for padding, or the reverse."""
    modules = ("channel_first", "parallel", "spatial_only")
    for number, (shape, kernel_size) in enumerate(VOLUMES):
        for batch_norm in (False, True):
            case = make(
                modules[number % 3], shape, dtype, layout,
                hidden=2, kernel_size=kernel_size, batch_norm=batch_norm,
                fill=("normal", "saturated")[number % 2],
            )  # fmt: skip
            check(case, CORE, threads=2)


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_with_every_kernel_size(
    instruction_set: str, dtype: str, layout: str, shape: tuple[int, int, int, int]
) -> None:
    """As above, for all kernel sizes."""
    for number in range(len(KERNEL_SIZES)):
        check_shape(dtype, layout, shape, number)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_than_the_caches_tiles(
    instruction_set: str, dtype: str, layout: str, module: str
) -> None:
    """Fails: work split over many tiles of one sample is put together wrongly."""
    case = make(module, (2, 40, 40, 96), dtype, layout, hidden=12, kernel_size=7, fill="relu")
    check(case, CORE, gate_gradients=False, threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width", "misalign"), [(32, 32, 0), (31, 5, 1), (3, 3, 2)])
def test_larger_than_the_caches(
    height: int, width: int, misalign: int, dtype: str, layout: str
) -> None:
    """A batch of 20 MiB, as against parts of it, which are not stored past the caches. Fails:
    cutting a batch into parts that fit a cache, or storing past the caches, goes wrong; rows that
    are no whole vectors, or do not start on one, among it.
    """
    n, part = 20, 8
    channels = (1 << 20) // (height * width * type_of(dtype).itemsize)
    if misalign:
        channels = (channels - 1) | 1
    case = make(
        "channel_first", (n, height, width, channels), dtype, layout,
        hidden=4, kernel_size=7, residual=True, options={"activation": "relu"},
    )  # fmt: skip
    problem = Problem(case, gate_gradients=False)
    whole = problem.both(CORE, threads=2, misalign=misalign)
    for i in (0, 8, n - part):
        maps = {name: problem.inputs[name][i : i + part] for name in ("x", "residual")}
        some = Problem(case.replace(size=(part, *case.size[1:])), **(problem.inputs | maps))
        some.gradients = {"dy": problem.gradients["dy"][i : i + part]}
        for name, value in some.both(CORE).items():
            if name in ("y", "dx", "d_residual", "channel_gate", "spatial_gate"):
                assert_same_bits(whole[name][i : i + part], value, f"{name} of sample {i} on")
    for name, value in whole.items():
        assert np.isfinite(value.astype(np.float64)).all(), name


@pytest.mark.parametrize("mlp", MLPS, ids=lambda mlp: "-".join(mlp.values()))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_larger_than_a_sum(instruction_set: str, dtype: str, mlp: dict[str, str]) -> None:
    """Gradients of weights add up samples in pieces; the two branches may have rows in common.
    Fails: a piece starts at the wrong sample, or a branch is left out or counted twice.
    """
    case = make("channel_first", (150, 2, 2, 21), dtype, options=mlp, hidden=9)
    check(case, CORE, threads=2)


# --- the same whatever the threads, the run, the place in memory ----------------------------------


# More values than the kernels take on one thread whatever they are given (IsSmall in kernels.cc):
# where a thread has samples of its own, and where all share a sample.
THREADED = [
    (3, 23, 17, 130), (1, 61, 41, 61), (33, 5, 4, 230), (8, 12, 13, 121), (1, 9, 12, 14, 100),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", THREADED)
def test_same_bits_for_any_threads(
    instruction_set: str, shape: tuple[int, ...], dtype: str, layout: str, module: str
) -> None:
    """Fails: results depend on the number of threads or change from run to run."""
    for batch_norm in {False, module != "channel_only"}:
        problem = Problem(make(module, shape, dtype, layout, batch_norm=batch_norm, kernel_size=7))
        expected = problem.both(CORE, threads=1)
        for threads in (1, 2, 3, 4, 4):
            for name, value in problem.both(CORE, threads=threads).items():
                assert_same_bits(value, expected[name], f"{name} with {threads} threads")


def shifted(arrays: Tensors, by: int) -> Tensors:
    """Copies that lie `by` elements off a boundary."""
    moved = {}
    for name, array in arrays.items():
        buffer = np.empty(array.size + by, array.dtype)
        buffer[by:] = array.ravel()
        moved[name] = buffer[by:].reshape(array.shape)
    return moved


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 7, 64), (2, 5, 5, 37)])
def test_off_alignment(
    instruction_set: str, shape: tuple[int, int, int, int], dtype: str, layout: str
) -> None:
    """Fails: a fast path assumes an alignment that inputs or outputs do not have."""
    case = make(
        "channel_first", shape, dtype, layout,
        kernel_size=7, residual=True, options={"activation": "relu"},
    )  # fmt: skip
    expected = Problem(case).both(CORE)
    for elements in (1, 3):
        moved = Problem(case)
        moved.inputs = shifted(moved.inputs, elements)
        moved.gradients = shifted(moved.gradients, elements)
        outputs = moved.forward(CORE, misalign=elements)
        grads = moved.backward(CORE, shifted(outputs, elements), misalign=elements)
        for name, value in (outputs | grads).items():
            assert_same_bits(value, expected[name], f"{name} off by {elements}")


def test_calls_from_several_threads_at_once() -> None:
    """Fails: calls share state, or deadlock on the shared pool."""
    problems = [
        Problem(make("channel_first", (3, 19, 17, 156), dtype, layout, kernel_size=7))
        for dtype in DTYPES
        for layout in LAYOUTS
    ]
    expected = [problem.both(CORE) for problem in problems]
    with concurrent.futures.ThreadPoolExecutor(len(problems)) as executor:
        for _ in range(3):
            for want, got in zip(
                expected,
                executor.map(lambda problem: problem.both(CORE, threads=3), problems),
                strict=True,
            ):
                for name, value in got.items():
                    assert_same_bits(value, want[name], name)


def test_sliced_and_strided_inputs() -> None:
    """Fails: arrays that are not dense in memory are read as if they were."""
    problem = Problem(make("channel_first", (2, 5, 6, 9)))
    expected = problem.forward(CORE)["y"]
    x = problem.inputs["x"]
    wide = np.full((2, 5, 6, 18), np.nan, np.float32)
    wide[..., ::2] = x
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for view in (wide[..., ::2], np.asfortranarray(x), unaligned):
        problem.inputs["x"] = view
        assert_same_bits(problem.forward(CORE)["y"], expected, "y")


def test_bfloat16_bits_as_uint16() -> None:
    """Fails: a caller without a bfloat16 type for numpy cannot use bfloat16 maps."""
    problem = Problem(make("channel_first", (2, 5, 6, 9), "bfloat16"))
    expected = problem.forward(CORE)["y"]
    problem.inputs["x"] = problem.inputs["x"].view(np.uint16)
    actual = problem.forward(CORE)["y"]
    assert actual.dtype == np.uint16
    assert_same_bits(actual.view(expected.dtype), expected, "y")


# --- telling values -------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["relu", "steps", "offset", "denormal", "huge", "zeros"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(instruction_set: str, dtype: str, layout: str, module: str, fill: str) -> None:
    """Fails: ties (after a ReLU whole maps are equal), an offset, denormals or saturated gates are
    treated wrongly.
    """
    for shape in ((2, 6, 7, 35), (2, 12, 12, 16)):
        check(make(module, shape, dtype, layout, kernel_size=7, fill=fill), CORE)


def spoil(
    x: np.ndarray, layout: str, position: int, channel: int, value: float | str
) -> np.ndarray:
    """`x` with `value` in the second sample; "both": +inf there and -inf beside it."""
    x = oracle.to_nhwc(x, layout).copy()
    sample = x[1].reshape(-1, x.shape[3])
    sample[position, channel] = np.inf if value == "both" else value
    if value == "both":
        sample[position - 1, channel] = sample[position, channel - 1] = -np.inf
    return np.ascontiguousarray(oracle.from_nhwc(x, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "both"])
def test_not_a_number_and_infinity(
    instruction_set: str, value: float | str, module: str, dtype: str, layout: str
) -> None:
    """NaN and infinities reach the outputs and gradients they reach in the definition, no others.
    Fails: a maximum swallows NaN, or one sample spoils another.
    """
    options = {"mlp_activation": "relu"} if layout == "NCHW" and module != "spatial_only" else {}
    case = make(module, (3, 5, 6, 21), dtype, layout, options=options, kernel_size=7)
    for position, channel in ((0, 0), (17, 20), (29, 9)):
        problem = Problem(case, gate_gradients=False)
        problem.inputs["x"] = spoil(problem.inputs["x"], layout, position, channel, value)
        outputs = problem.forward(CORE)
        truth = problem.define_forward(problem.exact)
        stock = problem.define_forward(problem.compute)
        for name, expected in truth.items():
            if name in outputs:
                assert_accurate(outputs[name], expected, stock[name], f"{name} of {value}")
        true_grads = problem.define_backward(outputs, problem.exact)
        for name, actual in problem.backward(CORE, outputs).items():
            same = np.isnan(actual.astype(np.float64)) == np.isnan(true_grads[name])
            assert same.all(), f"{name} of {value}: {int((~same).sum())} of {same.size} differ"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_nan_stays_one(instruction_set: str, dtype: str, layout: str) -> None:
    """Fails: rounding a NaN to a half type carries into its exponent or its sign."""
    c = 40
    for bits in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001, 0x7FBFFFFF):
        b1 = np.full(c, bits, np.uint32).view(np.float32)
        outputs = _core.channel_attention(
            oracle.from_nhwc(np.ones((1, 3, 3, c)), layout).astype(type_of(dtype), order="C"),
            w0=np.zeros((c, 1), np.float32),
            w1=np.zeros((1, c), np.float32),
            b1=b1,
            data_format=layout,
        )
        assert np.isnan(outputs["y"].astype(np.float32)).all(), hex(bits)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigmoid_is_exact(instruction_set: str, dtype: str) -> None:
    """The gate over its whole range, to a few roundings of its own size. Fails: the sigmoid is an
    approximation, or loses its small values. (Denormal ones may be 0: TensorFlow flushes them.)
    """
    limit = 100 if dtype == "float32" else 720
    logits = np.concatenate([np.linspace(-limit, limit, 20001), [0.0, -1e4, 1e4, -1e30, 1e30]])
    c = logits.size
    out = _core.channel_attention(
        np.zeros((1, 1, 1, c), dtype),
        w0=np.zeros((c, 1), dtype),
        w1=np.zeros((1, c), dtype),
        b1=logits.astype(dtype),
        pooling="avg",
    )["channel_gate"][0]
    truth = oracle.sigmoid(logits.astype(dtype).astype(testing.truth_type(dtype)))
    assert_accurate(
        out, truth, truth.astype(dtype), "sigmoid", smallest=float(np.finfo(dtype).tiny)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
def test_saturated_gates(instruction_set: str, module: str, dtype: str, layout: str) -> None:
    """Logits of thousands give gates of exactly 0 and 1 and gradients of 0, never NaN."""
    problem = Problem(make(module, (2, 5, 6, 21), dtype, layout, kernel_size=7))
    for sign in (-1, 1):
        for name in {"b1", "bias"} & set(problem.inputs):
            problem.inputs[name] = np.full_like(problem.inputs[name], sign * 3e4)
        outputs = problem.forward(CORE)
        for name in {"channel_gate", "spatial_gate"} & set(outputs):
            assert (outputs[name] == (sign + 1) / 2).all(), f"{name} at {sign * 3e4}"
        for name, actual in problem.backward(CORE, outputs).items():
            assert np.isfinite(actual.astype(np.float64)).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", [(0, 5, 6, 21), (0, 1, 1, 1)])
def test_empty_batch(
    instruction_set: str, shape: tuple[int, int, int, int], module: str, dtype: str, layout: str
) -> None:
    """No samples: empty maps and gates, and weight gradients of exactly zero."""
    problem = Problem(make(module, shape, dtype, layout, batch_norm=module != "channel_only"))
    outputs = problem.forward(CORE)
    grads = problem.backward(CORE, outputs)
    assert outputs["y"].shape == grads["dx"].shape == problem.inputs["x"].shape
    for name, value in grads.items():
        assert (value == 0).all(), f"{name} of an empty batch is {value}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_many(instruction_set: str, dtype: str, layout: str) -> None:
    """The mean of half a million values near 1000 keeps its digits. Fails: one sum for all."""
    rng = np.random.default_rng(5)
    for shape in ((1, 1024, 512, 1), (1, 1, 2, 1 << 18)):
        values = 1000 + rng.standard_normal(shape, np.float32)
        x = oracle.from_nhwc(values, layout).astype(type_of(dtype), order="C")
        for name in ("channel_pool", "spatial_pool"):
            pools = getattr(CORE, name)(x, data_format=layout, threads=2)
            for key, expected in getattr(oracle, name)(x, layout).items():
                # An exact evaluation: the bound is a few roundings, whatever the length of the sum.
                narrow = expected.astype(testing.compute_type(dtype))
                assert_accurate(pools[key], expected, narrow, f"{key} of {shape}")


# --- the pools on their own -----------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["normal", "relu", "steps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pools(instruction_set: str, dtype: str, layout: str, fill: str) -> None:
    """Fails: a pool or its gradient is wrong in this type and layout."""
    for number, size in enumerate(SHAPES):
        for function in ("channel_pool", "spatial_pool"):
            case = Case(function, size, fill=fill, dtype=dtype, data_format=layout, seed=number)
            check(case, CORE, threads=2, misalign=number % 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "both"])
def test_pools_of_not_a_number_and_infinity(
    instruction_set: str, value: float | str, dtype: str, layout: str
) -> None:
    """As tf.reduce_mean and tf.reduce_max have it, gradients included: NaN has no equal, so a NaN
    maximum's share is 0 / 0.
    """
    for position, channel in ((0, 0), (34, 36), (16, 9)):
        for function in ("channel_pool", "spatial_pool"):
            case = Case(function, (2, 5, 7, 37), dtype=dtype, data_format=layout)
            problem = Problem(case)
            problem.inputs["x"] = spoil(problem.inputs["x"], layout, position, channel, value)
            outputs = problem.forward(CORE)
            for key, expected in problem.define_forward("float64").items():
                magnitude = np.where(np.isfinite(expected), 4.0, 0.0)
                stock = expected.astype(problem.compute)
                assert_accurate(
                    outputs[key], expected, stock, f"{function} {key}", magnitude=magnitude
                )
            dx = problem.backward(CORE, outputs)["dx"]
            expected = problem.define_backward(outputs, "float64")["dx"]
            same = np.isnan(dx.astype(np.float64)) == np.isnan(expected)
            assert same.all(), f"{function}_grad of {value}: {int((~same).sum())} differ"


@pytest.mark.parametrize("infinity", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("mlp", MLPS, ids=lambda mlp: "-".join(mlp.values()))
def test_infinity_in_the_mlp(instruction_set: str, mlp: dict[str, str], infinity: float) -> None:
    """Fails where a hidden unit that one branch switches off hides 0 times infinity, a NaN."""
    check_infinity(CORE, mlp, infinity)


# --- the definition itself ------------------------------------------------------------------------


@pytest.mark.parametrize("order", [*MODULES, "spatial_first"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_definition_by_finite_differences(layout: str, order: str) -> None:
    """Fails: the definition's gradients are not those of its function, so it proves nothing."""
    module = "channel_first" if order == "spatial_first" else order
    for mlp, activation, batch_norm in itertools.product(MLPS, ("none", "relu"), (False, True)):
        if batch_norm and module == "channel_only":
            continue
        problem = Problem(
            make(
                module, (2, 3, 4, 5), "float64", layout,
                options={"activation": activation, **mlp}, batch_norm=batch_norm, residual=True,
            )
        )  # fmt: skip
        words = oracle.options_of(problem.case)
        if order == "spatial_first":
            words["gates"] = order
        weight = {"y": problem.gradients["dy"]}
        weight |= {name[2:]: v for name, v in problem.gradients.items() if name != "dy"}

        def loss(arguments: Tensors, words: dict = words, weight: Tensors = weight) -> float:
            out = oracle.forward(**arguments, **words)
            return sum(float(np.sum(out[name] * w)) for name, w in weight.items())

        grads = oracle.backward(**problem.inputs, **problem.gradients, **words)
        rng = np.random.default_rng(1)
        for name, value in problem.inputs.items():
            direction = rng.standard_normal(value.shape)
            above, below = (
                loss({**problem.inputs, name: value + sign * 1e-6 * direction}) for sign in (1, -1)
            )
            gradient = grads[testing.gradient_name(name)]
            numeric, analytic = (above - below) / 2e-6, float(np.sum(gradient * direction))
            assert abs(numeric - analytic) < 1e-7 * (1 + abs(numeric)), f"{problem.case}: {name}"


# --- the functions --------------------------------------------------------------------------------


def test_every_function_says_what_it_takes() -> None:
    """Fails: a function is missing, or its docstring does not begin with its signature."""
    for name, signature in _core.signatures().items():
        first = getattr(_core, name).__doc__.splitlines()[0]
        for row in signature["inputs"] + signature["attributes"]:
            assert row["name"] in first, f"{row['name']} in {first}"
        assert first.startswith(f"{name}(x, ")


def test_unknown_arguments() -> None:
    """Fails: a misspelt argument is silently ignored."""
    x = np.zeros((1, 2, 3, 4), np.float32)
    for call in (
        lambda: _core.channel_pool(x, layout="NHWC"),
        lambda: _core.channel_pool(x, kernel=x),
        lambda: _core.channel_pool(x, x),
        lambda: _core.channel_pool(x, x=x),
        lambda: _core.channel_pool(x, order="parallel"),
    ):
        with pytest.raises(TypeError, match="^channel_"):
            call()


# --- bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": zeros(5, 6, 8)},
            r"`x` must have shape \[N, H, W, C\] or \[N, D, H, W, C\], got \[5, 6",
        ),
        ({"x": zeros(2, 5, 6, 0)}, r"`x` must have C >= 1, got shape \[2, 5, 6, 0\]"),
        ({"x": zeros(2, 5, 6, 8, dtype=np.int32)}, r"`x` must be of float32 .* got int32"),
        ({"x": [1.0]}, r"`x` must be a numpy array, got list"),
        ({"x": zeros(2, 5, 6, 8, dtype=">f4")}, r"`x` must have the byte order of this machine"),
        ({"w0": None}, r"`w0` must be a numpy array, got None"),
        ({"w0": zeros(7, 2)}, r"`w0` must have shape \[C, hidden\] = \[8, hidden"),
        ({"w0": zeros(8, 0)}, r"`w0` must have hidden >= 1, got shape \[8, 0\]"),
        ({"w0": zeros(8, 2, dtype=np.float64)}, r"`w0` must be of float32, got float64"),
        ({"w1": zeros(3, 8)}, r"`w1` must have shape .* = \[2, 8\], got \[3, 8\]"),
        ({"b0": zeros(3)}, r"`b0` must have shape \[hidden\] = \[2\], got \[3\]"),
        ({"b1": zeros(3)}, r"`b1` must have shape \[C\] = \[8\], got \[3\]"),
        ({"kernel": zeros(4, 4, 2, 1)}, r"`kernel` must .* odd kh, got shape \[4, 4, 2"),
        ({"kernel": zeros(3, 4, 2, 1)}, r"`kernel` must .* odd kw, got shape \[3, 4, 2, 1\]"),
        ({"kernel": zeros(0, 0, 2, 1)}, r"`kernel` must .* got shape \[0, 0, 2, 1\]"),
        ({"bias": zeros(2)}, r"`bias` must have shape \[1\], got \[2\]"),
        ({"gamma": zeros(2)}, r"`gamma` must have shape \[1\], got \[2\]"),
        ({"residual": zeros(2, 5, 6, 7)}, r"`residual` must have shape"),
        ({"data_format": "NWHC"}, r"`data_format` must be one of 'NHWC', 'NCHW', got 'NWHC'"),
        ({"order": "both"}, r"`order` must be one of 'channel_first', 'parallel', got 'both'"),
        ({"pooling": "min"}, r"`pooling` must be one of 'avg\+max', 'avg', 'max', got 'min'"),
        ({"activation": "gelu"}, r"`activation` must be one of 'none', 'relu', got 'gelu'"),
        ({"mlp_activation": "gelu"}, r"`mlp_activation` must be one of .* got 'gelu'"),
        ({"epsilon": -1.0}, r"`epsilon` must be at least 0, got -1"),
        ({"epsilon": "small"}, r"`epsilon` must be like 1e-05, got 'small'"),
        ({"threads": 0}, r"`threads` must be between 1 and 256, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    """Fails: a wrong argument is accepted, or the message does not say which and why."""
    inputs = Problem(make("channel_first", (2, 5, 6, 8), hidden=2)).inputs
    with pytest.raises(ValueError, match="cbam: " + message):
        _core.cbam(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("activation", "changes", "message"),
    [
        ("relu", {"y": None}, "`y` must hold 1 tensors with activation='relu', got 0"),
        ("none", {"y": zeros(2, 5, 6, 8)}, "`y` must hold 0 tensors with activation='none', got 1"),
        ("none", {"d_residual": True}, "`d_residual` is `dy` itself with activation='none'"),
        ("relu", {"dy": zeros(2, 5, 6, 7)}, r"`dy` must have shape .* got \[2, 5, 6, 7\]"),
        ("relu", {"channel_gate": None}, "`channel_gate` must be a numpy array, got None"),
        ("relu", {"batch_statistics": zeros(2)}, r"`batch_statistics` must have shape .* got \[2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_a_gradient(
    activation: str, changes: dict[str, Any], message: str
) -> None:
    """Fails: as above."""
    options = {"activation": activation}
    problem = Problem(make("channel_first", (2, 5, 6, 8), hidden=2, options=options))
    outputs = problem.forward(CORE)
    if activation == "none":
        outputs.pop("y")
    arguments = problem.inputs | outputs | problem.gradients | options | changes
    with pytest.raises(ValueError, match="cbam_grad: " + message):
        _core.cbam_grad(**arguments)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="`name` must be an instruction set of this .* got 'mmx'"):
        _core.set_instruction_set("mmx")
    assert _core.instruction_set() in _core.available_instruction_sets()
    assert _core.available_instruction_sets()[0] == "baseline"
