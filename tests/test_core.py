"""The kernels on their own, on numpy arrays, against the definition in float64.

Everything runs poisoned: outputs and workspace are full of NaN before the kernels run, and guards
around them are looked at afterwards. A value that is never written, or read before it is written,
is a NaN in a result here.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy_oracle as oracle
import pytest

from cbam_ops import _core, testing
from cbam_ops.testing import assert_accurate, assert_same_bits

ml_dtypes = pytest.importorskip("ml_dtypes", reason="numpy itself has no bfloat16")

DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("NHWC", "NCHW")
GATES = ("channel_first", "parallel", "channel_only", "spatial_only")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")

Tensors = dict[str, np.ndarray]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in _core.available_instruction_sets():
        pytest.skip(f"this machine or this build has no {request.param}")
    before = _core.instruction_set()
    _core.set_instruction_set(request.param)
    yield request.param
    _core.set_instruction_set(before)


def type_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; its inputs follow from it."""

    shape: tuple[int, int, int, int]  # N, H, W, C
    dtype: str = "float32"
    layout: str = "NHWC"
    gates: str = "channel_first"
    hidden: int = 3
    kernel_size: int = 7
    pooling: str = "avg+max"
    mlp_activation: str | None = None
    activation: str | None = None
    batch_norm: bool = False
    residual: bool = False
    biases: bool = True
    gate_gradients: bool = False
    style: str = "normal"  # what x looks like: see _map
    seed: int = 0

    @property
    def compute(self) -> str:
        return testing.compute_type(self.dtype)

    @property
    def exact(self) -> str:
        return testing.truth_type(self.dtype)

    @property
    def options(self) -> dict[str, Any]:
        names = ("layout", "gates", "pooling", "mlp_activation", "activation", "batch_norm")
        return {name: getattr(self, name) for name in names}


def _map(case: Case, rng: np.random.Generator, style: str) -> np.ndarray:
    n, h, w, c = case.shape
    values = rng.standard_normal((n, h, w, c))
    if style == "relu":  # many exact zeros; the first sample and channel entirely
        values = np.maximum(values, 0)
        values[:1] = 0
        values[..., :1] = 0
    elif style == "steps":  # few distinct values: equal maxima almost everywhere
        values = np.round(values)
    elif style == "offset":  # a large mean under small noise
        values = 1000 + values / 16
    elif style == "tiny":  # denormal in float32 and bfloat16, and in float16
        values = values * (1e-39 if case.dtype != "float16" else 1e-6)
    elif style == "huge":  # near the end of float16
        values = values * 2000
    return oracle.from_nhwc(values, case.layout).astype(type_of(case.dtype), order="C")


