"""The machine for PTX (csrc/testing/ptx): its arithmetic against numpy, its checks, its counts."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import COMPILER

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler on PATH")

BF16 = ml_dtypes.bfloat16
TYPES: dict[str, Any] = {
    "f16": np.float16, "bf16": BF16, "f32": np.float32, "f64": np.float64,
    "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32,
    "s64": np.int64, "u64": np.uint64, "b64": np.uint64,
}  # fmt: skip


@pytest.fixture(scope="session")
def machine() -> Any:
    import ptx_machine

    return ptx_machine.machine()


@pytest.fixture(autouse=True)
def configured(machine: Any) -> None:
    machine.remove_buffers()
    machine.configure()


def program(body: str, buffers: int, shared: int = 0) -> str:
    """A kernel `k` whose parameters are the addresses %b0, %b1, ... of buffers."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(buffers))
    loads = "\n".join(f"ld.param.u64 %b{i}, [p{i}];" for i in range(buffers))
    return f"""
        .version 8.0
        .target sm_90
        .address_size 64
        .file 1 "kernel.cu"
        .visible .entry k({parameters}) {{
        .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .f32 %f<16>; .reg .b64 %rd<32>;
        .reg .f64 %fd<8>; .reg .b64 %b<{max(buffers, 1)}>;
        .shared .align 16 .b8 tile[{max(shared, 16)}];
        {loads}
        mov.u32 %r0, %tid.x;
        .loc 1 7 1
        {body}
        ret;
        }}"""


def run(
    machine: Any, body: str, *arrays: np.ndarray | tuple[np.ndarray, str],
    grid: int = 1, threads: int = 32, shared: int = 0,
) -> None:  # fmt: skip
    """Runs `body` on arrays: inputs, or with "out" or "zero" for those that it writes."""
    addresses = []
    for i, given in enumerate(arrays):
        array, kind = given if isinstance(given, tuple) else (given, "in")
        machine.add_buffer(
            f"buffer {i}", array.ctypes.data, array.nbytes, kind != "out", kind != "in"
        )
        addresses.append(np.uint64(array.ctypes.data).tobytes())
    handle = machine.load(program(body, len(arrays), shared))
    machine.launch(handle, "k", (grid, 1, 1), (threads, 1, 1), 0, addresses)


def aligned(count: int, dtype: Any) -> np.ndarray:
    """Zeros, at a multiple of 256 bytes."""
    raw = np.zeros(count * np.dtype(dtype).itemsize + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + count * np.dtype(dtype).itemsize].view(dtype)


