"""A call of a public function: its arguments are checked, who computes is chosen, and it runs.

:mod:`cbam_ops.ops` states the functions and :mod:`cbam_ops.reference` defines them. Everything that
both need for a call stands here, once: what the arguments may be, the words for what is wrong with
them, whether native ops run here, and what a function returns of an op's outputs.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar

import numpy as np
import tensorflow as tf

from cbam_ops import _gpu, _gpu_check, _loader, options
from cbam_ops._console import first_line

P = ParamSpec("P")
R = TypeVar("R")

FLOATING: tuple[tf.DType, ...] = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
HALF = (tf.float16, tf.bfloat16)

# The sides of a map by its rank: a series, an image or a volume.
SIDES = {3: ("L",), 4: ("H", "W"), 5: ("D", "H", "W")}
# The arguments that are tensors, with the names of their dimensions; "..." stands for the sides of
# maps, which are written with their channels last, and of the kernel. All but the maps are weights.
DIMENSIONS = {
    "x": ("N", "...", "C"),
    "residual": ("N", "...", "C"),
    "w0": ("C", "hidden"),
    "b0": ("hidden",),
    "w1": ("hidden", "C"),
    "b1": ("C",),
    "kernel": ("...", "2", "1"),
    "bias": ("1",),
    "gamma": ("1",),
    "beta": ("1",),
}
MAPS = ("x", "residual")
MAY_BE_NONE = ("b0", "w1", "b1", "bias", "residual")
# Without a hidden layer (no `w1`) the first layer of the MLP is the only one.
_NO_HIDDEN_LAYER = {"w0": ("C", "C"), "b0": ("C",)}
WORDS: dict[str, tuple[str | None, ...]] = {
    "data_format": ("NHWC", "NCHW"),  # channels last or first, also of series and volumes
    "pooling": ("avg+max", "avg", "max"),
    "mlp_activation": (None, "relu"),
    "activation": (None, "relu"),
    "order": ("channel_first", "spatial_first", "parallel"),
    "mlp_merge": ("logits", "hidden", "gates"),
    # Those that the native ops do not know: see `is_fused`.
    "hidden_activation": ("relu", "swish", "gelu", "elu", "mish"),
    "gate_activation": ("sigmoid", "hard_sigmoid"),
    "ties": ("even", "first"),
}


# What zeros that stand for a bias are called in a graph.
NO_BIAS = "no_bias"
# TensorFlow's words for the same, by the rank of the map.
_DATA_FORMATS = {3: ("NWC", "NCW"), 5: ("NDHWC", "NCDHW")}


class Arguments(SimpleNamespace):
    """The arguments of a call by name; as tensors, or None, where they are tensors.

    With `native`, the module of native ops, a definition takes its pools from there.
    """

    native: ModuleType | None = None
    # A definition scales the spatial descriptors before it stacks them: `_stock_graph.rewrite`.
    for_int8 = False
    # What some functions lack.
    residual: tf.Tensor | None = None
    bias: tf.Tensor | None = None
    gamma: tf.Tensor | None = None
    activation: str | None = None
    pooling = "avg+max"
    order = "channel_first"
    hidden_activation = "relu"
    gate_activation = "sigmoid"
    mlp_merge = "logits"
    ties = "even"

    @property
    def rank(self) -> int:
        """The rank of the map; 4 where it is not known, or there is none."""
        x = getattr(self, "x", None)
        return 4 if x is None else x.shape.rank or 4

    @property
    def compute_type(self) -> tf.DType:
        """The type of sums, descriptors and returned gates."""
        return compute_type(self.x.dtype)


def compute_type(dtype: tf.DType) -> tf.DType:
    """float64 for float64, else float32."""
    return tf.float64 if dtype is tf.float64 else tf.float32


Outputs = dict[str, Any]
_definitions: dict[str, Callable[[Arguments], Outputs]] = {}
_for_inference: ContextVar[dict[str, Any] | None] = ContextVar("for_inference", default=None)


def not_converted(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which AutoGraph leaves as it is; type checkers see its signature."""
    return tf.autograph.experimental.do_not_convert(function)


