"""Type checkers see the public signatures: a user's program under `mypy --strict`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed"
)


def checked(program: str, folder: Path) -> list[str]:
    """What mypy says of a program."""
    (folder / "program.py").write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "program.py"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_a_program_passes(tmp_path):
    said = checked(
        """
        import keras
        import tensorflow as tf

        import cbam_ops


        def attention(x: tf.Tensor, w0: tf.Tensor, w1: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
            y, channel_gate, spatial_gate = cbam_ops.cbam(
                x, w0, None, w1, None, kernel, data_format="NHWC", return_gates=True
            )
            return y


        def network() -> keras.Model:
            inputs = keras.Input((56, 56, 64))
            layer = cbam_ops.CBAM(ratio=16, kernel_size=7, activation="relu")
            other = cbam_ops.ChannelAttention.from_dialect("mobilenet_v3")
            return keras.Model(inputs, other(layer(inputs, residual=inputs)))


        with cbam_ops.use_implementation("reference"):
            print(cbam_ops.build_info()["version"])
        cbam_ops.set_implementation("auto")
        mean, maximum = cbam_ops.channel_pool(tf.ones((1, 2, 2, 4)))
        model = cbam_ops.models.CBAMResNet50(classes=10, input_shape=(224, 224, 3))
        fused = cbam_ops.fuse(network(), verbose=1)
        print(cbam_ops.dialects["official"].about)
        """,
        tmp_path,
    )
    assert said == ["Success: no issues found in 1 source file"]


def test_mistakes_are_found(tmp_path):
    """Fails where the package, or a name in it, is Any to a type checker."""
    said = checked(
        """
        import cbam_ops

        cbam_ops.set_implementation("fast")
        cbam_ops.CBAM(ratio="16")
        cbam_ops.models.CBAMResNet50(classes="ten")
        cbam_ops.channel_pool(data_format="NHWC")
        cbam_ops.fuze
        """,
        tmp_path,
    )
    lines = [int(line.split(":")[1]) for line in said if ": error: " in line]
    assert lines == [4, 5, 6, 7, 8], said
