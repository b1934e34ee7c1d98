"""The public functions: right numbers from the native ops, wherever and however they are called."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from numpy_oracle import gradient_magnitudes
from programs import run_python
from tensorflow.python.framework import op_def_registry

import cbam_ops
from cbam_ops import _call, _gpu, ops, reference
from cbam_ops.testing import (
    FLOAT32,
    LARGE,
    OPTIONS,
    SIZES,
    Case,
    assert_accurate,
    assert_close,
    assert_same_bits,
    options,
    truth_and_stock,
)

pytestmark = pytest.mark.usefixtures("native")


def op_types(function: tf.types.experimental.GenericFunction, *arguments) -> set[str]:
    """The types of the ops that a function is traced to."""
    graph = function.get_concrete_function(*arguments).graph
    return {operation.type for operation in graph.get_operations()}


# --- numbers --------------------------------------------------------------------------------------


def check(case: Case) -> None:
    """Outputs and the gradients of every argument, from gradients of every output."""
    if case.hands_on_a_half:  # its rounding decides single numbers, say dgamma
        assert not [finding.fault for finding in case.examine(ops) if finding.fault]
        return
    tensors = case.draw()
    case.check(ops, tensors, magnitudes=gradient_magnitudes(case, tensors))


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_option_is_accurate(case, dtype, data_format):
    """Fails where an option, a type or a layout computes something else than the definition."""
    check(case.replace(dtype=dtype, data_format=data_format))


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("size_dtype", ["float32", "float16"])
def test_every_size_is_accurate(case, size_dtype, data_format):
    """Fails where a tail of a vector, an edge of a tile or a halo is handled wrongly."""
    check(case.replace(dtype=size_dtype, data_format=data_format))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", [OPTIONS[0], OPTIONS[3], OPTIONS[6], *OPTIONS[-2:]], ids=str)
def test_special_values_reach_the_same_outputs(case, value, data_format):
    """Fails where NaN or an infinity is dropped by a maximum, or spreads to a sample of its own."""
    case = case.replace(data_format=data_format)
    tensors = case.draw()
    x = tensors["x"].numpy()
    x[(0, *(size // 2 for size in x.shape[1:]))] = value
    tensors["x"] = tf.constant(x)
    actual = case.call(ops, tensors)
    truth, stock = truth_and_stock(case, tensors, "call")
    for name, *values in zip(case.output_names(), actual, truth, stock, strict=True):
        assert_accurate(*(output.numpy() for output in values), name)
    if "batch_norm" not in case.function:  # whose statistics tie all samples together
        assert np.isfinite(actual[0][1].numpy()).all()
    expected = case.call(reference, tensors)
    for name, ours, theirs in zip(case.output_names(), actual, expected, strict=True):
        assert (np.isnan(ours.numpy()) == np.isnan(theirs.numpy())).all(), name


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_types_and_shapes_equal_the_reference_s(case, dtype):
    """Fails where a user who switches the implementation gets another type, say of a gate."""
    case = case.replace(dtype=dtype)
    tensors = case.draw()
    for ours, theirs in zip(case.call(ops, tensors), case.call(reference, tensors), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_an_empty_batch_gives_empty_outputs(case, data_format):
    """Fails where a kernel divides by the batch or refuses the last, empty batch of a data set."""
    case = case.replace(size=(0, *case.size[1:]), data_format=data_format)
    tensors = case.draw()
    expected = case.call(reference, tensors)
    for ours, theirs in zip(case.call(ops, tensors), expected, strict=True):
        assert_same_bits(ours.numpy(), theirs.numpy(), case.function)
    for name, gradient in case.gradients(ops, tensors).items():
        assert_same_bits(gradient.numpy(), np.zeros(tensors[name].shape, np.float32), name)


@pytest.mark.parametrize("module", [ops, reference])
def test_series_and_volumes_have_data_formats_of_tensorflow(module):
    """Fails where the words of `tf.nn.conv1d` and `conv3d` mean something else than NHWC, NCHW."""
    for size, words in (((2, 9, 3), ("NWC", "NCW")), ((2, 3, 4, 5, 3), ("NDHWC", "NCDHW"))):
        for usual, word in zip(("NHWC", "NCHW"), words, strict=True):
            case = Case(size=size, data_format=usual)
            tensors = case.draw()
            results = (
                case.call(module, tensors),
                case.replace(data_format=word).call(module, tensors),
            )
            for ours, theirs in zip(*results, strict=True):
                assert_same_bits(ours.numpy(), theirs.numpy(), word)


@pytest.mark.parametrize(
    ("size", "beside"), [((2, 37, 13), {"ExpandDims", "Squeeze"}), ((2, 3, 4, 5, 13), set())]
)
def test_a_series_and_a_volume_are_one_fused_op(size, beside):
    """Fails where a series takes another way than an image of one column, or a volume several."""
    case = Case(size=size, residual=True, options=options(activation="relu"))
    tensors = case.draw()
    spec = tf.TensorSpec([None] * (len(size) - 1) + [13])
    specs = [spec, *(tensors[name] for name in case.names[1:])]

    def function(*values):
        return case.call(ops, dict(zip(case.names, values, strict=True)))

    heavy = op_types(tf.function(function), *specs) - {"Placeholder", "Identity", "Const", "Pack"}
    assert heavy == {"CbamOps>Cbam", *beside}


def test_python_numbers_and_arrays_are_taken():
    x = np.ones((1, 2, 2, 2), np.float32)
    w = [[1.0], [2.0]], None, [[3.0, 4.0]], None
    y = cbam_ops.cbam(x, *w, np.zeros((1, 1, 2, 1), np.float32), [0.0])
    gate = 1 / (1 + np.exp(-np.array([18.0, 24.0])))
    assert_close(y, np.broadcast_to(gate / 2, (1, 2, 2, 2)), FLOAT32, "y")


def test_a_word_that_the_definition_does_not_know_is_refused():
    """Fails when a graph of another release is rewritten to another function without a word."""
    with pytest.raises(ValueError, match="`mlp_activation` must be None or 'relu', got 'sigmoid'"):
        _call.by_definition("CbamOps>Cbam", {"mlp_activation": "sigmoid"})


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "words",
    [
        {"pooling": "avg"},
        {"pooling": "max", "order": "parallel"},
        {"hidden_activation": "swish"},
        {"gate_activation": "hard_sigmoid"},
        {"hidden": 0},
        {"ties": "first"},
    ],
    ids=lambda words: "-".join(map(str, words.values())),
)
def test_what_hands_on_a_half_is_as_accurate_as_stock(words, half):
    """Fails when a composition is held against one that keeps more digits than it can."""
    case = Case(dtype=half, hidden=words.get("hidden", 4))
    words = {name: value for name, value in words.items() if name != "hidden"}
    case = case.replace(options=options(**words))
    assert case.hands_on_a_half
    check(case)


# --- the statement --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", reference.__all__)
def test_the_statement_is_the_registered_op_s(function):
    """Fails where Python's names, words or defaults of a function and its op go apart."""
    op = f"CbamOps>{function.removesuffix('_with_batch_norm').title().replace('_', '')}"
    parameters = inspect.signature(getattr(ops, function)).parameters
    definition = op_def_registry.get(op)
    inputs = {argument.name for argument in definition.input_arg}
    assert inputs - {"gamma"} == {
        {"beta": "bias"}.get(name, name)
        for name in parameters
        if name in _call.DIMENSIONS and name != "gamma"
    }
    for attribute in definition.attr:
        if attribute.type == "string":
            default = parameters[attribute.name].default
            words = ["none" if word is None else word for word in _call.WORDS[attribute.name]]
            allowed = [word.decode() for word in attribute.allowed_values.list.s]
            assert attribute.default_value.s.decode() == (default or "none")
            if attribute.name == "order":
                words.remove("spatial_first")  # a composition of the other two ops
            assert words == allowed, attribute.name
    if "gamma" in parameters:
        assert parameters["epsilon"].default == 1e-5 == cbam_ops.CBAM().batch_norm_epsilon
    assert parameters == inspect.signature(getattr(reference, function)).parameters
    assert getattr(reference, function).__doc__ == getattr(ops, function).__doc__


