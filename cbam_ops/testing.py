"""Cases of the public functions, and how far a result may be from the truth.

As numpy and Keras have a `testing` module, for tests of kernels, layers and models of your own:

    from cbam_ops import testing

    for fill in testing.FILLS:
        case = testing.Case(size=(2, 14, 14, 64), dtype="float16", data_format="NCHW", fill=fill)
        case.check(my_kernels)  # `my_kernels.cbam` takes and returns what `cbam_ops.cbam` does

    case = testing.Case("channel_attention", size=(8, 7, 7, 512), hidden=32)
    tensors = case.draw()
    truth, stock = testing.truth_and_stock(case, tensors, "call")
    testing.assert_accurate(my_gate(**tensors), truth[1], stock[1], "channel gate")

The policy: the truth is the reference in float64 on the inputs as rounded to their types. A result,
an output or any gradient, may err at most twice what the reference in the compute type errs, plus a
small floor: see :func:`compare`. Nothing passes on a wrong shape, a wrong type, or a NaN where the
truth has a number (or the reverse).

That holds near saturated gates and for batch norm too, where the ordinary evaluation loses digits:
the bound is what it errs, and is no wider for it. But what it errs in a single number, say the
gradient of a bias, or where rounding decides which value is the maximum, is a matter of luck, and
says little of what such a call errs. Where one draw of a case fails, four decide: the largest
error of a result is held against its largest bound, see :meth:`Case.examine`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # what needs no tensor works without TensorFlow
    import tensorflow as tf

# --- tolerances -----------------------------------------------------------------------------------

# Ours may err at most this many times what the ordinary evaluation errs.
STOCK_FACTOR = 2.0
# ... plus this many roundings of the compute type, of the size of the value itself or, where large
# terms cancel, of the sum of their absolute values.
FLOOR_ROUNDINGS = 8.0
# How many draws decide where one is not enough: see `Case.examine`.
DRAWS = 4

# Distance from 1 to the next number, and the smallest positive number.
EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
}
SMALLEST = {
    "float64": 2.0**-1074,
    "float32": 2.0**-149,
    "bfloat16": 2.0**-133,
    "float16": 2.0**-24,
}
SMALLEST_NORMAL = {name: SMALLEST[name] / EPSILON[name] for name in EPSILON}
LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float16": 65504.0,
}

# Central differences in float64: their own error is of the order of the step squared and of the
# rounding over the step. Relative to the largest entry, like the other tolerances below.
FINITE_DIFFERENCE_STEP = 1e-5
FINITE_DIFFERENCE_TOLERANCE = 1e-7
# <J v, w> against <v, J' w>, relative to the root of the sum of squares of the terms.
DOT_PRODUCT_TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
# Second order and forward mode against the reference in float64.
SECOND_ORDER_TOLERANCE = {"float32": 1e-3, "float64": 1e-10}

# Whole networks of up to fifty layers, relative to the largest value: in float64 against a
# composition of other ops (epsilon of the spatial batch norm is an attribute of type float32), in
# mixed precision against float32.
MODEL_FORWARD = 1e-9
MODEL_GRADIENT = 1e-7
MIXED_MODEL = {"mixed_float16": 0.03, "mixed_bfloat16": 0.2}
# The same few operations in float32 in another order.
FLOAT32 = 1e-5
# ... and in float64.
FLOAT64 = 1e-13
# An exported network against the model, by what it computes in or is rounded to.
EXPORTED = {"float32": 1e-3, "float16": 0.03, "dynamic_range": 0.5, "int8": 0.5}
# Of a few hundred random draws or more against their distribution's.
STANDARD_DEVIATION = 0.1


def compute_type(dtype: str) -> str:
    """The type that sums, weights, gates and descriptors of a map of type ``dtype`` have."""
    return "float64" if dtype == "float64" else "float32"


def truth_type(dtype: str) -> str:
    """The type to evaluate the truth in for results of type ``dtype``, in numpy."""
    return "longdouble" if dtype == "float64" else "float64"


# --- comparers ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finding:
    """How far a result is from the truth, at the value nearest to its bound or farthest over it.

    Attributes:
      name: what was compared.
      error: the absolute error there; infinite where the two are not comparable.
      allowed: its bound.
      stock: the largest error of the ordinary evaluation.
      scale: the largest magnitude of the truth; errors relative to it are `error / scale`.
      fault: what is wrong, in a sentence; empty if nothing is.
    """

    name: str
    error: float = 0.0
    allowed: float = 0.0
    stock: float = 0.0
    scale: float = 0.0
    fault: str = ""

    @property
    def strain(self) -> float:
        """The part of its bound that the error takes; above 1 it is a fault."""
        return self.error / self.allowed if self.allowed else self.error


def compare(
    actual: np.ndarray,
    truth: np.ndarray,
    stock: np.ndarray,
    name: str,
    *,
    magnitude: np.ndarray | float | None = None,
    smallest: float = 0.0,
) -> Finding:
    """Whether ``actual`` is as near the truth as its type allows.

    Every value may err ``STOCK_FACTOR`` times the largest error of ``stock``, plus
    ``FLOOR_ROUNDINGS`` roundings of the compute type and, of a half type, one rounding to it.

    Args:
      actual: the result, of any of the four types. A result of a half type was computed in float32
        and rounded once: that rounding is all that its bound has over a float32 result's.
      truth: of a wider type than the compute type of ``actual``.
      stock: the ordinary evaluation, in the *compute type* of ``actual``, not rounded to a half.
      name: for the message.
      magnitude: what the sums behind ``actual`` come to without their signs, where that is more
        than ``truth``: terms that cancel leave their rounding errors.
      smallest: values below may be 0 (the smallest normal number where denormals may be flushed).
    """
    actual, truth, stock = np.asarray(actual), np.asarray(truth), np.asarray(stock)
    if not actual.shape == truth.shape == stock.shape:
        fault = f"{name}: shape {actual.shape} instead of {truth.shape}"
        return Finding(name, error=np.inf, fault=fault)
    if actual.size == 0:
        return Finding(name)
    dtype = actual.dtype.name
    value = actual.astype(truth.dtype)
    fault = _another_kind(value, truth, LARGEST[dtype])
    if fault:
        return Finding(name, error=np.inf, fault=f"{name}: {fault}")

    finite = np.isfinite(value) & np.isfinite(truth)
    if not finite.any():
        return Finding(name)
    with np.errstate(invalid="ignore", over="ignore"):
        stock_error = np.abs(stock.astype(truth.dtype) - truth)
        error = np.where(finite, np.abs(value - truth), 0.0)
    usable = float(np.max(stock_error, initial=0.0, where=finite & np.isfinite(stock_error)))
    scale = np.abs(truth) if magnitude is None else np.fmax(np.abs(truth), magnitude)
    narrow = compute_type(dtype)
    bound = STOCK_FACTOR * usable + smallest
    bound = bound + FLOOR_ROUNDINGS * (EPSILON[narrow] * scale + SMALLEST[narrow])
    if narrow != dtype:
        bound = bound + 0.5 * EPSILON[dtype] * (np.abs(truth) + bound) + SMALLEST[dtype]
    at = np.unravel_index(np.argmax(np.where(finite, error / bound, 0.0)), error.shape)
    wrong = int((finite & ~(error <= bound)).sum())
    if wrong:
        fault = (
            f"{name}: {wrong} of {error.size} values are too far off; at {_index(at)} "
            f"{value[at]!r} instead of {truth[at]!r}, "
            f"error {error[at]:.3g}, allowed {bound[at]:.3g}"
        )
    largest = _largest(truth)
    return Finding(name, float(error[at]), float(bound[at]), usable, largest, fault)


def worst_of(draws: Iterable[Iterable[Finding]]) -> list[Finding]:
    """What several draws of one case find: of each result the largest error, and bound.

    Args:
      draws: for each draw the findings of all results, in the same order.
    """
    worst = []
    for same in zip(*draws, strict=True):
        finding = max(same, key=lambda each: each.error)
        bounds = {
            name: max(getattr(each, name) for each in same)
            for name in ("allowed", "stock", "scale")
        }
        finding = dataclasses.replace(finding, **bounds)
        worst.append(finding if finding.strain > 1 else dataclasses.replace(finding, fault=""))
    return worst


def assert_accurate(
    actual: np.ndarray,
    truth: np.ndarray,
    stock: np.ndarray,
    name: str,
    *,
    magnitude: np.ndarray | float | None = None,
    smallest: float = 0.0,
) -> None:
    """Asserts what :func:`compare` finds out; see there."""
    finding = compare(actual, truth, stock, name, magnitude=magnitude, smallest=smallest)
    assert not finding.fault, finding.fault


def relative_error(actual: np.ndarray, expected: np.ndarray, name: str) -> float:
    """The largest error, as a part of the largest expected value.

    Raises:
      AssertionError: shapes differ, or a value is NaN or infinite where the other is not.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    fault = _another_kind(actual, expected, LARGEST["float64"])
    assert not fault, f"{name}: {fault}"
    finite = np.isfinite(expected)
    error = _largest(np.subtract(actual, expected, where=finite, out=np.zeros_like(actual)))
    scale = _largest(expected)
    return error / scale if scale else np.inf if error else 0.0


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, name: str) -> None:
    """Asserts a largest error of ``tolerance`` times the largest expected value."""
    error = relative_error(actual, expected, name)
    assert error <= tolerance, (
        f"{name}: error {error:.3g} of the largest value; allowed {tolerance:.3g}"
    )


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Asserts equality of shape, type and every bit (NaN equals NaN, -0 is not 0)."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: type {actual.dtype}, not {expected.dtype}"
    same = np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()
    if not same:
        differ = actual.astype(np.float64) != expected.astype(np.float64)
        raise AssertionError(f"{name}: {int(differ.sum())} of {actual.size} values differ")


