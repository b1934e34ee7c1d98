"""The module that all other tests stand on: what it must refuse, and what it draws."""

from __future__ import annotations

import types

import numpy as np
import pytest
import tensorflow as tf

from cbam_ops import reference
from cbam_ops.testing import (
    EPSILON,
    FILLS,
    FLOAT32,
    LARGE,
    MAPS,
    NOT_FINITE,
    OPTIONS,
    SIZES,
    SMALLEST,
    Case,
    Finding,
    assert_accurate,
    assert_close,
    assert_same_bits,
    compare,
    worst_of,
)

EXACT = np.linspace(1, 2, 5)
GOOD = EXACT.astype(np.float32)


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (np.where(GOOD > 1.6, np.float32(np.nan), GOOD), "2 of 5 values are NaN"),
        (np.where(GOOD > 1.6, np.float32(np.inf), GOOD), "2 of 5 values are infinite"),
        (GOOD * np.float32(1 + 1e-5), "5 of 5 values are too far off"),
        (GOOD[:4], "shape (4,) instead of (5,)"),
        (GOOD[None], "shape (1, 5) instead of (5,)"),
    ],
    ids=["nan", "infinite", "far", "short", "rank"],
)
def test_the_comparers_refuse(bad, fault):
    """Fails where a wrong result passes: then every other test is void."""
    finding = compare(bad, EXACT, GOOD, "name")
    assert fault in finding.fault and finding.strain > 1
    with pytest.raises(AssertionError, match="name: "):
        assert_accurate(bad, EXACT, GOOD, "name")
    with pytest.raises(AssertionError, match="name: "):
        assert_close(bad, EXACT, 1e-6, "name")
    with pytest.raises(AssertionError, match="name: "):
        assert_same_bits(bad, GOOD, "name")


def test_the_comparers_take_what_is_right():
    assert_accurate(GOOD, GOOD.astype(np.float64), GOOD, "same")
    assert_close(GOOD, GOOD, 0.0, "same")
    assert_same_bits(GOOD, GOOD.copy(), "same")
    assert compare(GOOD[:0], EXACT[:0], GOOD[:0], "empty").strain == 0


@pytest.mark.parametrize("error", [0.0, 0.25])
@pytest.mark.parametrize("kind", list(EPSILON))
def test_the_bound_is_twice_the_ordinary_error_and_eight_roundings(kind, error):
    """Fails where the policy moves."""
    compute = "float64" if kind == "float64" else "float32"
    truth = np.ones(3, np.longdouble if kind == "float64" else np.float64)
    finding = compare(truth.astype(tf.as_dtype(kind).as_numpy_dtype), truth, truth + error, "value")
    bound = 2 * error + 8 * EPSILON[compute]
    if kind != compute:
        bound += 0.5 * EPSILON[kind] * (1 + bound) + SMALLEST[kind]
    assert_close(finding.allowed, bound, FLOAT32, "bound")


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_a_case_finds_every_wrong_result(case):
    """Fails where a case compares less than all outputs and all gradients."""
    tensors = case.draw()
    results = case.evaluate(reference, tensors)
    gradients = ["d_residual" if name == "residual" else f"d{name}" for name in case.names]
    assert list(results) == [*case.output_names(), *gradients]
    case.check(reference)
    for name, result in results.items():
        found = case.compare({**results, name: result * 1.01}, tensors)
        assert [finding.name for finding in found if finding.fault] == [name]
    other = {**results, "dx": tf.cast(results["dx"], tf.float64)}
    faults = [finding.fault for finding in case.compare(other, tensors)]
    assert "dx: type float64 instead of float32" in faults


def test_a_failed_check_says_which_case():
    wrong = types.SimpleNamespace(channel_pool=lambda x, data_format: (x[:, 0, 0], x[:, 0, 0]))
    with pytest.raises(AssertionError, match="^channel_pool-2x5x7x13:\n  mean: .* too far off"):
        Case("channel_pool").check(wrong)


