"""Hand-written attention in a Keras model, replaced by this package's layers: :func:`fuse`.

By proposing and proving, in five steps:

1. The graph: the calls of a functional model, in order, as Keras keeps them.
2. Regions: one map goes in, a map of the same shape comes out, and nothing else leaves.
3. Candidates: the layers of this package whose weights have the shapes of the region's.
4. Proof: on random maps and random weights, region and candidate have the same outputs, the same
   gradients and the same moving statistics, in float64 where the region computes in it. How the
   region is written does not matter; nothing is told from names.
5. A new model, which calls the candidate where the region's last call was.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import itertools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from cbam_ops import _call, _console, layers, testing
from cbam_ops._dialects import dialects
from cbam_ops._graphs import (
    Graph,
    Rebuild,
    checked,
    graphs_of,
    is_graph,
    is_own,
    sublayers_of,
    unwrapped,
    variables_of,
)

__all__ = ["Attention", "fuse"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """A place of the model with attention: a row of the report of :func:`fuse`.

    Attributes:
      layer: the layer there, in the new model; inside nested models after their names, with "/".
      found: what it is; empty if it was left as it was.
      dialect: the name in `cbam_ops.dialects` of how it is written; empty if it has none.
      options: the arguments of the `cbam_ops` layer that is there now.
      replaced: the names of the layers and ops that it replaces.
      difference: the largest difference in the proof, of an output, a gradient or a moving
        statistic, relative to its largest value; NaN without a proof.
      dtype: the type in which the proof was computed.
      reads: how often the map is read in a forward pass, before and after.
      reason: why it was left as it was; empty if it was replaced.
    """

    layer: str
    found: str = ""
    dialect: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    difference: float = math.nan
    dtype: str = ""
    reads: tuple[int, int] | None = None
    reason: str = ""


class _LeftError(Exception):
    """Why a region is left as it is, in a few words."""


# --- graph ----------------------------------------------------------------------------------------


def _run(nodes: Iterable[Any], values: dict[int, Any]) -> None:
    """Runs calls on values of tensors by their ids, and adds what they return."""
    for node in nodes:
        arguments, keywords = node.arguments.fill_in(values)
        outputs = keras.tree.flatten(node.operation(*arguments, **keywords))
        values.update(zip(map(id, node.outputs), outputs, strict=True))


# --- regions --------------------------------------------------------------------------------------


class _Region(NamedTuple):
    """Calls that make one map of another, and perhaps of a residual."""

    nodes: tuple[Any, ...]  # in order
    map: Any
    residual: Any
    output: Any

    @property
    def inputs(self) -> list[Any]:
        """The tensors that go in, each once."""
        both = [self.map] if self.residual is None else [self.map, self.residual]
        return both[:1] if both[0] is both[-1] else both

    @property
    def operations(self) -> list[Any]:
        return list({id(node.operation): node.operation for node in self.nodes}.values())

    @property
    def variables(self) -> list[Any]:
        found = (variable for operation in self.operations for variable in variables_of(operation))
        return list({id(variable): variable for variable in found}.values())


# A CBAM with a batch norm and 1x1 convolutions takes fewer than thirty calls.
_MOST_CALLS = 80


def _regions(graph: Graph, last: Any, strict: bool = True) -> Iterator[_Region]:
    """The regions that end with a call, small ones first.

    Not `strict`: with those that something leaves besides the output, or with other weights.
    """
    if len(last.outputs) != 1 or len(last.outputs[0].shape) not in _call.SIDES:
        return
    (output,) = last.outputs
    inside = {id(last): last}
    border = {id(tensor): tensor for tensor in last.input_tensors}
    while True:
        if len(border) == 1:
            (start,) = border.values()
            nodes = sorted(inside.values(), key=lambda node: graph.place[id(node)])
            region = _Region(tuple(nodes), start, None, output)
            if _alike(start, output) and not (strict and _leaks(graph, region)):
                yield region
        # Of all tensors at the border, the one that is made last cannot lead to another.
        made = [graph.producer[id(t)] for t in border.values() if id(t) in graph.producer]
        if not made or len(inside) == _MOST_CALLS:
            return
        node = max(made, key=lambda node: graph.place[id(node)])
        weights = variables_of(node.operation)
        if strict and not all(_may_belong(weight, output.shape) for weight in weights):
            return
        inside[id(node)] = node
        for tensor in node.outputs:
            border.pop(id(tensor), None)
        border.update((id(tensor), tensor) for tensor in node.input_tensors)


def _alike(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _leaks(graph: Graph, region: _Region) -> bool:
    """Whether something made inside is used outside, besides the output."""
    inside = {id(node) for node in region.nodes}
    made = (tensor for node in region.nodes for tensor in node.outputs)
    return any(
        id(tensor) in graph.outputs
        or any(id(node) not in inside for node in graph.consumers[id(tensor)])
        for tensor in made if tensor is not region.output
    )  # fmt: skip


def _may_belong(variable: Any, shape: Sequence[int | None]) -> bool:
    """Whether a weight may be attention's: a vector, a layer of an MLP, or a spatial kernel."""
    size = _core(variable.shape)
    in_mlp = len(size) == 2 and bool({*size} & {*shape})
    return len(size) < 2 or in_mlp or _is_spatial(variable.shape, len(shape))


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """Without leading ones, down to rank 2: 1x1 convolutions have the kernels of dense layers."""
    size = tuple(shape)
    while len(size) > 2 and size[0] == 1:
        size = size[1:]
    return size


def _is_spatial(shape: Sequence[int], rank: int) -> bool:
    """Whether it is that of a spatial kernel for maps of a rank."""
    *sides, inputs, outputs = shape if len(shape) == rank else (0, 0)
    return (inputs, outputs) == (2, 1) and all(k % 2 for k in sides)


