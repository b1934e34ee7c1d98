"""Attention put into a Keras model that has none: :func:`add_attention`.

Where it goes is read off the model's graph of calls, not off names, in this order; the first kind
that the model, with the models inside it, has anywhere is used:

1. Residual blocks: calls that one map goes into and an addition ends, with convolutions (or dense
   layers) on one way and fewer on the other. Behind the last normalisation of that way, or behind
   its last convolution where no normalisation follows it; before the addition.
2. Concatenations of three maps or more (Inception, NASNet): behind each.
3. Depthwise convolutions (MobileNet): behind each normalisation, as the paper does.
4. Stages: behind the last map before each call with strides, and behind the last map (VGG,
   DenseNet). Stages of a single convolution count only where all are such.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import keras

from cbam_ops import _call, layers
from cbam_ops._console import first_line
from cbam_ops._graphs import Graph, Rebuild, checked, graphs_of, is_graph, unwrapped, variables_of

__all__ = ["Place", "add_attention"]


class Place(NamedTuple):
    """A place for attention.

    Attributes:
      layer: the layer or op that it follows; inside nested models after their names, with "/".
      name: of the attention layer there.
      shape: of the map.
      reason: why there: `"residual block"`, `"concatenation"`, `"normalisation"`, `"stage"` or
        `"given"`.
    """

    layer: str
    name: str
    shape: tuple[int | None, ...]
    reason: str


# --- what calls are -------------------------------------------------------------------------------


def _is_map(tensor: Any) -> bool:
    return len(tensor.shape) in _call.SIDES and tensor.dtype.startswith(("float", "bfloat"))


def _kernels(node: Any) -> int:
    """How many kernels a call's weights have; of a model inside those of all its layers."""
    return sum(len(v.shape) >= 2 for v in variables_of(node.operation))


def _is_normalisation(node: Any) -> bool:
    return "Norm" in type(node.operation).__name__


def _strides(node: Any) -> bool:
    strides = getattr(node.operation, "strides", 1)
    return any(stride != 1 for stride in keras.tree.flatten(strides))


# --- the graph's structure ------------------------------------------------------------------------


