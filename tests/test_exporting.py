"""`cbam_ops.export`: what it writes runs elsewhere and computes what the model does.

The runs in fresh processes and in other runtimes are long; all but LiteRT's interpreter in
TensorFlow needs the extra `export`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import cbam_ops
from cbam_ops import __main__ as command
from cbam_ops import _stock_graph, exporting, testing
from cbam_ops.testing import Case, assert_close

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning"),
]


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason="pip install 'cbam-ops[export]'")


ONNX = ("tf2onnx", "onnx", "onnxruntime")
FORMATS = [
    pytest.param("tf_saved_model"),
    pytest.param("tf_saved_model_native"),
    pytest.param("litert", marks=needs("ai_edge_litert")),
    pytest.param("onnx", marks=needs(*ONNX)),
]
IN_MIXED_PRECISION = [
    pytest.param("tf_saved_model", "mixed_bfloat16"),
    pytest.param("litert", "mixed_bfloat16", marks=needs("ai_edge_litert")),
    pytest.param("onnx", "mixed_bfloat16", marks=needs(*ONNX)),
    pytest.param("onnx", "mixed_float16", marks=needs(*ONNX)),
]
SUFFIX = {"litert": ".tflite", "onnx": ".onnx"}


def ops_of(folder: Path) -> set[str]:
    saved = _stock_graph._read(folder)
    return {
        node.op
        for part in saved.meta_graphs
        for nodes in _stock_graph._node_lists(part.graph_def)
        for node in nodes
    }


# --- fused ops, rewritten -------------------------------------------------------------------------


def evaluated(case: Case):
    """Outputs and gradients of a case as a function of a SavedModel."""
    specs = {name: tf.TensorSpec(t.shape, t.dtype, name) for name, t in case.draw().items()}
    return tf.function(
        lambda tensors: case.evaluate(cbam_ops, tensors), input_signature=[specs], autograph=False
    )


def test_rewritten_ops_and_gradients_are_as_accurate_as_the_fused_ones(tmp_path):
    """Every op with every option, forward and backward, without the Python that made the graph."""
    kinds = itertools.cycle(
        itertools.product(("float32", "float16", "bfloat16", "float64"), ("NHWC", "NCHW"))
    )
    cases = [
        case.replace(dtype=dtype, data_format=data_format)
        for case, (dtype, data_format) in zip(testing.OPTIONS, kinds, strict=False)
    ]
    module = tf.Module()
    module.functions = [evaluated(case) for case in cases]
    tf.saved_model.save(module, tmp_path)
    before = {op for op in ops_of(tmp_path) if op.startswith("CbamOps>")}
    assert len(before) == 10  # all there are
    assert _stock_graph.rewrite(tmp_path) >= 2 * len(cases)
    assert not [op for op in ops_of(tmp_path) if not hasattr(tf.raw_ops, op)]
    loaded = tf.saved_model.load(tmp_path)
    for case, function in zip(cases, loaded.functions, strict=True):
        draws = [case.replace(seed=seed) for seed in range(4)]
        compared = (d.compare(function(t), t) for d in draws for t in [d.draw()])
        findings = next(compared)
        if any(finding.fault for finding in findings):  # then several decide
            findings = testing.worst_of([findings, *compared])
        faults = [finding.fault for finding in findings if finding.fault]
        assert not faults, f"{case}: {faults}"


@pytest.mark.parametrize("order", ["channel_first", "parallel"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_outputs_that_only_a_gradient_reads(tmp_path, order, batch_norm):
    """A SavedModel may hold them as results of a function, for another that is the gradient."""
    case = Case("cbam_with_batch_norm" if batch_norm else "cbam", data_format="NCHW")
    tensors = case.draw()

    @tf.function
    def raw(tensors):
        from cbam_ops import _loader

        tensors = dict(tensors)
        gamma = [tensors.pop("gamma")] if batch_norm else []
        if batch_norm:
            tensors["bias"] = tensors.pop("beta")
        results = _loader.load_ops().CbamOps_Cbam(
            **tensors, gamma=gamma, residual=[], order=order, data_format="NCHW"
        )
        return results._asdict()

    module = tf.Module()
    module.raw = raw
    expected = raw(tensors)
    tf.saved_model.save(module, tmp_path)
    assert _stock_graph.rewrite(tmp_path) == 1
    actual = tf.saved_model.load(tmp_path).raw(tensors)
    assert len(actual) == 6
    for name, value in expected.items():
        assert_close(actual[name], value, testing.FLOAT32, name)


def test_the_main_graph_of_a_saved_model_of_tensorflow_1(tmp_path):
    """There nodes are referred to by another rule than in functions."""
    case = Case(size=(2, 5, 4, 8), residual=True)
    tensors = case.draw()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, (None, None, None, 8), "x")
        weights = {name: tf.constant(t.numpy()) for name, t in tensors.items() if name != "x"}
        y, channel_gate, spatial_gate = case.call(cbam_ops, {"x": x, **weights})
        outputs = {"y": y, "channel_gate": channel_gate, "spatial_gate": spatial_gate}
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "v1"), {"x": x}, outputs)
    cbam_ops.export(tmp_path / "v1", tmp_path / "stock", verify=False)
    assert "CbamOps>Cbam" not in ops_of(tmp_path / "stock")
    function = tf.saved_model.load(tmp_path / "stock").signatures["serving_default"]
    actual = function(x=tensors["x"])
    expected = dict(zip(outputs, case.call(cbam_ops, tensors), strict=True))
    for name, value in expected.items():
        assert_close(actual[name], value, testing.FLOAT32, name)


# --- models ---------------------------------------------------------------------------------------


def network(**policy: str) -> keras.Model:
    """Every layer, with what is fused and what is not, and open sizes."""
    keras.utils.set_random_seed(2)
    image = keras.Input((None, None, 3), name="image")
    scale = keras.Input((16,), name="scale")

    def conv(x):
        x = keras.layers.Conv2D(16, 3, padding="same", use_bias=False, **policy)(x)
        return keras.layers.BatchNormalization(**policy)(x)

    shortcut = keras.layers.ReLU(**policy)(conv(image))
    x = conv(shortcut)
    cbam = cbam_ops.CBAM(4, spatial_batch_norm=True, activation="relu", **policy)
    x = cbam(x, residual=shortcut)
    gelu = cbam_ops.CBAM(4, 3, order="spatial_first", hidden_activation="gelu", **policy)
    x, channel_gate, _ = gelu(conv(x), return_gates=True)
    x = cbam_ops.CBAM(4, order="parallel", **policy)(conv(x))
    x = cbam_ops.ChannelAttention(4, pooling="avg", gate_activation="hard_sigmoid", **policy)(x)
    x = cbam_ops.SpatialAttention(3, **policy)(x)
    pooled = keras.layers.GlobalAveragePooling2D(**policy)(x)
    logits = keras.layers.Dense(5, dtype="float32")(keras.layers.multiply([pooled, scale]))
    outputs = {"logits": logits, "gate": channel_gate}
    model = keras.Model({"image": image, "scale": scale}, outputs)
    random = np.random.default_rng(3)
    for weight in model.weights:
        if len(weight.shape) == 1:  # biases and statistics, which begin as zeros and ones
            weight.assign(weight + 0.2 * np.abs(random.standard_normal(weight.shape)))
    return model


def inputs_of(model: keras.Model, batch: int = 3, height: int = 21, width: int = 18):
    random = np.random.default_rng(4)
    sizes = {"image": (batch, height, width, 3), "scale": (batch, 16)}
    return {n: random.standard_normal(sizes[n], np.float32) for n in model.input}


def run_elsewhere(path: Path, format: str, inputs: dict, folder: Path) -> dict[str, np.ndarray]:
    """What a process without cbam_ops makes of an export."""
    files = {name: str(folder / f"{name}.npz") for name in ("inputs", "outputs")}
    np.savez(files["inputs"], **inputs)
    library = str(cbam_ops._loader.ops_library()) if format == "tf_saved_model_native" else None
    call = {"format": format, "path": str(path), "signature": "serving_default"}
    (folder / "call.json").write_text(json.dumps({**call, "library": library, **files}))
    program = Path(exporting.__file__).with_name("_run_exported.py").read_text()
    arguments = [sys.executable, "-c", program, str(folder / "call.json")]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(files["outputs"]))


def check(path: Path, format: str, model: keras.Model, folder: Path, tolerance: float) -> None:
    """At sizes that the exporter has not seen."""
    inputs = inputs_of(model)
    actual = run_elsewhere(path, format, inputs, folder)
    expected = model(inputs)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_close(actual[name], tf.cast(value, tf.float32), tolerance, f"{format}, {name}")


@pytest.mark.long
@pytest.mark.parametrize("format", FORMATS)
def test_a_network_elsewhere(tmp_path, format, capsys):
    """Open batch, height and width stay open, and names are those of the model."""
    model = network()
    path = tmp_path / f"model{SUFFIX.get(format, '')}"
    cbam_ops.export(model, path, format)
    said = capsys.readouterr().out
    assert "the largest difference from the model is" in said and str(path) in said
    if format.startswith("tf_saved_model"):
        fused = [op for op in ops_of(path) if op.startswith("CbamOps>")]
        assert bool(fused) == (format == "tf_saved_model_native")
    check(path, format, model, tmp_path, testing.EXPORTED["float32"])


@pytest.mark.long
@pytest.mark.parametrize(("format", "policy"), IN_MIXED_PRECISION)
def test_a_network_in_mixed_precision_elsewhere(tmp_path, format, policy):
    """LiteRT computes in no half type, ONNX Runtime not in bfloat16: there it is float32."""
    model = network(dtype=policy)
    path = tmp_path / f"model{SUFFIX.get(format, '')}"
    cbam_ops.export(model, path, format, verify=False)
    check(path, format, model, tmp_path, testing.MIXED_MODEL[policy])


class Traced(keras.Model):
    """Its call is a function of TensorFlow's, which keeps what it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = cbam_ops.CBAM(4, 3)
        self.traced = tf.function(self.attention)

    def call(self, x):
        return self.traced(x)