def digest(results: Any) -> str:
    """A short text that changes with any bit of any tensor of a nest."""
    import tensorflow as tf

    hashed = hashlib.sha256()
    for tensor in tf.nest.flatten(results):
        hashed.update(tensor.numpy().tobytes())
    return hashed.hexdigest()


def _another_kind(value: np.ndarray, truth: np.ndarray, largest: float) -> str:
    """What is NaN where the truth is not, or infinite where it is not nor may round to it."""
    nan = np.isnan(value) != np.isnan(truth)
    near_overflow = np.abs(truth) > largest * (1 - 2.0**-7)
    infinite = np.isinf(value) | np.isinf(truth)
    wrong = infinite & ~near_overflow & ~np.isnan(truth)
    wrong |= infinite & (np.sign(value) != np.sign(truth))
    wrong |= np.isinf(truth) & ~np.isinf(value)
    for kind, places in (("NaN", nan), ("infinite", wrong)):
        if places.any():
            at = tuple(np.argwhere(places)[0])
            return (
                f"{int(places.sum())} of {value.size} values are {kind} where the truth is not or "
                f"the reverse; at {_index(at)} {value[at]!r} instead of {truth[at]!r}"
            )
    return ""


def _index(at: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in at)


def _largest(values: np.ndarray) -> float:
    """The largest finite magnitude; 0 if there is none."""
    return float(np.max(np.abs(values), initial=0.0, where=np.isfinite(values)))