class _Structure:
    """Which calls every way through a graph goes through."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        # The place of a call, from 1 on; 0 are the inputs, the last the outputs.
        self.place = {key: place + 1 for key, place in graph.place.items()}
        count = len(graph.nodes)
        before: list[list[int]] = [[] for _ in range(count + 2)]
        for node in graph.nodes:
            before[self.place[id(node)]] = [self._made(t) for t in node.input_tensors] or [0]
        before[-1] = [self._made(tensor) for tensor in graph.model.outputs]
        after: list[list[int]] = [[] for _ in range(count + 2)]
        for place, sources in enumerate(before):
            for source in sources:
                after[source].append(place)
        self._before = before
        # As sets of bits: the calls on every way from the inputs to a call, and to the outputs.
        self._dominators = _meet(range(count + 2), before)
        self._followers = _meet(range(count + 1, -1, -1), after)

    def _made(self, tensor: Any) -> int:
        producer = self.graph.producer.get(id(tensor))
        return self.place[id(producer)] if producer else 0

    def start(self, node: Any) -> int | None:
        """The last call that every way to this one goes through, if every way from it comes here.

        Such a pair encloses a block.
        """
        place = self.place[id(node)]
        start = (self._dominators[place] & ~(1 << place)).bit_length() - 1
        following = self._followers[start] & ~(1 << start)
        return start if following & -following == 1 << place else None

    def way(self, tensor: Any, start: int) -> list[Any]:
        """The calls that make a tensor of what `start` returns."""
        found, waiting = set(), [self._made(tensor)]
        while waiting:
            place = waiting.pop()
            if place > start and place not in found:
                found.add(place)
                waiting += self._before[place]
        return [self.graph.nodes[place - 1] for place in sorted(found)]

    def trunk(self, output: Any) -> list[Any]:
        """The calls that every way from the inputs to an output goes through."""
        bits = self._dominators[self._made(output)]
        return [node for node in self.graph.nodes if bits >> self.place[id(node)] & 1]


def _meet(order: Iterable[int], neighbours: Sequence[Sequence[int]]) -> list[int]:
    """For each place the places on all ways to it, itself included, as a set of bits."""
    sets = [0] * len(neighbours)
    for place in order:
        common = -1
        for neighbour in neighbours[place]:
            common &= sets[neighbour]
        sets[place] = (common if neighbours[place] else 0) | 1 << place
    return sets


# --- places ---------------------------------------------------------------------------------------


def _residual_blocks(structure: _Structure) -> Iterator[Any]:
    graph = structure.graph
    for end in graph.nodes:
        # The second is InceptionResNet's, which scales one of the two before it adds them.
        if type(end.operation).__name__ not in ("Add", "CustomScaleLayer"):
            continue
        tensors = [t for t in end.input_tensors if _is_map(t) and t.shape == end.outputs[0].shape]
        if len(tensors) < 2 or len(tensors) < len(end.input_tensors):
            continue
        start = structure.start(end)
        if start is None:
            continue
        ways = [structure.way(tensor, start) for tensor in tensors]
        sizes = [
            (sum(map(_kernels, way)), sum(n.operation.count_params() for n in way if _kernels(n)))
            for way in ways
        ]
        longest = sizes.index(max(sizes))
        if not sizes[longest][0] or sizes.count(sizes[longest]) > 1:
            continue
        node = graph.producer[id(tensors[longest])]
        while not (_kernels(node) or _is_normalisation(node)):
            (tensor, *others) = node.input_tensors
            if others or len(graph.consumers[id(tensor)]) > 1 or not _is_map(tensor):
                break
            node = graph.producer[id(tensor)]
        yield node


def _concatenations(structure: _Structure) -> Iterator[Any]:
    for node in structure.graph.nodes:
        maps = sum(map(_is_map, node.input_tensors))
        if type(node.operation).__name__ == "Concatenate" and maps >= 3:
            yield node


def _after_normalisations(structure: _Structure) -> Iterator[Any]:
    nodes = structure.graph.nodes
    if any(isinstance(node.operation, keras.layers.DepthwiseConv2D) for node in nodes):
        yield from (n for n in nodes if _is_normalisation(n) and _is_map(n.outputs[0]))


def _stages(structure: _Structure) -> Iterator[Any]:
    ends: dict[int, tuple[Any, int]] = {}  # with the number of their convolutions
    for output in structure.graph.model.outputs:
        trunk = {id(n) for n in structure.trunk(output) if not is_graph(unwrapped(n.operation))}
        last, kernels = None, 0
        for node in [*structure.graph.nodes, None]:
            inside = node is None or id(node) in trunk
            is_map = node is not None and len(node.outputs) == 1 and _is_map(node.outputs[0])
            if inside and (not is_map or _strides(node)):
                if last is not None and kernels:
                    ends[id(last)] = last, kernels
                last, kernels = None, 0
            if is_map:
                kernels += bool(_kernels(node))
                last = node if inside else last
    several = [node for node, kernels in ends.values() if kernels > 1]
    yield from several or [node for node, _ in ends.values()]


_BLOCKS: dict[str, Callable[[_Structure], Iterator[Any]]] = {
    "residual block": _residual_blocks,
    "concatenation": _concatenations,
    "normalisation": _after_normalisations,
    "stage": _stages,
}


def _places_of_blocks(graphs: dict[int, Graph]) -> dict[int, str]:
    """The ids of calls to put attention behind, with the reasons."""
    structures = [_Structure(graph) for graph in graphs.values()]
    for reason, find in _BLOCKS.items():
        found = {id(node): reason for structure in structures for node in find(structure)}
        if found:
            return found
    raise ValueError(
        'add_attention: `where`="blocks" finds no place: there is no residual block, no '
        "concatenation of three maps, no depthwise convolution with a normalisation and no stage "
        "of convolutions; give a list of layers' names or a function of the layer"
    )


def _given_places(graphs: dict[int, Graph], where: Any) -> dict[int, str]:
    """The ids of the calls of layers that a list names, or a function takes."""
    named = {
        graph.path + node.operation.name: node.operation
        for graph in graphs.values() for node in graph.nodes
    }  # fmt: skip
    if callable(where):
        chosen = [
            v for v in named.values()
            if isinstance(v, keras.layers.Layer) and not is_graph(unwrapped(v)) and where(v)
        ]  # fmt: skip
        if not chosen:
            raise ValueError("add_attention: `where` must be true of a layer, it is of none")
    else:
        for name in where:
            if name not in named:
                near = difflib.get_close_matches(str(name), named, 3, 0)
                raise ValueError(
                    f"add_attention: `where` must name layers of the model, got {name!r}; near it "
                    f"are {', '.join(near)}"
                )
        chosen = [named[name] for name in where]
        if not chosen:
            raise ValueError("add_attention: `where` must name a layer, got an empty list")
    keys = {id(operation) for operation in chosen}
    return {
        id(node): "given"
        for graph in graphs.values() for node in graph.nodes if id(node.operation) in keys
    }  # fmt: skip


# --- the new model --------------------------------------------------------------------------------


def _places(graphs: dict[int, Graph], reasons: dict[int, str]) -> dict[int, Place]:
    """The places, by the ids of the layers that they follow."""
    taken = {node.operation.name for graph in graphs.values() for node in graph.nodes}
    places: dict[int, Place] = {}
    for graph in graphs.values():
        for node in graph.nodes:
            operation = node.operation
            if id(node) not in reasons or id(operation) in places:
                continue
            layer = graph.path + operation.name
            if len(node.outputs) != 1 or not _is_map(node.outputs[0]):
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in node.outputs)
                raise ValueError(
                    "add_attention: `where` must name layers that return one map of a float type, "
                    f"of rank 3, 4 or 5; {layer} returns {shapes}"
                )
            name = f"{operation.name}_attention"
            while name in taken:
                name += "_"
            taken.add(name)
            shape = tuple(node.outputs[0].shape)
            places[id(operation)] = Place(layer, graph.path + name, shape, reasons[id(node)])
    return places


class _Insert(Rebuild):
    """Makes the model again, with attention behind some of its layers."""

    def __init__(
        self, graphs: dict[int, Graph], places: dict[int, Place], attention: Any, gain: float
    ) -> None:
        """`gain` is what the attention's result is multiplied by."""
        super().__init__(graphs, "add_attention")
        self._places, self._attention, self._gain = places, attention, gain
        self.inserted: dict[int, list[Any]] = {}  # by the layers that they follow

    def layers(self, node: Any) -> list[Any]:
        return [*super().layers(node), *self._following(node.operation)]

    def call(self, node: Any, values: dict[int, Any]) -> None:
        super().call(node, values)
        for layer in self._following(node.operation):
            key = id(node.outputs[0])
            try:
                values[key] = layer(values[key])
            except ValueError as error:
                place = self._places[id(node.operation)]
                raise ValueError(
                    f"add_attention: no attention can follow {place.layer}: {first_line(error)}"
                ) from error

    def _following(self, operation: Any) -> list[Any]:
        """What is inserted behind a layer, the same again at another call of it."""
        if id(operation) not in self._places:
            return []
        if id(operation) not in self.inserted:
            name = self._places[id(operation)].name.rpartition("/")[2]
            options = {**self._attention.get_config(), "name": name}
            options["dtype"] = getattr(operation, "dtype_policy", self._attention.dtype_policy)
            made = [type(self._attention).from_config(options)]
            if self._gain != 1.0:
                scale = f"{name}_scale"
                made.append(keras.layers.Rescaling(self._gain, name=scale, dtype=options["dtype"]))
            self.inserted[id(operation)] = made
        return self.inserted[id(operation)]

    def trainable(self, layer: Any) -> bool:
        """A frozen model's own layers are; what is inserted is trained."""
        graph = self.graphs.get(id(unwrapped(layer)))
        if graph and any(place.layer.startswith(graph.path) for place in self._places.values()):
            return True
        return super().trainable(layer)

    def copy_weights(self) -> None:
        super().copy_weights()
        for graph in self.graphs.values():
            for node in graph.nodes if not graph.model.trainable else ():
                layer = node.operation
                if isinstance(layer, keras.layers.Layer) and not is_graph(unwrapped(layer)):
                    self.clone(layer).trainable = False