@pytest.mark.long
@needs(*ONNX)
def test_a_model_that_was_traced_before(tmp_path):
    format = "onnx"
    model = Traced()
    x = np.random.default_rng(5).standard_normal((2, 7, 6, 16), np.float32)
    expected = model(x)
    path = tmp_path / "model.onnx"
    cbam_ops.export(model, path, format, verify=False)
    (actual,) = run_elsewhere(path, format, {"args_0": x}, tmp_path).values()
    assert_close(actual, expected, testing.FLOAT32, format)


@pytest.mark.long
@pytest.mark.parametrize("format", FORMATS[2:])
def test_every_dialect_elsewhere(tmp_path, format):
    """What published code does otherwise, and trained networks of PyTorch with it."""
    image = keras.Input((8, 8, 32))
    outputs = {"channels_first": cbam_ops.CBAM(4, data_format="channels_first")(image)}
    for name in cbam_ops.dialects:
        outputs[f"{name} channel"] = cbam_ops.ChannelAttention.from_dialect(name, ratio=4)(image)
        with contextlib.suppress(ValueError):  # it has no spatial part
            outputs[name] = cbam_ops.CBAM.from_dialect(name, ratio=4)(image)
    assert len(outputs) > 1.5 * len(cbam_ops.dialects)
    cbam_ops.export(keras.Model(image, outputs), tmp_path / f"model{SUFFIX[format]}", format)