# --- candidates -----------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """A layer of this package that a region may be."""

    layer: Any  # its class
    options: dict[str, Any]
    weights: dict[str, Any]  # the layer's attributes, and the region's variables
    maximum_first: bool = False  # the order of the region's spatial descriptors

    def make(self, shape: Sequence[int | None], **keywords: Any) -> Any:
        made = self.layer(**self.options, **keywords)
        made.build(tuple(shape))
        return made

    def with_options(self, options: dict[str, Any]) -> _Candidate:
        return self._replace(options={**self.options, **options}) if options else self

    def weights_of(self, layer: Any) -> dict[str, Any]:
        """The weights of a layer that was made."""
        return {name: getattr(layer, name) for name in self.weights if name != _FOLDED}

    def value(self, attribute: str, values: dict[str, Any], layer: Any) -> Any:
        """What a weight of the layer is, from values of the region's."""
        value = tf.reshape(values[attribute], getattr(layer, attribute).shape)
        if attribute == "spatial_kernel" and self.maximum_first:
            value = tf.reverse(value, [len(value.shape) - 2])
        if attribute == "moving_mean" and _FOLDED in values:
            value -= values[_FOLDED]
        return value


_SPATIAL = (layers.CBAM, layers.SpatialAttention)
_BATCH_NORM = {
    "batch_norm_gamma": "gamma",
    "batch_norm_beta": "beta",
    "moving_mean": "moving_mean",
    "moving_variance": "moving_variance",
}
_STATISTICS = ("moving_mean", "moving_variance")
# A bias of the spatial convolution before a batch norm. It only shifts the mean that is taken off.
_FOLDED = "folded_bias"


def _candidates(region: _Region) -> Iterator[_Candidate]:
    """Every layer that has the region's weights.

    Raises:
      _LeftError: there is none.
    """
    variables = region.variables
    if not variables:
        raise _LeftError("it has no weights")
    others = [v.name for v in variables if not tf.as_dtype(v.dtype).is_floating]
    if others:
        random = "seed" in others[0]
        raise _LeftError(
            "it draws random numbers" if random else f"{others[0]} is of no float type"
        )
    _policy(region)
    shape = region.output.shape
    if shape[1] is None and shape[-1] is None:
        raise _LeftError("its number of channels is open")
    norm = _batch_norm(region)
    found = False
    for data_format, channels in (("channels_last", shape[-1]), ("channels_first", shape[1])):
        if channels is None:
            continue  # no layer can be built
        for weights in _assignments(variables, channels, len(shape), norm):
            common = {"data_format": data_format, **_described(weights)}
            if norm is not None:
                common.update(
                    spatial_batch_norm=True,
                    batch_norm_momentum=norm.momentum,
                    batch_norm_epsilon=norm.epsilon,
                )
            for candidate in _with_options(weights, common):
                found = True
                yield candidate
    if not found:
        raise _LeftError(_misfit(variables))


def _batch_norm(region: _Region) -> Any:
    """The region's batch norm, or None."""
    everything = [layer for operation in region.operations for layer in sublayers_of(operation)]
    for layer in everything:
        if getattr(layer, "activity_regularizer", None) is not None:
            raise _LeftError(f"{layer.name} has an activity regularizer")
    norms = [v for v in everything if isinstance(v, keras.layers.BatchNormalization)]
    norms = list({id(norm): norm for norm in norms}.values())
    if not norms:
        return None
    if len(norms) > 1 or norms[0].moving_mean.shape != (1,):
        raise _LeftError("it has a batch norm elsewhere than before the spatial sigmoid")
    if not (norms[0].scale and norms[0].center) or norms[0].synchronized:
        raise _LeftError("its batch norm has no scale, no offset, or is synchronized")
    return norms[0]


_Shapes = dict[str, tuple[Any, ...]]


def _assignments(
    variables: list[Any], channels: int, rank: int, norm: Any
) -> Iterator[dict[str, Any]]:
    """Every way to take the variables for all weights of an MLP, a spatial convolution or both."""
    fixed = {} if norm is None else {ours: getattr(norm, its) for ours, its in _BATCH_NORM.items()}
    taken = {id(variable) for variable in fixed.values()}
    free = [variable for variable in variables if id(variable) not in taken]
    shapes = [tuple(variable.shape) for variable in free]
    mlps: list[_Shapes] = [{}]
    hidden = {size[1] for size in map(_core, shapes) if len(size) == 2 and size[0] == channels}
    for units in sorted(hidden):
        mlp = {"w0": (channels, units), "w1": (units, channels)}
        mlps += [mlp, {**mlp, "b0": (units,), "b1": (channels,)}]
        if units == channels:  # one layer
            mlps += [{"w0": mlp["w0"]}, {"w0": mlp["w0"], "b0": (units,)}]
    convolutions: list[_Shapes] = [] if fixed else [{}]
    for kernel in dict.fromkeys(shape for shape in shapes if _is_spatial(shape, rank)):
        bias = _FOLDED if fixed else "spatial_bias"
        convolutions += [{"spatial_kernel": kernel}, {"spatial_kernel": kernel, bias: (1,)}]
    for mlp, convolution in itertools.product(mlps, convolutions):
        for match in _matches(free, {**mlp, **convolution}):
            yield {**match, **fixed}


def _matches(variables: list[Any], wanted: _Shapes) -> Iterator[dict[str, Any]]:
    """Every way to give each name a variable of its shape, all variables used."""
    if len(variables) != len(wanted):
        return
    if not variables:
        yield {}
        return
    first, *rest = variables
    size = tuple(first.shape)
    for name, shape in wanted.items():
        ones = (1,) * (len(size) - len(shape))
        if size == (*ones, *shape):
            others = {key: value for key, value in wanted.items() if key != name}
            for match in _matches(rest, others):
                yield {name: first, **match}


