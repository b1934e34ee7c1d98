"""Files that earlier versions saved (saved/make.py): today's code loads them and computes the same.

The other machine may have had other instruction sets, so results are compared by tolerance.
"""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from packaging.version import Version

from cbam_ops import models, testing

ARCHIVES = sorted((Path(__file__).parent / "saved").glob("*.tar.xz"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one version's files."""
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(request.param) as archive:
        # Python 3.14's default; the first releases of 3.10 and 3.11 do not know it.
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safely)
    return folder


def load(path: Path) -> keras.Model:
    """The model in a file, where this Keras is not older than the one that wrote it."""
    with zipfile.ZipFile(path) as archive:
        writer = json.loads(archive.read("metadata.json"))["keras_version"]
    if Version(keras.__version__) < Version(writer):
        pytest.skip(
            f"written by Keras {writer}, and Keras {keras.__version__} reads no newer files"
        )
    return keras.models.load_model(path)


def assert_as_before(actual: tf.Tensor, expected: np.ndarray, name: str) -> None:
    dtype = actual.dtype.name
    half = dtype in ("float16", "bfloat16")
    tolerance = 8 * testing.EPSILON[dtype] if half else testing.FLOAT32
    testing.assert_close(tf.cast(actual, expected.dtype), expected, tolerance, name)


def named(arrays: np.lib.npyio.NpzFile, group: str) -> dict[str, np.ndarray]:
    """The arrays of a group, in the order in which they were saved."""
    prefix = f"{group}/"
    return {n.removeprefix(prefix): arrays[n] for n in arrays.files if n.startswith(prefix)}


def test_layers_in_a_keras_file(saved, implementation):
    """Weights under their old paths, in their old order; configurations; results."""
    model = load(saved / "layers.keras")
    arrays = np.load(saved / "layers.npz")
    for variables, group in ((model.weights, "weight"), (model.optimizer.variables, "optimizer")):
        expected = named(arrays, group)
        assert [v.path for v in variables] == list(expected)
        for variable in variables:
            testing.assert_same_bits(variable.numpy(), expected[variable.path], variable.path)
    outputs = model(named(arrays, "input"))
    expected = named(arrays, "output")
    assert {name.partition("/")[0] for name in expected} == set(outputs)
    for name, value in expected.items():
        output, _, index = name.partition("/")
        assert_as_before(tf.nest.flatten(outputs[output])[int(index)], value, name)


def test_a_network_in_a_keras_file(saved, tmp_path):
    """The file as a whole, and its weights alone in the network as it is built today."""
    arrays = np.load(saved / "network.npz")
    loaded = load(saved / "network.keras")
    with zipfile.ZipFile(saved / "network.keras") as archive:
        weights = archive.extract("model.weights.h5", tmp_path)
    built = models.CBAMResNet18(weights=weights, input_shape=(32, 32, 3), classes=5)
    for model in (loaded, built):
        assert_as_before(model(arrays["x"]), arrays["y"], "classes")


def test_weights_of_every_network(saved):
    """Files of weights alone, and optimizers, go by paths, shapes and order."""
    for name, expected in np.load(saved / "weights.npz").items():
        with keras.StatelessScope(initialize_variables=False):  # shapes, without values
            model = getattr(models, name)(input_shape=(32, 32, 3), classes=5)
        actual = [f"{weight.path} {tuple(weight.shape)}" for weight in model.weights]
        assert actual == expected.tolist(), name
    keras.backend.clear_session()  # forgets the variables that wait for a value


def test_functions_in_a_saved_model(saved):
    """A graph names ops, attributes and arguments, and leaves out attributes at their defaults."""
    cases = tf.saved_model.load(saved / "functions").cases
    arrays = np.load(saved / "functions.npz")
    assert {name.partition("/")[0] for name in arrays.files} == set(cases)
    for name, case in cases.items():
        signature = case.input_signature
        values = named(arrays, f"{name}/input").values()
        tensors = [tf.cast(v, s.dtype) for v, s in zip(values, signature, strict=True)]
        for group, actual in zip(("result", "gradient"), case(*tensors), strict=True):
            expected = named(arrays, f"{name}/{group}")
            for (index, value), tensor in zip(expected.items(), actual, strict=True):
                assert_as_before(tensor, value, f"{name}, {group} {index}")
