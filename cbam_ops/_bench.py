"""What `cbam-ops bench` and the suite in the repository's `benchmarks/` time with.

A case is a call of the module on a map; a provider is who computes it: the fused op, or a baseline,
what a user would run instead. Each sets a case up once; the same functions are then checked against
the reference in float64 and timed, in turns, beside the framework's own copy of the map. The suite
adds more cases and baselines, memory, and processes of its own; nothing here knows it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cbam_ops

if TYPE_CHECKING:
    from cbam_ops import testing

Row = dict[str, Any]
Tensors = dict[str, Any]

OURS = "ours"
RATIO, KERNEL_SIZE = 16, 7
WEIGHTS = ("w0", "b0", "w1", "b1", "kernel", "bias")
RESNET50 = ((56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048))

_ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# Forward: x is read and y written. Backward: x and dy are read, dx is written. A step is both.
_MAPS_MOVED = {"forward": 2, "backward": 3, "step": 5}
# With the residual and the ReLU inside: the residual is read too; y is read again to see where the
# ReLU let pass, and the residual's gradient is written.
_MAPS_MOVED_BLOCK = {"forward": 3, "backward": 5, "step": 8}

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

# A call of a TensorFlow function from Python costs 0.1 to 0.5 ms, as long as the module itself on a
# small map; in a network nobody pays it per module. So calls of small maps are chained in one graph
# until they touch this many bytes of x.
_CHAIN_BYTES, _CHAIN_LIMIT = 100 * 2**20, 32

# The least number of timed calls, and of those that take longer than _SLOW seconds.
_RUNS, _RUNS_SLOW, _SLOW = 7, 3, 0.4
_MOST_RUNS = 400
# One turn of a provider among the others lasts about this long, or one call.
_TURN_SECONDS = 0.02
# Idle threads of OpenMP and of TensorFlow's pool spin before they sleep: the next one waits.
_SETTLE_SECONDS = 0.004


# --- cases ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the module on a map of `n` x `h` x `w` x `c`, and who computes it.

    `op` is "cbam", or "cbam+add+relu": the end of a residual block, `relu(cbam(x) + residual)`; or
    "cbam-1d", of a series of length `h`, and "cbam-3d", of a volume whose `h` rows are slices of
    `w` x `w`, one after the other.
    `threads` is how many the frameworks get; 0 stands for all that there are.
    """

    group: str
    n: int
    h: int
    w: int
    c: int
    dtype: str = "float32"
    layout: str = "NHWC"
    op: str = "cbam"
    threads: int = 0
    modes: tuple[str, ...] = ("forward", "backward", "step")
    providers: tuple[str, ...] = (OURS, "tf-graph", "xla")

    @property
    def name(self) -> str:
        """Names the case in filters and in the progress bar."""
        words = [self.group, f"{self.n}x{self.h}x{self.w}x{self.c}", self.dtype, self.layout]
        words += [self.op] * (self.op != "cbam") + [f"{self.threads}threads"] * bool(self.threads)
        return "/".join(words)

    @property
    def hidden(self) -> int:
        """Hidden units of the MLP: C / 16, at least 1."""
        return max(1, self.c // RATIO)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of the map."""
        volume = (self.h // self.w, self.w, self.w)
        return {"cbam-1d": (self.h,), "cbam-3d": volume}.get(self.op, (self.h, self.w))

    @property
    def has_residual(self) -> bool:
        """Whether a residual and a ReLU are in it."""
        return self.op == "cbam+add+relu"

    @property
    def problem(self) -> testing.Case:
        """The call itself: what it takes and how that is drawn."""
        from cbam_ops import testing  # needs TensorFlow; reports do not

        problem = testing.Case(
            size=(self.n, *self.sides, self.c),
            hidden=self.hidden,
            kernel_size=KERNEL_SIZE,
            dtype=self.dtype,
            data_format=self.layout,
        )
        if not self.has_residual:
            return problem
        return problem.replace(residual=True, options=testing.options(activation="relu"))

    @property
    def columns(self) -> Row:
        """The columns of a row that say what the case is."""
        names = ("op", "n", "h", "w", "c", "dtype", "layout", "threads", "group")
        return {name: getattr(self, name) for name in names}

    @property
    def map_bytes(self) -> int:
        """Bytes of one map."""
        return self.n * self.h * self.w * self.c * _ITEM_SIZE[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, which are float32 for every type of map."""
        hidden = self.hidden
        return 4 * (2 * self.c * hidden + hidden + self.c + 2 * KERNEL_SIZE ** len(self.sides) + 1)

    def bytes_moved(self, mode: str) -> int:
        """Bytes that the arithmetic must move to or from memory, all else being kept in caches.

        Each map once per direction, the weights once per pass and their gradients once.
        """
        maps = _MAPS_MOVED_BLOCK if self.has_residual else _MAPS_MOVED
        passes = {"forward": 1, "backward": 2, "step": 3}[mode]
        return maps[mode] * self.map_bytes + passes * self.weight_bytes


def quick_cases() -> list[Case]:
    """Two minutes' worth: the stages of ResNet-50 at batch 16, and other kinds once each."""
    case = functools.partial(Case, modes=("forward", "step"))
    return [
        *(case("resnet50", 16, *size) for size in RESNET50),
        case("resnet50", 16, *RESNET50[2], dtype="bfloat16"),
        case("resnet50", 16, *RESNET50[2], dtype="float16"),
        case("resnet50", 1, *RESNET50[0]),
        case("unfriendly", 16, 28, 28, 33),
    ]


# --- inputs ---------------------------------------------------------------------------------------


class Inputs:
    """The arguments of a case as numpy arrays in float32, already rounded to its types.

    `sets` are dicts of the maps x, dy and, where the case has one, residual. Timed calls go round
    them, so that a map is not in the cache just because the last call left it there.
    """

    def __init__(self, sets: list[Tensors], weights: Tensors) -> None:
        self.sets, self.weights = sets, weights
        self._made: dict[Any, list[Tensors]] = {}

    def as_tensors(self, kind: Any, make: Callable[[np.ndarray], Any]) -> list[Tensors]:
        """The sets as tensors of one kind, made once for all who ask for it."""
        if kind not in self._made:
            self._made[kind] = [
                {name: make(array) for name, array in maps.items()} for maps in self.sets
            ]
        return self._made[kind]


def draw_inputs(case: Case, cache_bytes: int, seed: int = 0) -> Inputs:
    """Seeded values; as many sets of maps as `rotated_bytes` hold, at least one, at most 512."""
    drawn = case.problem.replace(seed=seed).arrays()
    # Exactly representable in every type.
    drawn["dy"] = np.random.default_rng(7).integers(-8, 9, size=drawn["x"].shape) / 8
    arrays = {name: array.astype(np.float32) for name, array in drawn.items()}
    weights = {name: arrays.pop(name) for name in WEIGHTS}
    chain = chain_length(case)
    count = int(np.clip(-(-rotated_bytes(cache_bytes) // case.map_bytes), 1, 512))
    # The first is what results are checked on; the others are other memory, other values.
    sets = [
        {name: np.roll(array.reshape(-1), 61 * i).reshape(array.shape) for name, array in
         arrays.items()} for i in range(-(-count // chain) * chain)
    ]  # fmt: skip
    return Inputs(sets, weights)


def rotated_bytes(cache_bytes: int) -> int:
    """Of maps that timed calls go round: four caches, so that none finds what the last one left.

    But a 64th of the memory at most, since every provider has maps of its own, with gradients: a
    virtual machine may see the whole cache of its host, of which it has a share.
    """
    return min(4 * cache_bytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 64)


def chain_length(case: Case) -> int:
    """How many calls one timed TensorFlow call chains."""
    return int(np.clip(round(_CHAIN_BYTES / case.map_bytes), 1, _CHAIN_LIMIT))


# --- providers ------------------------------------------------------------------------------------


Timer = Callable[[Callable[[], Any]], float]


@dataclasses.dataclass
class Prepared:
    """A case set up by one provider.

    Attributes:
      run: by mode that it can, a function of the index of a call, which returns what it computed.
      calls: how many times the module, or the copy, runs in one such call.
      step: one step on the first inputs; returns `y` and the gradients, alive.
      results: those of `step` as arrays by name, maps in the case's layout.
      copy: copies maps into fresh outputs, the framework's own way; by index of a call.
      framework: whose copy that is.
      timer: the seconds that a call takes, where it is not over when it returns.
      errors: of the results; see `errors_of`.
    """

    run: dict[str, Callable[[int], Any]]
    calls: int
    step: Callable[[], Any]
    results: Callable[[], dict[str, np.ndarray]]
    copy: Callable[[int], Any]
    framework: str = "tensorflow"
    timer: Timer | None = None
    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Provider:
    """Who computes a case: its framework ("tensorflow", "torch"), and how it sets a case up."""

    framework: str
    setup: Callable[[Case, Inputs], Prepared]

    @property
    def installed(self) -> bool:
        """Whether the framework is there."""
        return importlib.util.find_spec(self.framework) is not None


Forward = Callable[[Tensors, Tensors], Any]  # maps without dy, weights -> y


def _step(forward: Forward, maps: Tensors, weights: Tensors) -> Tensors:
    """`y` and, by name, the gradients of the maps and the weights."""
    import tensorflow as tf

    from cbam_ops.testing import gradient_name

    sources = {name: tensor for name, tensor in maps.items() if name != "dy"}
    everything = {**sources, **weights}
    with tf.GradientTape() as tape:
        tape.watch(everything)
        y = forward(sources, weights)
    gradients = tape.gradient(y, everything, maps["dy"])
    return {"y": y, **{gradient_name(name): gradient for name, gradient in gradients.items()}}


def setup_tensorflow(
    case: Case, inputs: Inputs, forward: Forward, weights: Tensors, *, jit: bool = False
) -> Prepared:
    """Sets up a forward pass on tensors; `weights` are tensors or variables to differentiate by."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # every case traces the same few functions again
    maps = inputs.as_tensors("tf", lambda array: tf.cast(tf.constant(array), case.dtype))
    sources = [{name: t for name, t in each.items() if name != "dy"} for each in maps]
    function = functools.partial(tf.function, autograph=False, jit_compile=jit or None)
    forward_function = function(lambda maps: forward(maps, weights))
    step_function = function(lambda maps: _step(forward, maps, weights))
    chain = chain_length(case)

    def chained(function: Callable[..., Any], calls: Sequence[Any]) -> Any:
        """One after the other, as the modules of a network run; returns what the last one does.

        Results of the others are only waited for. Ops that read them would go to other threads,
        whose search for more work afterwards takes processors from the module's.
        """
        results: Any = None
        for argument in calls:
            done = []
            if results is not None:  # nothing else keeps a call whose results nobody reads
                values = tf.nest.flatten(results)
                done = [tf.raw_ops.Assert(condition=True, data=values)]
            with tf.control_dependencies(done):
                # The chain must hold for whatever in the function does not wait for its inputs.
                argument = tf.nest.map_structure(tf.identity, argument)
            results = function(argument)
        return results

    def timed(function: Any, arguments: Sequence[Any]) -> Callable[[int], Any]:
        if chain == 1:
            return lambda i: function(arguments[i % len(arguments)])
        groups = [arguments[i : i + chain] for i in range(0, len(arguments), chain)]
        # One argument in the traced structure. As flat arguments each tensor takes 5 ms more:
        # TensorFlow tries the structure first and writes the tensors into an error nobody sees.
        chain_function = tf.function(lambda calls: chained(function, calls), autograph=False)
        return lambda i: chain_function(groups[i % len(groups)])

    @functools.cache
    def timed_backward() -> Callable[[int], Any]:
        """The gradient alone, as a graph of its own over what the forward pass keeps for it.

        The pair that TensorFlow itself makes of a function whose gradient another graph takes. A
        tape in eager mode would time zeros for all that was kept, and their addition, with it.
        """
        concrete = forward_function.get_concrete_function(
            tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), sources[0])
        )
        forward_pair, backward_pair = concrete._delayed_rewrite_functions.forward_backward(1)

        def backward_once(arguments: Any) -> Any:
            return backward_pair._call_flat(list(arguments), [])

        captured = concrete.captured_inputs
        kept = [forward_pair.call_flat(*tf.nest.flatten(each), *captured)[1:] for each in sources]
        arguments = [(each["dy"], *kept_of) for each, kept_of in zip(maps, kept, strict=True)]
        return timed(tf.function(backward_once, autograph=False), arguments)

    def results() -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in step_function(maps[0]).items()}

    run = {}
    if "forward" in case.modes:
        run["forward"] = timed(forward_function, sources)
    if "backward" in case.modes:  # traced at the first call: checks alone do not need it
        run["backward"] = lambda i: timed_backward()(i)
    if "step" in case.modes:
        run["step"] = timed(step_function, maps)
    copy_function = tf.function(lambda x: tf.raw_ops.DeepCopy(x=x), autograph=False)

    def until_done(call: Callable[[], Any]) -> float:
        def wait() -> Any:
            result = call()
            tf.test.experimental.sync_devices()
            return result

        return host_seconds(wait)

    return Prepared(
        run=run,
        calls=chain,
        timer=until_done if tf.config.list_physical_devices("GPU") else None,
        step=lambda: step_function(maps[0]),
        results=results,
        copy=timed(copy_function, [each["x"] for each in maps]),
    )


def call_of(case: Case, module: Any) -> Forward:
    """`module.cbam` with the options of the case."""
    return lambda maps, weights: case.problem.call(module, {**maps, **weights})[0]


def tensorflow_provider(module: Callable[[], Any], *, jit: bool = False) -> Provider:
    """Who computes with the `cbam` of a module, outside or inside XLA."""

    def setup(case: Case, inputs: Inputs) -> Prepared:
        import tensorflow as tf

        weights = {name: tf.constant(value) for name, value in inputs.weights.items()}
        call = call_of(case, module())

        def forward(maps: Tensors, weights: Tensors) -> Any:
            with cbam_ops.use_implementation("native"):  # or an error
                return call(maps, weights)

        return setup_tensorflow(case, inputs, forward, weights, jit=jit)

    return Provider("tensorflow", setup)


PROVIDERS: dict[str, Provider] = {
    OURS: tensorflow_provider(lambda: cbam_ops),
    "tf-graph": tensorflow_provider(lambda: cbam_ops.reference),
    "xla": tensorflow_provider(lambda: cbam_ops.reference, jit=True),
}


# --- checks ---------------------------------------------------------------------------------------


def truth_of(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """The reference in float64: `y` and every gradient, on the first inputs as rounded."""
    import tensorflow as tf

    def in_float64(arrays: Tensors) -> Tensors:
        return {name: tf.constant(array, tf.float64) for name, array in arrays.items()}

    forward = call_of(case, cbam_ops.reference)
    found = _step(forward, in_float64(inputs.sets[0]), in_float64(inputs.weights))
    return {name: value.numpy() for name, value in found.items()}


def errors_of(
    results: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """By name the largest and the root-mean-square error, relative to the truth's.

    A bias's gradient is a sum that may cancel to nearly nothing; its errors are relative to what is
    larger, itself or the gradient of the weights that it belongs to. Infinite where a result is
    missing, of another shape, or not finite.
    """
    found = {}
    for name, expected in truth.items():
        value = results.get(name)
        found[name] = (math.inf, math.inf)
        if value is None or value.shape != expected.shape:
            continue
        difference = value.astype(np.float64) - expected
        if np.isfinite(difference).all():
            scales = [expected, *([truth[_BIAS_OF[name]]] if name in _BIAS_OF else [])]
            largest = max(float(np.max(np.abs(scale))) for scale in scales) or 1.0
            norm = max(float(np.linalg.norm(scale.reshape(-1))) for scale in scales) or 1.0
            off = float(np.max(np.abs(difference))), float(np.linalg.norm(difference.reshape(-1)))
            found[name] = (off[0] / largest, off[1] / norm)
    return found


def disagreement(
    case: Case, provider: str, errors: Mapping[str, tuple[float, float]]
) -> str | None:
    """What is wrong with a provider's results of these errors; None if they are the module's."""
    for name, (_, norm) in errors.items():
        limits = _AGREE_Y if name == "y" else _AGREE_GRADIENTS
        limit = (_AGREE_OURS if provider.startswith(OURS) else limits)[case.dtype]
        if not norm <= limit:
            return f"{name} is off by {norm:.2g} (root mean square, relative), allowed {limit:.2g}"
    return None


@dataclasses.dataclass
class Outcome:
    """What became of a case: rows of figures, and why others are missing.

    `wrong` are providers whose results do not agree with the truth; `absent` those which cannot
    compute the case here.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)


def prepare(
    case: Case,
    cache_bytes: int,
    providers: Mapping[str, Provider] = PROVIDERS,
    truth_of: Callable[[Case, Inputs], dict[str, np.ndarray]] = truth_of,
) -> tuple[Inputs, dict[str, Prepared], Outcome]:
    """Sets the case up by each of its providers, and leaves out whose results are not the truth.

    The inputs are the first draw, of `testing.DRAWS`, for which all results are the truth, or the
    last. Where two values are equal but for rounding, it decides for a whole gradient which is the
    maximum, and of a map of 100,000 positions one may be such; a wrong computation is wrong in all.
    """
    from cbam_ops import testing

    for seed in range(testing.DRAWS):
        inputs = draw_inputs(case, cache_bytes, seed)
        prepared, outcome = _set_up(case, inputs, providers, truth_of)
        if not outcome.wrong:
            break
    return inputs, prepared, outcome


def _set_up(
    case: Case,
    inputs: Inputs,
    providers: Mapping[str, Provider],
    truth_of: Callable[[Case, Inputs], dict[str, np.ndarray]],
) -> tuple[dict[str, Prepared], Outcome]:
    outcome, prepared = Outcome(), {}
    truth = truth_of(case, inputs)
    for name in case.providers:
        provider = providers[name]
        if not provider.installed:
            outcome.absent[name] = f"{provider.framework} is not installed"
            continue
        try:
            candidate = provider.setup(case, inputs)
            candidate.errors = errors_of(candidate.results(), truth)
        except Exception as error:  # whatever a framework raises for what it cannot do
            outcome.absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        wrong = disagreement(case, name, candidate.errors)
        if wrong is None:
            prepared[name] = candidate
        else:
            outcome.wrong[name] = wrong
    return prepared, outcome


# --- time -----------------------------------------------------------------------------------------


def host_seconds(call: Callable[[], Any]) -> float:
    """How long a call takes that waits for what it computes; what it returns is freed after."""
    started = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - started
    del result
    return elapsed


def interleave(
    functions: Mapping[Any, Callable[[int], Any]],
    seconds: float,
    *,
    settle: bool = False,
    pairs: bool = False,
    timers: Mapping[Any, Timer | None] | None = None,
) -> dict[Any, list[float]]:
    """Times functions in turns, so that a busy moment of the machine hits all of them alike.

    Args:
      functions: by name; each is called with a running number.
      seconds: how long to time each, at least a few calls.
      settle: whether to wait before each turn until another framework's threads have gone to sleep.
      timers: by name, what times a call where that is not `host_seconds`.
      pairs: whether all get the same number of calls, one per turn, for differences between them.

    Returns:
      The seconds of each call, by name.
    """
    estimates = {}
    counter = dict.fromkeys(functions, 0)

    def once(name: Any) -> float:
        counter[name] += 1
        timer = (timers or {}).get(name) or host_seconds
        return timer(lambda: functions[name](counter[name]))

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


def spread(times: Sequence[float], calls: int = 1) -> Row:
    """The columns of a row that say how long it took."""
    low, median, high = (float(t) / calls for t in np.quantile(times, [0.2, 0.5, 0.8]))
    return {"median_s": median, "q20_s": low, "q80_s": high, "runs": len(times), "calls": calls}


def time_prepared(
    case: Case, inputs: Inputs, prepared: Mapping[str, Prepared], seconds: float
) -> list[Row]:
    """A row per mode and provider, each timed that long."""
    rows: list[Row] = []
    if not prepared:
        return rows
    # The copy takes its turns among the others: its bandwidth is that of the same minute.
    copies = {("copy", p.framework): p.copy for p in prepared.values()}
    calls = {p.framework: p.calls for p in prepared.values()}
    timers = {name: p.timer for name, p in prepared.items()}
    copy_timers = {("copy", p.framework): p.timer for p in prepared.values()}
    for mode in case.modes:
        able = {name: p for name, p in prepared.items() if mode in p.run}
        functions: dict[Any, Any] = {name: p.run[mode] for name, p in able.items()}
        times = interleave(
            {**functions, **copies},
            seconds,
            settle=len(copies) > 1,
            timers={**timers, **copy_timers},
        )
        copy_seconds = {
            framework: spread(times["copy", framework], count)["median_s"]
            for framework, count in calls.items()
        }
        spreads = {name: spread(times[name], p.calls) for name, p in able.items()}
        for name, p in able.items():
            median, copy = spreads[name]["median_s"], copy_seconds[p.framework]
            moved = case.bytes_moved(mode)
            ours = spreads[OURS]["median_s"] if OURS in spreads else None
            rows.append(
                {
                    "mode": mode,
                    "provider": name,
                    **spreads[name],
                    "inputs": len(inputs.sets),
                    "bytes": moved,
                    "gb_per_s": moved / median / 1e9,
                    "copy_s": copy,
                    "copies": median / copy,
                    "percent_of_copy_bandwidth": 50 * moved / case.map_bytes * copy / median,
                    "ours_is_faster": ours and median / ours,
                    "error": error_of(p.errors, mode),
                }
            )
            if p.timer is not None:
                # What the caller waits for: the call is not over then.
                issued = [host_seconds(functools.partial(p.run[mode], i)) for i in range(_RUNS)]
                rows[-1]["host_s"] = spread(issued, p.calls)["median_s"]
    return rows


def error_of(errors: Mapping[str, tuple[float, float]], mode: str) -> float:
    """The largest relative error of what a mode computes: y, the gradients, or both."""
    names = [name for name in errors if mode == "step" or (name == "y") == (mode == "forward")]
    return max(errors[name][0] for name in names)


# --- machine --------------------------------------------------------------------------------------


def cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes() -> int:
    """The size of the last-level cache; 32 MB where the system does not tell."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        digits, scale = text.rstrip("KM"), {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        found += [int(digits) * scale] if digits.isdigit() else []
    return max(found, default=32 * 2**20)