def _described(weights: dict[str, Any]) -> dict[str, Any]:
    """The regularizers and constraints of the weights, as arguments."""
    groups = collections.defaultdict(list)  # those that the same arguments describe
    for weight in layers.CBAM._table:
        if weight.arguments and weight.attribute in weights:
            groups[weight.arguments].append(weights[weight.attribute])
    if _FOLDED in weights:
        groups[_FOLDED].append(weights[_FOLDED])
    arguments = {}
    for group, members in groups.items():
        for what in ("regularizer", "constraint"):
            module = getattr(keras, f"{what}s")
            kept = [getattr(variable, what, None) for variable in members]
            configs = [module.serialize(value) if value is not None else None for value in kept]
            if any(config != configs[0] for config in configs):
                raise _LeftError(f"its weights have different {what}s")
            if kept[0] is None:
                continue
            if group == _FOLDED:
                raise _LeftError(f"the bias before its batch norm has a {what}")
            if any(len(variable.shape) != len(_core(variable.shape)) for variable in members):
                if not isinstance(kept[0], (module.L1, module.L2, module.L1L2)):
                    raise _LeftError(f"a {what} of a 1x1 convolution depends on its shape")
            arguments[f"{group}_{what}"] = kept[0]
    return arguments


def _with_options(weights: dict[str, Any], common: dict[str, Any]) -> Iterator[_Candidate]:
    """The layers that have these weights, the less unusual first."""
    layer: Any = layers.SpatialAttention
    words = ["gate_activation"]
    if "w0" in weights:
        layer = layers.ChannelAttention
        hidden = weights["w0"].shape[-1] if "w1" in weights else 0
        common = {"hidden": hidden, "use_bias": "b0" in weights, **common}
        words += ["pooling", "mlp_activation", "mlp_merge", *["hidden_activation"] * bool(hidden)]
    if "spatial_kernel" in weights:
        sides = tuple(weights["spatial_kernel"].shape[:-2])
        size = sides if len(set(sides)) > 1 else sides[0]
        common = {"kernel_size": size, "spatial_use_bias": "spatial_bias" in weights, **common}
        if "w0" in weights:
            layer = layers.CBAM
            words += ["order"]
    orders = (False, True) if layer in _SPATIAL else (False,)
    choices = [*(_call.WORDS[name] for name in words), orders]
    places = itertools.product(*map(range, map(len, choices)))
    for place in sorted(places, key=lambda place: len(place) - place.count(0)):
        *chosen, maximum_first = (choice[i] for choice, i in zip(choices, place, strict=True))
        options = {**common, **dict(zip(words, chosen, strict=True))}
        merge = options.get("mlp_merge", "logits")
        if merge != "logits" and options["pooling"] != "avg+max":
            continue  # there is one branch
        if merge == "hidden" and not options["hidden"]:
            continue
        yield _Candidate(layer, options, weights, bool(maximum_first))


def _misfit(variables: list[Any]) -> str:
    """Why no layer has these weights."""
    sizes = [_core(variable.shape) for variable in variables]
    matrices = [size for size in sizes if len(size) == 2]
    if len(matrices) > 2 and len(set(matrices)) == 2:
        return "its MLPs are not shared"
    listed = [str(tuple(variable.shape)) for variable in variables]
    listed[6:] = ["..."] * (len(listed) > 6)
    return f"no layer has weights of these shapes: {', '.join(listed)}"


# --- proof ----------------------------------------------------------------------------------------

# Sides of probes where the model leaves them open, as many as their maps have.
_SIZES = ((5, 7, 4), (8, 3, 6))
# Maps of so many values are compared at their own size once, in their outputs.
_LARGE = 2**16


class _Fill(NamedTuple):
    """What a probe holds: a map of `testing.FILLS`, its scale, and the sign of `w0`, 0 for either.

    Positive maps and one sign make hidden units live, or dead, however few there are. A `far` probe
    shows what is cut off: hidden units are as large as the map, and gates are near 0 and 1 too, or
    with one sign near 1. Only outputs are compared: gradients have few digits there.
    """

    map: str
    scale: float = 1.0
    sign: int = 0
    far: bool = False

    def __str__(self) -> str:
        return f"{'large ' if self.far else ''}{self.map} values"


_FILLS = (
    _Fill("normal"),
    _Fill("steps"),
    _Fill("relu", 8.0, 1),
    _Fill("relu", 1.0, -1),
    _Fill("normal", 1024.0, far=True),
    _Fill("relu", 1024.0, 1, far=True),
)
# Logits of far probes are so many times as large, and outputs may differ by so many times as much.
_FAR, _STEEP = 16, 100
# Of a first comparison, which only chooses the candidate.
_NEAR = 1e-3
_TOLERANCES = {
    "float64": (testing.MODEL_FORWARD, testing.MODEL_GRADIENT),
    "float32": (testing.FLOAT32, testing.FLOAT32),
}


class _Outermost(keras.layers.Layer):
    """A call as a model makes it: layers inside take `training` from it."""

    def __init__(self, function: Callable[..., Any], dtype: str) -> None:
        super().__init__(dtype=dtype)
        self._function = function

    def call(self, *tensors: Any, training: bool = False) -> Any:
        return self._function(*tensors)