def _identity_weights(layer: Any) -> list[Any]:
    """The weights that make every gate a half where they are zero."""
    names = []
    if not isinstance(layer, layers.SpatialAttention):
        names += ["w1", "b1"] if layer.w1 is not None else ["w0", "b0"]
    if not isinstance(layer, layers.ChannelAttention):
        names += (
            ["batch_norm_gamma", "batch_norm_beta"]
            if layer.spatial_batch_norm
            else ["spatial_kernel", "spatial_bias"]
        )
    weights = (getattr(layer, name) for name in names)
    return [weight for weight in weights if weight is not None]


def _gain(attention: Any, start: str) -> float:
    """What undoes gates of a half.

    Raises:
      ValueError: there is no such start, or the attention cannot begin so.
    """
    if start not in ("identity", "paper"):
        raise ValueError(f'add_attention: `start` must be "identity" or "paper", got {start!r}')
    if start == "paper":
        return 1.0
    for name in ("activation", "mlp_activation"):
        if getattr(attention, name, None) is not None:
            raise ValueError(
                f'add_attention: `attention` must have {name}=None with `start`="identity", got '
                f"{getattr(attention, name)!r}: it would change the map, or never learn"
            )
    gain = 4.0 if isinstance(attention, layers.CBAM) else 2.0
    is_sum = getattr(attention, "mlp_merge", "") == "gates" and attention.pooling == "avg+max"
    return gain / 2.0 if is_sum else gain