@pytest.mark.long
def test_the_interpreter_in_tensorflow_does_too(tmp_path, monkeypatch, small):
    """Where the extra is not installed."""
    hidden = tmp_path / "hidden"
    (hidden / "ai_edge_litert").mkdir(parents=True)
    (hidden / "ai_edge_litert" / "__init__.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    cbam_ops.export(small, tmp_path / "model.tflite", "litert")


@pytest.mark.long
@needs("ai_edge_litert")
@pytest.mark.parametrize("optimizations", ["dynamic_range", "float16", "int8"])
def test_optimizations_of_litert(tmp_path, optimizations):
    model = network()
    data = {n: np.repeat(v, 8, axis=0) for n, v in inputs_of(model).items()}
    data["image"] += np.random.default_rng(6).standard_normal(data["image"].shape, np.float32)
    plain, small = tmp_path / "plain.tflite", tmp_path / "small.tflite"
    cbam_ops.export(model, plain, "litert", verify=False)
    cbam_ops.export(model, small, "litert", optimizations=optimizations, data=data)
    assert small.stat().st_size < plain.stat().st_size


@pytest.mark.long
@needs("ai_edge_litert")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"order": "parallel"},
        {"ties": "first"},
        {"gate_activation": "hard_sigmoid"},
        {"mlp_merge": "gates"},
    ],
)
def test_int8_does_not_cut_off_the_gated_map(tmp_path, arguments):
    """Stock layers and the definition err by more than half of the largest value here."""
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 8))
    x = keras.layers.Conv2D(8, 1, use_bias=False)(image)
    model = keras.Model(image, cbam_ops.CBAM(4, **arguments)(x))
    data = np.random.default_rng(7).standard_normal((40, 16, 16, 8), np.float32)
    path = tmp_path / "model.tflite"
    cbam_ops.export(model, path, "litert", optimizations="int8", data=data)
    (name,) = (tensor.name for tensor in model.inputs)
    (actual,) = run_elsewhere(path, "litert", {name: data[:8]}, tmp_path).values()
    assert_close(actual, model(data[:8]), testing.EXPORTED["float16"], "int8")


