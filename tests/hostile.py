"""Makes hostile calls of all ops; a program of its own, since what it looks for ends a process.

    python tests/hostile.py eager 400 --seed 7

Every call starts from a right one, taken from a graph of the public functions, and has one to three
things changed: an attribute, a type, a rank, a size, the number of tensors in a list. It must
return or raise an error in words; a line says what is tried before it is tried, so that the last
line names what ended the process. Prints `UNEXPECTED` for any other exception.

kinds: `eager` calls kernels, which no shape function has checked; `graph` imports nodes from a
GraphDef whose shapes are not known; `custom_call` hands a program to XLA that no lowering has seen.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, graph_pb2, node_def_pb2
from tensorflow.python.eager import context, execute
from tensorflow.python.framework import op_def_registry

# Another build of the libraries, one with a sanitizer say, in the place of the installed ones.
LIBRARIES = os.environ.get("CBAM_OPS_TEST_LIBRARIES", "")


def _elsewhere(load: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda installed: load(
        str(Path(LIBRARIES or Path(installed).parent, Path(installed).name))
    )


with (
    mock.patch.object(tf, "load_op_library", _elsewhere(tf.load_op_library)),
    mock.patch.object(tf, "load_library", _elsewhere(tf.load_library)),
):
    import cbam_ops
    from cbam_ops.testing import OPTIONS, Case

EXPECTED = (tf.errors.OpError, ValueError, TypeError)
WORDS = ["NHWC", "NCHW", "none", "relu", "avg", "max", "avg+max", "parallel", "channel_first", "",
         "NHWC\0", "x" * 1000, "\u00e9"]  # fmt: skip
FLOATS = [0.0, -1.0, 1e-45, 1e38, float("nan"), float("inf"), float("-inf")]
TYPES = [tf.half, tf.bfloat16, tf.float32, tf.float64, tf.int32, tf.uint8, tf.bool]
SIZES = [0, 1, 2, 3, 7, 8, 33]
HUGE = [2**15, 2**30, 2**31 - 1, 2**31, 2**40, 2**62]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """An op, its attributes as Python values, and its tensors in a flat list."""

    op: str
    attributes: dict[str, Any]
    inputs: tuple[tuple[Shape, tf.DType], ...]
    outputs: tuple[tuple[Shape, tf.DType], ...]

    def __str__(self) -> str:
        inputs = [f"{dtype.name}{list(shape)}" for shape, dtype in self.inputs]
        return f"{self.op} {self.attributes!r:.400} {inputs}"

    def tensors(self) -> list[tf.Tensor]:
        generator = np.random.default_rng(1)
        made = []
        for shape, dtype in self.inputs:
            if 0 in shape:
                made.append(tf.zeros(shape, dtype))
            else:
                made.append(tf.cast(tf.constant(generator.normal(size=shape) * 2), dtype))
        return made


def right_calls() -> list[Call]:
    """Calls of every op, forward and backward, with every option."""
    found: list[Call] = []
    for number, case in enumerate([*OPTIONS, Case(size=(0, 5, 7, 13)), Case(size=(3, 1, 1, 8))]):
        case = case.replace(
            dtype=("float32", "bfloat16", "float16", "float64")[number % 4],
            data_format=("NHWC", "NCHW")[number % 2],
        )

        @tf.function(autograph=False)
        def step(case: Case = case) -> Any:
            return case.gradients(cbam_ops.ops, case.draw())

        for node in step.get_concrete_function().graph.get_operations():
            if node.type.startswith("CbamOps>"):
                definition = op_def_registry.get(node.type)
                found.append(
                    Call(
                        node.type,
                        {attr.name: node.get_attr(attr.name) for attr in definition.attr},
                        tuple((tuple(t.shape), t.dtype) for t in node.inputs),
                        tuple((tuple(t.shape), t.dtype) for t in node.outputs),
                    )
                )
    return found


def spoil(call: Call, draw: random.Random) -> Call:
    """The call with one thing changed."""
    inputs = list(call.inputs)
    at = draw.randrange(len(inputs))
    shape, dtype = inputs[at]
    changes = ["attribute", "attribute", "dimension", "dimension", "empty", "empty", "size", "rank"]
    change = draw.choice([*changes, "type", "count", "swap"])
    if change == "attribute":
        name = draw.choice(sorted(call.attributes))
        value = call.attributes[name]
        if isinstance(value, tf.DType):
            value = draw.choice(TYPES)
        elif isinstance(value, (bytes, str)):
            value = draw.choice(WORDS).encode()
        elif isinstance(value, float):
            value = draw.choice(FLOATS)
        else:
            # TensorFlow itself makes room for as many outputs as the attribute says.
            value = draw.choice([-1, 0, 1, 2, 3, 1000])
        return replace(call, attributes={**call.attributes, name: value})
    if change == "size" and shape:
        axis = draw.randrange(len(shape))
        inputs[at] = (*shape[:axis], draw.choice(SIZES), *shape[axis + 1 :]), dtype
    elif change in ("dimension", "empty"):
        # Everywhere alike, so that the call may be right: the sizes of the cases tell which is
        # which. What is empty can be huge without any memory.
        sizes = {draw.choice([1, 2, 3, 5, 7, 13]): draw.choice(SIZES)}
        if change == "empty":
            sizes = {size: draw.choice(HUGE) for size in draw.sample([1, 3, 5, 7, 13], 2)}
            sizes[2] = 0
        inputs = [(tuple(sizes.get(n, n) for n in s), t) for s, t in inputs]
    elif change == "rank":
        inputs[at] = draw.choice([(*shape, 1), shape[1:], (1, *shape), ()]), dtype
    elif change == "type":
        inputs[at] = shape, draw.choice(TYPES)
    elif change == "count":
        inputs[at : at + 1] = [inputs[at]] * draw.choice([0, 2])
    elif change == "swap":
        other = draw.randrange(len(inputs))
        inputs[at], inputs[other] = inputs[other], inputs[at]

    # What has elements must fit this machine.
    def fits(shape: Shape) -> bool:
        return np.prod([float(n) for n in shape]) < 1e6

    return replace(call, inputs=tuple(i for i in inputs if fits(i[0])) or call.inputs)


def expected_inputs(call: Call) -> int:
    """How many tensors the op takes with the attributes of the call."""
    arguments = op_def_registry.get(call.op).input_arg
    return sum(
        max(0, call.attributes[argument.number_attr]) if argument.number_attr else 1
        for argument in arguments
    )


def eager(call: Call) -> None:
    if len(call.inputs) > expected_inputs(call):
        raise ValueError("TensorFlow itself ends the process, of stock ops too")
    attributes: list[Any] = []
    for name, value in call.attributes.items():
        attributes += [name, value.as_datatype_enum if isinstance(value, tf.DType) else value]
    execute.execute(
        call.op, len(call.outputs), call.tensors(), tuple(attributes), context.context()
    )


def graph(call: Call) -> None:
    definition = graph_pb2.GraphDef()
    definition.versions.producer = 1087
    node = node_def_pb2.NodeDef(name="op", op=call.op)
    for name, value in call.attributes.items():
        attribute = attr_value_pb2.AttrValue()
        if isinstance(value, tf.DType):
            attribute.type = value.as_datatype_enum
        elif isinstance(value, bytes):
            attribute.s = value
        elif isinstance(value, float):
            attribute.f = value
        else:
            attribute.i = value
        node.attr[name].CopyFrom(attribute)
    for number, (_, dtype) in enumerate(call.inputs):
        placeholder = definition.node.add(name=f"input{number}", op="Placeholder")
        placeholder.attr["dtype"].type = dtype.as_datatype_enum
        node.input.append(placeholder.name)
    definition.node.append(node)
    names = [f"input{number}:0" for number in range(len(call.inputs))]

    def imported() -> None:
        tf.graph_util.import_graph_def(definition, name="")

    function = tf.compat.v1.wrap_function(imported, [])
    pruned = function.prune(
        [function.graph.get_tensor_by_name(name) for name in names],
        function.graph.get_operation_by_name("op").outputs,
    )
    pruned(*call.tensors())


ELEMENTS = {tf.float32: "f32", tf.float64: "f64", tf.half: "f16", tf.bfloat16: "bf16",
            tf.int32: "i32", tf.uint8: "ui8", tf.bool: "i1"}  # fmt: skip


def custom_call(call: Call, draw: random.Random) -> None:
    """The call as XLA's handler gets it, with scratch memory of some size."""
    if any(np.prod([float(max(n, 1)) for n in s]) >= 2.0**58 for s, _ in call.inputs):
        raise ValueError("TensorFlow's bridge to XLA itself ends the process, for stock ops too")
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    def text(shape: Shape, dtype: tf.DType) -> str:
        return f"tensor<{'x'.join([*map(str, shape), ELEMENTS[dtype]])}>"

    def value_text(value: Any) -> str:
        if isinstance(value, tf.DType):
            return f"{value.as_datatype_enum} : i32"
        if isinstance(value, bytes):
            return '"' + "".join(f"\\{byte:02X}" for byte in value) + '"'
        if isinstance(value, float):
            return f"0x{np.float32(value).view(np.uint32):08X} : f32"
        return f"{value} : i32"

    attributes = {name: value_text(value) for name, value in call.attributes.items()}
    attributes["threads"] = f"{draw.choice([-1, 0, 1, 2, 2, 2, 64, 2**31 - 1])} : i32"
    scratch = draw.choice([0, 1, 63, 1000, 2**20, 2**20, 2**20, 2**20])
    operands = [text(*argument) for argument in call.inputs]
    outputs = [*call.outputs, ((scratch,), tf.uint8)]
    if draw.random() < 0.2:
        outputs = [output for output in outputs if draw.random() < 0.8] or outputs
    results = [text(*output) for output in outputs]
    names = [f"%x{number}" for number in range(len(operands))]
    parameters = [f"{name}: {operand}" for name, operand in zip(names, operands, strict=True)]
    module = f"""
        func.func public @main({", ".join(parameters)}) -> {results[0]} {{
          %y:{len(results)} = stablehlo.custom_call @"{call.op}"({", ".join(names)})
            {{api_version = 4 : i32,
              backend_config = {{{", ".join(f"{k} = {v}" for k, v in attributes.items())}}}}}
            : ({", ".join(operands)}) -> ({", ".join(results)})
          return %y#0 : {results[0]}
        }}"""

    @tf.function(jit_compile=True, autograph=False)
    def function(*tensors: tf.Tensor) -> tf.Tensor:
        (y,) = gen_xla_ops.xla_call_module(
            args=tensors,
            version=9,
            module=module,
            Sout=[outputs[0][0]],
            Tout=[outputs[0][1]],
            platforms=["CPU"],
            disabled_checks=[f"call:{call.op}"],
        )
        return y

    function(*call.tensors())


def main() -> None:
    """Makes the calls and prints how many returned and how many were refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["eager", "graph", "custom_call"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    run: Callable[[Call], None] = {
        "eager": eager, "graph": graph, "custom_call": lambda call: custom_call(call, draw),
    }[arguments.kind]  # fmt: skip
    cbam_ops.ops.load_library()
    loaded = [line.split()[-1] for line in open("/proc/self/maps") if "libcbam_ops" in line]
    assert loaded and all(path.startswith(LIBRARIES) for path in loaded), loaded
    calls = right_calls()
    for call in calls:  # each as it is, or the rest would prove nothing
        if arguments.kind != "custom_call":
            run(call)
    returned = refused = 0
    for number in range(arguments.count):
        call = draw.choice(calls)
        for _ in range(draw.choice([1, 1, 2, 3])):
            call = spoil(call, draw)
        print(number, call, flush=True)
        try:
            run(call)
            returned += 1
        except EXPECTED:
            refused += 1
        except Exception as error:
            print(f"UNEXPECTED {type(error).__name__}: {error}", flush=True)
    print(f"{len({call.op for call in calls})} ops: {returned} returned, {refused} refused")


if __name__ == "__main__":
    main()
