"""A program that runs an exported model on arrays: `python -c PROGRAM CALL.json`.

What it imports is all that the model needs: it is run in a fresh process, and fails if that has
come to hold cbam_ops. CALL.json has the model's `format`, `path`, `signature` (None: the only one),
the `library` of ops to load (or None), and the files `inputs` and `outputs`, of arrays by name.
"""

import json
import sys
from typing import Any

import numpy as np

Call = dict[str, Any]
Arrays = dict[str, Any]


def saved_model(call: Call, inputs: Arrays) -> Arrays:
    import tensorflow as tf

    if call["library"]:
        tf.load_op_library(call["library"])
    function = tf.saved_model.load(call["path"]).signatures[call["signature"]]
    specs = function.structured_input_signature[1]
    outputs = function(**{n: tf.cast(v, specs[n].dtype) for n, v in inputs.items()})
    half = (tf.float16, tf.bfloat16)
    return {n: tf.cast(v, tf.float32) if v.dtype in half else v for n, v in outputs.items()}


def litert(call: Call, inputs: Arrays) -> Arrays:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter
    return Interpreter(call["path"]).get_signature_runner()(**inputs)


def onnx(call: Call, inputs: Arrays) -> Arrays:
    import onnxruntime

    session = onnxruntime.InferenceSession(call["path"], providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        call = json.load(file)
    run = {"litert": litert, "onnx": onnx}.get(call["format"], saved_model)
    outputs = run(call, dict(np.load(call["inputs"])))
    assert "cbam_ops" not in sys.modules, "the model was run with the help of cbam_ops"
    arrays: Arrays = {name: np.asarray(value) for name, value in outputs.items()}
    np.savez(call["outputs"], **arrays)


main()
