"""`cbam-ops check`: the fused ops against the float64 reference, on this machine.

Truth is the reference in float64 on the very inputs that the fused op gets (rounded to the case's
types first). The error of a value is its largest absolute difference from the truth, relative to
the largest magnitude in it. It may be twice what stock TensorFlow (the reference at the case's own
types) errs, plus a floor of a few roundings of its type, and covers the outputs and every gradient.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any

import numpy as np

from cbam_ops._console import import_tensorflow, say

# The floor, in roundings (machine epsilons) of the value's type: what two correct evaluations in
# different orders may differ by even where stock TensorFlow happens to hit the truth.
_FLOOR_ROUNDINGS = {"float64": 512, "float32": 16, "float16": 1, "bfloat16": 1}
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_TIMES_STOCK = 2.0
_HALF_TYPES = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: the function, sizes `(N, H, W, C)`, types and options.

    `content` is what x holds: "normal" values; "relu", of which half are exactly zero, so that
    maxima tie; "offset", normal values around 100, where a careless mean loses digits.
    """

    function: str
    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    layout: str = "NHWC"
    options: tuple[tuple[str, Any], ...] = ()
    weights: str = ""  # type of the weights, as that of x where it is not given
    kernel_size: int = 7
    hidden: int = 4
    biases: bool = True
    residual: bool = False
    content: str = "normal"

    @property
    def weights_dtype(self) -> str:
        """The type of the weights."""
        return self.weights or self.dtype

    def describe(self) -> str:
        """The options in a few words, "-" for the defaults."""
        words = []
        if self.weights and self.weights != self.dtype:
            words.append(f"{self.weights} weights")
        if self.kernel_size != 7:
            words.append(f"k={self.kernel_size}")
        if not self.biases:
            words.append("no biases")
        if self.residual:
            words.append("residual")
        words.extend(
            {"activation": str(value), "mlp_activation": f"mlp {value}"}.get(key, str(value))
            for key, value in self.options
        )
        if self.content != "normal":
            words.append({"relu": "x >= 0, ties", "offset": "x near 100"}[self.content])
        return ", ".join(words) or "-"