# --- bits -----------------------------------------------------------------------------------------

DIGEST = """
    import hashlib, sys
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
    import cbam_ops
    from cbam_ops import ops
    from cbam_ops.testing import LARGE, OPTIONS, SIZES
    cbam_ops.set_implementation("native")
    digest = hashlib.sha256()
    for i, case in enumerate(OPTIONS + SIZES + LARGE):
        dtype = ("float32", "bfloat16", "float64", "float16")[i % 4]
        for data_format in ("NHWC", "NCHW"):
            case = case.replace(dtype=dtype, data_format=data_format)
            tensors = case.draw()
            outputs = case.call(ops, tensors)
            for tensor in [*outputs, *case.gradients(ops, tensors).values()]:
                digest.update(tensor.numpy().tobytes())
    print(digest.hexdigest())
"""


def test_results_have_the_same_bits_for_any_number_of_threads():
    """Fails where a sum depends on how the work was shared out, or on who came first."""
    digests = {run_python(DIGEST, threads)[-1] for threads in ("1", "2", "5")}
    assert len(digests) == 1


def test_results_have_the_same_bits_every_time():
    case = Case(size=(4, 33, 31, 40), residual=True, options=options(activation="relu"))
    tensors = case.draw()
    first = case.gradients(ops, tensors)
    for _ in range(5):
        for name, gradient in case.gradients(ops, tensors).items():
            assert_same_bits(gradient.numpy(), first[name].numpy(), name)