@contextlib.contextmanager
def _computing_in(dtype: str, operations: list[Any]) -> Iterator[None]:
    """Makes layers compute in a type, and functions inside them run without being traced.

    A traced function would keep the weights of a probe.
    """
    everything = [layer for operation in operations for layer in sublayers_of(operation)]
    # A model inside converts to the type of its inputs.
    inputs = [tensor for layer in everything if is_graph(layer) for tensor in layer.inputs]
    inputs = [tensor for tensor in inputs if tf.as_dtype(tensor.dtype).is_floating]
    places = [
        *((layer, "_dtype_policy", keras.DTypePolicy(dtype)) for layer in everything),
        *((tensor, "_dtype", dtype) for tensor in inputs),
        *((tensor._keras_history.operation, "_dtype", dtype) for tensor in inputs),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    default, eager = keras.config.dtype_policy(), tf.config.functions_run_eagerly()
    try:
        keras.config.set_dtype_policy(dtype)
        tf.config.run_functions_eagerly(True)
        for owner, name, value in places:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(places, before, strict=True):
            setattr(owner, name, value)
        tf.config.run_functions_eagerly(eager)
        keras.config.set_dtype_policy(default)


class _Probe:
    """Random maps and weights for a region, in one type."""

    def __init__(
        self, region: _Region, candidate: _Candidate, size: tuple[int, ...], fill: _Fill, dtype: str
    ) -> None:
        random = np.random.default_rng([*size, _FILLS.index(fill)])
        self.region, self.dtype = region, dtype

        def draw(values: np.ndarray) -> tf.Tensor:
            return tf.constant(values, dtype)

        def map_() -> tf.Tensor:
            values = testing.FILLS[fill.map].make(random.standard_normal(size), dtype)
            return draw(fill.scale * values)

        self.inputs = [map_() for _ in region.inputs]
        self.dy = draw(random.standard_normal(size))
        self.weights = {}
        for name, variable in candidate.weights.items():
            values = random.standard_normal(tuple(variable.shape))
            if name == "moving_variance":
                values = 0.5 + values**2
            elif name in ("w0", "w1", "spatial_kernel"):
                values *= 2 / math.sqrt(values.size / values.shape[-1])
                last = "w1" if fill.far and "w1" in candidate.weights else "w0"
                if name in (last, "spatial_kernel"):  # gates stay away from 0 and 1, or do not
                    values *= (_FAR if fill.far else 1) / fill.scale
            if fill.sign and (name == "w0" or (name == "w1" and fill.far)):
                values = fill.sign * np.abs(values)
            self.weights[name] = draw(values)

    def run_region(self, *tensors: Any) -> Any:
        values = dict(zip(map(id, self.region.inputs), tensors, strict=True))
        _run(self.region.nodes, values)
        return values[id(self.region.output)]

    def of_region(self, candidate: _Candidate, **how: Any) -> dict[str, Any]:
        with _computing_in(self.dtype, self.region.operations):
            return self._evaluate(self.run_region, candidate.weights, self.weights.get, **how)

    def of_candidate(self, candidate: _Candidate, layer: Any, **how: Any) -> dict[str, Any]:
        with_residual = self.region.residual is not None

        def call(*tensors: Any) -> Any:
            return layer(tensors[0], residual=tensors[-1] if with_residual else None)

        def value(name: str) -> Any:
            return candidate.value(name, self.weights, layer)

        results = self._evaluate(call, candidate.weights_of(layer), value, **how)
        if _FOLDED in self.weights and "moving_mean" in results:
            results["moving_mean"] += self.weights[_FOLDED]
        return results

    def _evaluate(
        self,
        function: Callable[..., Any],
        variables: dict[str, Any],
        value: Callable[[str], Any],
        training: bool = False,
        gradients: bool = True,
    ) -> dict[str, Any]:
        """The output, the gradients of maps and weights, and the statistics afterwards."""
        maps = {f"map {i}": tensor for i, tensor in enumerate(self.inputs)}
        sources = {**maps, **{n: w for n, w in self.weights.items() if n not in _STATISTICS}}
        outermost = _Outermost(function, self.dtype)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            with keras.StatelessScope(collect_losses=True) as scope:
                for name, variable in variables.items():
                    scope.add_update((variable, value(name)))
                y = outermost(*self.inputs, training=training)
        if scope.losses:
            raise _LeftError("it adds a loss")
        results = {"output": y}
        if gradients:
            slopes = tape.gradient(y, sources, self.dy, tf.UnconnectedGradients.ZERO)
            results.update((f"gradient of {name}", slope) for name, slope in slopes.items())
            for name in _STATISTICS:
                if name in variables:
                    results[name] = scope.get_current_value(variables[name])
        return results


def _differences(
    actual: dict[str, Any], expected: dict[str, Any], scales: dict[str, float]
) -> dict[str, float]:
    """Largest differences, relative to the largest value so far, which `scales` keeps."""
    found = {}
    for name, truth in expected.items():
        a, b = (np.asarray(value, np.float64) for value in (actual[name], truth))
        scale = scales[name] = max(scales.get(name, 0.0), float(np.abs(b).max(initial=0.0)))
        error = float(np.abs(a - b).max(initial=0.0)) if a.shape == b.shape else math.inf
        found[name] = error / scale if scale else error * math.inf if error else 0.0
    return found


def _sizes(shape: Sequence[int | None]) -> list[tuple[int, ...]]:
    """Sizes of probes for a map of this shape, whose axes may be open."""
    open_sides = (sides[: len(shape) - 2] for sides in _SIZES)
    last = shape[-1] is not None  # the channels
    sizes = ((2, *sides, 0) if last else (2, 0, *sides) for sides in open_sides)
    both = (zip(shape, open_, strict=True) for open_ in sizes)
    return list(dict.fromkeys(tuple(known or size for known, size in pairs) for pairs in both))


def _shapes(region: _Region, candidate: _Candidate) -> list[tuple[int | None, ...]]:
    """Those of a region's map to prove it for: where it is large, of any size if that goes."""
    shape = region.map.shape
    n, *rest = shape
    if None in rest or math.prod(rest) < _LARGE:
        return [shape]
    sides = [None] * (len(rest) - 1)
    if candidate.options["data_format"] == "channels_last":
        return [(n, *sides, rest[-1]), shape]
    return [(n, rest[0], *sides), shape]


def _near(region: _Region, candidates: Iterable[_Candidate]) -> Iterator[_Candidate]:
    """The candidates whose output on a first probe is the region's.

    Raises:
      _LeftError: there is none, or the region cannot be run.
    """
    differences: list[tuple[float, _Candidate]] = []
    size = _sizes(region.map.shape)[0]
    weights: dict[str, Any] = {}
    for candidate in candidates:
        if candidate.weights is not weights:
            weights = candidate.weights
            dtype = "float64" if region.map.dtype == "float64" else "float32"
            probe = _Probe(region, candidate, size, _FILLS[0], dtype)
            try:
                expected = probe.of_region(candidate, gradients=False)
            except _LeftError:
                raise
            except Exception as error:
                raise _LeftError(
                    f"it does not run on a probe: {_console.first_line(error)}"
                ) from error
            layer = candidate.make(region.map.shape, dtype=probe.dtype)
            possible = _is_possible(region, candidate, probe.inputs, expected["output"])
            maximum_first = None  # in the layer's kernel
        elif not possible:
            continue  # the first stands for all with these weights
        if candidate.maximum_first is not maximum_first:
            maximum_first = candidate.maximum_first
            for name, variable in candidate.weights_of(layer).items():
                variable.assign(candidate.value(name, probe.weights, layer))
        for name in _call.WORDS.keys() & candidate.options.keys() - {"data_format"}:
            setattr(layer, name, candidate.options[name])
        residual = [] if region.residual is None else probe.inputs[-1:]
        actual = {"output": layer.call(probe.inputs[0], *residual)}
        differences.append((_differences(actual, expected, {})["output"], candidate))
        if differences[-1][0] < _NEAR:
            yield candidate
    difference, nearest = min(differences, key=lambda pair: pair[0])
    if difference < _NEAR:
        return
    _check_activations(region)
    raise _LeftError(
        f"it has the weights of {nearest.layer.__name__}, whose output differs by "
        f"{difference:.2g} of the largest value"
    )


def _is_possible(
    region: _Region, candidate: _Candidate, inputs: list[tf.Tensor], y: tf.Tensor
) -> bool:
    """False if the map is surely not multiplied by numbers of channels, of positions, or of both.

    As where an activation comes before attention. It spares hundreds of candidates' trials.
    """
    last = candidate.options["data_format"] == "channels_last"

    def by_position(map_: tf.Tensor) -> np.ndarray:
        values = np.asarray(map_, np.float64)
        values = values if last else np.moveaxis(values, 1, -1)
        return values.reshape(len(values), -1, values.shape[-1])

    if inputs[0].shape != y.shape:
        return True
    x, product = by_position(inputs[0]), by_position(y)
    if "activation" in candidate.options:  # what a ReLU cut off says nothing
        x = x * (product > 0)
    if region.residual is not None:
        product = product - by_position(inputs[-1])
    product = product * (x != 0)
    of_channels = of_positions = np.ones(1)
    # Least squares, of both alternately. Behind an activation a quarter of the map remains, unless
    # it is tiny. The few values that a ReLU left of a tiny one come close slowly: a tenth may.
    for _ in range(30 if candidate.layer is layers.CBAM else 1):
        if candidate.layer is not layers.SpatialAttention:
            of_channels = _fitted_gates(product, x * of_positions, 1)
        if candidate.layer is not layers.ChannelAttention:
            of_positions = _fitted_gates(product, x * of_channels, 2)
        error = x * of_channels * of_positions - product
        if np.linalg.norm(error) <= 0.1 * np.linalg.norm(product):
            return True
    return False


def _fitted_gates(product: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """The gates, each along an axis, by which `x` comes closest to `product`."""
    squares = (x * x).sum(axis, keepdims=True)
    gates = (product * x).sum(axis, keepdims=True) / np.where(squares > 0, squares, 1.0)
    return np.maximum(gates, 0.0)


_ACTIVATIONS = {
    *layers._KERAS_WORDS,
    *_call.WORDS["gate_activation"], *_call.WORDS["hidden_activation"],
}  # fmt: skip


def _check_activations(region: _Region) -> None:
    """Names the activations that no layer of this package has.

    Raises:
      _LeftError: the region has such.
    """
    names = set()
    for operation in region.operations:
        for layer in sublayers_of(operation):
            function = getattr(layer, "activation", None)
            if function is not None:
                names.add(getattr(function, "__name__", type(function).__name__))
    if unusual := sorted(names - _ACTIVATIONS):
        raise _LeftError(f"no layer has its activation: {', '.join(unusual)}")


def _prove(region: _Region, candidate: _Candidate) -> _Found:
    """Says that they are the same.

    Raises:
      _LeftError: they are not.
    """
    trainable, policy = _trainable(region, candidate), _policy(region)
    for shape in _shapes(region, candidate):
        reasons: list[_LeftError] = []
        # Where the gradient of a maximum goes among equals does not show in the outputs.
        for ties, dtype in itertools.product(_call.WORDS["ties"], _TOLERANCES):
            choice = candidate if ties == "even" else candidate.with_options({"ties": ties})
            try:
                difference = _compare(region, choice, trainable, dtype, _sizes(shape))
                return _Found(region, choice, trainable, policy, difference, dtype)
            except _LeftError as error:
                reasons.append(error)
            except Exception as error:
                reasons.append(
                    _LeftError(f"it does not run on a probe: {_console.first_line(error)}")
                )
    raise reasons[0]  # at the map's own size


def _compare(
    region: _Region,
    candidate: _Candidate,
    trainable: bool,
    dtype: str,
    sizes: list[tuple[int, ...]],
) -> float:
    """The largest difference."""
    largest = 0.0
    scales: tuple[dict[str, float], dict[str, float]] = ({}, {})  # of probes near and far
    forward, backward = _TOLERANCES[dtype]
    layer = candidate.make(region.map.shape, dtype=dtype, trainable=trainable)
    for size, fill in itertools.product(sizes, _FILLS):
        probe = _Probe(region, candidate, size, fill, dtype)
        # Both ways to call it where it has statistics, and once where it should have none.
        both = not candidate.weights.keys().isdisjoint(_STATISTICS) or fill is _FILLS[0]
        for training in (False, True) if both else (False,):
            how = {"training": training, "gradients": not fill.far}
            expected = probe.of_region(candidate, **how)
            actual = probe.of_candidate(candidate, layer, **how)
            for name, difference in _differences(actual, expected, scales[fill.far]).items():
                limit = forward if name == "output" else backward
                if not difference <= limit * (_STEEP if fill.far else 1):
                    if fill.far:
                        _check_activations(region)
                    mode = "training" if training else "inference"
                    raise _LeftError(
                        f"{name} differs from {candidate.layer.__name__}'s by {difference:.2g} "
                        f"of the largest value ({mode}, {dtype}, {fill})"
                    )
                largest = max(largest, difference)
    return largest


# --- search ---------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A region that a candidate was proved to be."""

    region: _Region
    candidate: _Candidate
    trainable: bool
    policy: Any  # the layer's dtype policy
    difference: float
    dtype: str  # of the proof

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for regions that share their weights and options."""
        weights = tuple((name, id(v)) for name, v in sorted(self.candidate.weights.items()))
        return (self.candidate.layer, weights, repr(self.candidate.options))

    def row(self, layer: str, path: str = "") -> Attention:
        """The report's row for it."""
        replaced = dict.fromkeys(path + node.operation.name for node in self.region.nodes)
        return Attention(
            layer, self.name, self.dialect, dict(self.candidate.options), tuple(replaced),
            self.difference, self.dtype, self.reads,
        )  # fmt: skip

    @property
    def name(self) -> str:
        options = self.candidate.options
        name = _NAMES[self.candidate.layer]
        if self.candidate.layer is layers.ChannelAttention and options["pooling"] == "avg":
            name = "squeeze and excitation"
        if self.region.residual is not None:
            name += " + residual"
        return name + (" + ReLU" if options.get("activation") else "")

    @property
    def dialect(self) -> str:
        """The first of `cbam_ops.dialects` that it speaks, or is half of; empty if it has none."""
        candidate = self.candidate
        own = _way(candidate.layer(**candidate.options))
        for name, dialect in dialects.items():
            if dialect.layer not in ("CBAM", candidate.layer.__name__):
                continue
            if candidate.layer in _SPATIAL and dialect.maximum_first != candidate.maximum_first:
                continue
            if _way(candidate.layer.from_dialect(name)) == own:
                return name
        return ""

    @property
    def reads(self) -> tuple[int, int]:
        """How often a map is read in a forward pass, before and after."""
        options, layer = self.candidate.options, self.candidate.layer
        residual, activation = self.region.residual is not None, bool(options.get("activation"))
        has_channels, has_positions = layer is not layers.SpatialAttention, layer in _SPATIAL
        pools = len(options.get("pooling", "").split("+"))
        before = (1 + pools) * has_channels + 3 * has_positions + 2 * residual + activation
        if "ties" in options:  # stock ops
            return before, before
        args = _call.Arguments(**options, w1=self.candidate.weights.get("w1"))
        op = _call.op_of(layer._op.__name__)
        halves = _call.halves(op, args)
        fused = [_call.is_fused(part, args) for part in halves or (op,)]
        # A fused op reads it once; else a gate's pools read it once, and its product once more.
        gates = 1 if halves else has_channels + has_positions
        after = sum(1 if part else 2 * gates for part in fused)
        return before, after + (residual if fused[-1] else 2 * residual + activation)


# The options that tell dialects from each other, besides the biases of the convolution.
_WAY = (
    "order", "pooling", "hidden_activation", "gate_activation", "mlp_activation", "mlp_merge",
    "use_bias", "spatial_batch_norm",
)  # fmt: skip


def _way(layer: Any) -> list[Any]:
    """What distinguishes a layer of one dialect from that of another."""
    one_layer = getattr(layer, "hidden", None) == 0
    return [layer._has_spatial_bias, one_layer, *(getattr(layer, n, None) for n in _WAY)]


_NAMES = {
    layers.CBAM: "CBAM",
    layers.ChannelAttention: "channel gate",
    layers.SpatialAttention: "spatial gate",
}
# They end no attention: they follow it.
_TAILS = ("Add", "Concatenate", "Subtract", "Average", "Maximum", "Minimum")


class _Search:
    """What is found in a model and in those inside it.

    Attributes:
      model: the outer one.
      graphs: the graph of each model, by the model's id.
      found: by the id of a region's last call.
      left: for calls that look like attention, why they are left, by id.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graphs = graphs_of(model)
        self.found: dict[int, _Found] = {}
        self.left: dict[int, str] = {}
        self._users: dict[int, set[int]] = collections.defaultdict(set)
        for graph in self.graphs.values():
            for node in graph.nodes:
                if not is_graph(unwrapped(node.operation)):
                    for variable in variables_of(node.operation):
                        self._users[id(variable)].add(id(node))
        for graph in self._remaining():
            self._look(graph)
        self._keep_shared_together()

    def _remaining(self) -> Iterator[Graph]:
        """The graphs that no region includes, outer ones first."""
        remaining = [self.graphs[id(self.model)]]
        for graph in remaining:
            yield graph
            gone = self.inner | self.found.keys()
            for node in graph.nodes:
                inside = self.graphs.get(id(unwrapped(node.operation)))
                if inside and id(node) not in gone and inside not in remaining:
                    remaining.append(inside)

    @property
    def inner(self) -> set[int]:
        """The ids of the calls that regions include besides their last ones."""
        return {id(n) for found in self.found.values() for n in found.region.nodes[:-1]}

    def _look(self, graph: Graph) -> None:
        # From the last on: a module is met before its parts.
        for node in reversed(graph.nodes):
            if id(node) in self.inner or not _may_end(node):
                continue
            reason = ""
            for region in reversed(list(_regions(graph, node))):
                try:
                    found = self._identify(graph, region)
                except _LeftError as error:
                    reason = str(error)
                    continue
                for inside in found.region.nodes:
                    self.left.pop(id(inside), None)
                self.found[id(found.region.nodes[-1])] = found
                break
            else:
                inside = self._inside(graph, node.operation)
                if inside or _looks_like_attention(node):
                    self.left[id(node)] = inside or reason or _why_no_region(graph, node)

    def _inside(self, graph: Graph, operation: Any) -> str:
        """What a layer of one's own has inside, in words; empty if there is no attention."""
        texts = []
        for part in sublayers_of(operation)[1:] if is_own(type(unwrapped(operation))) else ():
            with contextlib.suppress(_LeftError):
                found = self._identify(graph, _alone(part))
                kind, words = found.candidate.layer.__name__, _words(found.row(""))
                texts.append(f"{part.path} in it is what cbam_ops.{kind}({words}) computes")
        return ", ".join(texts) + "; put it there by hand" if texts else ""

    def _identify(self, graph: Graph, region: _Region) -> _Found:
        reasons: list[_LeftError] = []
        for form, added in _forms(region):
            try:
                for candidate in _near(form, (c.with_options(added) for c in _candidates(form))):
                    if graph.chain and form.residual is not None:
                        reasons.insert(0, _LeftError("no layer of a Sequential adds its input"))
                        continue
                    choices = [(form, candidate)]
                    if not self._shared(form):
                        choices += _with_tails(graph, form, candidate)
                    for choice in reversed(choices):
                        try:
                            return _prove(*choice)
                        except _LeftError as error:
                            reasons.append(error)
            except _LeftError as error:
                reasons.append(error)
        raise reasons[0]

    def _shared(self, region: _Region) -> set[int]:
        """The calls outside the region that use its weights."""
        users = (self._users[id(variable)] for variable in region.variables)
        return set().union(*users) - self._calls(region.nodes)

    def _calls(self, nodes: Iterable[Any]) -> set[int]:
        """The ids of calls, and of those inside the models that they call."""
        calls = set()
        for node in nodes:
            calls.add(id(node))
            if is_graph(inside := unwrapped(node.operation)):
                calls |= self._calls(self.graphs[id(inside)].nodes)
        return calls

    def _keep_shared_together(self) -> None:
        """Leaves regions whose weights others use that are not replaced by the same layer."""
        while True:
            keys = {
                call: found.key
                for found in self.found.values() for call in self._calls(found.region.nodes)
            }  # fmt: skip
            for last, found in self.found.items():
                if any(keys.get(user) != found.key for user in self._shared(found.region)):
                    self.left[last] = "its weights are used elsewhere too"
                    del self.found[last]
                    break
            else:
                return

    def name(self, node: Any) -> str:
        """That of a call's layer or op; of one called several times it differs from call to call.

        Those that share their weights stay one layer.
        """
        operation = node.operation
        graphs = self.graphs.values()
        same = [n for graph in graphs for n in graph.nodes if n.operation is operation]
        place = [id(n) for n in same].index(id(node))
        if len(same) == 1 or variables_of(operation):
            return operation.name
        taken = {n.operation.name for graph in graphs for n in graph.nodes}
        names = (f"{operation.name}_{i}" for i in itertools.count(place))
        return next(name for name in names if name not in taken)

    def report(self) -> list[Attention]:
        rows = []
        for graph in self._remaining():
            for node in graph.nodes:
                layer = graph.path + self.name(node)
                if id(node) in self.found:
                    rows.append(self.found[id(node)].row(layer, graph.path))
                elif id(node) in self.left and id(node) not in self.inner:
                    rows.append(Attention(layer, reason=self.left[id(node)]))
        return rows


def _why_no_region(graph: Graph, node: Any) -> str:
    """Why there is no region that ends with this call."""
    for region in _regions(graph, node, strict=False):
        if all(tensor is not region.map for tensor in node.input_tensors):
            break  # another map lies between
        if _leaks(graph, region):
            return "something inside is used elsewhere too"
        try:
            next(_candidates(region))
        except _LeftError as error:
            return str(error)
    return "its gate is not made from the map alone"


def _alone(layer: Any) -> _Region:
    """A layer as a region of its own, of the shape that it was built for.

    Raises:
      _LeftError: it is not one of somebody's own that takes a map.
    """
    shapes = [*(layer._build_shapes_dict or {}).values()]
    if not is_own(type(layer)) or len(shapes) != 1 or len(shapes[0]) not in _call.SIDES:
        raise _LeftError("it takes no map")
    x, y = (keras.KerasTensor(tuple(shapes[0]), dtype=layer.compute_dtype) for _ in "xy")
    arguments = types.SimpleNamespace(fill_in=lambda values: ((values[id(x)],), {}))
    node = types.SimpleNamespace(
        operation=layer, arguments=arguments, input_tensors=[x], outputs=[y]
    )
    return _Region((node,), x, None, y)


def _forms(region: _Region) -> Iterator[tuple[_Region, dict[str, Any]]]:
    """The region as it is, and as one that adds its map, or ends with a ReLU, out of sight."""
    yield region, {}
    if is_own(type(region.nodes[-1].operation)):
        with_residual = region._replace(residual=region.map)
        yield with_residual, {}
        yield with_residual, {"activation": "relu"}
        yield region, {"activation": "relu"}


def _may_end(node: Any) -> bool:
    """Whether a region may end with this call: it combines tensors, or is somebody's own."""
    inside = unwrapped(node.operation)
    if is_graph(inside) or type(inside).__name__ in _TAILS:
        return False
    return len(node.input_tensors) > 1 or is_own(type(inside))


def _looks_like_attention(node: Any) -> bool:
    """Whether a call that is not replaced is worth a line of the report."""
    own = is_own(type(node.operation))
    if len(node.outputs) != 1 or len(node.outputs[0].shape) not in _call.SIDES:
        return False
    shape = node.outputs[0].shape
    shapes = [tensor.shape for tensor in node.input_tensors]
    if len(shapes) == 1:
        return own and shapes[0] == shape and bool(variables_of(node.operation))
    gates = [other for other in shapes if other != shape and (len(other) == 2 or 1 in other)]
    multiplies = own or type(node.operation).__name__ == "Multiply"
    return multiplies and shape in shapes and bool(gates)


def _trainable(region: _Region, candidate: _Candidate) -> bool:
    """Whether the region's weights are trained, all or none."""
    trained = {id(v) for o in region.operations if variables_of(o) for v in o.trainable_variables}
    states = {id(v) in trained for n, v in candidate.weights.items() if n not in _STATISTICS}
    if len(states) > 1:
        raise _LeftError("some of its weights are frozen")
    return states.pop()


def _with_tails(
    graph: Graph, region: _Region, candidate: _Candidate
) -> Iterator[tuple[_Region, _Candidate]]:
    """The region with the addition of a residual, and the ReLU, that follow it."""
    while "activation" not in candidate.options:
        consumers = graph.consumers[id(region.output)]
        if len(consumers) != 1 or id(region.output) in graph.outputs:
            return
        (node,) = consumers
        others = [tensor for tensor in node.input_tensors if tensor is not region.output]
        inside = unwrapped(node.operation)
        if variables_of(inside) or is_graph(inside) or len(node.outputs) != 1:
            return
        if not all(_alike(tensor, region.output) for tensor in (*node.outputs, *others)):
            return
        region = region._replace(nodes=(*region.nodes, node), output=node.outputs[0])
        if len(others) == 1 and region.residual is None:
            region = region._replace(residual=others[0])
        elif not others:
            candidate = candidate.with_options({"activation": "relu"})
        else:
            return
        try:
            next(_near(region, [candidate]))
        except _LeftError:
            return
        yield region, candidate


# --- the new model --------------------------------------------------------------------------------


class _Rebuild(Rebuild):
    """Makes the new model."""

    def __init__(self, search: _Search) -> None:
        super().__init__(search.graphs, "fuse")
        self._search = search

    def layers(self, node: Any) -> list[Any]:
        if id(node) in self._search.inner:
            # Keeps the place of a layer that the next one includes.
            return [keras.layers.Identity(name=node.operation.name)]
        if id(node) in self._search.found:
            return [self._attention(node)]
        return super().layers(node)

    def call(self, node: Any, values: dict[int, Any]) -> None:
        if id(node) in self._search.found:
            region = self._search.found[id(node)].region
            residual = None if region.residual is None else values[id(region.residual)]
            y = self._attention(node)(values[id(region.map)], residual=residual)
            values[id(region.output)] = y
        elif id(node) not in self._search.inner:
            super().call(node, values)

    def _attention(self, node: Any) -> Any:
        """The layer in the place of the region that ends with this call."""
        found = self._search.found[id(node)]
        if found.key not in self._made:
            region, candidate = found.region, found.candidate
            layer = candidate.make(
                region.map.shape, name=self._search.name(node), dtype=found.policy,
                trainable=found.trainable,
            )  # fmt: skip
            for name, variable in candidate.weights_of(layer).items():
                variable.assign(candidate.value(name, candidate.weights, layer))
            self._made[found.key] = layer
        return self._made[found.key]


def _policy(region: _Region) -> Any:
    """The dtype policy of the region's layers with weights.

    Raises:
      _LeftError: they have none that can be trained, or compute in another type than the map has.
    """
    owners = [v for o in region.operations for v in sublayers_of(o) if v._trainable_variables]
    if not owners:
        raise _LeftError("none of its weights can be trained")
    policies = [owner.dtype_policy for owner in owners]
    for policy in policies:
        if policy.compute_dtype == region.output.dtype:
            return policy
    raise _LeftError(f"its layers compute in {policies[0].compute_dtype}, not in its map's type")


def fuse(model: Any, verbose: int = 0, return_report: bool = False) -> Any:
    """Replaces hand-written attention in a Keras model by this package's layers.

    Every CBAM, channel gate, spatial gate and squeeze and excitation is replaced that has the same
    outputs and the same gradients as one of :class:`cbam_ops.CBAM`,
    :class:`cbam_ops.ChannelAttention` and :class:`cbam_ops.SpatialAttention`, whether it is made of
    Keras's layers, `keras.ops`, `Lambda` layers, layers of your own or several of these, of images,
    series and volumes; in models inside the model too. An addition of a residual and a ReLU after
    it become part of the layer. Each is proved on random maps and weights (see
    :mod:`cbam_ops.fusing`). The rest stays.

    A replaced region's layer has the name of its last layer or op, so that
    `model.get_layer(name).output` stays what it was. A bias of the spatial convolution before a
    batch norm, which takes it off again, goes into the moving mean.

    No other thread may use Keras meanwhile: the proofs change, and set back, Keras's default dtype
    policy, those of the model's layers and whether TensorFlow runs functions eagerly.

    Args:
        model: A built `keras.Model`: functional, `Sequential`, or subclassed with a `call` that
            does no more than call Keras's layers and ops on one tensor. It is left as it is.
        verbose: 1 prints a table: layer, what was found, the options, the largest difference in the
            proof, how often the map is read before and after; and what is left as it is, and why.
        return_report: Whether to return the report too.

    Returns:
        A new model, of a subclassed one a functional one, with the values and the trainability of
        the weights; compiled as `model` is, with a fresh optimizer. With `return_report` the tuple
        of it and a list of :class:`cbam_ops.fusing.Attention`.

    Raises:
        ValueError: The calls of the model are not known (it is subclassed and cannot be traced, or
            has no input shape yet), its class has methods that a new model would lose, or a layer
            cannot be made again from its config.

    Example:
    >>> fused = cbam_ops.fuse(model, verbose=1)

    References:
        - [Woo et al., 2018](https://arxiv.org/abs/1807.06521)
    """
    graph = checked(model, "fuse")
    search = _Search(graph)
    rebuild = _Rebuild(search)
    new = rebuild.model(graph)
    rebuild.copy_weights()
    rebuild.compile(model, new)
    report = search.report()
    if verbose:
        _print(report)
    return (new, report) if return_report else new


def _print(report: list[Attention]) -> None:
    replaced = [row for row in report if row.found]
    if replaced:
        head = ["layer", "found", "dialect", "options", "largest difference", "reads of the map"]
        rows = [
            [row.layer, row.found, row.dialect or "-", _words(row),
             f"{row.difference:.1e} ({row.dtype})", "{} -> {}".format(*row.reads or ())]
            for row in replaced
        ]  # fmt: skip
        _console.print_table([head, *rows], "<<<<>>")
    else:
        _console.say("Nothing was replaced.")
    for row in report:
        if row.reason:
            _console.say(f"Left as it is: {row.layer}: {row.reason}.")


def _words(row: Attention) -> str:
    """The sizes, and what else is not usual and not said by the dialect."""
    kind = layers.CBAM if "kernel_size" in row.options else layers.ChannelAttention
    defaults = inspect.signature(kind).parameters
    names = ["ties"] if row.dialect else ["ties", *_WAY]
    unusual = [n for n in names if n in row.options and row.options[n] != defaults[n].default]
    sizes = [name for name in ("hidden", "kernel_size") if name in row.options]
    return ", ".join(f"{name}={row.options[name]}" for name in [*sizes, *unusual])