def call(function: str, values: dict[str, Any]) -> Any:
    """What the public ``function`` returns for its arguments ``values``."""
    native = options.native_ops(cause_of_the_place)
    args = Arguments(**(values | (_for_inference.get() or {})))
    _convert(function, args)
    op = op_of(function)
    if native is None:
        _check_shapes(function, args)
        return _results(_definitions[op](args), args)
    if not tf.executing_eagerly() or args.rank == 3 or not is_fused(op, args):
        _check_shapes(function, args)
        return _results(native_outputs(native, op, args), args)
    # The op checks the shapes itself. What it refuses is then explained in the function's words.
    try:
        return _results(native_outputs(native, op, args), args)
    except tf.errors.InvalidArgumentError as error:
        refused = error
    _check_shapes(function, args)
    raise refused


@contextlib.contextmanager
def for_inference(for_int8: bool) -> Iterator[None]:
    """Calls in the block are traced for inference elsewhere, where only values matter.

    `ties` concern the gradient alone. With "even" what they keep stock becomes a fused op, and so
    what `_stock_graph.rewrite` makes of one.
    """
    token = _for_inference.set({"ties": "even", "for_int8": for_int8})
    try:
        yield
    finally:
        _for_inference.reset(token)


def reference_of(
    statement: Callable[P, R], definition: Callable[[Arguments], Outputs]
) -> Callable[P, R]:
    """The function that :mod:`cbam_ops.ops` states, always computed by its ``definition``."""
    _definitions[op_of(statement.__name__)] = definition

    @not_converted
    @functools.wraps(statement)
    def reference(*args: P.args, **keywords: P.kwargs) -> R:
        with options.use_implementation("reference"):
            return statement(*args, **keywords)

    reference.__module__ = definition.__module__
    return reference


def is_defined(op: str) -> bool:
    """Whether an op, by its registered name, has a definition here."""
    return op in _definitions


def by_definition(op: str, values: Mapping[str, Any]) -> Outputs:
    """The outputs of a native op by its definition.

    Args:
        op: Its registered name.
        values: Its inputs and attributes by name, as the op has them.

    Raises:
        ValueError: An attribute is no word of this release's.
    """
    arguments = dict(values)
    for name, value in values.items():
        if name in WORDS:
            arguments[name] = None if value == "none" else value
            _check_word(op, name, arguments[name], WORDS[name])
        elif isinstance(value, list):  # an argument that may be absent
            arguments[name] = value[0] if value else None
    if arguments.get("gamma") is not None:
        arguments["beta"] = arguments.pop("bias")
    return _definitions[op](Arguments(**arguments))


def op_of(function: str) -> str:
    """The native op that computes a function: "CbamOps>Cbam" for "cbam_with_batch_norm"."""
    name = function.removesuffix("_with_batch_norm").title().replace("_", "")
    return f"CbamOps>{name}"


def _results(outputs: Outputs, args: Arguments) -> Any:
    """What a function returns of the outputs."""
    if "y" in outputs:
        results = [outputs["y"]]
        if args.gamma is not None:
            results += outputs["batch_statistics"]
        if args.return_gates:
            gates = [outputs[name] for name in ("channel_gate", "spatial_gate") if name in outputs]
            results += [tf.cast(gate, args.compute_type) for gate in gates]
    else:
        results = list(outputs.values())
    return tuple(results) if len(results) > 1 else results[0]


# --- checks ---------------------------------------------------------------------------------------


def _convert(function: str, args: Arguments) -> None:
    """Makes tensors of what should be, and checks everything but the shapes."""
    for name, value in vars(args).items():
        if name == "data_format":
            args.data_format = _layout(function, value, args.x.shape.rank)
        elif name in WORDS:
            # An array or a tensor compares elementwise: the type is looked at first.
            _check_word(function, name, value, WORDS[name])
        elif name == "epsilon":
            args.epsilon = _epsilon(function, value)
        elif name in DIMENSIONS and (value is not None or name not in MAY_BE_NONE):
            if not isinstance(value, tf.Tensor):
                value = _tensor(function, name, value, None if name == "x" else args.x.dtype)
                setattr(args, name, value)
            _check_type(function, args, name, value.dtype)