def other_instruction_sets() -> list[str]:
    from cbam_ops import _core

    active = _core.instruction_set()
    return [name for name in _core.available_instruction_sets() if name != active]


@pytest.mark.parametrize("instruction_set", other_instruction_sets())
def test_every_instruction_set_is_accurate(instruction_set):
    """Fails where the code for an older processor is wrong, which this machine would never run."""
    tests = [
        "test_ops.py::test_every_option_is_accurate",
        "test_ops.py::test_every_size_is_accurate",
        "test_ops.py::test_special_values_reach_the_same_outputs",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests],
        cwd=Path(__file__).parent,
        env={**os.environ, "CBAM_OPS_INSTRUCTION_SET": instruction_set},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# --- memory ---------------------------------------------------------------------------------------


def test_inputs_may_lie_anywhere(dtype):
    """Fails where a kernel takes the alignment of a whole tensor for granted: slices have none."""
    case = Case(size=(4, 3, 3, 5), dtype=dtype)
    tensors = case.draw()
    whole = case.call(ops, tensors)
    gradients = case.gradients(ops, tensors)
    for start in range(1, 4):
        part = {**tensors, "x": tensors["x"][start:]}  # shares the buffer, at an odd offset
        outputs = case.call(ops, part)
        for name, ours, theirs in zip(case.output_names(), outputs, whole, strict=True):
            assert_same_bits(ours.numpy(), theirs[start:].numpy(), name)
        got = case.gradients(ops, part)["x"]
        assert got.shape == gradients["x"][start:].shape


def test_inputs_stay_as_they_are():
    """Fails where an op writes its output into its input: x is needed again, for the gradient."""
    case = Case(residual=True, options=options(activation="relu"))
    tensors = case.draw()

    @tf.function
    def step(tensors):
        # Temporaries of the graph, whose buffers an op could be tempted to take over.
        temporaries = {name: tensor * 2.0 for name, tensor in tensors.items()}
        y, *_ = case.call(ops, temporaries)
        return y, [temporaries[name] + 0.0 for name in tensors]

    _, after = step(tensors)
    for name, value in zip(tensors, after, strict=True):
        assert_same_bits(value.numpy(), (tensors[name] * 2.0).numpy(), name)


