"""Keras models as graphs of calls, and new models made call by call, with the same weights."""

from __future__ import annotations

import collections
import inspect
import tempfile
import warnings
from typing import Any

import keras

from cbam_ops._console import first_line
from cbam_ops._loader import check_backend


class Graph:
    """The calls of a functional model.

    Attributes:
      model: the model.
      path: the names of the models that it is in, and its own, each with "/"; empty of the outer.
      nodes: in the order in which `keras.models.clone_model` visits them.
      producer: the node of a tensor, by the tensor's id.
      consumers: the nodes that take a tensor, by its id.
      outputs: the ids of the model's outputs.
      chain: whether it is a Sequential, whose layers take one tensor.
    """

    def __init__(self, model: Any, path: str = "") -> None:
        self.model, self.path = model, path
        self.chain = isinstance(model, keras.Sequential)
        by_depth = keras.Function(model.inputs, model.outputs)._nodes_by_depth
        self.nodes = [
            node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]
            if not node.is_input
        ]  # fmt: skip
        self.place = {id(node): i for i, node in enumerate(self.nodes)}
        self.producer = {id(tensor): node for node in self.nodes for tensor in node.outputs}
        self.consumers: dict[int, list[Any]] = collections.defaultdict(list)
        for node in self.nodes:
            for tensor in node.input_tensors:
                self.consumers[id(tensor)].append(node)
        self.outputs = {id(tensor) for tensor in model.outputs}


def is_graph(operation: Any) -> bool:
    """Whether it is a model whose calls are known."""
    return isinstance(operation, (keras.Function, keras.Sequential)) and operation.built


def unwrapped(operation: Any) -> Any:
    """What a call runs: what a TimeDistributed calls at each step of time, or the layer itself."""
    return operation.layer if isinstance(operation, keras.layers.TimeDistributed) else operation


def graphs_of(model: Any) -> dict[int, Graph]:
    """The graphs of a model and of those inside it, by the models' ids."""
    graphs = {id(model): Graph(model)}
    waiting = [*graphs.values()]
    for graph in waiting:
        for inside in (unwrapped(node.operation) for node in graph.nodes):
            if is_graph(inside) and id(inside) not in graphs:
                graphs[id(inside)] = Graph(inside, f"{graph.path}{inside.name}/")
                waiting.append(graphs[id(inside)])
    return graphs


def sublayers_of(operation: Any) -> list[Any]:
    """The layer and all inside it; nothing of an op."""
    return operation._flatten_layers() if isinstance(operation, keras.layers.Layer) else []


def variables_of(operation: Any) -> list[Any]:
    """Those of a layer; an op has none."""
    return operation.variables if isinstance(operation, keras.layers.Layer) else []


def is_own(kind: type) -> bool:
    """Whether a class is somebody's own, or what it does is."""
    stock = kind.__module__.split(".")[0] in ("keras", "cbam_ops", "tensorflow", "builtins")
    return not stock or kind is keras.layers.Lambda


# --- the new model --------------------------------------------------------------------------------


class Rebuild:
    """Makes a model again, layer by layer, each once however often it is called.

    A subclass says what is there in the place of a call.
    """

    def __init__(self, graphs: dict[int, Graph], who: str) -> None:
        """The graphs of a model and those inside; `who` does it, for the messages."""
        self.graphs = graphs
        self._who = who
        self._made: dict[Any, Any] = {}
        self._copies: list[tuple[Any, Any]] = []

    def layers(self, node: Any) -> list[Any]:
        """The layers of a Sequential in the place of a call."""
        return [self.clone(node.operation)]

    def call(self, node: Any, values: dict[int, Any]) -> None:
        """Adds the new tensors of a call's to those by the ids of the old ones."""
        arguments, keywords = node.arguments.fill_in(values)
        outputs = self.clone(node.operation)(*arguments, **keywords)
        values.update(zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True))

    def model(self, model: Any) -> Any:
        """A model like this one, or the same again."""
        if id(model) not in self._made:
            make = self._sequential if isinstance(model, keras.Sequential) else self._functional
            self._made[id(model)] = make(model)
        return self._made[id(model)]

    def _sequential(self, model: Any) -> Any:
        made: list[Any] = [self._again(t._keras_history.operation) for t in model.inputs]
        for node in self.graphs[id(model)].nodes:
            made += self.layers(node)
        return keras.Sequential(made, name=model.name, trainable=self.trainable(model))

    def _functional(self, model: Any) -> Any:
        values = {id(t): self._again(t._keras_history.operation).output for t in model.inputs}
        for node in self.graphs[id(model)].nodes:
            self.call(node, values)
        inputs, outputs = (
            keras.tree.map_structure(lambda tensor: values[id(tensor)], struct)
            for struct in (model.input, model.output)
        )
        make = type(model) if _takes_a_graph(model) else keras.Model
        return make(inputs, outputs, name=model.name, trainable=self.trainable(model))

    def clone(self, operation: Any) -> Any:
        """A layer, model or op like this one, or the same again."""
        if is_graph(operation):
            return self.model(operation)
        if id(operation) not in self._made:
            if (inside := unwrapped(operation)) is not operation:
                self._made[id(operation)] = keras.layers.TimeDistributed(
                    self.clone(inside), name=operation.name, dtype=operation.dtype_policy,
                    trainable=self.trainable(operation),
                )  # fmt: skip
            else:
                self._made[id(operation)] = self._again(operation)
                self._copies.append((operation, self._made[id(operation)]))
        return self._made[id(operation)]

    def _again(self, operation: Any) -> Any:
        """Another layer or op like this one, without its weights' values."""
        if isinstance(operation, keras.layers.Lambda):
            # Its code is not made into a text and back.
            return keras.layers.Lambda(
                operation.function, operation._output_shape, operation.mask, operation.arguments,
                name=operation.name, trainable=operation.trainable, dtype=operation.dtype_policy,
            )  # fmt: skip
        try:
            return type(operation).from_config(operation.get_config())
        except Exception as error:
            if not isinstance(operation, keras.layers.Layer):
                return operation  # an op has no state
            raise ValueError(
                f"{self._who}: {operation.name} cannot be made again from its config: "
                f"{first_line(error)}"
            ) from error

    def trainable(self, layer: Any) -> bool:
        """Whether the one like this model, or what a TimeDistributed wraps, is as a whole."""
        return bool(layer.trainable)

    def copy_weights(self) -> None:
        """Gives the new layers the values, and the trainability, of the old ones."""
        for old, copy in self._copies:
            values, copies = variables_of(old), variables_of(copy)
            if [v.shape for v in values] != [v.shape for v in copies]:
                raise ValueError(
                    f"{self._who}: {old.name} made again from its config has other weights."
                )
            for a, b in zip(sublayers_of(old), sublayers_of(copy), strict=True):
                b.trainable = a.trainable
            for a, b in zip(values, copies, strict=True):
                b.assign(a)
                b.trainable = a.trainable
            for a, b in zip(sublayers_of(old), sublayers_of(copy), strict=True):
                _copy_adapted(a, b)

    def compile(self, model: Any, new: Any) -> None:
        """Compiles the new model as the old one is, with a fresh optimizer."""
        if not model.compiled:
            return
        try:
            new.compile_from_config(model.get_compile_config())
        except Exception as error:  # whatever the user's own loss or metric raises
            warnings.warn(
                f"{self._who}: the new model is not compiled, since not all that {model.name} was "
                f"compiled with can be made again from its config: {first_line(error)}",
                stacklevel=3,
            )