@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_is_what_it_says(fill, dtype):
    """Fails where a kind of map that hurts is no longer drawn."""
    x = Case(fill=fill, dtype=dtype).arrays()["x"].astype(np.float64)
    compute = np.float64 if dtype == "float64" else np.float32
    tiny = np.finfo(np.float16 if dtype == "float16" else compute).tiny
    with np.errstate(invalid="ignore"):
        holds = {
            "normal": np.std(x) > 0.5,
            "relu": np.all(x >= 0) and np.any(x > 0) and not x[0].any() and not x[..., 0].any(),
            "steps": len(np.unique(x)) < 12,
            "equal": len(np.unique(x)) == 1,
            "zeros": not x.any() and len(np.unique(np.signbit(x))) == 2,
            "offset": np.mean(x) > 900 and np.std(x) < 1,
            "denormal": x.any() and np.mean(np.abs(x) < tiny) > 0.9,
            "huge": np.max(x) > 4000,
            "saturated": np.std(x) > 0.5,
            "nan": np.isnan(x).sum() == 1,
            "inf": np.isposinf(x).sum() == 1,
            "-inf": np.isneginf(x).sum() == 1,
            "infinities": np.isposinf(x).sum() == np.isneginf(x).sum() == 1,
        }
    assert holds[fill]
    assert np.isfinite(x).all() == (fill not in NOT_FINITE)


@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_of_the_smallest_maps(fill):
    """Fails where a fill needs more than one sample, position or channel, or any."""
    for size in ((1, 1, 1, 1), (0, 3, 2, 4)):
        Case(size=size, fill=fill).check(reference)


def test_gates_of_a_saturated_case_are_near_their_ends():
    case = Case(fill="saturated", size=(4, 9, 9, 32))
    for gate in case.call(reference, case.draw())[1:]:
        assert np.mean(gate * (1 - gate) < 0.01) > 0.1


def test_both_layouts_and_all_types_are_one_problem():
    """Fails where a difference between layouts or types is one of the arguments."""
    case = Case(residual=True)
    one = case.arrays()
    other = case.replace(dtype="float64", data_format="NCHW").arrays()
    for name, value in one.items():
        assert other[name].flags.c_contiguous
        expected = np.moveaxis(value, 3, 1) if name in MAPS else value
        assert_same_bits(other[name].astype(np.float32), np.ascontiguousarray(expected), name)
    assert not np.array_equal(case.replace(seed=1).arrays()["x"], one["x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "cbm"}, "Case: `function` must be one of cbam, .*, got 'cbm'"),
        ({"fill": "ones"}, "Case: `fill` must be one of normal, .*, got 'ones'"),
        ({"dtype": "int8"}, "Case: `dtype` must be one of float64, .*, got 'int8'"),
        ({"size": (2, 3)}, r"Case: `size` must be of a map, as \(N, H, W, C\), got \(2, 3\)"),
    ],
)
def test_a_case_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case(**arguments)


def test_the_names_of_cases_differ():
    """Fails where a test's name does not say which case it is."""
    cases = [*OPTIONS, *SIZES, *LARGE]
    assert len({str(case) for case in cases}) == len(cases)


def test_several_draws_hold_the_largest_error_against_the_largest_bound():
    lucky = Finding("dbias", error=3.0, allowed=1.0, stock=0.0, fault="too far off")
    usual = Finding("dbias", error=2.0, allowed=4.0, stock=1.5)
    (found,) = worst_of([[lucky], [usual]])
    assert (found.error, found.allowed, found.stock, found.fault) == (3.0, 4.0, 1.5, "")
    wrong = Finding("dbias", error=5.0, allowed=1.0, fault="too far off")
    (found,) = worst_of([[usual], [wrong], [lucky]])
    assert (found.error, found.fault) == (5.0, "too far off")
    incomparable = Finding("dbias", error=np.inf, fault="shape")
    assert worst_of([[usual], [incomparable]])[0].fault == "shape"