def run_traced(fetches, tensors):
    """The values of tensors of a graph, and where each of its ops' outputs was, by label and slot.

    `fetches(temporaries)` builds what follows from temporaries of twice the given tensors.
    """
    with tf.Graph().as_default(), tf.device("CPU:0"):
        given = {
            name: tf.compat.v1.placeholder(value.dtype, value.shape)
            for name, value in tensors.items()
        }
        wanted = fetches({name: tf.multiply(x, 2.0, name=name) for name, x in given.items()})
        metadata = tf.compat.v1.RunMetadata()
        with tf.compat.v1.Session() as session:
            values = session.run(
                wanted,
                {given[name]: value.numpy() for name, value in tensors.items()},
                tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE),
                metadata,
            )
    return values, {
        (node.node_name.rpartition(">")[2], output.slot):
            output.tensor_description.allocation_description.ptr
        for device in metadata.step_stats.dev_stats
        for node in device.node_stats
        for output in node.output
    }  # fmt: skip


# One sample that threads share in blocks, whose rows near a border both need; and many.
THREADED = [case.size for case in LARGE[:3]]


@pytest.mark.parametrize("size", THREADED, ids=str)
@pytest.mark.parametrize("kept", ["", "x", "x, residual"])
def test_x_or_the_residual_is_taken_over(size, kept, data_format):
    """Fails where y takes memory of its own, or memory that somebody still reads."""
    case = Case(size=size, residual=True, data_format=data_format)
    tensors = case.draw()
    names = kept.split(", ") if kept else []

    def fetches(temporaries):
        y, *gates = case.call(ops, temporaries)
        with tf.control_dependencies([y]):
            return [y, *gates], [temporaries[name] * 2.0 for name in names]

    (outputs, others), places = run_traced(fetches, tensors)
    free = [name for name in ("x", "residual") if name not in names]
    at = {name: places[name, 0] for name in ("x", "residual")}
    if free:
        assert places["Cbam", 0] == at[free[0]]
    else:
        assert places["Cbam", 0] not in at.values()
    for name, value in zip(names, others, strict=True):
        assert_same_bits(value, (tensors[name] * 4.0).numpy(), name)
    expected = case.call(ops, {name: value * 2.0 for name, value in tensors.items()})
    for name, ours, theirs in zip(case.output_names(), outputs, expected, strict=True):
        assert_same_bits(ours, theirs.numpy(), name)