# --- cases ----------------------------------------------------------------------------------------

MLP = ("w0", "b0", "w1", "b1")
ARGUMENTS = {
    "cbam": ("x", *MLP, "kernel", "bias"),
    "cbam_with_batch_norm": ("x", *MLP, "kernel", "gamma", "beta"),
    "channel_attention": ("x", *MLP),
    "spatial_attention": ("x", "kernel", "bias"),
    "spatial_attention_with_batch_norm": ("x", "kernel", "gamma", "beta"),
    "channel_pool": ("x",),
    "spatial_pool": ("x",),
}
OUTPUTS = {
    "cbam": ("y", "channel_gate", "spatial_gate"),
    "cbam_with_batch_norm": ("y", "mean", "variance", "channel_gate", "spatial_gate"),
    "channel_attention": ("y", "channel_gate"),
    "spatial_attention": ("y", "spatial_gate"),
    "spatial_attention_with_batch_norm": ("y", "mean", "variance", "spatial_gate"),
    "channel_pool": ("mean", "maximum"),
    "spatial_pool": ("descriptors",),
}
MAPS = ("x", "residual")
STATISTICS = {"cbam_with_batch_norm": (1, 2), "spatial_attention_with_batch_norm": (1, 2)}


class Fill(NamedTuple):
    """What a map holds: made of normal values, channels last, and the map's type.

    `weights` is the factor of `w0` and `kernel`: weights as training would make them bring the
    gates' logits near 1 whatever the map holds.
    """

    make: Callable[[np.ndarray, str], np.ndarray]
    weights: float = 1.0