def evaluate(machine: Any, opcode: str, to: str, *operands: tuple[str, np.ndarray]) -> np.ndarray:
    """`opcode d, a, b, ...` for all elements; operands with their types."""
    count = len(operands[0][1])
    lines, names = [], []
    for i, (kind, _) in enumerate(operands):
        size = np.dtype(TYPES[kind]).itemsize
        register = f"%rd{10 + i}" if size == 8 else f"%r{10 + i}" if size == 4 else f"%h{i}"
        names.append(register)
        access = {1: f"{kind[0]}8", 2: "b16", 4: "b32", 8: "b64"}[size]
        lines.append(f"mad.wide.u32 %rd0, %r1, {size}, %b{i};")
        lines.append(f"ld.global.{access} {register}, [%rd0];")
    size = np.dtype(TYPES[to]).itemsize
    result = "%rd20" if size == 8 else "%r20" if size == 4 else "%h7"
    lines.append(f"{opcode} {result}, {', '.join(names)};")
    lines.append(f"mad.wide.u32 %rd0, %r1, {size}, %b{len(operands)};")
    lines.append(f"st.global.b{8 * size} [%rd0], {result};")
    body = "mov.u32 %r2, %ctaid.x; mad.lo.u32 %r1, %r2, 32, %r0;\n" + "\n".join(lines)
    padded = -(-count // 32) * 32
    arrays = []
    for kind, values in operands:
        array = aligned(padded, TYPES[kind])
        array[:count] = values
        arrays.append(array)
    out = aligned(padded, TYPES[to])
    machine.remove_buffers()
    run(machine, body, *arrays, (out, "out"), grid=padded // 32)
    return out[:count]


# ---- numbers -------------------------------------------------------------------------------------


def interesting(kind: str, count: int = 40) -> np.ndarray:
    """Ends, zeros, subnormal and not finite numbers, numbers near 1 with all their digits."""
    rng = np.random.default_rng(1)
    dtype = TYPES[kind]
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        few = [0, 1, 2, 3, 7, info.max, info.max - 1, info.min, info.min + 1, info.max // 3]
        many = rng.integers(info.min, info.max, count, dtype, endpoint=True)
        return np.concatenate([np.array(few, dtype), many])
    info = ml_dtypes.finfo(dtype)
    few = [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 0.5, 1.5, 2.5, -2.5]
    few += [float(info.max), -float(info.max), float(info.smallest_normal)]
    few += [float(info.smallest_subnormal) * n for n in (1, -1, 3)]
    many = rng.standard_normal(count) * 2.0 ** rng.integers(-8, 8, count)
    with np.errstate(all="ignore"):
        return np.concatenate([few, many]).astype(dtype)


def pairs(kind: str, count: int = 2) -> list[np.ndarray]:
    values = interesting(kind, 12 if count == 3 else 30)
    return [
        np.array(column, TYPES[kind])
        for column in zip(*itertools.product(values, repeat=count), strict=True)
    ]


def nearest_double(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def rounded(exact: Fraction, dtype: Any, mode: str) -> Any:
    """A finite number that is not 0, rounded by definition."""
    with np.errstate(all="ignore"):
        near = np.array(nearest_double(exact)).astype(dtype)[()]
        infinity = np.array(np.inf, dtype)
        if not np.isfinite(near):
            near = np.copysign(np.array(ml_dtypes.finfo(dtype).max, dtype), near)[()]
        candidates = [near, np.nextafter(near, infinity), np.nextafter(near, -infinity)]
    finite = [c for c in candidates if np.isfinite(c)]
    below = [c for c in finite if Fraction(float(c)) <= exact]
    above = [c for c in finite if Fraction(float(c)) >= exact]
    low = max(below, default=-infinity, key=float)
    high = min(above, default=infinity, key=float)
    if mode == "rm" or (mode == "rz" and exact > 0):
        return low
    if mode == "rp" or mode == "rz":
        return high
    largest = Fraction(float(ml_dtypes.finfo(dtype).max))
    step = largest - Fraction(float(np.nextafter(np.array(float(largest), dtype), -infinity)))

    def distance(c: Any) -> tuple[Fraction, int]:
        value = Fraction(float(c)) if np.isfinite(c) else (largest + step) * (1 if c > 0 else -1)
        odd = int(np.array(c, dtype).view(f"u{np.dtype(dtype).itemsize}")) & 1
        return abs(value - exact), odd if np.isfinite(c) else 0

    return min(low, high, key=distance)


def defined(exact: Callable[..., Fraction], plain: Callable[..., Any], mode: str, dtype: Any,
            *columns: np.ndarray) -> np.ndarray:  # fmt: skip
    """The exact result rounded, where the inputs are finite and it is not 0; else numpy's."""
    out = []
    for row in zip(*columns, strict=True):
        numbers = [float(v) for v in row]
        with np.errstate(all="ignore"):
            value = np.array(plain(*numbers)).astype(dtype)[()]
        if np.isfinite(numbers).all():
            truth = exact(*(Fraction(v) for v in numbers))
            if truth != 0:
                value = rounded(truth, dtype, mode)
        out.append(value)
    return np.array(out, dtype)


def same_numbers(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, NaN aside."""
    assert actual.dtype == expected.dtype
    bits = f"u{actual.dtype.itemsize}"
    with np.errstate(invalid="ignore"):
        nan = np.isnan(expected.astype(np.float64))
        np.testing.assert_array_equal(np.isnan(actual.astype(np.float64)), nan)
    wrong = np.flatnonzero((actual.view(bits) != expected.view(bits)) & ~nan)
    assert wrong.size == 0, (wrong[:5], actual[wrong[:5]], expected[wrong[:5]])


def signless_zeros(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, np.zeros((), values.dtype), values)


ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", [*ARITHMETIC, "fma"])
def test_arithmetic_rounds_to_the_nearest(machine: Any, name: str, kind: str) -> None:
    check_rounding(machine, name, kind, "rn")


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", [*ARITHMETIC, "fma"])
def test_arithmetic_rounds_as_directed(machine: Any, name: str, mode: str) -> None:
    check_rounding(machine, name, "f32", mode)


def check_rounding(machine: Any, name: str, kind: str, mode: str) -> None:
    def fma(a: float, b: float, c: float) -> float:
        return c if np.isinf(c) and np.isfinite([a, b]).all() else a * b + c

    exact = ARITHMETIC.get(name, lambda a, b, c: a * b + c)
    columns = pairs(kind, 3 if name == "fma" else 2)
    expected = defined(exact, ARITHMETIC.get(name, fma), mode, TYPES[kind], *columns)
    actual = evaluate(machine, f"{name}.{mode}.{kind}", kind, *((kind, c) for c in columns))
    same_numbers(signless_zeros(actual), signless_zeros(expected))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_division_and_roots(machine: Any, kind: str) -> None:
    a, b = pairs(kind)
    with np.errstate(all="ignore"):
        same_numbers(evaluate(machine, f"div.rn.{kind}", kind, (kind, a), (kind, b)), a / b)
        same_numbers(evaluate(machine, f"rcp.rn.{kind}", kind, (kind, a)), 1 / a)
        same_numbers(evaluate(machine, f"sqrt.rn.{kind}", kind, (kind, a)), np.sqrt(a))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_minimum_and_maximum(machine: Any, kind: str) -> None:
    """Without .NaN the other operand, with it NaN; -0 is below 0."""
    a, b = pairs(kind)
    for name, choose, fmin in (("min", np.minimum, np.fmin), ("max", np.maximum, np.fmax)):
        zero = (a == 0) & (b == 0)
        negative = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
        zeros = np.where(negative, -0.0, 0.0).astype(a.dtype)
        for suffix, function in ((".NaN", choose), ("", fmin)):
            if kind == "f64" and suffix:
                continue
            with np.errstate(invalid="ignore"):
                expected = np.where(zero, zeros, function(a, b))
            same_numbers(
                evaluate(machine, f"{name}{suffix}.{kind}", kind, (kind, a), (kind, b)), expected
            )


def test_flushing_and_saturation(machine: Any) -> None:
    a, b = pairs("f32")
    tiny = np.finfo(np.float32).smallest_normal

    def flush(v: np.ndarray) -> np.ndarray:
        return np.where(np.abs(v) < tiny, np.copysign(np.float32(0), v), v)

    with np.errstate(all="ignore"):
        product = flush(flush(a) * flush(b))
        same_numbers(evaluate(machine, "mul.ftz.f32", "f32", ("f32", a), ("f32", b)), product)
        saturated = np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1)).astype(np.float32)
        actual = evaluate(machine, "add.sat.f32", "f32", ("f32", a), ("f32", b))
        same_numbers(signless_zeros(actual), signless_zeros(saturated))
        one = np.where(np.isnan(a), 0, np.clip(a, 0, 1)).astype(np.float32)
        actual = evaluate(machine, "cvt.sat.f32.f32", "f32", ("f32", a))
        same_numbers(signless_zeros(actual), signless_zeros(one))


@pytest.mark.parametrize(
    ("name", "function", "error"),
    [
        ("ex2.approx", np.exp2, 2 ** -22),
        ("ex2.approx.ftz", np.exp2, 2 ** -22),
        ("rcp.approx", lambda v: 1 / v, 2 ** -23),
        ("sqrt.approx", np.sqrt, 2 ** -23),
    ],
)  # fmt: skip
def test_approximations_are_within_their_documented_error(
    machine: Any, name: str, function: Callable[[np.ndarray], np.ndarray], error: float
) -> None:
    values = interesting("f32", 500)
    values = values[np.isfinite(values)]
    if ".ftz" in name:
        values = values[(np.abs(values) < 100)]
    actual = evaluate(machine, f"{name}.f32", "f32", ("f32", values)).astype(np.float64)
    with np.errstate(all="ignore"):
        exact = function(values.astype(np.float64))
        exact = np.where(np.abs(exact) > np.finfo(np.float32).max, np.sign(exact) * np.inf, exact)
        # Relative to the result, which near 0 has no more digits than a subnormal number.
        allowed = error * np.abs(exact) + np.finfo(np.float32).smallest_subnormal
        assert ((actual == exact) | (np.abs(actual - exact) <= allowed) | np.isnan(exact)).all()
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(exact))


@pytest.mark.parametrize("kind", ["f32", "f64", "s32", "u32", "s64", "u64", "s16", "u16"])
def test_comparisons(machine: Any, kind: str) -> None:
    a, b = pairs(kind)
    with np.errstate(invalid="ignore"):
        unordered = np.isnan(a) | np.isnan(b) if kind[0] == "f" else np.zeros(len(a), bool)
    names = {
        "eq": a == b,
        "ne": (a != b) & ~unordered,
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
    }
    if kind[0] == "f":
        names |= {f"{k}u": v | unordered for k, v in names.items()}
        names = {"neu" if k == "neu" else k: v for k, v in names.items()}
        names |= {"num": ~unordered, "nan": unordered}
    for name, expected in names.items():
        got = compare(machine, f"setp.{name}.{kind} %p1", kind, a, b)
        np.testing.assert_array_equal(got[0], expected, name)
    # With another predicate, and the complement.
    odd = np.arange(len(a)) % 2 == 1
    for word, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.not_equal)):
        got = compare(machine, f"setp.lt.{word}.{kind} %p1|%p2", kind, a, b, ", %p3")
        np.testing.assert_array_equal(got[0], combine(a < b, odd), word)
        np.testing.assert_array_equal(got[1], combine(~(a < b), odd), word)


def compare(
    machine: Any, opcode: str, kind: str, a: np.ndarray, b: np.ndarray, extra: str = ""
) -> np.ndarray:
    """%p1 and %p2 after the comparison; %p3 is true for odd elements."""
    size = np.dtype(TYPES[kind]).itemsize
    register = {2: ("%h1", "%h2"), 4: ("%r11", "%r12"), 8: ("%rd11", "%rd12")}[size]
    count = -(-len(a) // 32) * 32
    columns = [aligned(count, TYPES[kind]) for _ in range(2)]
    columns[0][: len(a)], columns[1][: len(a)] = a, b
    out = aligned(2 * count, np.uint32)
    machine.remove_buffers()
    body = f"""
        mov.u32 %r2, %ctaid.x; mad.lo.u32 %r1, %r2, 32, %r0;
        and.b32 %r3, %r1, 1; setp.ne.u32 %p3, %r3, 0; setp.ne.u32 %p2, %r3, %r3;
        mad.wide.u32 %rd0, %r1, {size}, %b0; ld.global.b{8 * size} {register[0]}, [%rd0];
        mad.wide.u32 %rd0, %r1, {size}, %b1; ld.global.b{8 * size} {register[1]}, [%rd0];
        {opcode}, {register[0]}, {register[1]}{extra};
        selp.u32 %r4, 1, 0, %p1; selp.u32 %r5, 1, 0, %p2;
        mad.wide.u32 %rd0, %r1, 8, %b2; st.global.v2.u32 [%rd0], {{%r4, %r5}};"""
    run(machine, body, *columns, (out, "out"), grid=count // 32)
    return out.reshape(-1, 2)[: len(a)].T != 0


# ---- conversions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize(("to", "source"), [("f16", "f32"), ("bf16", "f32"), ("f32", "f64")])
def test_narrowing_floats(machine: Any, to: str, source: str, mode: str) -> None:
    """All that lies between two neighbours, and half way."""
    values = interesting(source, 300)
    short = interesting(to, 60).astype(TYPES[source])
    with np.errstate(all="ignore"):
        step = np.nextafter(short.astype(TYPES[to]), TYPES[to](np.inf)).astype(TYPES[source])
        middle = short + (step - short) / 2
        values = np.concatenate([values, short, middle, np.nextafter(middle, TYPES[source](0))])
    expected = defined(lambda v: v, lambda v: v, mode, TYPES[to], values)
    same_numbers(evaluate(machine, f"cvt.{mode}.{to}.{source}", to, (source, values)), expected)


@pytest.mark.parametrize(("to", "source"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f32")])
def test_widening_floats(machine: Any, to: str, source: str) -> None:
    values = (
        np.arange(1 << 16, dtype=np.uint16).view(TYPES[source])
        if source != "f32"
        else interesting("f32", 300)
    )
    expected = values.astype(TYPES[to])
    same_numbers(evaluate(machine, f"cvt.{to}.{source}", to, (source, values)), expected)


def test_packing_two_floats(machine: Any) -> None:
    """The first source is the upper half."""
    high, low = pairs("f32")
    for kind in ("f16", "bf16"):
        with np.errstate(over="ignore"):
            expected = np.stack([low.astype(TYPES[kind]), high.astype(TYPES[kind])], 1)
        actual = evaluate(machine, f"cvt.rn.{kind}x2.f32", "b32", ("f32", high), ("f32", low))
        same_numbers(actual.view(TYPES[kind]), expected.reshape(-1))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16"])
def test_floats_to_integers(machine: Any, to: str, source: str) -> None:
    """Saturated; NaN is 0, or the highest bit where 64 bits are in it."""
    values = np.concatenate(
        [
            interesting(source, 200),
            np.array([2.5, 3.5, -0.5, 1e10, -1e10, 2.0**31, 2.0**63, 2.0**64], TYPES[source]),
        ]
    )
    info = np.iinfo(TYPES[to])
    for mode, function in (
        ("rni", np.rint),
        ("rzi", np.trunc),
        ("rmi", np.floor),
        ("rpi", np.ceil),
    ):
        wide = "64" in to or source == "f64"
        nan = (1 << (info.bits - 1)) if wide else 0
        if info.min < 0 and wide:
            nan = info.min
        expected = []
        for v in map(float, values):
            finite = min(max(v, -1e30), 1e30) if v == v else 0
            whole = min(max(int(function(finite)), info.min), info.max)
            expected.append(nan if np.isnan(v) else whole)
        clipped = np.array(expected, TYPES[to])
        np.testing.assert_array_equal(
            evaluate(machine, f"cvt.{mode}.{to}.{source}", to, (source, values)), clipped
        )


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["f32", "f64"])
def test_integers_to_floats(machine: Any, to: str, source: str) -> None:
    values = interesting(source, 300)
    expected = values.astype(TYPES[to])
    same_numbers(evaluate(machine, f"cvt.rn.{to}.{source}", to, (source, values)), expected)


INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", INTEGERS[2:])
def test_integers_to_integers(machine: Any, to: str, source: str) -> None:
    values = interesting(source, 60)
    np.testing.assert_array_equal(
        evaluate(machine, f"cvt.{to}.{source}", to, (source, values)), values.astype(TYPES[to])
    )
    if to[0] == "s" and int(to[1:]) <= 32:
        info = np.iinfo(TYPES[to])
        clipped = [min(max(int(v), info.min), info.max) for v in values]
        np.testing.assert_array_equal(
            evaluate(machine, f"cvt.sat.{to}.{source}", to, (source, values)), clipped
        )


def test_rounding_to_whole_floats(machine: Any) -> None:
    values = interesting("f32", 200)
    for mode, function in (
        ("rni", np.rint),
        ("rzi", np.trunc),
        ("rmi", np.floor),
        ("rpi", np.ceil),
    ):
        same_numbers(
            evaluate(machine, f"cvt.{mode}.f32.f32", "f32", ("f32", values)), function(values)
        )


# ---- integers and bits ---------------------------------------------------------------------------


def wrap(value: int, kind: str) -> int:
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(machine: Any, kind: str) -> None:
    a, b = pairs(kind)
    bits = int(kind[1:])
    operations: dict[str, Callable[[int, int], int]] = {
        "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max,
        "mul.hi": lambda x, y: x * y >> bits,
        "div": lambda x, y: truncated(x, y) if y else -1,
        "rem": lambda x, y: x - y * truncated(x, y) if y else x,
    }  # fmt: skip
    for name, operation in operations.items():
        expected = [wrap(operation(int(x), int(y)), kind) for x, y in zip(a, b, strict=True)]
        actual = evaluate(machine, f"{name}.{kind}", kind, (kind, a), (kind, b))
        np.testing.assert_array_equal(actual, expected, name)
    if bits < 64:
        wide = kind[0] + str(2 * bits)
        products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
        actual = evaluate(machine, f"mul.wide.{kind}", wide, (kind, a), (kind, b))
        np.testing.assert_array_equal(actual, products)
        c = interesting(wide, len(a))[: len(a)]
        expected = [wrap(p + int(z), wide) for p, z in zip(products, c, strict=True)]
        actual = evaluate(machine, f"mad.wide.{kind}", wide, (kind, a), (kind, b), (wide, c))
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("kind", ["b16", "s16", "u16", "b32", "s32", "u32", "b64", "s64", "u64"])
def test_shifts_are_clamped(machine: Any, kind: str) -> None:
    values = interesting(kind)
    bits = int(kind[1:])
    for by in (0, 1, bits - 1, bits, bits + 5, 255):
        shifts = np.full(len(values), by, np.uint32)
        if kind[0] == "b":
            expected = [wrap(int(v) << by, "u" + kind[1:]) for v in values]
            actual = evaluate(machine, f"shl.{kind}", kind, (kind, values), ("u32", shifts))
        else:
            expected = [int(v) >> by for v in values]
            actual = evaluate(machine, f"shr.{kind}", kind, (kind, values), ("u32", shifts))
        np.testing.assert_array_equal(actual, expected)


def test_bits(machine: Any) -> None:
    a, b = pairs("u32")
    c = a[::-1].copy()
    ints = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]

    def permute(x: int, y: int, z: int) -> int:
        result = 0
        for i in range(4):
            which = z >> 4 * i & 15
            byte = (y << 32 | x) >> 8 * (which & 7) & 255
            result |= (255 if byte & 128 else 0) << 8 * i if which & 8 else byte << 8 * i
        return result

    cases: dict[str, tuple[int, Callable[..., int]]] = {
        "and.b32": (2, operator.and_),
        "or.b32": (2, operator.or_),
        "xor.b32": (2, operator.xor),
        "not.b32": (1, lambda x: ~x),
        "prmt.b32": (3, permute),
    }
    for opcode, (count, function) in cases.items():
        columns = [("b32", column) for column in (a, b, c)[:count]]
        expected = [function(*row[:count]) & ((1 << 32) - 1) for row in ints]
        np.testing.assert_array_equal(evaluate(machine, opcode, "b32", *columns), expected, opcode)


def test_bit_fields_are_inserted(machine: Any) -> None:
    for kind in ("b32", "b64"):
        a, b = (c[:64] for c in pairs(kind))
        bits = int(kind[1:])
        for start, length in (
            (0, 5),
            (3, 8),
            (24, 8),
            (bits - 4, 16),
            (7, 0),
            (0, bits),
            (bits, 3),
        ):
            field = ((1 << length) - 1 << start) & ((1 << bits) - 1)
            expected = [
                int(y) & ~field | int(x) << start & field for x, y in zip(a, b, strict=True)
            ]
            places = (("u32", np.full(len(a), n)) for n in (start, length))
            actual = evaluate(machine, f"bfi.{kind}", kind, (kind, a), (kind, b), *places)
            np.testing.assert_array_equal(actual, expected)


def test_moves_pack_and_unpack(machine: Any) -> None:
    values = interesting("b64", 22)[:32]
    out = aligned(32, np.uint64)
    run(
        machine,
        """
        mad.wide.u32 %rd0, %r0, 8, %b0; ld.global.b64 %rd1, [%rd0];
        mov.b64 {%r1, %r2}, %rd1; mov.b32 {%h1, %h2}, %r1; mov.b32 %r1, {%h2, %h1};
        mov.b64 {_, %r3}, %rd1; xor.b32 %r3, %r3, %r2;
        or.b32 %r2, %r2, %r3; mov.b64 %rd2, {%r2, %r1};
        mad.wide.u32 %rd0, %r0, 8, %b1; st.global.b64 [%rd0], %rd2;""",
        values, (out, "out"),
    )  # fmt: skip
    halves = values.view(np.uint16).reshape(-1, 4)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(-1, 4), halves[:, [2, 3, 1, 0]])


# ---- memory --------------------------------------------------------------------------------------


def test_loads_and_stores(machine: Any) -> None:
    """Vectors, signs, generic addresses of shared and of global memory."""
    values = np.arange(-64, 64, dtype=np.int8)
    out = aligned(64, np.int32)
    run(
        machine,
        """
        shl.b32 %r1, %r0, 2; cvt.u64.u32 %rd0, %r1; add.u64 %rd1, %b0, %rd0;
        ld.global.v4.s8 {%r2, %r3, %r4, %r5}, [%rd1];
        mov.u64 %rd3, tile; cvta.shared.u64 %rd3, %rd3;
        mul.wide.u32 %rd4, %r0, 16; add.u64 %rd3, %rd3, %rd4;
        st.v4.u32 [%rd3], {%r2, %r3, %r4, %r5};
        mov.u32 %r6, tile; shl.b32 %r7, %r0, 4; add.u32 %r6, %r6, %r7;
        ld.shared.v2.u32 {%r8, %r9}, [%r6+8];
        mul.wide.u32 %rd5, %r0, 8; cvta.to.global.u64 %rd6, %b1; add.u64 %rd6, %rd6, %rd5;
        st.v2.u32 [%rd6], {%r8, %r9};""",
        values, (out, "out"), shared=512,
    )  # fmt: skip
    np.testing.assert_array_equal(out.reshape(-1, 2), values.reshape(-1, 4)[:, 2:])


FAULTS = {
    "misaligned": ("ld.global.v2.u32 {%r1, %r2}, [%b0+4];", "misaligned access of 8 bytes"),
    "behind": ("ld.global.u32 %r1, [%b0+256];", r"outside of all buffers: byte 256 of buffer 0"),
    "before": ("ld.global.u32 %r1, [%b0+-4];", r"byte -4 of buffer 0"),
    "across the end": ("st.global.v4.u32 [%b1+252], {%r0, %r0, %r0, %r0};", "misaligned|outside"),
    "never written": ("ld.global.u32 %r1, [%b1+16];", "never written: byte 16 of buffer 1"),
    "partly written": (
        "setp.eq.u32 %p1, %r0, 3; @%p1 st.global.u16 [%b1], %h0; @%p1 ld.global.u32 %r1, [%b1];",
        "thread 3, .*never written: byte 0"),
    "written by two": (
        "st.global.u32 [%b1], %r0;", r"a race in buffer 1 \(byte 0\) with an access by thread 0"),
    "shared never written": ("ld.shared.u32 %r1, [tile];", "never written: byte 0 of shared"),
    "outside of shared": ("st.shared.u32 [tile+512], %r0;", "outside of shared memory: byte 512"),
    "read only": ("st.global.u32 [%b0], %r0;", "buffer 0, which is read only"),
    "trap": ("setp.eq.u32 %p1, %r0, 5; @%p1 trap;", "thread 5, .*a trap"),
    "constant": (
        "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.u32 [%b1], %r0; @%p1 ld.global.nc.u32 %r1, [%b1];",
        "as constant what this launch has written"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_thread_and_line(machine: Any, fault: str) -> None:
    body, message = FAULTS[fault]
    arrays = aligned(64, np.uint32), (aligned(64, np.uint32), "out")
    with pytest.raises(machine.Error, match=message) as caught:
        run(machine, body, *arrays, shared=512)
    assert "k, block 0, thread" in str(caught.value)
    assert "kernel.cu:7, in `" in str(caught.value)


def test_unknown_opcodes_are_named(machine: Any) -> None:
    body = "bfind.u32 %r1, %r0; add.rz.f64 %fd1, %fd0, %fd0; add.u32 %r1, %r0, 1;"
    with pytest.raises(machine.Error, match=r"k: unknown PTX: add\.rz\.f64 bfind\.u32$"):
        run(machine, body)


# ---- branches, barriers, lanes -------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lanes_meet_again_behind_loops_and_branches(machine: Any, seed: int) -> None:
    """Fails where lanes that left a loop are lost, or run what follows it on their own."""
    machine.configure(seed=seed)
    out = aligned(64, np.uint32)
    run(
        machine,
        """
        mov.u32 %r1, 0; mov.u32 %r2, 0;
        loop:
        add.u32 %r2, %r2, %r1;
        add.u32 %r1, %r1, 1;
        setp.le.u32 %p1, %r1, %r0;
        @%p1 bra loop;
        and.b32 %r3, %r0, 1; setp.eq.u32 %p2, %r3, 0;
        @!%p2 bra odd;
        add.u32 %r2, %r2, 1000;
        bra.uni both;
        odd:
        add.u32 %r2, %r2, 2000;
        both:
        mad.wide.u32 %rd0, %r0, 4, %b0;
        st.global.u32 [%rd0], %r2;""",
        (out, "out"), threads=64,
    )  # fmt: skip
    i = np.arange(64)
    np.testing.assert_array_equal(out, i * (i + 1) // 2 + np.where(i % 2 == 0, 1000, 2000))
    (kernel,) = machine.counts()
    issued = {row["opcode"]: row["issued"] for row in kernel["instructions"]}
    assert issued["st.global.u32"] == 2  # once per warp
    assert issued["setp.le.u32"] == 32 + 64  # as long as the last lane stays


EXCHANGES = {
    "shfl.sync.bfly.b32 %r1, %r0, 5, 31, 0xffffffff": lambda i: i ^ 5,
    "shfl.sync.up.b32 %r1, %r0, 3, 0, 0xffffffff": lambda i: np.where(i >= 3, i - 3, i),
    "shfl.sync.down.b32 %r1, %r0, 3, 31, -1": lambda i: np.where(i + 3 <= 31, i + 3, i),
    "shfl.sync.down.b32 %r1, %r0, 1, 0x181f, -1": lambda i: np.where(i % 8 < 7, i + 1, i),
    "shfl.sync.idx.b32 %r1, %r0, 2, 0x181f, -1": lambda i: i // 8 * 8 + 2,
    "shfl.sync.up.b32 %r1|%p2, %r0, 3, 0, -1; selp.u32 %r1, 1, 0, %p2": lambda i: i >= 3,
}  # fmt: skip


@pytest.mark.parametrize("code", EXCHANGES)
def test_exchanges_between_lanes(machine: Any, code: str) -> None:
    out = aligned(32, np.uint32)
    run(
        machine, f"{code}; mad.wide.u32 %rd0, %r0, 4, %b0; st.global.u32 [%rd0], %r1;", (out, "out")
    )
    np.testing.assert_array_equal(out, EXCHANGES[code](np.arange(32)))


HALF = "setp.lt.u32 %p1, %r0, 16; @!%p1 bra end;"
DIVERGENT = {
    "own lane": ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xffff;", "thread 16.*own lane is not in"),
    "missing lanes": (
        f"{HALF} shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; end: add.u32 %r1, %r1, 1;",
        "a lane of the mask does not take part"),
    "lane outside": (
        f"{HALF} shfl.sync.bfly.b32 %r1, %r0, 16, 31, 0xffff; end: add.u32 %r1, %r1, 1;",
        "thread 0.*reads lane 16, which does not take part"),
    "barrier": (
        f"{HALF} bar.sync 0; end: add.u32 %r1, %r1, 1;",
        "a barrier that other threads of the warp do not come to"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIVERGENT)
def test_what_must_not_be_done_apart(machine: Any, case: str) -> None:
    body, message = DIVERGENT[case]
    with pytest.raises(machine.Error, match=message):
        run(machine, body, threads=64 if "warp" in case else 32)


def test_local_memory(machine: Any) -> None:
    """Each thread has its own."""
    out = aligned(64, np.uint32)
    body = """
        .local .align 16 .b8 depot[16];
        mov.u64 %rd1, depot;
        and.b32 %r1, %r0, 3; mad.wide.u32 %rd3, %r1, 4, %rd1; st.local.u32 [%rd3], %r0;
        ld.local.u32 %r2, [%rd3]; add.u32 %r2, %r2, 1;
        mad.wide.u32 %rd0, %r0, 4, %b0; st.global.u32 [%rd0], %r2;"""
    run(machine, body, (out, "out"), threads=64)
    np.testing.assert_array_equal(out, np.arange(64) + 1)
    with pytest.raises(machine.Error, match="outside of local memory"):
        run(machine, body + "ld.local.u32 %r3, [%rd1+16];", (out, "zero"), threads=64)


WARPS = "mov.u32 %r1, tile; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2; setp.ge.u32 %p1, %r0, 64;"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_barriers_of_some_warps(machine: Any, seed: int) -> None:
    """They order those that come to them, and nobody else."""
    machine.configure(seed=seed)
    two = f"{WARPS} @%p1 bra third; st.shared.u32 [%r3], %r0; bar.sync 1, 64; {{}} {{}} bra end;"
    third = "third: {} end: add.u32 %r1, %r1, 1;"
    exchange = "xor.b32 %r2, %r2, 128; add.u32 %r3, %r1, %r2; ld.shared.u32 %r4, [%r3];"
    run(machine, two.format(exchange, "") + third.format(""), threads=96, shared=512)
    reads = "ld.shared.u32 %r4, [tile];"
    run(machine, two.format(exchange, "bar.sync 0, 96;") + third.format(f"bar.sync 0, 96; {reads}"),
        threads=96, shared=512)  # fmt: skip
    with pytest.raises(machine.Error, match="never written|race in shared memory"):
        run(machine, two.format("", "") + third.format(reads), threads=96, shared=512)
    with pytest.raises(machine.Error, match="(?s)deadlock.*thread 0, .*: waits at a barrier"):
        run(machine, two.format("bar.sync 0, 96;", "") + third.format(""), threads=96, shared=512)
    with pytest.raises(machine.Error, match="a barrier for other threads than those"):
        run(machine, two.format("bar.sync 0, 96;", "") + third.format("bar.sync 0;"),
            threads=96, shared=512)  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_threads_of_a_block_hand_over(machine: Any, seed: int) -> None:
    machine.configure(seed=seed)
    body = """
        mov.u64 %rd1, tile; cvta.shared.u64 %rd1, %rd1;
        setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [tile], 0; bar.sync 0;
        setp.eq.u32 %p1, %r0, 0; @!%p1 bra other;
        st.shared.u32 [tile+4], 5; st.RELEASE.cta.u32 [%rd1], 1; ret;
        other: setp.ne.u32 %p1, %r0, 32; @%p1 ret;
        again: ld.ACQUIRE.cta.u32 %r1, [%rd1]; setp.eq.u32 %p2, %r1, 0; @%p2 bra again;
        ld.shared.u32 %r2, [tile+4];"""
    right = body.replace("RELEASE", "release").replace("ACQUIRE", "acquire")
    run(machine, right, threads=64)
    for wrong in (right.replace("release", "relaxed"), right.replace("acquire", "relaxed")):
        with pytest.raises(
            machine.Error, match="race in shared memory .byte 4. with an access by thread 0"
        ):
            run(machine, wrong, threads=64)


def test_threads_that_have_ended_are_not_waited_for(machine: Any) -> None:
    """By a barrier, by a shuffle with a full mask: the others go on."""
    out = aligned(16, np.uint32)
    run(
        machine,
        """
        setp.ge.u32 %p1, %r0, 16; @%p1 ret;
        bar.sync 0;
        shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;
        mad.wide.u32 %rd0, %r0, 4, %b0; st.global.u32 [%rd0], %r1;""",
        (out, "out"), threads=96,
    )  # fmt: skip
    np.testing.assert_array_equal(out, np.arange(16) ^ 1)


# ---- order ---------------------------------------------------------------------------------------

TILE = "mov.u32 %r1, tile; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0;"
NEIGHBOUR = "xor.b32 %r2, %r2, 128; add.u32 %r3, %r1, %r2; ld.shared.u32 %r4, [%r3];"


@pytest.mark.parametrize("seed", [0, 3])
def test_a_missing_barrier_is_a_race(machine: Any, seed: int) -> None:
    """Whatever the schedule: the values may be right."""
    machine.configure(seed=seed)
    run(machine, f"{TILE} bar.sync 0; {NEIGHBOUR}", threads=64, shared=256)
    with pytest.raises(machine.Error, match="never written|race in shared memory"):
        run(machine, f"{TILE} {NEIGHBOUR}", threads=64, shared=256)
    again = f"{TILE} bar.sync 0; {NEIGHBOUR} st.shared.u32 [%r3], %r4;"
    with pytest.raises(machine.Error, match="race in shared memory .*with an access by thread"):
        run(
            machine,
            f"{again} bar.sync 0; {NEIGHBOUR} {NEIGHBOUR} st.shared.u32 [%r3], %r0;"
            f"xor.b32 %r2, %r2, 128; add.u32 %r3, %r1, %r2; ld.shared.u32 %r4, [%r3];",
            threads=64,
            shared=256,
        )


def test_a_warp_needs_its_own_barrier(machine: Any) -> None:
    near = "xor.b32 %r2, %r2, 4; add.u32 %r3, %r1, %r2; ld.shared.u32 %r4, [%r3];"
    run(machine, f"{TILE} bar.warp.sync -1; {near}", shared=128)
    with pytest.raises(machine.Error, match="race in shared memory"):
        run(machine, f"{TILE} {near}", shared=128)


def handed_over(store: str, load: str) -> str:
    """Block 0 writes and announces; the others wait, and read."""
    return f"""
        mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0;
        @%p1 bra reader;
        mad.wide.u32 %rd0, %r0, 4, %b0; st.global.u32 [%rd0], %r0;
        bar.sync 0;
        setp.eq.u32 %p2, %r0, 0;
        @%p2 {store}
        ret;
        reader:
        setp.ne.u32 %p2, %r0, 0;
        @%p2 bra there;
        wait:
        {load}
        setp.eq.u32 %p3, %r2, 0;
        @%p3 bra wait;
        there:
        bar.sync 0;
        xor.b32 %r3, %r0, 7; mad.wide.u32 %rd0, %r3, 4, %b0; ld.global.u32 %r4, [%rd0];"""


RELEASE, ACQUIRE = (
    "red.release.gpu.global.add.u32 [%b1], 1;",
    "ld.acquire.gpu.global.u32 %r2, [%b1];",
)
RELAXED_STORE, RELAXED_LOAD = (
    RELEASE.replace("release", "relaxed"),
    ACQUIRE.replace("acquire", "relaxed"),
)
FENCED_STORE = f"bra next; bra end; next: fence.acq_rel.gpu; {RELAXED_STORE} end:"


def hand_over(machine: Any, store: str, load: str, seed: int, **running: Any) -> None:
    machine.configure(seed=seed)
    machine.remove_buffers()
    data, flag = aligned(64, np.uint32), aligned(1, np.uint32)
    run(
        machine,
        handed_over(store, load),
        (data, "out"),
        (flag, "zero"),
        threads=64,
        grid=3,
        **running,
    )


@pytest.mark.parametrize("seed", range(4))
def test_blocks_hand_over_by_release_and_acquire(machine: Any, seed: int) -> None:
    hand_over(machine, RELEASE, ACQUIRE, seed)
    hand_over(machine, FENCED_STORE, f"{RELAXED_LOAD} fence.acq_rel.gpu;", seed)
    for store, load in (
        (RELAXED_STORE, ACQUIRE),
        (RELEASE, RELAXED_LOAD),
        (RELEASE, ACQUIRE.replace("gpu", "cta")),
        (RELEASE.replace("gpu", "cta"), ACQUIRE),
    ):
        with pytest.raises(machine.Error, match="race in buffer 0"):
            hand_over(machine, store, load, seed)


def test_waiting_for_nobody_is_a_deadlock(machine: Any) -> None:
    for seed in (0, 1):
        with pytest.raises(
            machine.Error,
            match="(?s)deadlock: all threads wait\n.*block 1, thread 0.*ld.acquire.*: polls",
        ):
            hand_over(machine, "add.u32 %r1, %r1, 1;", ACQUIRE, seed)


def test_a_block_that_waits_lets_others_run(machine: Any) -> None:
    """One multiprocessor with room for two: those that wait first leave it to who is waited for."""
    machine.configure(multiprocessors=1, blocks=2, seed=0)
    body = handed_over(RELEASE, ACQUIRE).replace(
        "setp.ne.u32 %p1, %r1, 0", "setp.ne.u32 %p1, %r1, 1"
    )
    data, flag = aligned(64, np.uint32), aligned(1, np.uint32)
    run(machine, body, (data, "out"), (flag, "zero"), threads=64, grid=8)
    (kernel,) = machine.counts()
    assert sum(row["spins"] for row in kernel["instructions"]) > 0
    with pytest.raises(machine.Error, match="deadlock"):
        body = body.replace("setp.ne.u32 %p1, %r1, 1", "setp.ne.u32 %p1, %r1, 7")
        machine.remove_buffers()
        flag[0] = 0
        run(machine, body, (data, "out"), (flag, "zero"), threads=64, grid=8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tickets_are_taken_once(machine: Any, seed: int) -> None:
    machine.configure(seed=seed)
    counter, taken = aligned(1, np.uint32), aligned(640, np.uint32)
    run(
        machine,
        """
        atom.global.add.u32 %r1, [%b0], 1;
        mad.wide.u32 %rd0, %r1, 4, %b1; st.global.u32 [%rd0], 1;""",
        (counter, "zero"), (taken, "out"), threads=64, grid=10,
    )  # fmt: skip
    assert counter[0] == 640
    assert (taken == 1).all()


# ---- counts --------------------------------------------------------------------------------------


def counted(machine: Any, family: str, what: Sequence[str]) -> Iterator[int]:
    (kernel,) = machine.counts()
    rows = [row for row in kernel["instructions"] if row["family"] == family]
    for name in what:
        yield sum(row[name] for row in rows)


@pytest.mark.parametrize(
    ("stride", "bytes_each", "sectors"),
    [(4, 4, 4), (32, 4, 32), (16, 16, 16), (0, 4, 1), (2, 2, 2), (8, 4, 8)],
)
def test_sectors(machine: Any, stride: int, bytes_each: int, sectors: int) -> None:
    data = aligned(1024, np.uint8)
    value = "{%r4, %r5, %r6, %r7}" if bytes_each == 16 else "%r4" if bytes_each == 4 else "%h4"
    access = {16: "v4.u32", 4: "u32", 2: "u16"}[bytes_each]
    run(
        machine, f"mad.wide.u32 %rd0, %r0, {stride}, %b0; ld.global.{access} {value}, [%rd0];", data
    )
    got = list(counted(machine, "load global", ("issued", "sectors", "from_l2", "from_dram")))
    assert got == [1, sectors, sectors, sectors]


def test_caches(machine: Any) -> None:
    """Read twice: by L1 if it has room, else by L2; written sectors leave L2 once."""
    data, out = aligned(4096, np.uint8), aligned(4096, np.uint8)
    body = """
        mov.u32 %r1, 0;
        again:
        mad.wide.u32 %rd0, %r0, 16, %b0; ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd0];
        mad.wide.u32 %rd0, %r0, 16, %b1; st.global.v4.u32 [%rd0], {%r4, %r5, %r6, %r7};
        add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 2;
        bar.sync 0;
        @%p1 bra again;"""
    for l1, l2, expected in (
        (1 << 16, 1 << 16, [256, 128, 128]),
        (0, 1 << 16, [256, 256, 128]),
        (0, 0, [256, 256, 256]),
    ):
        machine.configure(l1=l1, l2=l2)
        machine.remove_buffers()
        run(machine, body, data, (out, "out"), threads=256)
        got = list(counted(machine, "load global", ("sectors", "from_l2", "from_dram")))
        assert got == expected
        assert machine.sectors_written() == (128 if l2 else 256)


@pytest.mark.parametrize(
    ("stride", "width", "wavefronts", "least"),
    [(4, 1, 1, 1), (8, 1, 2, 1), (128, 1, 32, 1), (0, 1, 1, 1), (132, 1, 1, 1),
     (8, 2, 2, 2), (16, 4, 4, 4), (32, 4, 8, 4), (128, 4, 32, 4)],
)  # fmt: skip
def test_bank_conflicts(machine: Any, stride: int, width: int, wavefronts: int, least: int) -> None:
    values = ["%r0", "%r0", "%r0", "%r0"][:width]
    vector = f"v{width}." if width > 1 else ""
    value = "{" + ", ".join(values) + "}" if width > 1 else "%r0"
    predicate = "setp.eq.u32 %p1, %r0, 0; @%p1" if stride == 0 else ""
    body = f"""
        mov.u32 %r1, tile; mad.lo.u32 %r1, %r0, {stride}, %r1;
        {predicate} st.shared.{vector}u32 [%r1], {value};"""
    run(machine, body, shared=128 * 33 + 16)
    assert list(counted(machine, "store shared", ("wavefronts", "least_wavefronts"))) == [
        wavefronts,
        least,
    ]