@pytest.mark.parametrize("size", THREADED, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_dy_and_y_are_taken_over(size, activation, data_format):
    """Fails where they take memory of their own, or are wrong there."""
    case = Case(
        size=size, residual=True, options=options(activation=activation), data_format=data_format
    )
    tensors = case.draw()
    dy = tf.constant(case.cotangents(case.call(ops, tensors))[0])
    names = ["x", "w0", "kernel", *(["residual"] if activation == "relu" else [])]

    def gradients(tensors):
        y = case.call(ops, tensors)[0]
        return tf.gradients(y, [tensors[name] for name in names], tensors["dy"])

    ours, places = run_traced(gradients, {**tensors, "dy": dy})
    slots = sorted(slot for name, slot in places if name == "CbamGrad")
    assert places["CbamGrad", 0] == places["dy", 0]
    if activation == "relu":
        assert places["CbamGrad", slots[-1]] == places["Cbam", 0]
    expected = tf.function(gradients)(
        {name: value * 2.0 for name, value in {**tensors, "dy": dy}.items()}
    )
    for name, mine, theirs in zip(names, ours, expected, strict=True):
        assert_same_bits(mine, theirs.numpy(), name)


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS, ids=str)
@pytest.mark.parametrize("known", ["rank", "nothing"])
def test_unknown_shapes_in_a_graph(case, known, data_format):
    """Fails where Python code needs a size that only the running graph knows."""
    if known == "nothing" and len(case.size) != 4:
        case = case.replace(size=(2, 5, 7, 13), kernel_size=3)  # what has no rank is an image
    case = case.replace(data_format=data_format)
    tensors = case.draw()
    specs = {
        name: tf.TensorSpec([None] * tensor.shape.rank if known == "rank" else None, tensor.dtype)
        for name, tensor in tensors.items()
    }

    @tf.function(input_signature=[specs])
    def function(tensors):
        outputs = case.call(ops, tensors)
        assert outputs[0].shape.rank == len(case.call(ops, eager)[0].shape)
        return outputs

    eager = tensors
    expected = case.call(ops, tensors)
    for name, ours, theirs in zip(case.output_names(), function(tensors), expected, strict=True):
        if len(case.size) == 5:  # a graph may compute what is TensorFlow's in another order
            assert_close(ours.numpy(), theirs.numpy(), FLOAT32, name)
        else:
            assert_same_bits(ours.numpy(), theirs.numpy(), name)


@pytest.mark.filterwarnings("ignore")  # TensorFlow's own, about the loop it falls back to
def test_vectorized_map_falls_back_to_a_loop():
    case = Case(size=(2, 4, 5, 6))
    tensors = case.draw()
    maps = tf.stack([tensors["x"], -tensors["x"], 2.0 * tensors["x"]])
    mapped = tf.vectorized_map(lambda x: case.call(ops, {**tensors, "x": x})[0], maps)
    for ours, x in zip(mapped, maps, strict=True):
        expected = case.call(ops, {**tensors, "x": x})[0]
        assert_same_bits(ours.numpy(), expected.numpy(), "y")


class Module(tf.Module):
    """A function to save: y and the gradient of its sum of squares."""

    case = Case(
        "cbam_with_batch_norm", residual=True, options=options(activation="relu", epsilon=1e-5)
    )

    def __init__(self) -> None:
        super().__init__()
        self.tensors = self.case.draw()
        self.weights = {
            name: tf.Variable(value) for name, value in self.tensors.items() if name != "x"
        }

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 13], tf.float32)])
    def __call__(self, x):
        return self.case.call(ops, {"x": x, **self.weights})[0]


@pytest.mark.filterwarnings("ignore")  # the saver's own
def test_a_saved_model_runs_and_trains_in_a_fresh_process(tmp_path):
    """Fails where a saved model cannot be read without the code that made it, or not be trained."""
    module = Module()
    tf.saved_model.save(module, str(tmp_path / "saved"))
    x = module.tensors["x"]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = module(x)
        loss = tf.reduce_sum(y * y)
    expected = [y, *tape.gradient(loss, [x, module.weights["gamma"], module.weights["residual"]])]
    np.save(tmp_path / "x.npy", x.numpy())
    run_python(
        """
        import sys
        from pathlib import Path
        import numpy as np
        import tensorflow as tf
        import cbam_ops
        folder = Path(sys.argv[1])
        x = tf.constant(np.load(folder / "x.npy"))
        module = tf.saved_model.load(str(folder / "saved"))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = module(x)
            loss = tf.reduce_sum(y * y)
        weights = module.weights
        gradients = tape.gradient(loss, [x, weights["gamma"], weights["residual"]])
        np.savez(folder / "results.npz", y, *gradients)
        print("done")
        """,
        str(tmp_path),
    )
    results = np.load(tmp_path / "results.npz")
    for i, value in enumerate(expected):
        assert_same_bits(results[f"arr_{i}"], value.numpy(), f"result {i}")


