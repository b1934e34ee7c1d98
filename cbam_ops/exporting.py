"""Takes a trained model elsewhere: SavedModels, LiteRT, ONNX. See :func:`export`.

Every export begins as a SavedModel, the one that Keras writes or the one that is given. Its fused
ops are rewritten into stock ops (`_stock_graph`), and converters see nothing else. A fresh process
without this package then runs the result (`_run_exported.py`), which is compared with the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from cbam_ops import _call, _console, _loader, _stock_graph, options, testing

__all__ = ["FORMATS", "OPTIMIZATIONS", "ExportError", "export"]

FORMATS = ("tf_saved_model", "tf_saved_model_native", "litert", "onnx")
OPTIMIZATIONS = (None, "dynamic_range", "float16", "int8")
# Of those that are files; the others are folders.
_SUFFIXES = {"litert": ".tflite", "onnx": ".onnx"}
# The types that their kernels do not compute in.
_NO_ARITHMETIC = {"litert": ("float16", "bfloat16"), "onnx": ("bfloat16",)}
# What a dimension that the model leaves open is, in random inputs: the first, and all others.
_BATCH, _SIZE = 2, 64
_MOST = 8  # of the user's inputs are compared
_PROGRAM = Path(__file__).with_name("_run_exported.py")

Arrays = dict[str, np.ndarray]


class ExportError(RuntimeError):
    """An export does not run, or computes something else than the model.

    Attributes:
        path: where it was left.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.path)  # how it comes back from a process of a pool


def export(
    model: Any,
    path: str | os.PathLike[str],
    format: str = "tf_saved_model",
    *,
    optimizations: str | None = None,
    data: Any = None,
    signature: str | None = None,
    opset_version: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> None:
    """Writes a model for inference elsewhere, and runs it there to compare.

    Args:
        model: A Keras model, however it was called before; or the path of a `.keras` file; or of
            the folder of a SavedModel, whose fused ops are rewritten without the Python that made
            it.
        path: What to write: a folder, a `.tflite` or an `.onnx` file.
        format: `"tf_saved_model"`: stock ops only, needs TensorFlow alone.
            `"tf_saved_model_native"`: keeps the fused ops; the process that loads it imports
            cbam_ops, or loads the library that `cbam-ops info --ops-library` prints.
            `"litert"`: a file for LiteRT (TensorFlow Lite). `"onnx"`: a file for ONNX Runtime and
            others, through tf2onnx. Open dimensions of the model stay open.
        optimizations: Of LiteRT's weights and arithmetic: `None`, `"dynamic_range"` (weights in
            int8), `"float16"` (weights) or `"int8"` (both, calibrated on `data`; inputs and outputs
            stay float32).
        data: Inputs like the model's, with any number of samples: an array, or for several inputs
            what the model takes. Needed for `"int8"`; the first of them are compared. `None`
            compares random inputs.
        signature: Which signature of a SavedModel LiteRT and ONNX get. `None` is
            `"serving_default"`, or the only one.
        opset_version: Of ONNX; `None` is the converter's choice.
        verify: Whether to run the result in a fresh process without cbam_ops and compare its
            outputs with the model's. Prints the largest difference.
        overwrite: Whether something at `path` may be replaced.

    Raises:
        ValueError: An argument does not fit; a model has not been called yet; the model holds
            custom ops that are not of this package; a converter refuses it.
        FileExistsError: There is something at `path`, and `overwrite` is false.
        ImportError: A converter is not installed; the message names the extra.
        NativeUnavailableError: The native ops do not run here, and are asked for.
        ExportError: The result does not run, or its outputs are not the model's. It is left beside
            `path`, and what was at `path` stays.

    Example:
    >>> cbam_ops.export(model, "model.tflite", "litert", optimizations="dynamic_range")
    """
    _loader.check_backend("export")
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"export: `path` must be a path, got {type(path).__name__}")
    target = Path(path)
    _check(target, format, optimizations, data, overwrite)
    _require(format, verify)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cbam_ops_export_", dir=target.parent) as name:
        saved = Path(name).resolve() / "saved_model"
        _save(model, saved, native=format == "tf_saved_model_native", int8=optimizations == "int8")
        chosen = _signature(saved, signature, needed=format in _SUFFIXES)
        sample = _sample(saved, chosen, data, optimizations) if verify and chosen else None
        if format != "tf_saved_model_native":
            widen = _NO_ARITHMETIC.get(format, ())
            _stock_graph.rewrite(saved, widen=widen, for_int8=optimizations == "int8")
        made = saved.with_suffix(_SUFFIXES.get(format, ""))
        if format == "litert":
            _to_litert(saved, chosen, made, optimizations, data)
        elif format == "onnx":
            _to_onnx(saved, chosen, made, opset_version)
        difference, fault = (0.0, "") if sample is None else _compare(made, format, sample)
        if fault:
            target = target.with_name(f"{target.stem}.unverified{target.suffix}")
        _put(made, target)
    if fault:
        raise ExportError(f"{fault} The export was left as {target}.", target)
    if sample is not None:
        _console.say(
            f"{target}: runs in a process without cbam_ops; the largest difference from the model "
            f"is {difference:.2g} of the largest output."
        )
    elif verify:
        _console.say(f"{target}: has no signature, so nothing was run and compared.")