def _after_a_relu(values: np.ndarray, dtype: str) -> np.ndarray:
    values = np.maximum(values, 0.0)
    values[: len(values) - 1 and 1] = 0.0
    values[..., : values.shape[-1] - 1 and 1] = 0.0
    return values


def _with(special: float, beside: float | None = None) -> Fill:
    """`special` at one place of the last sample, `beside` at the position before it."""

    def make(values: np.ndarray, dtype: str) -> np.ndarray:
        if values.size:
            positions = values[-1].reshape(-1, values.shape[-1])
            middle = len(positions) // 2, values.shape[-1] // 2
            positions[middle] = special
            if beside is not None:
                positions[middle[0] - 1, middle[1]] = beside
        return values

    return Fill(make)


FILLS = {
    "normal": Fill(lambda values, dtype: values),
    # Half of it zero, the first sample and the first channel entirely: maxima tie.
    "relu": Fill(_after_a_relu),
    # Few distinct values: maxima tie almost everywhere.
    "steps": Fill(lambda values, dtype: np.round(values)),
    "equal": Fill(lambda values, dtype: np.full_like(values, 0.5)),
    "zeros": Fill(lambda values, dtype: np.copysign(0.0, values)),
    # A large mean under small noise, which a careless sum loses.
    "offset": Fill(lambda values, dtype: 1000.0 + values / 16, weights=1e-3),
    "denormal": Fill(lambda values, dtype: values * (SMALLEST_NORMAL[dtype] / 8)),
    # Sums of it are near the end of float16.
    "huge": Fill(lambda values, dtype: values * 2000.0, weights=1e-3),
    # Gates near 0 and 1.
    "saturated": Fill(lambda values, dtype: values, weights=8.0),
    "nan": _with(np.nan),
    "inf": _with(np.inf),
    "-inf": _with(-np.inf),
    "infinities": _with(np.inf, -np.inf),
}
# The gradients of such maps are not compared: on which values a NaN of a maximum falls is not
# promised (the reference gives it to all, the kernels to the maxima).
NOT_FINITE = ("nan", "inf", "-inf", "infinities")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a public function, with all that follows from a seed.

    Attributes:
      function: its name.
      size: `(N, H, W, C)`, whatever the layout; of a series `(N, L, C)`, of a volume
        `(N, D, H, W, C)`.
      hidden: hidden units of the MLP; 0 for an MLP of one layer.
      kernel_size: of the convolution, a number or one for each side of the map.
      residual: whether a residual is added.
      biases: whether the MLP and the convolution have them.
      half_weights: whether weights beside a half map are of its type instead of float32.
      fill: what the map holds, one of `FILLS`.
      options: further keywords of the function; :func:`options` makes them.
      dtype: of the maps.
      data_format: "NHWC" or "NCHW": channels last or first.
      seed: of the random values, which all types and both layouts have in common.
    """

    function: str = "cbam"
    size: tuple[int, ...] = (2, 5, 7, 13)
    hidden: int = 3
    kernel_size: int | tuple[int, ...] = 3
    residual: bool = False
    biases: bool = True
    half_weights: bool = False
    fill: str = "normal"
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"
    data_format: str = "NHWC"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where a word is unknown, or the size is of no map."""
        for name, words in (("function", ARGUMENTS), ("fill", FILLS), ("dtype", EPSILON)):
            word = getattr(self, name)
            if word not in tuple(words):
                raise ValueError(f"Case: `{name}` must be one of {', '.join(words)}, got {word!r}")
        if not 3 <= len(self.size) <= 5:
            raise ValueError(f"Case: `size` must be of a map, as (N, H, W, C), got {self.size}")

    def __str__(self) -> str:
        parts = [self.function, "x".join(map(str, self.size)), *self.words()]
        parts += [self.dtype] * (self.dtype != "float32")
        parts += [self.data_format] * (self.data_format != "NHWC")
        return "-".join(parts)

    def words(self) -> list[str]:
        """The options, a word each."""
        words = []
        if "kernel" in self.names:
            sides = (self.kernel_size,) if isinstance(self.kernel_size, int) else self.kernel_size
            words.append("k" + "x".join(map(str, sides)))
        for key, value in self.options:
            words.append(f"mlp_{value}" if key == "mlp_activation" else str(value))
        words += ["residual"] * self.residual + ["half_weights"] * self.half_weights
        words += ["no_biases"] * (not self.biases)
        return words + [self.fill] * (self.fill != "normal")

    def replace(self, **changes: Any) -> Case:
        """The same case but for `changes`."""
        return dataclasses.replace(self, **changes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that the call takes, in the order of its arguments."""
        names = ARGUMENTS[self.function]
        if self.hidden == 0:
            names = tuple(name for name in names if name not in ("w1", "b1"))
        if not self.biases:
            names = tuple(name for name in names if name not in ("b0", "b1", "bias"))
        return (*names, "residual") if self.residual else names

    @property
    def kernel_sides(self) -> tuple[int, ...]:
        """The size of the convolution along each side of the map."""
        size = self.kernel_size
        return (size,) * (len(self.size) - 2) if isinstance(size, int) else size

    @property
    def weights_dtype(self) -> str:
        """The type of the weights."""
        return self.dtype if self.half_weights else compute_type(self.dtype)

    @property
    def hands_on_a_half(self) -> bool:
        """Whether several ops compute it and hand on maps or descriptors of a half type."""
        from cbam_ops import _call

        op = _call.op_of(self.function)
        args = _call.Arguments(**dict(self.options), w1=self.hidden or None)
        composed = bool(_call.halves(op, args)) or not _call.is_fused(op, args)
        return composed and self.dtype in ("float16", "bfloat16")

    @property
    def is_one_call(self) -> bool:
        """Whether one call of a kernel, with weights of its type, is the whole case."""
        composed = ("order", "spatial_first") in self.options
        return len(self.size) != 3 and not composed and not self.half_weights

    @property
    def kernel_options(self) -> dict[str, Any]:
        """The options in the kernels' words, with the layout."""
        return {"data_format": self.data_format, **dict(self.options)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every argument that some function takes, maps as in NHWC."""
        c = self.size[-1]
        hidden = self.hidden or c
        return {
            "x": self.size,
            "w0": (c, hidden),
            "b0": (hidden,),
            "w1": (hidden, c),
            "b1": (c,),
            "kernel": (*self.kernel_sides, 2, 1),
            "bias": (1,),
            "gamma": (1,),
            "beta": (1,),
            "residual": self.size,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The arguments, as numpy arrays of the types and in the layout that the call takes."""
        import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by it)

        generator = np.random.default_rng((self.seed, *self.size))
        fill = FILLS[self.fill]
        shapes = self.shapes()
        # Scales that keep the gates' logits near 1, so that no sigmoid saturates.
        scales = {
            "w0": fill.weights * self.size[-1] ** -0.5,
            "w1": (self.hidden or 1) ** -0.5,
            "kernel": fill.weights / np.prod(self.kernel_sides) ** 0.5,
        }
        arrays = {}
        for name in self.names:
            value = generator.normal(size=shapes[name]) * scales.get(name, 1.0)
            if name == "x":
                value = fill.make(value, self.dtype)
            if name in MAPS and self.data_format == "NCHW":
                value = np.moveaxis(value, -1, 1)
            dtype = self.dtype if name in MAPS else self.weights_dtype
            arrays[name] = value.astype(np.dtype(dtype), order="C")
        return arrays

    def draw(self) -> dict[str, tf.Tensor]:
        """:meth:`arrays` as tensors."""
        import tensorflow as tf

        return {name: tf.constant(array) for name, array in self.arrays().items()}

    def call(self, module: Any, tensors: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        """All outputs of the function of `module`: y, then the gates where there are any."""
        arguments = [tensors.get(name) for name in ARGUMENTS[self.function]]
        keywords: dict[str, Any] = {"data_format": self.data_format, **dict(self.options)}
        if not self.function.endswith("pool"):
            keywords.update(residual=tensors.get("residual"), return_gates=True)
        outputs = getattr(module, self.function)(*arguments, **keywords)
        return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]

    def output_names(self) -> tuple[str, ...]:
        """What the outputs of `call` are, in order."""
        return OUTPUTS[self.function]

    def cotangents(self, outputs: list[Any]) -> list[Any]:
        """A gradient for each output, exactly representable in every type.

        Args:
          outputs: tensors or numpy arrays; the gradients are of their kind, shape and type.
        """
        generator = np.random.default_rng(7)
        values = [generator.integers(-8, 9, size=output.shape) / 8.0 for output in outputs]
        pairs = list(zip(values, outputs, strict=True))
        if all(isinstance(output, np.ndarray) for output in outputs):
            return [value.astype(output.dtype) for value, output in pairs]
        import tensorflow as tf

        return [tf.constant(value, output.dtype) for value, output in pairs]

    def gradients(self, module: Any, tensors: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The gradient of every argument, by its name, from gradients of every output."""
        return self._outputs_and_gradients(module, tensors)[1]

    def evaluate(self, module: Any, tensors: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Outputs and gradients, by the names `y` ..., `dx`, `dw0` ..., `d_residual`."""
        outputs, gradients = self._outputs_and_gradients(module, tensors)
        return dict(zip(self.output_names(), outputs, strict=True)) | {
            gradient_name(name): gradient for name, gradient in gradients.items()
        }

    def _outputs_and_gradients(
        self, module: Any, tensors: dict[str, tf.Tensor]
    ) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(list(tensors.values()))
            outputs = self.call(module, tensors)
        gradients = tape.gradient(
            outputs,
            tensors,
            output_gradients=self.cotangents(outputs),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return outputs, gradients

    def compare(
        self,
        actual: Mapping[str, tf.Tensor],
        tensors: dict[str, tf.Tensor],
        *,
        magnitudes: Mapping[str, np.ndarray] | None = None,
        truth: Mapping[str, tf.Tensor | np.ndarray] | None = None,
    ) -> list[Finding]:
        """Every output and gradient against the truth.

        Args:
          actual: what :meth:`evaluate` gave for `tensors`.
          tensors: the arguments.
          magnitudes: what the sums behind results come to without their signs, where it is known.
            Of gradients and of float64 results, the largest value is an estimate from below.
          truth: to be taken instead of the reference's results in float64.
        """
        reference_truth, stock = truth_and_stock(self, tensors, "evaluate")
        truth = truth or reference_truth
        types = {gradient_name(name): tensor.dtype for name, tensor in tensors.items()}
        smallest = SMALLEST_NORMAL[compute_type(self.dtype)] if self.fill == "denormal" else 0.0
        findings = []
        for name, tensor in actual.items():
            if name in types and self.fill in NOT_FINITE:
                continue
            if tensor.dtype != types.get(name, tensor.dtype):
                fault = f"{name}: type {tensor.dtype.name} instead of {types[name].name}"
                findings.append(Finding(name, error=np.inf, fault=fault))
                continue
            value, exact, ordinary = map(np.asarray, (tensor, truth[name], stock[name]))
            scale = (magnitudes or {}).get(name, 0.0)
            if name in types or self.dtype == "float64":
                scale = np.maximum(scale, _largest(exact))
            findings.append(
                compare(value, exact, ordinary, name, magnitude=scale, smallest=smallest)
            )
        return findings

    def examine(self, module: Any) -> list[Finding]:
        """What :func:`worst_of` says of several draws, each compared as :meth:`compare` does.

        They have the seeds from that of this case on, and are `DRAWS`.

        Args:
          module: what has the function, say `cbam_ops`.
        """
        cases = [self.replace(seed=self.seed + index) for index in range(DRAWS)]
        inputs = [(case, case.draw()) for case in cases]
        return worst_of(
            case.compare(case.evaluate(module, tensors), tensors) for case, tensors in inputs
        )

    def check(
        self,
        module: Any,
        tensors: dict[str, tf.Tensor] | None = None,
        *,
        magnitudes: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Asserts that :meth:`compare` finds no fault in what `module` computes.

        Args:
          module: what has the function, say `cbam_ops`.
          tensors: the arguments; those of :meth:`draw` if they are not given.
          magnitudes: see :meth:`compare`.
        """
        tensors = self.draw() if tensors is None else tensors
        findings = self.compare(self.evaluate(module, tensors), tensors, magnitudes=magnitudes)
        faults = [finding.fault for finding in findings if finding.fault]
        assert not faults, "\n  ".join([f"{self}:", *faults])


def options(**values: Any) -> tuple[tuple[str, Any], ...]:
    """The options of a case, in the form in which it can be hashed."""
    return tuple(values.items())


def gradient_name(argument: str) -> str:
    """What the gradient of an argument is called."""
    return "d_residual" if argument == "residual" else f"d{argument}"


def cast(tensors: Mapping[str, tf.Tensor], dtype: str) -> dict[str, tf.Tensor]:
    """The same values in another type."""
    import tensorflow as tf

    return {name: tf.cast(tensor, dtype) for name, tensor in tensors.items()}


def truth_and_stock(case: Case, tensors: Mapping[str, tf.Tensor], what: str) -> Any:
    """`case.<what>` of the reference in float64, and in the compute type of `tensors`."""
    import tensorflow as tf

    from cbam_ops import reference

    truth, stock = (cast(tensors, dtype) for dtype in ("float64", "float32"))
    if case.hands_on_a_half:  # so does an ordinary composition
        stock = {**stock, **{name: tensors[name] for name in MAPS if name in tensors}}
    truth, stock = (getattr(case, what)(reference, v) for v in (truth, stock))
    if tensors["x"].dtype == tf.float64:
        # In float64 the truth is an ordinary evaluation itself. That errs as one in float32 does,
        # by as many roundings.
        def shrink(truth: tf.Tensor, stock: tf.Tensor) -> tf.Tensor:
            return truth + (tf.cast(stock, tf.float64) - truth) * 2.0**-29

        stock = tf.nest.map_structure(shrink, truth, stock)
    return truth, stock


# Every function with every option at least once; each runs in all types and both layouts.
OPTIONS = [
    Case(),
    Case(fill="relu", biases=False),
    Case(half_weights=True, kernel_size=7),
    Case(residual=True, options=options(activation="relu", mlp_activation="relu")),
    Case(residual=True, fill="relu", options=options(order="parallel")),
    Case(residual=True, options=options(order="spatial_first", activation="relu")),
    Case("cbam_with_batch_norm", kernel_size=7),
    Case(
        "cbam_with_batch_norm",
        residual=True,
        half_weights=True,
        options=options(order="parallel", activation="relu", epsilon=1e-5),
    ),
    Case("channel_attention", fill="relu", residual=True),
    Case("channel_attention", biases=False, options=options(pooling="avg", activation="relu")),
    Case("channel_attention", options=options(pooling="max", mlp_activation="relu")),
    Case("channel_attention", fill="relu", residual=True, options=options(mlp_merge="gates")),
    Case("cbam_with_batch_norm", biases=False, options=options(mlp_merge="gates")),
    Case(options=options(mlp_merge="hidden", activation="relu")),
    Case("spatial_attention", fill="relu", kernel_size=7, biases=False),
    Case("spatial_attention", residual=True, options=options(activation="relu")),
    Case("spatial_attention_with_batch_norm", fill="relu"),
    # Series and volumes.
    Case(size=(2, 37, 13), kernel_size=7),
    Case("cbam_with_batch_norm", size=(3, 19, 8), residual=True, half_weights=True),
    Case("channel_attention", size=(2, 21, 9), fill="relu", options=options(pooling="avg")),
    Case("spatial_attention", size=(2, 33, 5), fill="relu", options=options(activation="relu")),
    Case("channel_pool", size=(2, 31, 5), fill="relu"),
    Case("spatial_pool", size=(2, 17, 12), fill="relu"),
    Case(size=(2, 3, 4, 5, 13), residual=True, fill="relu", options=options(activation="relu")),
    Case(size=(2, 4, 3, 3, 9), kernel_size=(1, 3, 5), options=options(order="parallel")),
    Case("cbam_with_batch_norm", (2, 3, 5, 4, 8), options=options(order="spatial_first")),
    Case("channel_attention", size=(2, 3, 2, 5, 17), half_weights=True, fill="relu"),
    Case("spatial_attention_with_batch_norm", size=(2, 4, 5, 3, 6), residual=True),
    Case("channel_pool", size=(2, 4, 3, 5, 7), fill="relu"),
    Case("spatial_pool", size=(2, 3, 5, 4, 9), fill="relu"),
    Case("channel_pool", fill="relu"),
    Case("spatial_pool", fill="relu"),
]

# Sizes that vectors, tiles and halos must get right; these run in float32 (and float16, whose
# conversion has tails of its own) and both layouts.
SIZES = [
    Case(size=(1, 1, 1, 1), hidden=1, kernel_size=1),
    Case(size=(3, 1, 1, 33), hidden=2, kernel_size=7),
    Case(size=(2, 1, 9, 3), hidden=1, kernel_size=11),  # a map smaller than the kernel
    Case(size=(2, 3, 2, 257), hidden=16, kernel_size=5, fill="relu"),
    Case(size=(5, 17, 1, 16), hidden=1, kernel_size=3),
    Case(size=(1, 31, 29, 64), hidden=4, kernel_size=7, residual=True),
    Case(size=(9, 4, 4, 8), hidden=8, kernel_size=7, options=options(activation="relu")),
    Case("spatial_attention", size=(2, 64, 63, 1), kernel_size=7),
    Case(size=(2, 9, 8, 17), hidden=2, kernel_size=(7, 1)),
    Case("cbam_with_batch_norm", size=(2, 5, 19, 8), kernel_size=(3, 9), residual=True),
    Case("spatial_attention", size=(1, 4, 40, 33), kernel_size=(1, 11), fill="relu"),
    # Series: shorter than the kernel, longer than what is taken at a time.
    Case(size=(2, 1500, 33), kernel_size=11, residual=True),
    Case("cbam_with_batch_norm", size=(2, 201, 8), kernel_size=7),
    Case("spatial_attention", size=(3, 65, 5), kernel_size=401, fill="saturated"),
    Case("channel_attention", size=(2, 2, 3, 1025), hidden=64),
    Case("channel_pool", size=(2, 70, 61, 5)),
    Case("spatial_pool", size=(2, 3, 5, 515)),
    Case(size=(2, 4, 6, 10), fill="equal"),
]

# Large enough to be shared out among threads: by samples, and within one sample.
LARGE = [
    Case(size=(1, 56, 56, 128), hidden=8, kernel_size=7),
    Case(size=(5, 28, 28, 256), hidden=16, kernel_size=7, residual=True),
    Case("cbam_with_batch_norm", size=(16, 7, 7, 512), hidden=32, kernel_size=7),
    Case("channel_pool", size=(1, 100, 100, 96)),
    Case("spatial_pool", size=(1, 100, 100, 96)),
]