def _copy_adapted(old: Any, new: Any) -> None:
    """Gives a preprocessing layer what `adapt` made and neither config nor variables hold."""
    if hasattr(old, "save_assets"):  # a vocabulary
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    elif isinstance(new, keras.layers.Normalization):
        new.finalize_state()  # of its variables


def checked(model: Any, who: str) -> Any:
    """The model, or one whose calls are known.

    Raises:
      ValueError: its calls cannot be known, or a model with them would not be the same.
    """
    check_backend(who)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"{who}: `model` must be a model of Keras 3, got {type(model).__module__}."
            f"{type(model).__name__}"
        )
    graph = isinstance(model, (keras.Function, keras.Sequential))
    own = {name for kind in type(model).__mro__ if is_own(kind) for name in vars(kind)}
    methods = sorted(name for name in own - _HARMLESS if not name.startswith("_"))
    if methods and not (graph and _takes_a_graph(model)):
        raise ValueError(
            f"{who}: {type(model).__name__} has methods of its own ({', '.join(methods)}), which a "
            f"model with other layers would lose; {who} the models and layers that it is made of."
        )
    if not model.built or (graph and not model.inputs):
        raise ValueError(f"{who}: {model.name} has no input shape yet; call it on data once.")
    return model if graph else _traced(model, who)


# What a class of one's own may define, and lose.
_HARMLESS = frozenset(("call", "build", "get_config", "from_config", "compute_output_shape"))


def _takes_a_graph(model: Any) -> bool:
    """Whether the model's class is constructed from inputs and outputs, or a list of layers."""
    specification = inspect.getfullargspec(type(model).__init__)
    if isinstance(model, keras.Sequential):
        return specification.args[1:2] == ["layers"]
    known = specification.args[1:3] == ["inputs", "outputs"]
    return known or bool(specification.varargs and specification.varkw)


def _traced(model: Any, who: str) -> Any:
    """A functional model of the layers that a subclassed one calls."""
    shapes = [*(model._build_shapes_dict or {}).values()]
    if len(shapes) != 1 or not all(size is None or isinstance(size, int) for size in shapes[0]):
        raise ValueError(f"{who}: {model.name}, a {type(model).__name__}, must have one input.")
    inputs = keras.Input(batch_shape=(None, *shapes[0][1:]), dtype=model.input_dtype)
    choices: list[dict[str, Any]] = [{}]
    if "training" in inspect.signature(model.call).parameters:
        choices = [{"training": None}, {"training": True}]
    try:
        traces = [
            keras.Model(inputs, model.call(inputs, **keywords), name=model.name)
            for keywords in choices
        ]
    except Exception as error:
        why = first_line(error)
        if "input to a TensorFlow function" in why:
            why = "it calls functions of TensorFlow, where those of keras.ops can be traced"
        raise ValueError(
            f"{who}: {type(model).__name__}.call cannot be traced, since it does more than call "
            f"Keras's layers and ops: {why}"
        ) from error
    calls = [
        [(type(node.operation), id(node.operation) * bool(variables_of(node.operation)))
         for node in Graph(trace).nodes] for trace in traces
    ]  # fmt: skip
    if calls[0] != calls[-1]:
        raise ValueError(
            f"{who}: {type(model).__name__}.call cannot be traced: it calls other layers in "
            "training"
        )
    return traces[0]
