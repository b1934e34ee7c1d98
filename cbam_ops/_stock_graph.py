"""Rewrites the fused ops in a SavedModel into stock TensorFlow, without the Python that made it.

A fused node becomes a call of a function: the op's definition, traced at the node's types and
attributes. TensorFlow and the converters inline such calls. Where a node stands (the graph, a
function, a gradient), its name and who reads it stay as they are, and so do variables and assets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import (
    attr_value_pb2,
    graph_pb2,
    node_def_pb2,
    op_def_pb2,
    types_pb2,
)
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow.python.framework import meta_graph, op_def_registry
from tensorflow.python.saved_model import fingerprinting_utils

from cbam_ops import _call, _gradients, reference

_PREFIX = "CbamOps>"
_FILE = "saved_model.pb"
_HALF = {types_pb2.DT_HALF, types_pb2.DT_BFLOAT16}


def is_saved_model(path: Path) -> bool:
    """Whether this is the folder of a SavedModel."""
    return (path / _FILE).is_file()


def _read(folder: Path) -> saved_model_pb2.SavedModel:
    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((folder / _FILE).read_bytes())
    except DecodeError as error:
        raise ValueError(f"{folder / _FILE} is damaged: {error}") from error
    return saved


def signatures(folder: Path) -> list[str]:
    """The names of a SavedModel's signatures."""
    names = {name for part in _read(folder).meta_graphs for name in part.signature_def}
    return sorted(names - {"__saved_model_init_op"})


def has_fused_ops(folder: Path) -> bool:
    """Whether a SavedModel holds ops of this package."""
    graphs = (part.graph_def for part in _read(folder).meta_graphs)
    lists = (nodes for graph in graphs for nodes in _node_lists(graph))
    return any(node.op.startswith(_PREFIX) for nodes in lists for node in nodes)


def half_types(folder: Path) -> set[str]:
    """The names of the half types that a SavedModel computes in."""
    found = {dtype for part in _read(folder).meta_graphs for dtype, _ in _types(part.graph_def)}
    return {tf.as_dtype(dtype).name for dtype in found & _HALF}


def rewrite(folder: Path, *, widen: Collection[str] = (), for_int8: bool = False) -> int:
    """Rewrites the SavedModel in a folder, in place, and returns how many fused ops it had.

    Args:
        folder: Where `saved_model.pb` is.
        widen: The half types in whose place float32 is to be computed in.
        for_int8: Whether LiteRT's int8 will quantise it. That gives tensors which are stacked one
            scale, and the operand of a maximum the scale of its result: in the definition as it
            stands the gated map gets that of the spatial descriptors, which cuts off whatever is
            below the smallest of them. A factor in between breaks that chain. The mean gets a
            larger one, since it is the smaller of the two.

    Raises:
        ValueError: The file is damaged, or holds custom ops of others.
    """
    saved = _read(folder)
    replaced = 0
    for part in saved.meta_graphs:
        _widen(part, {tf.as_dtype(name).as_datatype_enum for name in widen})
        definitions = {op.name: op for op in part.meta_info_def.stripped_op_list.op}
        replaced += _Rewriting(part.graph_def, definitions, for_int8).run()
        refuse_foreign_ops(part.graph_def, str(folder))
        used = meta_graph.stripped_op_list_for_graph(part.graph_def)
        part.meta_info_def.stripped_op_list.CopyFrom(used)
    if replaced or widen:
        (folder / _FILE).write_bytes(saved.SerializeToString(deterministic=True))
        fingerprinting_utils.write_fingerprint(str(folder))
    return replaced


def refuse_foreign_ops(graph: graph_pb2.GraphDef, name: str) -> None:
    """Looks for ops that neither TensorFlow itself nor this package has.

    Raises:
        ValueError: There are such ops; the message has their names.
    """
    functions = {function.signature.name for function in graph.library.function}
    foreign = {
        node.op
        for nodes in _node_lists(graph)
        for node in nodes
        if node.op not in functions and not _is_stock(node.op)
    }
    if foreign:
        raise ValueError(
            f"{name} holds custom ops that stock TensorFlow does not have: "
            f"{', '.join(sorted(foreign))}"
        )


def _is_stock(op: str) -> bool:
    return hasattr(tf.raw_ops, op) or op.startswith("_")


def _node_lists(graph: graph_pb2.GraphDef) -> Iterator[Sequence[node_def_pb2.NodeDef]]:
    yield graph.node
    for function in graph.library.function:
        yield function.node_def