# --- arguments ------------------------------------------------------------------------------------


def _check(
    target: Path, format: str, optimizations: str | None, data: Any, overwrite: bool
) -> None:
    for name, value, words in (
        ("format", format, FORMATS),
        ("optimizations", optimizations, OPTIMIZATIONS),
    ):
        if value not in words:
            expected = ", ".join(repr(word) for word in words)
            raise ValueError(f"export: `{name}` must be one of {expected}, got {value!r}")
    if optimizations is not None and format != "litert":
        raise ValueError(
            f"export: `optimizations` must be None with format={format!r}, got {optimizations!r}"
        )
    if optimizations == "int8" and data is None:
        raise ValueError(
            'export: `data` must be a representative set of inputs with optimizations="int8", '
            "got None"
        )
    suffix = _SUFFIXES.get(format, "")
    if target.suffix != suffix and (suffix or target.suffix in _SUFFIXES.values()):
        kind = f"a {suffix} file" if suffix else "a folder"
        raise ValueError(f"export: `path` must be {kind} with format={format!r}, got {target}")
    if not overwrite and target.exists():
        raise FileExistsError(f"export: {target} exists; overwrite=True replaces it")


def _require(format: str, verify: bool) -> None:
    """Looks for the converter, and for what runs its result."""
    if format != "onnx":  # the others are TensorFlow's own
        return
    needed = ["tf2onnx", "onnx", *(["onnxruntime"] if verify else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'export: format="onnx" needs {" and ".join(missing)}; install with: '
            "pip install 'cbam-ops[export]'"
        )


# --- the SavedModel -------------------------------------------------------------------------------


def _save(model: Any, folder: Path, native: bool, int8: bool) -> None:
    """Writes the model as a SavedModel, with fused ops if they run here."""
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if _stock_graph.is_saved_model(path):
            shutil.copytree(path, folder)
            return
        if path.suffix != ".keras" or not path.is_file():
            raise ValueError(
                "export: `model` must be a Keras model, a .keras file or the folder of a "
                f"SavedModel, got {path}"
            )
        model = keras.models.load_model(path, compile=False)
    if not isinstance(model, keras.Model):
        raise ValueError(
            "export: `model` must be a Keras model, a .keras file or the folder of a SavedModel, "
            f"got {type(model).__name__}"
        )
    elsewhere = contextlib.nullcontext() if native else _call.for_inference(for_int8=int8)
    kernels = "native" if native or _call.native_runs() else "reference"
    with options.use_implementation(kernels), elsewhere:  # type: ignore[arg-type]
        model.export(folder, format="tf_saved_model", verbose=False)


def _signature(folder: Path, wanted: str | None, needed: bool) -> str:
    """The name of the signature to take, "" if there are none and none is needed."""
    names = _stock_graph.signatures(folder)
    if wanted is None:
        default = [name for name in names if name == "serving_default"]
        if len(default or names) == 1:
            return (default or names)[0]
        if not names and not needed:
            return ""
    elif wanted in names:
        return wanted
    if not names:
        raise ValueError("export: `model` must be a SavedModel with a signature, got one without")
    known = " or ".join(repr(name) for name in names)
    raise ValueError(f"export: `signature` must be {known}, got {wanted!r}")


# --- converters -----------------------------------------------------------------------------------


def _to_litert(
    saved: Path, signature: str, file: Path, optimizations: str | None, data: Any
) -> None:
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved), signature_keys=[signature])
    # As in Keras: what LiteRT lacks becomes an op of TensorFlow.
    converter.target_spec.supported_ops = [
        tf.lite.OpsSet.TFLITE_BUILTINS,
        tf.lite.OpsSet.SELECT_TF_OPS,
    ]
    if optimizations is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if optimizations == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif optimizations == "int8":
        samples = _named(data, tf.saved_model.load(str(saved)).signatures[signature])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.representative_dataset = lambda: (
            {name: values[i : i + 1] for name, values in samples.items()}
            for i in range(len(next(iter(samples.values()))))
        )
    try:
        with warnings.catch_warnings():
            # It calibrates with an interpreter that warns of its own end.
            warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated")
            content = converter.convert()
    except Exception as error:  # of many types, with pages of MLIR
        lacking = sorted(set(re.findall(r"'tf\.(\S+)' op is neither", str(error))))
        why = f"LiteRT has no {', '.join(lacking)}" if lacking else _console.first_line(error)
        raise ValueError(f"export: LiteRT's converter refuses the model: {why}") from error
    file.write_bytes(content)


