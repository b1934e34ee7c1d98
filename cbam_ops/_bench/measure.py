"""Checks one case against float64, then times it and watches its memory."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbam_ops._bench import providers as providers_module
from cbam_ops._bench.cases import OURS, OURS_XLA, Case
from cbam_ops._bench.providers import PROVIDERS, WEIGHTS, Inputs, Prepared

# Before a provider is timed, the root of its summed squared errors must be under this part of the
# root of the summed squares, for y and for every gradient. It stops a wrong computation, not an
# inaccurate one: how accurate each is, is in the table; how accurate ours must be, the tests say.
# Stock graphs in half types round `x * channel_gate` before they look for its maxima: the gradient
# then goes to another channel at every few positions, and sums of thousands of terms are rounded
# over and over. Ours does neither and has no such excuse.
_AGREE_OURS = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 2e-3}
_AGREE_Y = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
_AGREE_GRADIENTS = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.2}
_BIAS_OF = {"db0": "dw0", "db1": "dw1", "dbias": "dkernel"}

# The least number of timed calls, and of those that take longer than _SLOW seconds.
_RUNS, _RUNS_SLOW, _SLOW = 7, 3, 0.4
_MOST_RUNS = 400
# One turn of a provider among the others lasts about this long, or one call.
_TURN_SECONDS = 0.02
# Idle threads of OpenMP and of TensorFlow's pool spin before they sleep: the next one waits.
_SETTLE_SECONDS = 0.004

# Peaks are read in pages of a process whose counters are a few hundred KB apart.
_LEAST_MAP_FOR_MEMORY = 4 * 2**20


# --- time -----------------------------------------------------------------------------------------


def interleave(
    functions: Mapping[Any, Callable[[int], Any]],
    seconds: float,
    *,
    settle: bool = False,
    pairs: bool = False,
) -> dict[Any, list[float]]:
    """Times functions in turns, so that a busy moment of the machine hits all of them alike.

    Args:
      functions: by name; each is called with a running number, and waits for what it computes.
      seconds: how long to time each, at least a few calls.
      settle: whether to wait before each turn until another framework's threads have gone to sleep.
      pairs: whether all get the same number of calls, one per turn, for differences between them.

    Returns:
      The seconds of each call, by name. What a call returns is freed after its time is taken.
    """
    estimates = {}
    counter = dict.fromkeys(functions, 0)

    def once(name: Any) -> float:
        counter[name] += 1
        started = time.perf_counter()
        result = functions[name](counter[name])
        elapsed = time.perf_counter() - started
        del result
        return elapsed

    times: dict[Any, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in functions:
            first = once(name)  # untimed: the first call may trace or compile
            estimates[name] = first if first > 2 * _SLOW else once(name)
        wanted = {}
        for name, estimate in estimates.items():
            least = _RUNS_SLOW if estimate > _SLOW else _RUNS
            wanted[name] = int(np.clip(seconds / max(estimate, 1e-6), least, _MOST_RUNS))
        if pairs:
            wanted = dict.fromkeys(wanted, min(wanted.values()))
        per_turn = {
            name: 1
            if pairs
            else max(1, min(int(_TURN_SECONDS / max(estimates[name], 1e-6)), -(-want // 5)))
            for name, want in wanted.items()
        }
        rounds = max(-(-want // per_turn[name]) for name, want in wanted.items())
        for round_ in range(rounds):
            for name in list(functions)[:: 1 if round_ % 2 else -1]:
                # Those that need few turns take them spread over all rounds.
                turns = -(-wanted[name] // per_turn[name])
                if (round_ * turns) // rounds == ((round_ + 1) * turns) // rounds:
                    continue
                if settle:
                    time.sleep(_SETTLE_SECONDS)
                if estimates[name] < _TURN_SECONDS:
                    once(name)  # brings back the code and the weights: not the maps, which rotate
                times[name] += [once(name) for _ in range(per_turn[name])]
    finally:
        if collecting:
            gc.enable()
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """The median and the 20 % and 80 % quantiles."""
    low, median, high = np.quantile(times, [0.2, 0.5, 0.8])
    return float(median), float(low), float(high)


# --- memory ---------------------------------------------------------------------------------------


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    for line in status.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _trim() -> None:
    """Gives free heap memory back to the system, so that its next use shows."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library: peaks may come out too low
        pass