def _types(
    graph: graph_pb2.GraphDef,
) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Every type in a graph, with what changes it."""
    for nodes in _node_lists(graph):
        for node in nodes:
            for value in node.attr.values():
                if value.type:
                    yield value.type, functools.partial(setattr, value, "type")
                for i, dtype in enumerate(value.list.type):
                    yield dtype, functools.partial(value.list.type.__setitem__, i)
    for function in graph.library.function:
        for argument in (*function.signature.input_arg, *function.signature.output_arg):
            yield argument.type, functools.partial(setattr, argument, "type")


def _widen(part: meta_graph_pb2.MetaGraphDef, dtypes: set[int]) -> None:
    """Makes float32 of some types in a graph."""
    for nodes in _node_lists(part.graph_def):
        for node in nodes:
            if node.op == "VarHandleOp" and node.attr["dtype"].type in dtypes:
                raise ValueError(
                    f"the format does not take weights of type "
                    f"{tf.as_dtype(node.attr['dtype'].type).name}, got {node.name}"
                )
            if node.op == "Const" and node.attr["dtype"].type in dtypes:
                values = tf.make_ndarray(node.attr["value"].tensor).astype("float32")
                node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values))
    for dtype, change in _types(part.graph_def):
        if dtype in dtypes:
            change(types_pb2.DT_FLOAT)
    for signature in part.signature_def.values():
        for tensor in (*signature.inputs.values(), *signature.outputs.values()):
            tensor.dtype = types_pb2.DT_FLOAT if tensor.dtype in dtypes else tensor.dtype


class _Rewriting:
    """The rewriting of a graph with its library of functions."""

    def __init__(
        self,
        graph: graph_pb2.GraphDef,
        definitions: dict[str, op_def_pb2.OpDef],
        for_int8: bool,
    ) -> None:
        self._graph = graph
        self._for_int8 = for_int8
        self._definitions = definitions
        self._functions: dict[bytes, str] = {}  # by what the node asks for

    def run(self) -> int:
        """Replaces every fused node; returns how many there were."""
        functions = list(self._graph.library.function)  # those that are added have none
        ranks = {node.name: _rank(node.attr) for node in self._graph.node}
        count = sum(self._replace(node, ranks) is not None for node in self._graph.node)
        for function in functions:
            outputs = {}
            ranks = {node.name: _rank(node.attr) for node in function.node_def}
            for i, argument in enumerate(function.signature.input_arg):
                ranks[argument.name] = _rank(function.arg_attr[i].attr)
            for node in function.node_def:
                places = self._replace(node, ranks)
                if places is not None:
                    outputs[node.name] = places
            count += len(outputs)
            if not outputs:
                continue

            def renamed(tensor: str, outputs: dict[str, dict[str, int]] = outputs) -> str:
                """Of a tensor in a function: "node:argument:index"."""
                node, _, rest = tensor.partition(":")
                if node not in outputs:
                    return tensor
                argument, _, index = rest.partition(":")
                return f"{node}:output:{outputs[node][argument] + int(index)}"

            for node in function.node_def:
                node.input[:] = [renamed(tensor) for tensor in node.input]
            for name, tensor in function.ret.items():
                function.ret[name] = renamed(tensor)
        return count

    def _replace(self, node: node_def_pb2.NodeDef, ranks: dict[str, int]) -> dict[str, int] | None:
        """Makes a call of a fused node; where its outputs then begin, or None if it is no such."""
        if not node.op.startswith(_PREFIX):
            return None
        definition = self._definition(node.op)
        attributes = {a.name: a.default_value for a in definition.attr} | dict(node.attr)
        inputs = _flat_types(definition.input_arg, attributes)
        outputs = _flat_types(definition.output_arg, attributes)
        is_volume = ranks.get(node.input[0].partition(":")[0]) == 5  # x comes first
        function = self._function(definition, attributes, inputs, outputs, is_volume)
        node.op = "PartitionedCall"
        for name in [name for name in node.attr if not name.startswith("_")]:
            del node.attr[name]
        node.attr["f"].func.name = function
        node.attr["Tin"].list.type[:] = [dtype for _, dtype in inputs]
        node.attr["Tout"].list.type[:] = [dtype for _, dtype in outputs]
        names = [name for name, _ in outputs]
        return {name: names.index(name) for name in names}

    def _definition(self, op: str) -> op_def_pb2.OpDef:
        definition = self._definitions.get(op) or op_def_registry.get(op)
        if definition is None or not _call.is_defined(op.removesuffix("Grad")):
            raise ValueError(f"this version of cbam_ops does not know the op {op}")
        return definition

    def _function(
        self,
        definition: op_def_pb2.OpDef,
        attributes: dict[str, attr_value_pb2.AttrValue],
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[tuple[str, int]],
        is_volume: bool,
    ) -> str:
        """The name of the function that computes an op at these attributes."""
        asked = node_def_pb2.NodeDef(op=definition.name)
        for name, value in attributes.items():
            if not name.startswith("_"):
                asked.attr[name].CopyFrom(value)
        key = asked.SerializeToString(deterministic=True) + bytes([is_volume])
        if key not in self._functions:
            words = {a.name: _plain(asked.attr[a.name]) for a in definition.attr}
            taken = {function.signature.name for function in self._graph.library.function}
            for function in self._trace(definition, words, inputs, outputs, is_volume):
                if function.signature.name in taken:  # of the same op in another graph of this file
                    raise ValueError(f"there is a function {function.signature.name} already")
                self._graph.library.function.append(function)
            self._functions[key] = self._graph.library.function[-1].signature.name
        return self._functions[key]

    def _trace(
        self,
        definition: op_def_pb2.OpDef,
        words: dict[str, Any],
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[tuple[str, int]],
        is_volume: bool,
    ) -> list[Any]:
        """The functions that the op's definition in plain TensorFlow is made of, it itself last."""
        signature = _call.signature_of(definition)
        lengths = {a.name: words[a.number_attr] for a in definition.input_arg if a.number_attr}

        def compute(*tensors: tf.Tensor) -> list[tf.Tensor]:
            # Half types are read and written as such, and computed in float32, as by the ops.
            rest = iter(tf.cast(t, _call.compute_type(t.dtype)) for t in tensors)
            values = {**words, "for_int8": self._for_int8}
            for name in signature.inputs:
                many = name in lengths
                values[name] = list(islice(rest, lengths[name])) if many else next(rest)
            if definition.name.endswith("Grad"):
                forward = definition.name.removesuffix("Grad")
                results = _gradients.by_definition(
                    forward,
                    _call.signature_of(self._definition(forward)),
                    signature.outputs,
                    values,
                )
            else:
                results = _all_outputs(definition.name, values)
            flat = _gradients.flat(results[name] for name in signature.outputs)
            return [tf.cast(t, dtype) for t, (_, dtype) in zip(flat, outputs, strict=True)]

        of_volumes = "_of_volumes" if is_volume else ""
        name = definition.name.replace(">", "_") + of_volumes + "_in_stock_ops"
        compute.__name__ = name
        sides = 3 if is_volume else 2
        specs = [tf.TensorSpec(_shape(name, sides), dtype) for name, dtype in inputs]
        traced = tf.function(compute, autograph=False).get_concrete_function(*specs)
        return [*traced.graph.as_graph_def().library.function, traced.function_def]