def _options(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


def cases(quick: bool = False) -> list[Case]:
    """The spread of cases; `quick` keeps about a third of them."""
    relu = _options(activation="relu")
    found: list[Case] = []
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        for layout in ("NHWC", "NCHW"):
            common: dict[str, Any] = {"dtype": dtype, "layout": layout}
            found += [
                Case("cbam", (2, 14, 14, 64), **common),
                Case("cbam", (3, 7, 9, 37), options=relu, residual=True, **common),
                Case("cbam", (2, 8, 8, 32), content="relu", kernel_size=3, **common),
                Case(
                    "cbam",
                    (1, 2, 3, 5),
                    options=_options(mlp_activation="relu"),
                    hidden=1,
                    biases=False,
                    **common,
                ),
                Case("channel_pool", (2, 9, 7, 33), **common),
                Case("spatial_pool", (2, 9, 7, 33), **common),
            ]
    for layout in ("NHWC", "NCHW"):
        for order in ("spatial_first", "parallel"):
            found.append(Case("cbam", (2, 6, 5, 24), layout=layout, options=_options(order=order)))
        for order in ("channel_first", "parallel"):
            found.append(
                Case(
                    "cbam_with_batch_norm",
                    (3, 6, 8, 20),
                    layout=layout,
                    options=_options(order=order, activation="relu"),
                    residual=True,
                )
            )
        for pooling in ("avg+max", "avg", "max"):
            found.append(
                Case(
                    "channel_attention",
                    (2, 11, 6, 40),
                    layout=layout,
                    options=_options(pooling=pooling),
                    residual=pooling == "avg",
                )
            )
        found.append(Case("spatial_attention", (2, 12, 5, 18), layout=layout, kernel_size=5))
        found.append(Case("spatial_attention", (2, 9, 9, 16), layout=layout, options=relu))
        found.append(Case("cbam", (2, 40, 40, 48), layout=layout, content="offset"))
    for dtype in _HALF_TYPES:
        found.append(Case("cbam", (2, 14, 14, 48), dtype, weights="float32"))
        found.append(
            Case(
                "cbam", (2, 5, 5, 19), dtype, weights="float32", options=relu, residual=True,
                layout="NCHW",
            )
        )  # fmt: skip
    found.append(Case("cbam", (2, 1, 1, 16)))
    found.append(Case("cbam", (1, 56, 56, 256), hidden=16, options=relu, residual=True))
    found.append(Case("cbam", (0, 6, 6, 16)))
    found.append(Case("cbam", (2, 5, 4, 12), kernel_size=1))
    found.append(Case("cbam", (2, 5, 4, 12), kernel_size=11))
    if not quick:
        return found
    # Two of the six per type and layout, changing from one to the next, and a third of the rest.
    per_type = [found[6 * block + (block + k) % 6] for block in range(8) for k in (0, 3)]
    return per_type + found[48::3]


def _inputs(case: Case, seed: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The arguments by name, in order, and directions for the outputs; values in float64."""
    random = np.random.default_rng(seed)
    n, h, w, c = case.shape
    size = (n, h, w, c) if case.layout == "NHWC" else (n, c, h, w)
    k = case.kernel_size

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return random.standard_normal(shape) * scale

    x = normal(*size)
    if case.content == "relu":
        x = np.maximum(x, 0)
    elif case.content == "offset":
        x = x + 100
    values: dict[str, np.ndarray] = {"x": x}
    if case.function in ("cbam", "cbam_with_batch_norm", "channel_attention"):
        values["w0"] = normal(c, case.hidden, scale=c**-0.5)
        values["b0"] = normal(case.hidden, scale=0.1)
        values["w1"] = normal(case.hidden, c, scale=case.hidden**-0.5)
        values["b1"] = normal(c, scale=0.1)
        if case.content == "offset":  # the gates should not saturate
            values["w0"] *= 0.01
    if case.function in ("cbam", "cbam_with_batch_norm", "spatial_attention"):
        values["kernel"] = normal(k, k, 2, 1, scale=1 / k)
        if case.content == "offset":
            values["kernel"] *= 0.01
        if case.function == "cbam_with_batch_norm":
            values["gamma"] = 1 + normal(1, scale=0.1)
            values["beta"] = normal(1, scale=0.1)
        else:
            values["bias"] = normal(1, scale=0.1)
    if not case.biases:
        for name in ("b0", "b1", "bias"):
            values.pop(name, None)
    if case.residual:
        values["residual"] = normal(*size)
    planes = (n, h, w, 2) if case.layout == "NHWC" else (n, 2, h, w)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "channel_pool": [(n, c), (n, c)],
        "spatial_pool": [planes],
        "channel_attention": [size, (n, c)],
        "spatial_attention": [size, (n, h, w)],
        "cbam": [size, (n, c), (n, h, w)],
        "cbam_with_batch_norm": [size, (1,), (1,), (n, c), (n, h, w)],
    }
    return values, [normal(*shape) for shape in shapes[case.function]]


_OUTPUT_NAMES = {
    "channel_pool": ("mean", "max"),
    "spatial_pool": ("descriptors",),
    "channel_attention": ("y", "channel gate"),
    "spatial_attention": ("y", "spatial gate"),
    "cbam": ("y", "channel gate", "spatial gate"),
    "cbam_with_batch_norm": ("y", "mean", "variance", "channel gate", "spatial gate"),
}


def _evaluate(
    module: Any,
    case: Case,
    values: dict[str, np.ndarray],
    directions: list[np.ndarray],
    exact: bool = False,
) -> dict[str, tuple[np.ndarray, str]]:
    """Outputs and gradients of `module.<function>`: name to (values in float64, type).

    With `exact` everything is float64, on inputs that are rounded as the case says.
    """
    import tensorflow as tf

    def tensor(value: np.ndarray, dtype: str) -> Any:
        rounded = tf.cast(tf.constant(value, tf.float64), dtype)
        return tf.cast(rounded, tf.float64) if exact else rounded

    maps = ("x", "residual")
    arguments = {
        name: tensor(value, case.dtype if name in maps else case.weights_dtype)
        for name, value in values.items()
    }
    options: dict[str, Any] = {"data_format": case.layout, **dict(case.options)}
    if "pool" not in case.function:
        options["return_gates"] = True
    keywords = dict(arguments)
    if case.function in ("cbam", "cbam_with_batch_norm", "channel_attention"):
        keywords.setdefault("b0", None)
        keywords.setdefault("b1", None)
    with tf.GradientTape() as tape:
        tape.watch(list(arguments.values()))
        outputs = getattr(module, case.function)(**keywords, **options)
    if not isinstance(outputs, tuple | list):
        outputs = (outputs,)
    # Directions are rounded to the map's type for every implementation alike.
    towards = [
        tf.cast(tensor(direction, case.dtype), output.dtype)
        for output, direction in zip(outputs, directions, strict=True)
    ]
    gradients = tape.gradient(
        list(outputs), arguments, towards, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    results = dict(zip(_OUTPUT_NAMES[case.function], outputs, strict=True))
    results |= {f"d{name}": gradient for name, gradient in gradients.items()}
    return {
        name: (tf.cast(value, tf.float64).numpy(), value.dtype.name)
        for name, value in results.items()
    }


def error_of(value: np.ndarray, truth: np.ndarray) -> float:
    """The largest absolute difference, relative to the largest magnitude of the truth.

    Infinite for another shape, and for NaN or infinity where the truth has something else.
    """
    if value.shape != truth.shape:
        return float("inf")
    if truth.size == 0:
        return 0.0
    regular = np.isfinite(truth)
    if not np.array_equal(regular, np.isfinite(value)) or not np.array_equal(
        value[~regular], truth[~regular], equal_nan=True
    ):
        return float("inf")
    if not regular.any():
        return 0.0
    difference = float(np.max(np.abs(value[regular] - truth[regular])))
    scale = float(np.max(np.abs(truth[regular])))
    return difference / scale if scale > 0 else difference


def allowed_error(stock: float, dtype: str) -> float:
    """What a value of this type may err, given what stock TensorFlow errs."""
    return _TIMES_STOCK * stock + _FLOOR_ROUNDINGS[dtype] * _EPSILON[dtype]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One value (an output or a gradient) of one case."""

    name: str
    error: float
    stock: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; a NaN is not."""
        return self.error <= self.allowed


def examine(case: Case, seed: int) -> list[Finding]:
    """Compares every value of one case; the one nearest to (or farthest over) its limit first."""
    import cbam_ops

    values, directions = _inputs(case, seed)
    truth = _evaluate(cbam_ops.reference, case, values, directions, exact=True)
    stock = _evaluate(cbam_ops.reference, case, values, directions)
    with cbam_ops.use_implementation("native"):
        fused = _evaluate(cbam_ops, case, values, directions)
    found = []
    for name, (true_value, _) in truth.items():
        stock_error = error_of(stock[name][0], true_value)
        value, dtype = fused[name]
        # Infinite means that stock TensorFlow overflows its type: no excuse for the fused ops.
        usable = stock_error if np.isfinite(stock_error) else 0.0
        found.append(
            Finding(name, error_of(value, true_value), stock_error, allowed_error(usable, dtype))
        )
    return sorted(found, key=lambda finding: -finding.error / finding.allowed)


_ROW = "  {:<20} {:<12} {:<9} {:<6} {:<32} {:<13} {:>8} {:>8} {:>8}  {}"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def run(quick: bool = False) -> int:
    """Prints the table; exit code 0 if every case passes, 1 if any fails or nothing fused runs."""
    import_tensorflow()
    import cbam_ops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        info = cbam_ops.build_info()
    if not info["native"]:
        say("The fused ops do not run here, so there is nothing to check.")
        say(f"Why: {info['native_off_because']}")
        return 1
    chosen = cases(quick)
    instructions = (info.get("instruction_set") or {}).get("active")
    say(
        f"cbam_ops {info['version']}, TensorFlow {info['tensorflow']}, instruction set "
        f"{instructions}: {len(chosen)} cases, fused against the reference in float64"
    )
    say("Per case the value (output or gradient, `d...`) nearest to its limit. Errors are relative")
    say("to the largest magnitude; allowed is 2 x the error of stock TensorFlow + a floor.")
    say()
    say(
        _ROW.format(
            "function", "N x H x W x C", "type", "layout", "options", "worst value",
            "fused", "stock", "allowed", "",
        ).rstrip()
    )  # fmt: skip
    started = time.perf_counter()
    failures: list[str] = []
    values = 0
    for index, case in enumerate(chosen):
        place = (
            case.function,
            "x".join(map(str, case.shape)),
            case.dtype,
            case.layout,
            case.describe(),
        )
        try:
            found = examine(case, seed=index)
        except Exception as error:
            text = " ".join(str(error).split())
            failures.append(f"{' '.join(place)}: {type(error).__name__}: {text[:300]}")
            say(_ROW.format(*place, "-", "-", "-", "-", "FAILED (error)"))
            continue
        values += len(found)
        worst = found[0]
        wrong = [finding for finding in found if not finding.passed]
        failures += [
            f"{' '.join(place)}: {finding.name} errs {_number(finding.error)}, allowed "
            f"{_number(finding.allowed)}"
            for finding in wrong
        ]
        numbers = (_number(worst.error), _number(worst.stock), _number(worst.allowed))
        say(_ROW.format(*place, worst.name, *numbers, "FAILED" if wrong else "ok"))
    say()
    seconds = time.perf_counter() - started
    if failures:
        say(f"FAILED: {len(failures)} of the values, in {len(chosen)} cases ({seconds:.0f} s):")
        for failure in failures:
            say(f"  {failure}")
        return 1
    say(f"All {len(chosen)} cases pass: {values} outputs and gradients ({seconds:.0f} s).")
    return 0