def _to_onnx(saved: Path, signature: str, file: Path, opset_version: int | None) -> None:
    import onnx
    import tf2onnx

    loaded = tf.saved_model.load(str(saved))
    function = loaded.signatures[signature]
    specs = [tf.TensorSpec(s.shape, s.dtype, n) for n, s in _specs(function).items()]
    names = [spec.name for spec in specs]
    named = tf.function(lambda *tensors: function(**dict(zip(names, tensors, strict=True))))
    tf2onnx.convert.from_function(named, specs, opset=opset_version, output_path=str(file))
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise ValueError(
            f"export: tf2onnx cannot convert it: {_console.first_line(error)}"
        ) from error


# --- verification ---------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """Inputs of a signature, what the model makes of them, and how far off an export may be."""

    signature: str
    inputs: Arrays
    outputs: Arrays
    tolerance: float


def _specs(function: Any) -> dict[str, tf.TensorSpec]:
    return function.structured_input_signature[1]


def _named(data: Any, function: Any) -> Arrays:
    """The user's inputs by the names in the signature."""
    specs = _specs(function)
    if not isinstance(data, Mapping):
        data = {next(iter(specs)): data} if len(specs) == 1 else {}
    if set(data) != set(specs):
        raise ValueError(
            f"export: `data` must be a dictionary with the keys {', '.join(sorted(specs))}, got "
            f"{', '.join(map(str, data)) or 'something else'}"
        )
    arrays = {}
    for name, spec in specs.items():
        try:
            array = arrays[name] = np.asarray(data[name], spec.dtype.as_numpy_dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"export: `data` for {name!r} must be an array of type {spec.dtype.name}: {error}"
            ) from error
        if not spec.shape.is_compatible_with(array.shape) or 0 in array.shape:
            raise ValueError(
                f"export: `data` for {name!r} must have shape {spec.shape}, got {array.shape}"
            )
    return arrays