@functools.lru_cache(maxsize=16)
def make(case: Case) -> tuple[Tensors, Tensors]:
    """The inputs of the forward pass, and the gradients that come back."""
    rng = np.random.default_rng((case.seed, *case.shape))
    n, h, w, c = case.shape
    k = case.kernel_size
    # Weights as training would make them: descriptors of a thousand give logits of about one.
    unit = {"offset": 1e-3, "huge": 1e-3}.get(case.style, 1.0)

    def weights(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(case.compute)

    inputs = {"x": _map(case, rng, case.style)}
    if case.residual:
        inputs["residual"] = _map(case, rng, "normal")
    if case.gates != "spatial_only":
        inputs["w0"] = weights(c, case.hidden, scale=unit * c**-0.5)
        inputs["w1"] = weights(case.hidden, c, scale=case.hidden**-0.5)
        if case.biases:
            inputs["b0"], inputs["b1"] = weights(case.hidden, scale=0.5), weights(c, scale=0.5)
    if case.gates != "channel_only":
        inputs["kernel"] = weights(k, k, 2, 1, scale=unit / k)
        if case.biases or case.batch_norm:
            inputs["bias"] = weights(1)
        if case.batch_norm:
            inputs["gamma"] = weights(1)
    gradients = {"dy": _map(case, rng, "normal")}
    if case.gate_gradients and case.gates != "spatial_only":
        gradients["d_channel_gate"] = weights(n, c)
    if case.gate_gradients and case.gates != "channel_only":
        gradients["d_spatial_gate"] = weights(n, h, w)
    return inputs, gradients


def run_forward(inputs: Tensors, options: dict[str, Any], **running: Any) -> Tensors:
    return _core.forward(**inputs, **options, poison=True, **running)


SAVED = (
    "channel_descriptors",
    "channel_gate",
    "spatial_descriptors",
    "spatial_gate",
    "batch_statistics",
)


def run_backward(
    inputs: Tensors,
    gradients: Tensors,
    outputs: Tensors,
    options: dict[str, Any],
    **running: Any,
) -> Tensors:
    arguments = {k: v for k, v in inputs.items() if k not in ("bias", "residual")}
    arguments |= {k: outputs[k] for k in SAVED if k in outputs}
    if options["activation"] == "relu":
        arguments["y"] = outputs["y"]
    return _core.backward(
        **arguments,
        **gradients,
        **options,
        has_residual="residual" in inputs,
        poison=True,
        **running,
    )


def define_forward(inputs: Tensors, options: dict[str, Any], dtype: str) -> Tensors:
    with np.errstate(all="ignore"):
        return oracle.forward(**inputs, **named(options), dtype=dtype)


def define_backward(
    inputs: Tensors,
    gradients: Tensors,
    outputs: Tensors,
    options: dict[str, Any],
    dtype: str,
    magnitude: bool = False,
) -> Tensors:
    with np.errstate(all="ignore"):
        return oracle.backward(
            **inputs,
            **gradients,
            **named(options),
            dtype=dtype,
            y=outputs["y"].astype(np.float64),
            tie_gate=outputs.get("channel_gate"),
            magnitude=magnitude,
        )


def named(options: dict[str, Any]) -> dict[str, Any]:
    """With the definition's word for "no activation"."""
    names = {key: options[key] or "none" for key in ("mlp_activation", "activation")}
    return {**options, **names}


@functools.lru_cache(maxsize=64)
def definition(case: Case) -> tuple[Tensors, Tensors, Tensors]:
    """Forward: the truth, the ordinary evaluation, and how large the terms of sums are."""
    inputs, _ = make(case)
    truth = define_forward(inputs, case.options, case.exact)
    absolute = {name: np.abs(value.astype(case.exact)) for name, value in inputs.items()}
    channel = truth.get("channel_gate", np.ones((1, 1)))[:, None, None, :]
    spatial = truth.get("spatial_gate", np.ones((1, 1, 1)))[..., None]
    y = absolute["x"] * oracle.from_nhwc(channel * spatial, case.layout)
    pools = define_forward(absolute, case.options, case.exact)
    magnitudes = {name: value for name, value in pools.items() if name.endswith("descriptors")}
    magnitudes["y"] = y + absolute.get("residual", 0)
    return truth, define_forward(inputs, case.options, case.compute), magnitudes


def check(case: Case, **running: Any) -> tuple[Tensors, Tensors]:
    """Runs both passes of `case` and holds every result against the definition."""
    inputs, gradients = make(case)
    outputs = run_forward(inputs, case.options, **running)
    truth, stock, magnitudes = definition(case)
    for name, value in outputs.items():
        assert_accurate(
            value, truth[name], stock[name], f"{case}: {name}", magnitude=magnitudes.get(name)
        )

    grads = run_backward(inputs, gradients, outputs, case.options, **running)
    arguments = inputs, gradients, outputs, case.options
    true_grads = define_backward(*arguments, case.exact)
    stock_grads = define_backward(*arguments, case.compute)
    magnitudes = define_backward(*arguments, case.exact, magnitude=True)
    expected = {f"d{name}" for name in inputs if name != "residual"}
    missing = expected - set(grads)
    assert not missing, f"{case}: no gradients {missing}"
    for name, value in grads.items():
        if name not in true_grads:  # of a bias that the problem does not have
            continue
        assert_accurate(
            value,
            true_grads[name],
            stock_grads[name],
            f"{case}: {name}",
            magnitude=magnitudes[name],
        )
    assert ("d_residual" in grads) == (case.activation == "relu" and case.residual)
    return outputs, grads


# --- options -------------------------------------------------------------------------------------


def option_cases(dtype: str, layout: str, gates: str) -> list[Case]:
    has_channel, has_spatial = gates != "spatial_only", gates != "channel_only"
    cases = []
    for number, (pooling, mlp_activation, activation, residual, batch_norm, biases) in enumerate(
        itertools.product(
            ("avg+max", "avg", "max") if has_channel else ("avg+max",),
            (None, "relu") if has_channel else (None,),
            (None, "relu"),
            (False, True),
            (False, True) if has_spatial else (False,),
            (True, False),
        )
    ):
        cases.append(
            Case(
                # Odd and even sizes, whole vectors and tails, in turn.
                shape=((2, 5, 3, 19), (3, 4, 4, 8), (1, 7, 7, 5))[number % 3],
                dtype=dtype,
                layout=layout,
                gates=gates,
                pooling=pooling,
                mlp_activation=mlp_activation,
                activation=activation,
                residual=residual,
                batch_norm=batch_norm,
                biases=biases,
                gate_gradients=number % 5 < 2,
                kernel_size=(3, 7, 5)[number % 3],
                style=("normal", "relu", "steps", "normal")[number % 4],
                seed=number,
            )
        )
    # The half types differ in loading and storing only: a fifth of the combinations, in turn.
    return cases if dtype in ("float32", "float64") else cases[::5]


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(instruction_set: str, dtype: str, layout: str, gates: str) -> None:
    """Every combination of options. Fails: some option is computed wrongly in this form."""
    for case in option_cases(dtype, layout, gates):
        check(case, threads=1 + case.seed % 2)


# --- shapes --------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(
    instruction_set: str, dtype: str, layout: str, shape: tuple[int, int, int, int]
) -> None:
    """Fails: a tail, a tile border or a tiny map goes wrong."""
    hidden = max(1, shape[3] // 8)
    for number, kernel_size in enumerate((1, 3, 7, 11)):  # up to larger than the map
        gates = GATES[number % 2]
        check(
            Case(shape, dtype, layout, gates, hidden, kernel_size, gate_gradients=True),
            threads=2,
        )


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_than_the_caches_tiles(
    instruction_set: str, dtype: str, layout: str, gates: str
) -> None:
    """Fails: work split over many tiles of one sample is put together wrongly."""
    check(Case((2, 40, 40, 96), dtype, layout, gates, hidden=12, style="relu"), threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_than_the_caches(dtype: str, layout: str) -> None:
    """A batch of 20 MiB, as against its samples on their own, which the tests above hold against
    the definition. Fails: cutting a batch into parts that fit a cache, or storing past the
    caches, goes wrong.
    """
    n, channels = 20, (1 << 20) // (32 * 32 * type_of(dtype).itemsize)
    case = Case((n, 32, 32, channels), dtype, layout, hidden=4, activation="relu", residual=True)
    inputs, gradients = make(case)
    whole = both(case, threads=2)
    weights = {k: v for k, v in inputs.items() if k not in ("x", "residual")}
    for i in (0, 8, 11, n - 1):
        one = {k: inputs[k][i : i + 1] for k in ("x", "residual")} | weights
        dy = {"dy": gradients["dy"][i : i + 1]}
        outputs = run_forward(one, case.options)
        grads = run_backward(one, dy, outputs, case.options)
        for name, value in (outputs | grads).items():
            if name in ("y", "dx", "d_residual", "channel_gate", "spatial_gate"):
                expected = value.astype(testing.truth_type(dtype))
                narrow = expected.astype(case.compute)
                assert_accurate(
                    whole[name][i : i + 1], expected, narrow, f"{name} of sample {i}", magnitude=4.0
                )
    for name, value in whole.items():
        assert np.isfinite(value.astype(np.float64)).all(), name


@pytest.mark.parametrize("mlp_activation", [None, "relu"])
@pytest.mark.parametrize("pooling", ["avg+max", "avg", "max"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_larger_than_a_sum(
    instruction_set: str, dtype: str, pooling: str, mlp_activation: str | None
) -> None:
    """Gradients of weights add up samples in pieces; the two branches may have rows in common.
    Fails: a piece starts at the wrong sample, or a branch is left out or counted twice.
    """
    case = Case(
        (150, 2, 2, 21), dtype, pooling=pooling, mlp_activation=mlp_activation, hidden=9,
        kernel_size=3, gate_gradients=True,
    )  # fmt: skip
    check(case, threads=2)


# --- the same whatever the threads, the run, the place in memory ---------------------------------


def both(case: Case, **running: Any) -> Tensors:
    inputs, gradients = make(case)
    outputs = run_forward(inputs, case.options, **running)
    return outputs | run_backward(inputs, gradients, outputs, case.options, **running)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 23, 17, 70), (1, 30, 41, 33), (9, 2, 2, 300)])
def test_same_bits_for_any_threads(
    instruction_set: str, shape: tuple[int, int, int, int], dtype: str, layout: str, gates: str
) -> None:
    """Fails: results depend on the number of threads or change from run to run."""
    case = Case(shape, dtype, layout, gates, batch_norm=gates != "channel_only")
    expected = both(case, threads=1)
    for threads in (1, 2, 3, 4, 4):
        for name, value in both(case, threads=threads).items():
            assert_same_bits(value, expected[name], f"{name} with {threads} threads")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 7, 64), (2, 5, 5, 37)])