def add_attention(
    model: Any,
    attention: Any = None,
    where: str | Sequence[str] | Callable[[Any], bool] = "blocks",
    start: str = "identity",
    dry_run: bool = False,
) -> Any:
    """Puts attention into a Keras model, which keeps its weights.

    Args:
        model: A built `keras.Model`: functional, `Sequential`, or subclassed with a `call` that
            does no more than call Keras's layers and ops on one tensor; with models inside as well.
            It is left as it is.
        attention: A :class:`cbam_ops.CBAM`, :class:`cbam_ops.ChannelAttention` or
            :class:`cbam_ops.SpatialAttention`, whose arguments every inserted layer has, but for
            its name and its dtype policy, which is that of the layer before. `None` is `CBAM()` in
            the model's data format.
        where: `"blocks"`: in every residual block behind the last normalisation, before the
            addition; where there are none, behind the concatenations of Inception and NASNet, the
            normalisations of MobileNet, the stages of VGG and DenseNet (see
            :mod:`cbam_ops.inserting`). Or the names of the layers to follow, those inside nested
            models after the models' names, with "/"; or a function that is true of these layers.
        start: `"identity"`: the new model's outputs are the model's, bit for bit, until it is
            trained (in a graph, TensorFlow's optimizer may put an addition after the map into
            another order, which changes last bits). The last weights before each gate are zero, so
            that it is a half everywhere; a `keras.layers.Rescaling` behind the layer multiplies by
            4, for one gate by 2 (half of that where `mlp_merge="gates"` adds two). They learn from
            the first step, and a gate's factor then goes from 0 to 2. The cost is one more pass
            over the map, per layer and direction. In float16, values below 2.5e-4 are rounded to
            multiples of 2.4e-7. `"paper"`: gates as the layer's initializers make them, and nothing
            is scaled.
        dry_run: Whether to return the places and make no model.

    Returns:
        A new model, of a subclassed one a functional one, with the values and the trainability of
        the weights, compiled as `model` is, with a fresh optimizer. The inserted layers are named
        after those that they follow, `..._attention`, and are trained even inside a frozen model.
        With `dry_run` a list of :class:`cbam_ops.inserting.Place`.

    Raises:
        ValueError: The calls of the model are not known, there is no place, `where` names no layer
            or one that returns no map, `attention` does not fit a map (such as a `ratio` larger
            than its channels), or cannot begin as the identity (it has an `activation` or
            `mlp_activation`).

    Example:
    >>> model = keras.applications.ResNet50(weights=None)
    >>> with_cbam = cbam_ops.add_attention(model, cbam_ops.CBAM(ratio=16))

    References:
        - [Woo et al., 2018](https://arxiv.org/abs/1807.06521)
    """
    graph = checked(model, "add_attention")
    graphs = graphs_of(graph)
    if attention is None:
        formats = (getattr(v, "data_format", None) for v in graph._flatten_layers())
        attention = layers.CBAM(data_format=next(filter(None, formats), None))
    if not isinstance(attention, layers._Attention):
        raise ValueError(
            "add_attention: `attention` must be a layer of cbam_ops, such as cbam_ops.CBAM(), got "
            f"{attention!r}"
        )
    gain = _gain(attention, start)
    given = callable(where) or isinstance(where, Sequence | Set)
    if where != "blocks" and (isinstance(where, str) or not given):
        raise ValueError(
            f'add_attention: `where` must be "blocks", a list of names or a function, got {where!r}'
        )
    reasons = _places_of_blocks(graphs) if where == "blocks" else _given_places(graphs, where)
    places = _places(graphs, reasons)
    if dry_run:
        return [*places.values()]
    insert = _Insert(graphs, places, attention, gain)
    new = insert.model(graph)
    insert.copy_weights()
    if start == "identity":
        for made, *_ in insert.inserted.values():
            for weight in _identity_weights(made):
                weight.assign(keras.ops.zeros_like(weight))
    insert.compile(model, new)
    return new