def _random(name: str, spec: tf.TensorSpec, generator: np.random.Generator) -> np.ndarray:
    if spec.shape.rank is None or not (spec.dtype.is_floating or spec.dtype.is_integer):
        raise ValueError(
            f"export: `data` must be given for {name!r}, of type {spec.dtype.name} and shape "
            f"{spec.shape}, for which no random values are drawn"
        )
    open_sizes = (_BATCH, *[_SIZE] * spec.shape.rank)
    shape = [s or o for s, o in zip(spec.shape.as_list(), open_sizes, strict=False)]
    if spec.dtype.is_integer:
        return generator.integers(2, size=shape).astype(spec.dtype.as_numpy_dtype)
    return generator.standard_normal(shape, np.float32).astype(spec.dtype.as_numpy_dtype)


def _sample(saved: Path, signature: str, data: Any, optimizations: str | None) -> _Sample:
    """Runs the model, as it is, on the first of the user's inputs or on random ones."""
    if _stock_graph.has_fused_ops(saved):
        options.loaded_ops()
    loaded = tf.saved_model.load(str(saved))
    function = loaded.signatures[signature]
    if data is None:
        generator = np.random.default_rng(0)
        inputs = {name: _random(name, spec, generator) for name, spec in _specs(function).items()}
    else:
        inputs = {name: values[:_MOST] for name, values in _named(data, function).items()}
    try:
        outputs = function(**{name: tf.constant(value) for name, value in inputs.items()})
    except Exception as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise ValueError(
            f"export: the model does not run on {shapes}; give `data` that it takes, or "
            f"verify=False: {_console.first_line(error)}"
        ) from error
    wide = {name: _wide(value.numpy()) for name, value in outputs.items()}
    tolerances = [testing.EXPORTED[optimizations or "float32"]]
    tolerances += [testing.MIXED_MODEL[f"mixed_{name}"] for name in _stock_graph.half_types(saved)]
    return _Sample(signature, inputs, wide, max(tolerances))


def _wide(values: np.ndarray) -> np.ndarray:
    """Half types as float32: a file of arrays cannot hold bfloat16."""
    return values.astype(np.float32) if values.dtype.itemsize == 2 else values


def _compare(made: Path, format: str, sample: _Sample) -> tuple[float, str]:
    """The largest difference, of the largest output; and what is wrong, in a sentence."""
    folder = made.parent
    files = {name: folder / f"{name}.npz" for name in ("inputs", "outputs")}
    wide: dict[str, Any] = {name: _wide(value) for name, value in sample.inputs.items()}
    np.savez(files["inputs"], **wide)
    library = _loader.ops_library() if format == "tf_saved_model_native" else None
    call = {"format": format, "path": made, "signature": sample.signature, "library": library}
    (folder / "call.json").write_text(json.dumps(call | files, default=str))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.read_text(encoding="utf-8"), "call.json"],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return np.inf, f"The export does not run in a fresh process: {last[0]}."
    actual = dict(np.load(files["outputs"]))
    if set(actual) != set(sample.outputs):
        return np.inf, f"The export has outputs {sorted(actual)}, not {sorted(sample.outputs)}."
    try:
        for name, expected in sample.outputs.items():
            testing.assert_close(actual[name], expected, sample.tolerance, name)
    except AssertionError as error:
        return np.inf, f"The export computes something else than the model: {error}."
    return max(testing.relative_error(actual[n], e, n) for n, e in sample.outputs.items()), ""


def _put(made: Path, target: Path) -> None:
    """Moves a file or folder to its place; what was there goes with the temporary folder."""
    before = made.with_name("before")
    existed = target.exists()
    if existed:
        target.rename(before)
    try:
        made.rename(target)
    except OSError:
        if existed:
            before.rename(target)
        raise