def peak_bytes(function: Callable[[], Any], attempts: int = 3) -> int | None:
    """How many bytes the process has more, at most, during a call than before it.

    The least of some attempts, since other threads of the process allocate too. None where the
    system does not let a process reset its peak (other than Linux, some containers).
    """
    found = []
    try:
        for _ in range(attempts):
            _trim()
            before = _status_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            result = function()
            found.append(_status_bytes("VmHWM") - before)
            del result
    except OSError:
        return None
    return max(0, min(found))


@functools.lru_cache
def shows_memory(framework: str) -> bool:
    """Whether `peak_bytes` sees what a framework allocates.

    TensorFlow's allocator with oneDNN, the default on processors with AVX512_VNNI, keeps what it
    has had; with TF_ENABLE_ONEDNN_OPTS=0 the system's is used.
    """
    if framework != "tensorflow":
        return True
    import tensorflow as tf

    values = 2**24
    seen = peak_bytes(lambda: tf.ones([values]))
    return seen is not None and seen >= 2 * values  # half of it


# --- truth ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Truth:
    """The reference in float64 on the inputs as they were rounded, and how far others are off."""

    values: dict[str, np.ndarray]

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Truth:
        """Evaluates the reference, `y` and every gradient."""
        import tensorflow as tf

        from cbam_ops import reference

        def tensor(array: np.ndarray) -> Any:
            return tf.cast(tf.constant(array), tf.float64)

        x, dy = tensor(inputs.x[0]), tensor(inputs.dy[0])
        residual = [tensor(array) for array in inputs.residual[:1]]
        weights = [tensor(inputs.weights[name]) for name in WEIGHTS]
        names = ["dx", *["d_residual"] * len(residual), *[f"d{name}" for name in WEIGHTS]]
        with tf.GradientTape() as tape:
            tape.watch([x, *residual, *weights])
            y = reference.cbam(
                x,
                *weights,
                data_format=case.layout,
                residual=residual[0] if residual else None,
                activation="relu" if residual else None,
            )
        gradients = tape.gradient(y, [x, *residual, *weights], dy)
        values = {"y": y, **dict(zip(names, gradients, strict=True))}
        return cls({name: value.numpy() for name, value in values.items()})

    def errors(self, results: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        """By name the largest and the root-mean-square error, relative to the truth's.

        A bias's gradient is a sum that may cancel to nearly nothing; its errors are relative to
        what is larger, itself or the gradient of the weights that it belongs to.

        Infinite where a result is missing, of another shape, or not finite.
        """
        found = {}
        for name, truth in self.values.items():
            value = results.get(name)
            if value is None or value.shape != truth.shape or not np.isfinite(value).all():
                found[name] = (math.inf, math.inf)
                continue
            difference = value - truth
            scales = [truth, *([self.values[_BIAS_OF[name]]] if name in _BIAS_OF else [])]
            largest = max(float(np.max(np.abs(scale))) for scale in scales) or 1.0
            norm = max(float(np.linalg.norm(scale.reshape(-1))) for scale in scales) or 1.0
            found[name] = (
                float(np.max(np.abs(difference))) / largest,
                float(np.linalg.norm(difference.reshape(-1))) / norm,
            )
        return found


def disagreement(
    case: Case, provider: str, errors: Mapping[str, tuple[float, float]]
) -> str | None:
    """What is wrong with a provider's results of these errors; None if they are the module's."""
    for name, (_, norm) in errors.items():
        limits = _AGREE_Y if name == "y" else _AGREE_GRADIENTS
        limit = (_AGREE_OURS if provider in (OURS, OURS_XLA) else limits)[case.dtype]
        if not norm <= limit:
            return f"{name} is off by {norm:.2g} (root mean square, relative), allowed {limit:.2g}"
    return None


# --- one case -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What came of a case: rows of figures, and why others are missing.

    `wrong` are providers whose results do not agree with the truth; `absent` those which cannot
    compute the case here.
    """

    rows: list[dict[str, Any]]
    wrong: dict[str, str]
    absent: dict[str, str]


def measure(case: Case, seconds: float, cache_bytes: int, *, timed: bool = True) -> Outcome:
    """Checks, times and weighs a case.

    Args:
      case: what to measure, with a known number of threads.
      seconds: how long to time each provider in each mode.
      cache_bytes: the size of the last-level cache, which the rotated inputs must exceed.
      timed: False only checks the results.
    """
    outcome = Outcome([], {}, {})
    inputs = providers_module.draw_inputs(case, cache_bytes)
    truth = Truth.of(case, inputs)
    prepared: dict[str, Prepared] = {}
    errors: dict[str, dict[str, tuple[float, float]]] = {}
    for name in case.providers:
        if not providers_module.installed(name):
            outcome.absent[name] = f"{PROVIDERS[name].framework} is not installed"
            continue
        try:
            candidate = PROVIDERS[name].setup(case, inputs)
            errors[name] = truth.errors(candidate.results())
        except Exception as error:  # whatever a framework raises for what it cannot do
            outcome.absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        wrong = disagreement(case, name, errors[name])
        if wrong is None:
            prepared[name] = candidate
        else:
            outcome.wrong[name] = wrong
    del truth
    if not timed:
        outcome.rows = [
            {"mode": mode, "provider": name, "error": _error(errors[name], mode)}
            for name in prepared
            for mode in case.modes
        ]
        return outcome

    weighs = case.map_bytes >= _LEAST_MAP_FOR_MEMORY
    # What a step returns is no extra: y, the gradients of the maps and of the weights.
    returned = (3 if case.op == "cbam+add+relu" else 2) * case.map_bytes + case.weight_bytes
    extra: dict[str, int | None] = {}
    for name in prepared:
        shows = weighs and shows_memory(PROVIDERS[name].framework)
        peak = peak_bytes(prepared[name].step) if shows else None
        extra[name] = None if peak is None else max(0, peak - returned)

    frameworks = {PROVIDERS[name].framework: name for name in reversed(prepared)}
    settle = len(frameworks) > 1
    copies: dict[str, float] = {}
    copy_functions = {
        ("copy", framework): prepared[name].copy for framework, name in frameworks.items()
    }
    for mode in case.modes:
        # The copy takes its turns among the others: its bandwidth is that of the same minute.
        functions: dict[Any, Callable[[int], Any]] = {
            name: prepared[name].run[mode] for name in prepared
        }
        times = interleave({**functions, **copy_functions}, seconds, settle=settle)
        for framework, name in frameworks.items():
            per_copy = [t / prepared[name].copy_calls for t in times["copy", framework]]
            copies[framework] = quantiles(per_copy)[0]
        ours = None
        if OURS in prepared:
            ours = quantiles(times[OURS])[0] / prepared[OURS].calls[mode]
        for name in prepared:
            calls = prepared[name].calls[mode]
            median, low, high = quantiles([t / calls for t in times[name]])
            moved = case.bytes_moved(mode)
            copy_seconds = copies[PROVIDERS[name].framework]
            outcome.rows.append(
                {
                    "mode": mode,
                    "provider": name,
                    "median_s": median,
                    "q20_s": low,
                    "q80_s": high,
                    "runs": len(times[name]),
                    "calls": calls,
                    "inputs": inputs.sets,
                    "bytes": moved,
                    "operations": case.operations(mode),
                    "gb_per_s": moved / median / 1e9,
                    "copy_s": copy_seconds,
                    "copies": median / copy_seconds,
                    "percent_of_copy_bandwidth": 100
                    * (moved / median)
                    / (2 * case.map_bytes / copy_seconds),
                    "ours_is_faster": None if ours is None else median / ours,
                    "error": _error(errors[name], mode),
                    "extra_bytes": extra[name] if mode == "step" else None,
                    "extra_percent_of_x": 100 * extra[name] / case.map_bytes  # type: ignore[operator]
                    if mode == "step" and extra[name] is not None
                    else None,
                }
            )
    return outcome


def _error(errors: Mapping[str, tuple[float, float]], mode: str) -> float:
    """The largest relative error of what a mode computes: y, the gradients, or both."""
    names = [name for name in errors if mode == "step" or (name == "y") == (mode == "forward")]
    return max(errors[name][0] for name in names)
