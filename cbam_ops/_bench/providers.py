"""Who computes a case: the fused op, and what a user would run instead of it.

A provider sets a case up once; the same functions are then checked, timed and watched for memory.
None has a definition of its own where the package has one: the TensorFlow ones run
`cbam_ops.reference`, the Keras one the stock layers of `cbam_ops.models`. PyTorch's is written
here, and checked against the reference like all the others before it is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cbam_ops._bench.cases import KERNEL_SIZE, OURS, OURS_XLA, RATIO, Case

# Weights in the order of the arguments of `cbam_ops.cbam`.
WEIGHTS = ("w0", "b0", "w1", "b1", "kernel", "bias")

# A call of a TensorFlow function from Python costs 0.1 to 0.5 ms, as long as the module itself on a
# small map; in a network nobody pays it per module. So calls of small maps are chained in one graph
# until they touch this many bytes of x.
_CHAIN_BYTES = 100 * 2**20
_CHAIN_LIMIT = 32
# Forward passes of PyTorch that wait for their backward pass to be timed: at most so many, and not
# more than this many bytes of x, each with all that it keeps.
_RECORDED_LIMIT, _RECORDED_BYTES = 8, 400 * 2**20


@dataclasses.dataclass
class Inputs:
    """The arguments of a case as numpy arrays in float32, the maps already rounded to its type.

    `x`, `dy` and, where the case has one, `residual` are lists: timed calls go round them, so that
    a map is not in the cache just because the last call left it there.
    """

    x: list[np.ndarray]
    dy: list[np.ndarray]
    residual: list[np.ndarray]
    weights: dict[str, np.ndarray]
    _made: dict[Any, list[Any]] = dataclasses.field(default_factory=dict)

    def as_tensors(self, name: str, kind: Any, make: Callable[[np.ndarray], Any]) -> list[Any]:
        """The maps called `name` as tensors of one kind, made once for all who ask for it."""
        key = (name, kind)
        if key not in self._made:
            self._made[key] = [make(array) for array in getattr(self, name)]
        return self._made[key]

    @property
    def sets(self) -> int:
        """How many maps there are to go round."""
        return len(self.x)


def draw_inputs(case: Case, cache_bytes: int) -> Inputs:
    """Seeded normal values; as many maps as four caches hold, at least one, at most 512."""
    import tensorflow as tf

    random = np.random.default_rng(20180717)
    c, hidden, k = case.c, case.hidden, KERNEL_SIZE

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def rounded(value: np.ndarray) -> np.ndarray:
        if case.dtype == "float32":
            return value
        return tf.cast(tf.cast(tf.constant(value), case.dtype), tf.float32).numpy()

    # Scales that keep the logits near 1, so that no gate saturates.
    weights = {
        "w0": normal(c, hidden, scale=c**-0.5),
        "b0": normal(hidden, scale=0.1),
        "w1": normal(hidden, c, scale=hidden**-0.5),
        "b1": normal(c, scale=0.1),
        "kernel": normal(k, k, 2, 1, scale=1 / k),
        "bias": normal(1, scale=0.1),
    }
    count = int(np.clip(-(-4 * cache_bytes // case.map_bytes), 1, 512))
    chain = chain_length(case)
    count = -(-count // chain) * chain
    first = {name: rounded(normal(*case.shape)) for name in ("x", "dy", "residual")}

    def turned(name: str) -> list[np.ndarray]:
        # The first is what results are checked on; the others are other memory, other values.
        return [np.roll(first[name].reshape(-1), 61 * i).reshape(case.shape) for i in range(count)]

    residual = turned("residual") if case.op == "cbam+add+relu" else []
    return Inputs(turned("x"), turned("dy"), residual, weights)


def chain_length(case: Case) -> int:
    """How many calls one timed TensorFlow call chains."""
    return int(np.clip(round(_CHAIN_BYTES / case.map_bytes), 1, _CHAIN_LIMIT))


@dataclasses.dataclass
class Prepared:
    """A case set up by one provider.

    Attributes:
      run: by mode, a function of the index of a call, which returns what it computed.
      calls: by mode, how many times the module runs in one such call.
      step: one step on the first inputs; returns `y` and the gradients, alive.
      results: those of `step` as float64 arrays by name, maps in the case's layout.
      copy: copies maps into fresh outputs, the framework's own way; by index of a call.
      copy_calls: how many maps that copies.
    """

    run: dict[str, Callable[[int], Any]]
    calls: dict[str, int]
    step: Callable[[], Any]
    results: Callable[[], dict[str, np.ndarray]]
    copy: Callable[[int], Any]
    copy_calls: int


Setup = Callable[[Case, Inputs], Prepared]


class NotAvailableError(Exception):
    """The provider cannot compute the case here; the text says why."""


# --- TensorFlow -----------------------------------------------------------------------------------

Forward = Callable[
    [Any, Sequence[Any], Sequence[Any]], Any
]  # x, residual ([] or [r]), weights -> y


def _setup_tensorflow(
    case: Case,
    inputs: Inputs,
    forward: Forward,
    weights: Sequence[Any],
    *,
    jit: bool = False,
    to_results: Callable[[Sequence[Any]], dict[str, np.ndarray]] | None = None,
) -> Prepared:
    """Sets up a forward pass on tensors; `weights` are tensors or variables to differentiate by."""
    import tensorflow as tf

    x, dy, residual = (
        inputs.as_tensors(name, "tf", lambda array: tf.cast(tf.constant(array), case.dtype))
        for name in ("x", "dy", "residual")
    )
    sets = inputs.sets
    block = bool(residual)

    def at(i: int) -> list[Any]:
        return [x[i], dy[i], *([residual[i]] if block else [])]

    def forward_once(x: Any, *more: Any) -> Any:
        return forward(x, more, weights)

    def step_once(x: Any, dy: Any, *more: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, *more, *[w for w in weights if not isinstance(w, tf.Variable)]])
            y = forward(x, more, weights)
        return y, tape.gradient(y, [x, *more, *weights], dy)

    forward_function = tf.function(forward_once, autograph=False, jit_compile=jit or None)
    step_function = tf.function(step_once, autograph=False, jit_compile=jit or None)
    chain = chain_length(case)

    def chained(function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> Any:
        """One after the other, as the modules of a network run; returns what the last one does.

        Results of the others are only waited for. Ops that read them would go to other threads,
        whose search for more work afterwards takes processors from the module's.
        """
        results: Any = None
        for arguments in calls:
            done = []
            if results is not None:  # nothing else keeps a call whose results nobody reads
                values = tf.nest.flatten(results)
                done = [tf.raw_ops.Assert(condition=True, data=values)]
            with tf.control_dependencies(done):
                # The chain must hold for whatever in the function does not wait for its inputs.
                arguments = [tf.identity(a) for a in arguments]
            results = function(*arguments)
        return results

    def timed(function: Any, pick: Callable[[int], list[Any]]) -> Callable[[int], Any]:
        if chain == 1:
            calls = [pick(i) for i in range(sets)]
            return lambda i: function(*calls[i % sets])
        starts = range(0, sets, chain)
        groups = [[pick(i) for i in range(start, start + chain)] for start in starts]
        # One argument in the traced structure. As flat arguments each tensor takes 5 ms more:
        # TensorFlow tries the structure first and writes the tensors into an error nobody sees.
        chain_function = tf.function(lambda calls: chained(function, calls), autograph=False)
        return lambda i: chain_function(groups[i % len(groups)])

    def timed_backward() -> Callable[[int], Any]:
        """The gradient alone, as a graph of its own over what the forward pass keeps for it.

        The pair that TensorFlow itself makes of a function whose gradient another graph takes. A
        tape in eager mode would time zeros for all that was kept, and their addition, with it.
        """
        concrete = forward_function.get_concrete_function(
            *[tf.TensorSpec(a.shape, a.dtype) for a in (x[0], *at(0)[2:])]
        )
        forward_pair, backward_pair = concrete._delayed_rewrite_functions.forward_backward(1)

        def backward_once(dy: Any, *kept: Any) -> Any:
            return backward_pair._call_flat([dy], list(kept))

        backward_function = tf.function(backward_once, autograph=False)
        kept = []
        for i in range(sets):
            sources = [x[i], *at(i)[2:], *concrete.captured_inputs]
            kept.append(forward_pair.call_flat(*sources)[1:])
        return timed(backward_function, lambda i: [dy[i], *kept[i]])

    def backward(i: int) -> Any:
        if not prepared_backward:  # at the first call: checks alone do not need it
            prepared_backward.append(timed_backward())
        return prepared_backward[0](i)

    prepared_backward: list[Callable[[int], Any]] = []

    def results() -> dict[str, np.ndarray]:
        y, gradients = step_function(*at(0))
        names = ["dx", *(["d_residual"] if block else [])]
        found = {"y": y, **dict(zip(names, gradients, strict=False))}
        arrays = {name: tf.cast(value, tf.float64).numpy() for name, value in found.items()}
        rest = gradients[len(names) :]
        if to_results is not None:
            return arrays | to_results(rest)
        return arrays | {
            f"d{name}": tf.cast(value, tf.float64).numpy()
            for name, value in zip(WEIGHTS, rest, strict=True)
        }

    @tf.function(autograph=False)
    def copy_function(x: Any) -> Any:
        return tf.raw_ops.DeepCopy(x=x)

    run = {}
    if "forward" in case.modes:
        run["forward"] = timed(forward_function, lambda i: [x[i], *at(i)[2:]])
    if "backward" in case.modes:
        run["backward"] = backward
    if "step" in case.modes:
        run["step"] = timed(step_function, at)
    return Prepared(
        run=run,
        calls=dict.fromkeys(run, chain),
        step=lambda: step_function(*at(0)),
        results=results,
        copy=timed(copy_function, lambda i: [x[i]]),
        copy_calls=chain,
    )


def _tensors(inputs: Inputs) -> list[Any]:
    import tensorflow as tf

    return [tf.constant(inputs.weights[name]) for name in WEIGHTS]


def _call(module: Any, case: Case, layout: str) -> Forward:
    """`module.cbam` with the options of the case."""
    activation = "relu" if case.op == "cbam+add+relu" else None

    def forward(x: Any, residual: Sequence[Any], weights: Sequence[Any]) -> Any:
        return module.cbam(
            x,
            *weights,
            data_format=layout,
            residual=residual[0] if residual else None,
            activation=activation,
        )

    return forward


def _ours(case: Case, inputs: Inputs, jit: bool) -> Prepared:
    import cbam_ops

    call = _call(cbam_ops, case, case.layout)

    def forward(x: Any, residual: Sequence[Any], weights: Sequence[Any]) -> Any:
        with cbam_ops.use_implementation("native"):
            return call(x, residual, weights)

    return _setup_tensorflow(case, inputs, forward, _tensors(inputs), jit=jit)


def _reference(case: Case, inputs: Inputs, jit: bool, transposed: bool) -> Prepared:
    import tensorflow as tf

    from cbam_ops import reference

    if not transposed:
        forward = _call(reference, case, case.layout)
    else:
        nhwc = _call(reference, case, "NHWC")

        def forward(x: Any, residual: Sequence[Any], weights: Sequence[Any]) -> Any:
            x, *rest = (tf.transpose(map_, [0, 2, 3, 1]) for map_ in (x, *residual))
            return tf.transpose(nhwc(x, rest, weights), [0, 3, 1, 2])

    return _setup_tensorflow(case, inputs, forward, _tensors(inputs), jit=jit)


def _keras(case: Case, inputs: Inputs) -> Prepared:
    """The stock layers that `cbam_ops.models` builds its comparison networks of."""
    import keras
    import tensorflow as tf

    from cbam_ops import models

    policy = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy[case.dtype])
    try:
        block = case.op == "cbam+add+relu"
        map_ = keras.Input(case.shape[1:], dtype=case.dtype)
        shortcut = keras.Input(case.shape[1:], dtype=case.dtype)
        options = {
            "ratio": min(RATIO, case.c),
            "kernel_size": KERNEL_SIZE,
            "data_format": "channels_last" if case.layout == "NHWC" else "channels_first",
        }
        output = models._stock_module(map_, shortcut, "cbam", "out", options)
        model = keras.Model([map_, shortcut], output)
        if not block:
            model = keras.Model(map_, model.get_layer("cbam_spatial_scale").output)
    finally:
        keras.config.set_dtype_policy(before)

    # Keras's order of the variables is its own; their shapes and layers say what each is.
    layers = {"cbam_mlp_0": ("w0", "b0"), "cbam_mlp_1": ("w1", "b1")}
    layers["cbam_spatial_conv"] = ("kernel", "bias")
    variables, names = [], []
    for layer, weight_names in layers.items():
        for name, variable in zip(weight_names, model.get_layer(layer).weights, strict=True):
            variable.assign(inputs.weights[name])
            variables.append(variable.value)
            names.append(name)

    def forward(x: Any, residual: Sequence[Any], weights: Sequence[Any]) -> Any:
        return model([x, *residual] if residual else x, training=True)

    def to_results(gradients: Sequence[Any]) -> dict[str, np.ndarray]:
        return {
            f"d{name}": tf.cast(gradient, tf.float64).numpy()
            for name, gradient in zip(names, gradients, strict=True)
        }

    return _setup_tensorflow(case, inputs, forward, variables, to_results=to_results)


# --- PyTorch --------------------------------------------------------------------------------------


def _torch(case: Case, inputs: Inputs, compiled: bool, channels_last: bool) -> Prepared:
    import torch
    from torch.nn import functional

    dtype = getattr(torch, case.dtype)
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def map_tensor(array: np.ndarray) -> Any:
        tensor = torch.from_numpy(array)
        if case.layout == "NHWC":
            tensor = tensor.permute(0, 3, 1, 2)  # PyTorch names the axes N, C, H, W
        return tensor.to(dtype=dtype, memory_format=memory, copy=True)

    x, dy, residual = (
        inputs.as_tensors(name, ("torch", channels_last), map_tensor)
        for name in ("x", "dy", "residual")
    )
    for tensor in (*x, *residual):
        tensor.requires_grad_(True)
    sets = inputs.sets
    values = dict(inputs.weights)
    values["kernel"] = np.ascontiguousarray(values["kernel"].transpose(3, 2, 0, 1))
    weights = [
        torch.from_numpy(values[name].copy()).to(dtype).requires_grad_(True) for name in WEIGHTS
    ]

    def forward(x: Any, residual: list[Any], w0: Any, b0: Any, w1: Any, b1: Any, k: Any, b: Any):  # type: ignore[no-untyped-def]  # noqa: E501
        def mlp(t: Any) -> Any:
            return torch.addmm(b1, torch.relu(torch.addmm(b0, t, w0)), w1)

        gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))
        u = x * gate[:, :, None, None]
        planes = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)
        y = u * torch.sigmoid(functional.conv2d(planes, k, b, padding=KERNEL_SIZE // 2))
        return torch.relu(y + residual[0]) if residual else y

    if compiled:
        # What the tape keeps may be used again: backward is timed from one forward pass.
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False
        torch._dynamo.reset()
        forward = torch.compile(forward, dynamic=False, fullgraph=True)

    def sources(i: int) -> list[Any]:
        return [x[i], *residual[i : i + 1], *weights]

    def run_forward(i: int) -> Any:
        i %= sets
        with torch.no_grad():
            return forward(x[i], residual[i : i + 1], *weights)

    def step(i: int) -> Any:
        i %= sets
        y = forward(x[i], residual[i : i + 1], *weights)
        return y, torch.autograd.grad(y, sources(i), dy[i])

    recorded: list[tuple[Any, int]] = []

    def backward(i: int) -> Any:
        if not recorded:
            for j in range(min(sets, max(1, _RECORDED_BYTES // case.map_bytes), _RECORDED_LIMIT)):
                recorded.append((forward(x[j], residual[j : j + 1], *weights), j))
        y, j = recorded[i % len(recorded)]
        return torch.autograd.grad(y, sources(j), dy[j], retain_graph=True)

    def results() -> dict[str, np.ndarray]:
        def array(tensor: Any) -> np.ndarray:
            return tensor.detach().to(torch.float64).numpy()

        def map_array(tensor: Any) -> np.ndarray:
            return array(tensor.permute(0, 2, 3, 1) if case.layout == "NHWC" else tensor)

        y, gradients = step(0)
        found = {"y": map_array(y), "dx": map_array(gradients[0])}
        if residual:
            found["d_residual"] = map_array(gradients[1])
        for name, gradient in zip(WEIGHTS, gradients[-len(WEIGHTS) :], strict=True):
            found[f"d{name}"] = array(gradient)
        found["dkernel"] = found["dkernel"].transpose(2, 3, 1, 0)
        return found

    functions = {"forward": run_forward, "backward": backward, "step": step}

    def copy(i: int) -> Any:
        return x[i % sets].detach().clone()

    return Prepared(
        run={mode: functions[mode] for mode in case.modes},
        calls=dict.fromkeys(case.modes, 1),
        step=lambda: step(0),
        results=results,
        copy=copy,
        copy_calls=1,
    )


# --- the list -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Provider:
    """A name in the tables, what it is, and how it sets up a case."""

    name: str
    title: str
    framework: str  # "tensorflow" or "torch": whose copy of a map is its yardstick
    setup: Setup


def _providers() -> Iterator[Provider]:
    yield Provider(
        OURS, "cbam_ops", "tensorflow", lambda case, inputs: _ours(case, inputs, jit=False)
    )
    yield Provider(
        OURS_XLA,
        "cbam_ops inside XLA",
        "tensorflow",
        lambda case, inputs: _ours(case, inputs, jit=True),
    )
    for transposed in (False, True):
        for jit in (False, True):
            name = ("xla" if jit else "tf-graph") + ("-transposed" if transposed else "")
            title = ("XLA" if jit else "TF graph") + (", transposed to NHWC" if transposed else "")
            yield Provider(
                name,
                title,
                "tensorflow",
                lambda case, inputs, jit=jit, transposed=transposed: _reference(  # type: ignore[misc]
                    case, inputs, jit, transposed
                ),
            )
    yield Provider("keras", "Keras layers", "tensorflow", _keras)
    for compiled in (False, True):
        for last in (True, False):
            kind = "compile" if compiled else "eager"
            name = f"torch-{kind}-{'channels-last' if last else 'contiguous'}"
            title = f"{'torch.compile' if compiled else 'PyTorch'}, " + (
                "channels last" if last else "contiguous"
            )
            yield Provider(
                name,
                title,
                "torch",
                lambda case, inputs, compiled=compiled, last=last: _torch(  # type: ignore[misc]
                    case, inputs, compiled, last
                ),
            )


PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _providers()}


def installed(name: str) -> bool:
    """Whether the framework of a provider is there."""
    return importlib.util.find_spec(PROVIDERS[name].framework) is not None