def _rank(attributes: Mapping[str, attr_value_pb2.AttrValue]) -> int:
    """The rank of a node's first output; 0 where the file does not say."""
    shapes = attributes["_output_shapes"].list.shape if "_output_shapes" in attributes else []
    return len(shapes[0].dim) if shapes else 0


def _shape(name: str, sides: int) -> list[int | None] | None:
    dimensions = _call.DIMENSIONS.get(name)
    if dimensions is None:
        return None
    return [None] * (len(dimensions) + dimensions.count("...") * (sides - 1))


def _all_outputs(op: str, values: dict[str, Any]) -> dict[str, Any]:
    """The outputs of an op, with those that only its gradient reads."""
    outputs = _call.by_definition(op, values)
    if "y" not in outputs:  # the pools
        return outputs
    x, layout = values["x"], values["data_format"]
    u = x
    if "channel_gate" in outputs:
        outputs["channel_descriptors"] = tf.stack(reference.channel_pool(x, data_format=layout))
        if values.get("order") != "parallel":
            u = reference.scale_channels(x, outputs["channel_gate"], layout)
    if "spatial_gate" in outputs:
        pooled = reference.spatial_pool(u, data_format=layout)
        mean_and_maximum = tf.unstack(pooled, axis=1 if layout == "NCHW" else -1)
        outputs["spatial_descriptors"] = tf.stack(mean_and_maximum, axis=1)
        statistics = outputs["batch_statistics"]
        outputs["batch_statistics"] = tf.concat(statistics or [tf.zeros([0], x.dtype)], axis=0)
    return outputs


def _flat_types(
    arguments: Sequence[op_def_pb2.OpDef.ArgDef], attributes: dict[str, attr_value_pb2.AttrValue]
) -> list[tuple[str, int]]:
    """Name and type of every tensor that an op takes, or gives."""
    return [
        (argument.name, attributes[argument.type_attr].type)
        for argument in arguments
        for _ in range(attributes[argument.number_attr].i if argument.number_attr else 1)
    ]


def _plain(value: attr_value_pb2.AttrValue) -> Any:
    kind = value.WhichOneof("value")
    plain = getattr(value, kind)
    return plain.decode() if kind == "s" else plain