# --- without cbam_ops.export ----------------------------------------------------------------------


@pytest.mark.long
@needs(*ONNX)
@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_export_of_keras_itself(tmp_path, format):
    """A converter that traces gets stock ops by itself; "native" is one sentence."""
    model = network()
    model(inputs_of(model))
    path = tmp_path / f"model{SUFFIX[format]}"
    with pytest.raises(cbam_ops.NativeUnavailableError, match=r"cbam_ops\.export\(model"):
        model.export(path, format=format, verbose=False)
    with cbam_ops.use_implementation("auto"):
        model.export(path, format=format, verbose=False)
    check(path, format, model, tmp_path, testing.EXPORTED["float32"])


def test_the_converter_of_litert_without_help(fresh_options):
    """Fails when what the converter traces holds fused ops, which it ends with pages of MLIR on."""
    image = keras.Input((8, 8, 8))
    model = keras.Model(image, cbam_ops.CBAM(4)(image))
    with cbam_ops.use_implementation("auto"):
        assert tf.lite.TFLiteConverter.from_keras_model(model).convert()


@pytest.mark.long
def test_the_import_is_enough_to_run_a_saved_model(tmp_path):
    image = keras.Input((8, 8, 8))
    keras.Model(image, cbam_ops.CBAM(4)(image)).export(tmp_path / "model", verbose=False)
    assert "CbamOps>Cbam" in ops_of(tmp_path / "model")
    code = f"""
import cbam_ops, tensorflow as tf
served = tf.saved_model.load({str(tmp_path / "model")!r}).signatures["serving_default"]
(name,) = served.structured_input_signature[1]
print(float(tf.reduce_sum(served(**{{name: tf.ones((2, 8, 8, 8))}})["output_0"])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> keras.Model:
    image = keras.Input((6, 6, 4))
    return keras.Model(image, cbam_ops.CBAM(2, 3)(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "`format` must be one of 'tf_saved_model', .*'litert', 'onnx', got"),
        ({"format": "litert"}, "`path` must be a .tflite file"),
        ({"path": "model.onnx"}, "`path` must be a folder"),
        ({"optimizations": "int8"}, "`optimizations` must be None with format='tf_saved_model'"),
        (
            {"path": "m.tflite", "format": "litert", "optimizations": "int4"},
            "`optimizations` must be one of None, 'dynamic_range', 'float16', 'int8', got 'int4'",
        ),
        (
            {"path": "m.tflite", "format": "litert", "optimizations": "int8"},
            "`data` must be a representative set",
        ),
        ({"model": 3}, "`model` must be a Keras model, .*got int"),
        ({"model": "gone.keras"}, "`model` must be a Keras model, .*got gone.keras"),
        ({"signature": "other"}, "`signature` must be 'serve' or 'serving_default', got 'other'"),
        ({"data": {"image": np.ones(3)}}, "`data` must be a dictionary with the keys .*got image"),
        ({"data": np.ones((1, 2, 2, 9))}, r"`data` for .* must have shape \(None, 6, 6, 4\), got"),
        ({"data": np.ones((0, 6, 6, 4))}, r"`data` for .* must have shape .*, got \(0, 6, 6, 4\)"),
        ({"data": "images.npy"}, "`data` for .* must be an array of type float32: could not conv"),
        ({"path": None}, "`path` must be a path, got NoneType"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, small, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        cbam_ops.export(**{"model": small, "path": "model", **arguments})
    assert not list(tmp_path.iterdir())


def test_a_model_that_random_inputs_do_not_fit(tmp_path):
    """Fails when the user is told that a graph failed, and not of what."""
    series = keras.Input((None, 4))
    model = keras.Model(series, keras.layers.Reshape((24,))(series))
    with pytest.raises(ValueError, match="give `data` that it takes.*: Input to reshape"):
        cbam_ops.export(model, tmp_path / "model")
    cbam_ops.export(model, tmp_path / "model", data=np.ones((2, 6, 4)))


def test_what_exists_is_not_overwritten(tmp_path, small):
    path = tmp_path / "model"
    path.write_text("something of the user's")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        cbam_ops.export(small, path, verify=False)
    assert path.read_text() == "something of the user's"
    cbam_ops.export(small, path, verify=False, overwrite=True)
    cbam_ops.export(small, path, verify=False, overwrite=True)
    assert ops_of(path) and list(tmp_path.iterdir()) == [path]


def test_a_missing_converter_names_the_extra(tmp_path, monkeypatch, small):
    monkeypatch.setitem(sys.modules, "onnx", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "onnx" else find(n))
    with pytest.raises(ImportError, match=r"onnx.*pip install 'cbam-ops\[export\]'"):
        cbam_ops.export(small, tmp_path / "model.onnx", "onnx")


def test_custom_ops_of_others_are_named(tmp_path, small):
    cbam_ops.export(small, tmp_path / "native", "tf_saved_model_native", verify=False)
    saved = _stock_graph._read(tmp_path / "native")
    node = saved.meta_graphs[0].graph_def.node.add()
    node.name, node.op = "foreign", "Other>Op"
    (tmp_path / "native" / "saved_model.pb").write_bytes(saved.SerializeToString())
    with pytest.raises(ValueError, match="custom ops that stock TensorFlow does not have: Other>O"):
        cbam_ops.export(tmp_path / "native", tmp_path / "stock", verify=False)


def test_an_export_that_computes_something_else_is_left_beside(tmp_path, monkeypatch, small):
    """And what was there before stays, and no word of it is that the model was exported."""
    path = tmp_path / "model"
    path.mkdir()

    def run(arguments, cwd, **others):
        sample = dict(np.load(cwd / "inputs.npz"))
        np.savez(cwd / "outputs.npz", output_0=next(iter(sample.values())))
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(exporting.subprocess, "run", run)
    with pytest.raises(exporting.ExportError, match="something else than the model: output_0") as e:
        cbam_ops.export(small, path, overwrite=True)
    assert e.value.path == tmp_path / "model.unverified"
    assert ops_of(e.value.path) and not list(path.iterdir())


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.long
@needs("ai_edge_litert", *ONNX)
def test_the_command_on_files(tmp_path, capsys):
    """A .keras file to a native SavedModel, and that to all others."""
    model = network()
    model.save(tmp_path / "model.keras")
    native = str(tmp_path / "native")
    to_native = ["export", str(tmp_path / "model.keras"), native]
    assert command.main([*to_native, "--format", "tf_saved_model_native", "--no-verify"]) == 0
    data = tmp_path / "data.npz"
    np.savez(data, **inputs_of(model))
    for format in ("tf_saved_model", "litert", "onnx"):
        path = tmp_path / f"out{SUFFIX.get(format, '')}"
        arguments = ["export", native, str(path), "--format", format, "--data", str(data)]
        assert command.main(arguments) == 0, capsys.readouterr().err
    check(path, format, model, tmp_path, testing.EXPORTED["float32"])
    assert command.main(["export", native, str(path), "--format", "onnx"]) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err


def test_the_command_says_in_one_sentence_what_is_wrong(tmp_path, capsys, small):
    small.save(tmp_path / "model.keras")
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "objects.npz", image=np.array([None]))
    model, out = str(tmp_path / "model.keras"), str(tmp_path / "out")
    for arguments, words in (
        ([model, out, "--format", "nnx"], "`format` must be one of"),
        ([model, out, "--data", str(tmp_path / "bad.npy")], "cannot read"),
        ([model, out, "--data", str(tmp_path / "empty.npy")], "cannot read"),
        ([model, out, "--data", str(tmp_path / "cut.npz")], "cannot read"),
        ([model, out, "--data", str(tmp_path / "objects.npz")], "cannot read"),
        ([str(tmp_path / "gone"), out], "there is no file"),
        ([model, str(tmp_path)], "exists; --overwrite replaces it"),
    ):
        assert command.main(["export", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("cbam-ops export: ") and words in line


@pytest.mark.long
@needs("ai_edge_litert", *ONNX)
def test_the_commands_of_the_page(tmp_path):
    """docs/exporting.md: its first model, then the commands, one after the other."""
    page = (Path(__file__).parents[1] / "docs/exporting.md").read_text(encoding="utf-8")
    (code, *_) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (commands,) = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
    program = f'cbam-ops() {{ "{sys.executable}" -m cbam_ops "$@"; }}\n'
    for arguments in ([sys.executable, "-c", code], ["bash", "-ec", program + commands]):
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    made = {"model.keras", "model.tflite", "native", "stock", "native.tflite", "model.onnx"}
    assert {path.name for path in tmp_path.iterdir()} == made
