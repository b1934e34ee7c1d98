"""SavedModels with fused ops in processes that never import cbam_ops, as docs/exporting.md says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import cbam_ops
from cbam_ops import __main__ as command
from cbam_ops.testing import assert_same_bits

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/exporting.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, keras.Model]:
    """The folder that holds the SavedModel `native`, and the model."""
    image = keras.Input((None, None, 3), name="image")
    x = keras.layers.Conv2D(16, 3, padding="same")(image)
    x = cbam_ops.CBAM(ratio=4, activation="relu")(x, residual=x)
    model = keras.Model(image, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))
    folder = tmp_path_factory.mktemp("served")
    cbam_ops.export(model, folder / "native", "tf_saved_model_native", verify=False)
    return folder, model


def ops_library(capsys) -> str:
    assert command.main(["info", "--ops-library"]) == 0
    return capsys.readouterr().out.strip()


SERVER = """
    import json, sys, threading
    import numpy as np
    import tensorflow as tf

    library, folder = sys.argv[1:]
    tf.load_op_library(library)
    serve = tf.saved_model.load(folder).signatures["serving_default"]
    shapes = [(1, 32, 32, 3), (4, 17, 9, 3), (2, 40, 24, 3), (3, 1, 1, 3), (8, 8, 8, 3)]
    requests = [np.random.default_rng(i).standard_normal(s, np.float32)
                for i, s in enumerate(shapes)]
    answers = [set() for _ in shapes]

    def work(index):
        for i in range(index, index + 125):
            y = serve(image=tf.constant(requests[i % len(shapes)]))["output_0"]
            answers[i % len(shapes)].add(y.numpy().tobytes())

    def a_thousand_requests():
        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    for _ in range(2):  # allocators and caches fill up
        a_thousand_requests()
    before = resident()
    for _ in range(3):
        a_thousand_requests()
    assert "cbam_ops" not in sys.modules
    np.savez("answers.npz", **{str(i): np.frombuffer(min(a), np.float32)
                               for i, a in enumerate(answers)})
    print(json.dumps([resident() - before, [len(a) for a in answers]]))
"""


def test_a_thousand_requests_from_eight_threads(served, capsys):
    """Fails when answers differ from thread to thread or from the model, or memory grows."""
    folder, model = served
    arguments = [sys.executable, "-c", textwrap.dedent(SERVER), ops_library(capsys), "native"]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    growth, different = json.loads(done.stdout)
    assert growth < 8.0
    assert different == [1] * 5
    answers = np.load(folder / "answers.npz")
    for index, shape in enumerate([(1, 32, 32, 3), (4, 17, 9, 3), (2, 40, 24, 3)]):
        request = np.random.default_rng(index).standard_normal(shape, np.float32)
        expected = tf.function(model)(request).numpy()
        assert_same_bits(answers[str(index)].reshape(expected.shape), expected, str(shape))


def test_the_c_api(served, capsys):
    """The program of examples/serve.c, built as the page says."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is not installed")
    folder, model = served
    (build,) = re.findall(r"^tensorflow=.*?libtensorflow_framework\S*", PAGE, re.M | re.S)
    shutil.copytree(ROOT / "examples", folder / "examples")
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    built = subprocess.run(
        ["bash", "-ec", python + build], cwd=folder, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    signature = tf.saved_model.load(folder / "native").signatures["serving_default"]
    output = "StatefulPartitionedCall_1:0"
    call = [folder / "serve", "native", "serving_default_image:0", output, ops_library(capsys)]
    done = subprocess.run(call, cwd=folder, input=images.tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    actual = np.frombuffer(done.stdout, np.float32).reshape(3, 10)
    for image, y in zip(images, actual, strict=True):
        assert_same_bits(y[None], signature(image=image[None])["output_0"].numpy(), "y")
    without = subprocess.run(call[:-1], cwd=folder, input=b"", capture_output=True)
    assert without.returncode == 1 and b"Op type not registered" in without.stderr