def test_an_imported_graph_has_gradients():
    """Fails where the gradient hangs on Python objects that a GraphDef does not carry."""
    case = Case(residual=True)
    tensors = case.draw()
    expected = case.gradients(ops, tensors)
    with tf.Graph().as_default() as graph:
        placeholders = {
            name: tf.compat.v1.placeholder(tensor.dtype, tensor.shape, name)
            for name, tensor in tensors.items()
        }
        outputs = case.call(ops, placeholders)
        names = [output.name for output in outputs]
        definition = graph.as_graph_def()
    assert any(node.op == "CbamOps>Cbam" for node in definition.node)
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(definition, name="")
        outputs = [graph.get_tensor_by_name(name) for name in names]
        inputs = [graph.get_tensor_by_name(f"{name}:0") for name in tensors]
        gradients = tf.gradients(outputs, inputs, case.cotangents(outputs))
        with tf.compat.v1.Session() as session:
            feed = {f"{name}:0": tensor.numpy() for name, tensor in tensors.items()}
            values = session.run(gradients, feed)
    for name, value in zip(tensors, values, strict=True):
        assert_same_bits(value, expected[name].numpy(), name)


# --- who computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_the_choice_of_the_implementation_is_followed(case):
    """Fails where a function ignores the choice: users compare the two to find out who is wrong."""
    tensors = case.draw()

    def ours() -> set[str]:
        function = tf.function(lambda tensors: case.call(ops, tensors))
        return {name for name in op_types(function, tensors) if name.startswith("CbamOps>")}

    for name in ("native", "auto"):
        with cbam_ops.use_implementation(name):
            assert ours()
    with cbam_ops.use_implementation("reference"):
        assert not ours()


@pytest.fixture
def fresh_warnings(monkeypatch):
    from cbam_ops import options as choices

    monkeypatch.setattr(choices, "_warned", set())


def test_a_gpu_that_cannot_run_the_kernels_gets_the_reference(fresh_warnings, monkeypatch):
    """Fails where an op without a GPU kernel would run on the CPU, with copies nobody asked for."""
    case = Case()
    tensors = case.draw()
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: [gpu])
    monkeypatch.setattr(_gpu, "why_not_under_tensorflow", lambda: "There is a reason.")

    def is_native(device: str | None) -> bool:
        with tf.Graph().as_default() as graph, tf.device(device):
            case.call(ops, {name: tf.constant(t.numpy()) for name, t in tensors.items()})
        return any(operation.type == "CbamOps>Cbam" for operation in graph.get_operations())

    with cbam_ops.use_implementation("auto"):
        with pytest.warns(RuntimeWarning, match="on a GPU.*There is a reason"):
            assert not is_native(None)  # by default TensorFlow would take the GPU
        assert not is_native("/device:GPU:0")
        assert is_native("/device:CPU:0")
        assert case.call(ops, tensors)[0].device.endswith("CPU:0")
        monkeypatch.setattr(_gpu, "why_not_under_tensorflow", lambda: None)
        assert is_native("/device:GPU:0")
    monkeypatch.setattr(_gpu, "why_not_under_tensorflow", lambda: "There is a reason.")
    with pytest.raises(cbam_ops.NativeUnavailableError, match="on a GPU.*There is a reason"):
        is_native("/device:GPU:0")


def test_first_call_inside_a_function_is_quiet():
    """A user's first call may be inside a tf.function, where the library is loaded while tracing.

    Fails: AutoGraph tries to convert the package's own code, and warns of what it cannot.
    """
    program = """
import tensorflow as tf, cbam_ops

@tf.function
def call(x, w0, w1, kernel):
    return cbam_ops.cbam(x, w0, None, w1, None, kernel)

print(call(tf.ones((1, 4, 4, 8)), tf.ones((8, 2)), tf.ones((2, 8)), tf.ones((3, 3, 2, 1))).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/"
    )
    assert "(1, 4, 4, 8)" in done.stdout
    assert "AutoGraph" not in done.stderr