def test_off_alignment(
    instruction_set: str, shape: tuple[int, int, int, int], dtype: str, layout: str
) -> None:
    """Fails: a fast path assumes an alignment that inputs or outputs do not have."""
    case = Case(shape, dtype, layout, activation="relu", residual=True)
    inputs, gradients = make(case)
    expected = both(case)
    for elements in (1, 3):

        def shifted(array: np.ndarray, by: int = elements) -> np.ndarray:
            buffer = np.empty(array.size + by, array.dtype)
            buffer[by:] = array.ravel()
            return buffer[by:].reshape(array.shape)

        moved = {name: shifted(value) for name, value in inputs.items()}
        outputs = run_forward(moved, case.options, misalign=elements)
        grads = run_backward(
            moved,
            {name: shifted(value) for name, value in gradients.items()},
            {name: shifted(value) for name, value in outputs.items()},
            case.options,
            misalign=elements,
        )
        for name, value in (outputs | grads).items():
            assert_same_bits(value, expected[name], f"{name} off by {elements}")


def test_calls_from_several_threads_at_once() -> None:
    """Fails: calls share state, or deadlock on the shared pool."""
    cases = [Case((3, 19, 17, 40), dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    expected = [both(case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as executor:
        for _ in range(3):
            for want, got in zip(
                expected, executor.map(lambda case: both(case, threads=3), cases), strict=True
            ):
                for name, value in got.items():
                    assert_same_bits(value, want[name], name)


def test_sliced_and_strided_inputs() -> None:
    """Fails: arrays that are not dense in memory are read as if they were."""
    case = Case((2, 5, 6, 9))
    inputs, _ = make(case)
    expected = run_forward(inputs, case.options)["y"]
    x = inputs["x"]
    wide = np.full((2, 5, 6, 18), np.nan, np.float32)
    wide[..., ::2] = x
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for view in (wide[..., ::2], np.asfortranarray(x), unaligned):
        actual = run_forward({**inputs, "x": view}, case.options)["y"]
        assert_same_bits(actual, expected, "y")


def test_bfloat16_bits_as_uint16() -> None:
    """Fails: a caller without a bfloat16 type for numpy cannot use bfloat16 maps."""
    case = Case((2, 5, 6, 9), "bfloat16")
    inputs, _ = make(case)
    expected = run_forward(inputs, case.options)["y"]
    actual = run_forward({**inputs, "x": inputs["x"].view(np.uint16)}, case.options)["y"]
    assert actual.dtype == np.uint16
    assert_same_bits(actual.view(expected.dtype), expected, "y")


# --- telling values ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["relu", "steps", "offset", "tiny", "huge"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(instruction_set: str, dtype: str, layout: str, gates: str, style: str) -> None:
    """Fails: ties, an offset, denormals or saturated gates are treated wrongly."""
    for shape in ((2, 6, 7, 35), (2, 12, 12, 16)):
        check(Case(shape, dtype, layout, gates, style=style, gate_gradients=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_map(instruction_set: str, dtype: str, layout: str) -> None:
    """All of x is zero, as after a ReLU: the maximum's gradient is shared by all. Fails: it goes to
    one of them, or to none.
    """
    case = Case((2, 5, 7, 19), dtype, layout)
    inputs, gradients = make(case)
    inputs = {**inputs, "x": np.zeros_like(inputs["x"])}
    outputs = run_forward(inputs, case.options)
    grads = run_backward(inputs, gradients, outputs, case.options)
    arguments = inputs, gradients, outputs, case.options
    truth = define_backward(*arguments, case.exact)
    stock = define_backward(*arguments, case.compute)
    magnitudes = define_backward(*arguments, case.exact, magnitude=True)
    for name, value in grads.items():
        assert_accurate(value, truth[name], stock[name], name, magnitude=magnitudes[name])


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
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "both"])
def test_not_a_number_and_infinity(
    instruction_set: str, value: float | str, gates: str, dtype: str, layout: str
) -> None:
    """NaN and infinities reach the outputs and gradients they reach in the definition, no others.
    Fails: a maximum swallows NaN, or one sample spoils another.
    """
    mlp_activation = None if layout == "NHWC" else "relu"
    case = Case((3, 5, 6, 21), dtype, layout, gates, mlp_activation=mlp_activation)
    clean, gradients = make(case)
    for position, channel in ((0, 0), (17, 20), (29, 9)):
        inputs = {**clean, "x": spoil(clean["x"], layout, position, channel, value)}
        outputs = run_forward(inputs, case.options)
        truth = define_forward(inputs, case.options, case.exact)
        stock = define_forward(inputs, case.options, case.compute)
        for name, actual in outputs.items():
            assert_accurate(actual, truth[name], stock[name], f"{name} of {value}")
        grads = run_backward(inputs, gradients, outputs, case.options)
        arguments = inputs, gradients, outputs, case.options
        true_grads = define_backward(*arguments, case.exact)
        for name, actual in grads.items():
            same = np.isnan(actual.astype(np.float64)) == np.isnan(true_grads[name])
            assert same.all(), f"{name} of {value}: {int((~same).sum())} of {same.size} differ"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_nan_stays_one(instruction_set: str, dtype: str, layout: str) -> None:
    """Fails: rounding a NaN to a half type carries into its exponent or its sign."""
    c = 40
    for bits in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001, 0x7FBFFFFF):
        b1 = np.full(c, bits, np.uint32).view(np.float32)
        outputs = _core.forward(
            oracle.from_nhwc(np.ones((1, 3, 3, c)), layout).astype(type_of(dtype), order="C"),
            w0=np.zeros((c, 1), np.float32),
            w1=np.zeros((1, c), np.float32),
            b1=b1,
            layout=layout,
            gates="channel_only",
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
    none = np.zeros((1, 1, 1, c), dtype)
    out = _core.forward(
        none,
        w0=np.zeros((c, 1), dtype),
        w1=np.zeros((1, c), dtype),
        b1=logits.astype(dtype),
        gates="channel_only",
        pooling="avg",
    )["channel_gate"][0]
    truth = oracle.sigmoid(logits.astype(dtype).astype(testing.truth_type(dtype)))
    assert_accurate(
        out, truth, truth.astype(dtype), "sigmoid", smallest=float(np.finfo(dtype).tiny)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", GATES)
def test_saturated_gates(instruction_set: str, gates: str, dtype: str, layout: str) -> None:
    """Logits of thousands give gates of exactly 0 and 1 and gradients of 0, never NaN."""
    case = Case((2, 5, 6, 21), dtype, layout, gates)
    inputs, gradients = make(case)
    for sign in (-1, 1):
        inputs = dict(inputs)
        for name in ("b1", "bias"):
            if name in inputs:
                inputs[name] = np.full_like(inputs[name], sign * 3e4)
        outputs = run_forward(inputs, case.options)
        for name in ("channel_gate", "spatial_gate"):
            if name in outputs:
                assert (outputs[name] == (sign + 1) / 2).all(), f"{name} at {sign * 3e4}"
        grads = run_backward(inputs, gradients, outputs, case.options)
        for name, actual in grads.items():
            assert np.isfinite(actual.astype(np.float64)).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("shape", [(0, 5, 6, 21), (0, 1, 1, 1)])
def test_empty_batch(
    instruction_set: str, shape: tuple[int, int, int, int], gates: str, dtype: str, layout: str
) -> None:
    """No samples: empty maps and gates, and weight gradients of exactly zero."""
    case = Case(shape, dtype, layout, gates, batch_norm=gates != "channel_only")
    inputs, gradients = make(case)
    outputs = run_forward(inputs, case.options)
    assert outputs["y"].shape == inputs["x"].shape
    grads = run_backward(inputs, gradients, outputs, case.options)
    assert grads["dx"].shape == inputs["x"].shape
    for name, value in grads.items():
        assert (value == 0).all(), f"{name} of an empty batch is {value}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_millions(instruction_set: str, dtype: str, layout: str) -> None:
    """The mean of 2 million values near 1000 keeps its digits. Fails: one running sum is used."""
    rng = np.random.default_rng(5)
    for shape in ((1, 2048, 1024, 1), (1, 1, 2, 1 << 20)):
        values = 1000 + rng.standard_normal(shape, np.float32)
        x = oracle.from_nhwc(values, layout).astype(type_of(dtype), order="C")
        pools = _core.channel_pool(x, layout=layout, threads=2, poison=True)
        truth = oracle.channel_pool(x, layout)
        spatial = _core.spatial_pool(x, layout=layout, threads=2, poison=True)["descriptors"]
        true_spatial = oracle.spatial_pool(x, layout)["descriptors"]
        epsilon = testing.EPSILON[testing.compute_type(dtype)]
        for name, actual, expected in (
            ("mean", pools["mean"], truth["mean"]),
            ("maximum", pools["maximum"], truth["maximum"]),
            ("descriptors", spatial, true_spatial),
        ):
            # An exact evaluation: the bound is a few roundings, whatever the length of the sum.
            narrow = expected.astype(testing.compute_type(dtype))
            assert epsilon * 1000 < 1
            assert_accurate(actual, expected, narrow, f"{name} of {shape}")


# --- the pools on their own ----------------------------------------------------------------------


@pytest.mark.parametrize("style", ["normal", "relu", "steps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pools(instruction_set: str, dtype: str, layout: str, style: str) -> None:
    """Fails: a pool or its gradient is wrong in this type and layout."""
    for number, shape in enumerate(SHAPES):
        case = Case(shape, dtype, layout, style=style, seed=number)
        x = make(case)[0]["x"]
        rng = np.random.default_rng(number)
        running: dict[str, Any] = {"layout": layout, "threads": 2, "poison": True}
        running["misalign"] = number % 3
        compute = case.compute

        pools = _core.channel_pool(x, **running)
        exact = case.exact
        truth = oracle.channel_pool(x, layout, exact)
        stock = oracle.channel_pool(x, layout, compute)
        scale = oracle.channel_pool(np.abs(x), layout, exact)
        for name in ("mean", "maximum"):
            assert_accurate(
                pools[name], truth[name], stock[name], f"{case}: {name}", magnitude=scale[name]
            )
        d_mean, d_maximum = (
            rng.standard_normal(pools["mean"].shape).astype(x.dtype) for _ in range(2)
        )
        dx = _core.channel_pool_grad(x, pools["maximum"], d_mean, d_maximum, **running)["dx"]
        grad = functools.partial(oracle.channel_pool_grad, x, layout=layout)
        assert_accurate(
            dx,
            grad(d_mean, d_maximum, dtype=exact)["dx"],
            grad(d_mean, d_maximum, dtype=compute)["dx"],
            f"{case}: dx of channel_pool",
            magnitude=grad(np.abs(d_mean), np.abs(d_maximum))["dx"],
        )

        pooled = _core.spatial_pool(x, **running)["descriptors"]
        assert_accurate(
            pooled,
            oracle.spatial_pool(x, layout, exact)["descriptors"],
            oracle.spatial_pool(x, layout, compute)["descriptors"],
            f"{case}: descriptors",
            magnitude=oracle.spatial_pool(np.abs(x), layout)["descriptors"],
        )
        d = rng.standard_normal(pooled.shape).astype(x.dtype)
        dx = _core.spatial_pool_grad(x, pooled, d, **running)["dx"]
        assert_accurate(
            dx,
            oracle.spatial_pool_grad(x, d, layout, exact)["dx"],
            oracle.spatial_pool_grad(x, d, layout, compute)["dx"],
            f"{case}: dx of spatial_pool",
            magnitude=oracle.spatial_pool_grad(x, np.abs(d), layout)["dx"],
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "both"])
def test_pools_of_not_a_number_and_infinity(
    instruction_set: str, value: float | str, dtype: str, layout: str
) -> None:
    """As tf.reduce_mean and tf.reduce_max have it, gradients included: NaN has no equal, so a NaN
    maximum's share is 0 / 0.
    """
    case = Case((2, 5, 7, 37), dtype, layout)
    for position, channel in ((0, 0), (34, 36), (16, 9)):
        x = spoil(make(case)[0]["x"], layout, position, channel, value)
        with np.errstate(all="ignore"):
            for name, pool in (
                ("channel_pool", oracle.channel_pool(x, layout)),
                ("spatial_pool", oracle.spatial_pool(x, layout)),
            ):
                actual = getattr(_core, name)(x, layout=layout, poison=True)
                for key, expected in pool.items():
                    stock = expected.astype(case.compute)
                    magnitude = np.where(np.isfinite(expected), 4.0, 0.0)
                    assert_accurate(
                        actual[key], expected, stock, f"{name} {key}", magnitude=magnitude
                    )
                d = [np.ones_like(v) for v in actual.values()]
                dx = getattr(_core, name + "_grad")(
                    x, *reversed(list(actual.values())[-1:]), *d, layout=layout, poison=True
                )["dx"]
                expected = getattr(oracle, name + "_grad")(x, *d, layout)["dx"]
                same = np.isnan(dx.astype(np.float64)) == np.isnan(expected)
                assert same.all(), f"{name}_grad of {value}: {int((~same).sum())} differ"


# --- the definition itself -----------------------------------------------------------------------


@pytest.mark.parametrize("gates", [*GATES, "spatial_first"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_definition_by_finite_differences(layout: str, gates: str) -> None:
    """Fails: the definition's gradients are not those of its function, so it proves nothing."""
    for pooling, mlp_activation, activation, batch_norm in itertools.product(
        ("avg+max", "avg", "max"), (None, "relu"), (None, "relu"), (False, True)
    ):
        if batch_norm and gates == "channel_only":
            continue
        case = Case(
            (2, 3, 4, 5), "float64", layout, gates, kernel_size=3, pooling=pooling,
            mlp_activation=mlp_activation, activation=activation, batch_norm=batch_norm,
            residual=True, gate_gradients=True,
        )  # fmt: skip
        inputs, gradients = make(case)
        options = named(case.options)
        weight = {"y": gradients["dy"]}
        weight |= {name[2:]: v for name, v in gradients.items() if name != "dy"}

        def loss(
            arguments: Tensors,
            options: dict[str, Any] = options,
            weight: Tensors = weight,
        ) -> float:
            out = oracle.forward(**arguments, **options)
            return sum(float(np.sum(out[name] * w)) for name, w in weight.items())

        grads = oracle.backward(**inputs, **gradients, **options)
        rng = np.random.default_rng(1)
        for name, value in inputs.items():
            direction = rng.standard_normal(value.shape)
            step = 1e-6 * direction
            difference = loss({**inputs, name: value + step}) - loss({**inputs, name: value - step})
            gradient = grads["d_residual" if name == "residual" else f"d{name}"]
            numeric, analytic = difference / 2e-6, float(np.sum(gradient * direction))
            assert abs(numeric - analytic) < 1e-7 * (1 + abs(numeric)), f"{case}: {name}"


def test_comparer_refuses() -> None:
    """The comparer itself: NaN against a number, a wrong shape, an infinity, a wrong value."""
    good = np.linspace(1, 2, 5)
    exact = good.astype(np.float32)
    assert_accurate(exact, exact.astype(np.float64), exact, "same")
    for bad in (
        np.where(exact > 1.6, np.nan, exact),
        np.where(exact > 1.6, np.inf, exact),
        exact * np.float32(1 + 1e-5),
        exact[:4],
        exact[None],
    ):
        with pytest.raises(AssertionError):
            assert_accurate(bad.astype(np.float32), exact.astype(np.float64), exact, "bad")


# --- bad input -----------------------------------------------------------------------------------


def good_arguments() -> dict[str, Any]:
    inputs, _ = make(Case((2, 5, 6, 8), hidden=2))
    return dict(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((5, 6, 8), np.float32)}, r"`x` must have shape \[N, H, W, C\], got \[5, 6"),
        ({"x": np.zeros((2, 5, 6, 8), np.int32)}, r"`x` must be of float32, .* got int32"),
        ({"x": [1.0]}, r"`x` must be a numpy array, got list"),
        ({"x": np.zeros((2, 5, 6, 8), ">f4")}, r"`x` must have the byte order of this machine"),
        ({"w0": None}, r"`w0` must be a numpy array, got None"),
        ({"w0": np.zeros((7, 2), np.float32)}, r"`w0` must have shape \[C, hidden\] = \[8, hidden"),
        ({"w0": np.zeros((8, 0), np.float32)}, r"`w0` must have hidden >= 1 .* got \[8, 0\]"),
        ({"w0": np.zeros((8, 2))}, r"`w0` must be of float32, got float64"),
        ({"w1": np.zeros((3, 8), np.float32)}, r"`w1` must have shape .* = \[2, 8\], got \[3, 8\]"),
        ({"b0": np.zeros(3, np.float32)}, r"`b0` must have shape \[hidden\] = \[2\], got \[3\]"),
        ({"b1": np.zeros(3, np.float32)}, r"`b1` must have shape \[C\] = \[8\], got \[3\]"),
        ({"kernel": np.zeros((4, 4, 2, 1), np.float32)}, r"`kernel` must .* odd k, got \[4, 4, 2"),
        ({"kernel": np.zeros((3, 5, 2, 1), np.float32)}, r"`kernel` must .* got \[3, 5, 2, 1\]"),
        ({"kernel": np.zeros((0, 0, 2, 1), np.float32)}, r"`kernel` must .* got \[0, 0, 2, 1\]"),
        ({"bias": np.zeros(2, np.float32)}, r"`bias` must have shape \[1\], got \[2\]"),
        ({"batch_norm": True}, r"`gamma` must be a numpy array, got None"),
        ({"batch_norm": True, "gates": "channel_only"}, r"`batch_norm` must be False without"),
        ({"residual": np.zeros((2, 5, 6, 7), np.float32)}, r"`residual` must have shape"),
        ({"layout": "NWHC"}, r"`layout` must be one of 'NHWC', 'NCHW', got 'NWHC'"),
        ({"gates": "both"}, r"`gates` must be one of 'channel_first', .*, got 'both'"),
        ({"pooling": "min"}, r"`pooling` must be one of 'avg\+max', 'avg', 'max', got 'min'"),
        ({"activation": "gelu"}, r"`activation` must be one of 'none', 'relu', got 'gelu'"),
        ({"mlp_activation": "gelu"}, r"`mlp_activation` must be one of .* got 'gelu'"),
        ({"epsilon": -1.0}, r"`epsilon` must be at least 0, got -1"),
        ({"threads": 0}, r"`threads` must be between 1 and 256, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    """Fails: a wrong argument is accepted, or the message does not say which and why."""
    with pytest.raises(ValueError, match="forward: " + message):
        _core.forward(**{**good_arguments(), **changes})


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="`name` must be an instruction set of this .* got 'mmx'"):
        _core.set_instruction_set("mmx")
    assert _core.instruction_set() in _core.available_instruction_sets()
    assert _core.available_instruction_sets()[0] == "baseline"