def _check_word(function: str, name: str, value: Any, words: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in words:
        choices = " or ".join(repr(choice) for choice in words)
        _refuse(function, name, f"be {choices}, got {value!r}")


def _layout(function: str, value: Any, rank: int | None) -> str:
    """The layout, "NHWC" or "NCHW", for what may be said of a map of this rank."""
    words, of_rank = WORDS["data_format"], _DATA_FORMATS.get(rank or 4, ())
    _check_word(function, "data_format", value, (*words, *of_rank))
    return "NCHW" if value[1] == "C" else "NHWC"


def _epsilon(function: str, value: Any) -> float:
    # Rounded to float32, the type of the ops' attribute: so the fused ops and the reference are
    # the same function in float64 too.
    try:
        epsilon = float(np.float32(value))
    except (TypeError, ValueError):
        epsilon = -1.0
    if not 0.0 <= epsilon < float("inf"):
        _refuse(function, "epsilon", f"be a number >= 0, got {value!r}")
    return epsilon


# What to do with those that look like tensors.
_NO_TENSORS = {
    "KerasTensor": "in a model, call a layer, such as cbam_ops.CBAM",
    "RaggedTensor": "its method to_tensor makes one, padded",
    "SparseTensor": "tf.sparse.to_dense makes one",
}


def _tensor(function: str, name: str, value: Any, preferred: tf.DType | None) -> tf.Tensor:
    if value is None:
        _refuse(function, name, "be a tensor, got None")
    if hasattr(value, "dtype"):
        preferred = None  # what has a type keeps it; only Python numbers take the map's
    try:
        return tf.convert_to_tensor(value, dtype_hint=preferred)
    except Exception as error:  # of whatever type a value's own conversion raises
        kind = type(value).__name__
        why = _NO_TENSORS.get(kind) or first_line(error)
        _refuse(function, name, f"be a tensor or what converts to one, got {kind}: {why}", error)


def _check_type(function: str, args: Arguments, name: str, dtype: tf.DType) -> None:
    """The residual has the type of the map; weights have one type, the map's or float32."""
    first = "w0" if hasattr(args, "w0") else "kernel"  # of the weights
    like = "x" if name in ("residual", first) else first
    map_type = args.x.dtype
    if name == "x":
        allowed, beside = FLOATING, ""
    elif dtype is getattr(args, like).dtype:  # every type is one object
        return
    else:
        allowed = (map_type, tf.float32) if map_type in HALF else (map_type,)
        beside = f" beside `x` of dtype {map_type.name}"
    if dtype not in allowed and name != "residual":
        names = " or ".join(dtype.name for dtype in allowed)
        _refuse(function, name, f"have dtype {names}{beside}, got {dtype.name}")
    if name not in ("x", first):
        expected = getattr(args, like).dtype.name
        _refuse(function, name, f"have the dtype of `{like}`, {expected}, got {dtype.name}")


def _check_shapes(function: str, args: Arguments) -> None:
    """Checks that the shapes fit each other, as far as they are known."""
    known: dict[str, int] = {"1": 1, "2": 2}
    sides = SIDES.get(args.rank)
    if sides is None:
        maps = " or ".join(_list("N", *sides, "C") for sides in SIDES.values())
        _refuse(function, "x", f"have shape {maps}, got {_text(args.x.shape.as_list())}")
    one_layer = hasattr(args, "w0") and args.w1 is None
    if one_layer and args.b1 is not None:
        _refuse(function, "b1", f"be None as `w1` is, got shape {_text(args.b1.shape.as_list())}")
    if one_layer and args.mlp_merge == "hidden":
        _refuse(function, "mlp_merge", "be 'logits' or 'gates' where `w1` is None, got 'hidden'")
    for name, dimensions in (DIMENSIONS | (_NO_HIDDEN_LAYER if one_layer else {})).items():
        tensor = getattr(args, name, None)
        if tensor is None or tensor.shape.rank is None:
            continue
        if name in MAPS:
            last = args.data_format == "NHWC"
            dimensions = ("N", *sides, "C") if last else ("N", "C", *sides)
        elif name == "kernel":
            dimensions = (*kernel_sides(sides), "2", "1")
        sizes = tensor.shape.as_list()
        if not _learn(known, dimensions, sizes):
            wanted = _list(*dimensions)
            expected = _list(*(str(known.get(letter, letter)) for letter in dimensions))
            if expected != wanted:
                wanted += f" = {expected}"
            _refuse(function, name, f"have shape {wanted}, got {_text(sizes)}")
        for letter in dimensions:
            if letter.startswith("k") and known.get(letter, 1) % 2 == 0:
                _refuse(function, name, f"have an odd {letter}, got shape {_text(sizes)}")
            if letter != "N" and known.get(letter) == 0:
                _refuse(function, name, f"have {letter} >= 1, got shape {_text(sizes)}")


def _learn(known: dict[str, int], dimensions: tuple[str, ...], sizes: list[int | None]) -> bool:
    """Whether sizes fit what is known of their dimensions; then they are known too."""
    if len(sizes) != len(dimensions):
        return False
    given = [(d, size) for d, size in zip(dimensions, sizes, strict=True) if size is not None]
    if any(known.get(dimension, size) != size for dimension, size in given):
        return False
    return all(known.setdefault(dimension, size) == size for dimension, size in given)


def _refuse(function: str, name: str, must: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(f"{function}: `{name}` must {must}") from cause


def kernel_sides(sides: tuple[str, ...]) -> tuple[str, ...]:
    """What the kernel's sides are called beside those of a map."""
    return tuple(f"k{side.lower()}" for side in sides) if len(sides) > 1 else ("k",)


def _text(sizes: list[int | None]) -> str:
    return _list(*("?" if size is None else str(size) for size in sizes))


def _list(*items: str) -> str:
    return f"[{', '.join(items)}]"


# --- where the native ops can run -----------------------------------------------------------------


def cause_of_the_place() -> _loader.Cause | None:
    """Why the library, though loaded, has no kernel for the place where the op would run."""
    if not tf.executing_eagerly():
        converter = _converter_that_traces()
        if converter is not None:
            return _loader.Cause(
                "converter",
                f"{converter} traces the op for a runtime that has no kernel of it.",
                "cbam_ops.export(model, ...) rewrites native ops into stock ones.",
            )
        from tensorflow.python.ops import control_flow_util

        if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            return cause_in_xla()
    return _cause_of_the_device()


# What traces a model for another runtime, by the start of its modules' names.
_CONVERTERS = {
    "keras.src.export.litert": 'model.export(..., format="litert")',
    "keras.src.export.onnx": 'model.export(..., format="onnx")',
    "keras.src.export.openvino": 'model.export(..., format="openvino")',
    "tensorflow.lite.python.": "tf.lite.TFLiteConverter",
    "tf2onnx.": "tf2onnx",
}


def _converter_that_traces() -> str | None:
    """The converter that this trace is for. Neither Keras nor TensorFlow tells a layer."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        for start, name in _CONVERTERS.items():
            if module.startswith(start):
                return name
        frame = frame.f_back
    return None


def native_runs() -> bool:
    """Whether an op called now, outside XLA, would run the native kernels."""
    if options.implementation() == "reference":
        return False
    return not isinstance(_loader.load_ops(), _loader.Cause) and cause_of_the_place() is None


def cause_in_xla() -> _loader.Cause | None:
    """Why XLA, compiling for the place where the op would run, cannot compile it."""
    return _loader.load_xla() or _cause_of_the_device()


def _cause_of_the_device() -> _loader.Cause | None:
    if not tf.config.list_logical_devices("GPU"):
        return None
    reason = _gpu.why_not_under_tensorflow()
    if reason is None and _gpu_check.is_proved():
        return None
    # Where TensorFlow would put a stock op now: the innermost tf.device, or by default the GPU. An
    # op without a kernel there would quietly run on the CPU, with copies either way.
    place = tf.zeros(()).device
    device = tf.DeviceSpec.from_string(place).device_type if place else "GPU"
    if device != "GPU":
        return None
    if reason is None:
        return _gpu_check.cause()
    return _loader.Cause(
        "no_kernel",
        f"The op would run on a GPU, where the kernels cannot. {reason}",
        'Put it under tf.device("CPU") to use the native ones there.',
    )


# --- native ops -----------------------------------------------------------------------------------


class Signature(NamedTuple):
    """What TensorFlow knows of an op: its arguments and the attributes that calls give.

    An argument that may be absent is a list of no or one tensor; its value here is the name of the
    attribute with the length, "" for all others.
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    attributes: tuple[str, ...]


@functools.cache
def signature(op: str) -> Signature:
    """The signature of a loaded op by its registered name."""
    from tensorflow.python.framework import op_def_registry

    return signature_of(op_def_registry.get(op))


def signature_of(definition: Any) -> Signature:
    """The signature in a definition of an op (an `OpDef`)."""
    inputs = {argument.name: argument.number_attr for argument in definition.input_arg}
    outputs = {argument.name: argument.number_attr for argument in definition.output_arg}
    # Types, and lengths of inputs, TensorFlow takes from the inputs.
    given = (a.name for a in definition.attr if a.type != "type" and a.name not in inputs.values())
    return Signature(inputs, outputs, tuple(given))


def run(native: ModuleType, op: str, values: dict[str, Any]) -> Outputs:
    """Runs an op on those of the values that it takes; its outputs by name."""
    inputs, outputs, attributes = signature(op)
    function = getattr(native, op.replace(">", "_"))
    result = function(**{name: values[name] for name in (*inputs, *attributes) if name in values})
    return dict(zip(outputs, result if isinstance(result, tuple) else (result,), strict=True))


def is_fused(op: str, args: Arguments) -> bool:
    """Whether a native op computes this, as one or (`halves`) as two of them."""
    if args.gate_activation != "sigmoid" or args.ties != "even":
        return False
    if op == "CbamOps>Cbam" and args.order == "parallel" and args.pooling != "avg+max":
        return False
    if op not in ("CbamOps>Cbam", "CbamOps>ChannelAttention"):
        return True
    return args.hidden_activation == "relu" and args.w1 is not None


def halves(op: str, args: Arguments) -> tuple[str, ...]:
    """The two ops, in order, whose composition this is; none if it is to be computed as one."""
    both = ("CbamOps>ChannelAttention", "CbamOps>SpatialAttention")
    if op != "CbamOps>Cbam" or args.order == "parallel":
        return ()
    if args.order == "spatial_first":
        return both[::-1]
    return () if args.pooling == "avg+max" and is_fused(op, args) else both


def native_outputs(native: ModuleType, op: str, args: Arguments) -> Outputs:
    """The outputs of a function, by native ops as far as there are such."""
    if args.rank == 3:
        return _of_an_image(native, op, args)
    if parts := halves(op, args):
        without = {"residual": None, "activation": None}
        outputs = native_outputs(native, parts[0], Arguments(**{**vars(args), **without}))
        then = Arguments(**{**vars(args), "x": outputs["y"]})
        return outputs | native_outputs(native, parts[1], then)
    if is_fused(op, args):
        return _fused(native, op, args)
    # The definition, with fused pools; its weights have the compute type, as those of native ops.
    weights = {
        name: tf.cast(value, args.compute_type)
        for name, value in vars(args).items()
        if name in DIMENSIONS and name not in MAPS and value is not None
    }
    return _definitions[op](Arguments(**{**vars(args), **weights, "native": native}))


def _of_an_image(native: ModuleType, op: str, args: Arguments) -> Outputs:
    """The outputs for a series as an image of one column."""
    column = args.data_format.index("W")
    images = {
        name: tf.expand_dims(value, column if name in MAPS else 1)
        for name in (*MAPS, "kernel")
        if (value := getattr(args, name, None)) is not None
    }
    outputs = native_outputs(native, op, Arguments(**{**vars(args), **images}))
    columns = {"y": column, "spatial_gate": 2, "descriptors": column}
    return {
        name: tf.squeeze(value, columns[name]) if name in columns else value
        for name, value in outputs.items()
    }


def _fused(native: ModuleType, op: str, args: Arguments) -> Outputs:
    """The outputs of a native op, which takes weights in the compute type, with all biases."""
    values = {"gamma": [], **vars(args)}
    compute_type = args.compute_type
    for name, value in vars(args).items():
        if name in WORDS:
            values[name] = value or "none"
        elif name == "residual":
            values[name] = [] if value is None else [value]
        elif name in DIMENSIONS and name != "x":
            if value is None:
                weight = getattr(args, {"b0": "w0", "b1": "w1", "bias": "kernel"}.get(name, name))
                if weight is not None:  # else this is half of a module, and they are the other's
                    values[name] = _zero_bias(weight, compute_type)
            elif value.dtype is not compute_type:
                values[name] = tf.cast(value, compute_type)
    if args.gamma is not None:
        values.update(gamma=[values["gamma"]], bias=values["beta"])
    outputs = run(native, op, values)
    if args.gamma is not None and "batch_statistics" in outputs:
        outputs["batch_statistics"] = tf.split(tf.stop_gradient(outputs["batch_statistics"]), 2)
    return outputs


def _zero_bias(weight: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Zeros for a bias that was not given, beside its weight."""
    size = weight.shape[-1:]
    if size.is_fully_defined():  # tf.zeros takes six times as long
        return tf.constant(np.zeros(size, dtype.as_numpy_dtype), name=NO_BIAS)
    return tf.zeros(tf.shape(weight)[-1:], dtype, name=NO_BIAS)
