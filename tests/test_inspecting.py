"""A look inside: `cbam_ops.gates`, and the pictures of `cbam-ops explain`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import matplotlib.figure
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import cbam_ops
from cbam_ops import __main__ as command
from cbam_ops._cli import explain
from cbam_ops.testing import FLOAT32, assert_close

SIZE = (12, 16)


def _network(shape=(*SIZE, 3), attention=cbam_ops.CBAM, name="net") -> keras.Model:
    """A convolution, an attention layer `one`, and a classifier."""
    x = image = keras.Input(shape)
    x = keras.layers.Conv2D(8, 3, 2, "same", activation="relu")(x)
    x = attention(name="one")(x)
    x = keras.layers.Dense(5, "softmax", name="top")(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, x, name=name)


def _cbam(**options) -> cbam_ops.CBAM:
    """With so many hidden units that some are not dead, and images differ."""
    return cbam_ops.CBAM(hidden=16, kernel_size=3, **options)


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """A layer of one's own, with attention inside."""

    def __init__(self, **options):
        super().__init__(**options)
        self.parts = [cbam_ops.ChannelAttention(2, name="channel"), _cbam(name="both")]

    def build(self, shape):
        for part in self.parts:
            part.build(shape)

    def get_config(self):
        return {"name": self.name}

    def call(self, x):
        return self.parts[1](self.parts[0](x))


class Mine(keras.Model):
    """A subclassed model, whose call is a graph of TensorFlow's."""

    def __init__(self):
        super().__init__()
        self.block = Block(name="block")
        self.last = cbam_ops.SpatialAttention(3, name="spatial")

    @tf.function
    def call(self, x):
        return self.last(self.block(x))


# --- gates ----------------------------------------------------------------------------------------


def test_gates_are_those_of_the_layer():
    """Fails when the gates are another layer's, another image's, or of a training step."""
    model = _network(attention=lambda **options: _cbam(spatial_batch_norm=True, **options))
    images = np.random.default_rng(0).normal(size=(5, *SIZE, 3)).astype("float32")
    before = keras.Model(model.input, model.get_layer("one").input)
    _, *expected = model.get_layer("one")(before(images), return_gates=True)
    found = cbam_ops.gates(model, images, batch_size=2)
    assert list(found) == ["one"]
    for actual, gate in zip(found["one"], expected, strict=True):
        assert isinstance(actual, np.ndarray)
        assert_close(actual, gate.numpy(), FLOAT32, "gate")
    assert np.ptp(expected[0], axis=0).max() > 0  # the images have different ones


def test_gates_of_models_and_layers_inside(tmp_path):
    """Fails when a module inside a model or a layer is left out, in a loaded model too."""
    shared = _cbam(name="shared")
    x = image = keras.Input((*SIZE, 8))
    for _ in range(2):
        x = shared(x)
    x = Block(name="block")(x)
    model = keras.Sequential([keras.Model(image, x, name="inner"), Block(name="outer")])
    model.save(tmp_path / "model.keras")
    images = np.random.default_rng(0).normal(size=(2, *SIZE, 8))
    expected = cbam_ops.gates(model, images)
    names = ["inner/shared", "inner/shared#2", "inner/block/channel", "inner/block/both",
             "outer/channel", "outer/both"]  # fmt: skip
    assert list(expected) == names
    assert expected["inner/block/channel"][1] is None
    assert expected["inner/shared"][1].shape == (2, *SIZE)
    assert not np.array_equal(expected["inner/shared"][0], expected["inner/shared#2"][0])
    found = cbam_ops.gates(keras.models.load_model(tmp_path / "model.keras"), images)
    assert list(found) == names
    for name in names:
        for actual, gate in zip(found[name], expected[name], strict=True):
            assert np.array_equal(actual, gate) if gate is not None else actual is None


def test_gates_of_a_subclassed_model():
    """Fails when gates that TensorFlow traces are lost, or the process is left changed."""
    found = cbam_ops.gates(Mine(), np.zeros((3, *SIZE, 8)))
    assert [(name, a is None, b is None) for name, (a, b) in found.items()] == [
        ("block/channel", False, True),
        ("block/both", False, False),
        ("spatial", True, False),
    ]
    assert not tf.config.functions_run_eagerly()
    assert cbam_ops.layers.listener.get() is None


def test_gates_refuse_what_they_cannot_take():
    """Fails when bad input ends in Keras's words, or with nothing."""
    plain = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten()], name="plain")
    images = np.zeros((1, *SIZE, 3))
    with pytest.raises(ValueError, match=r"`model` must be a keras.Model, got function"):
        cbam_ops.gates(_network, images)
    with pytest.raises(ValueError, match=r"`model` must have .* plain has none; cbam_ops.fuse"):
        cbam_ops.gates(plain, np.zeros((1, 4, 4, 1)))
    with pytest.raises(ValueError, match=r"`images` must have shape \(None, 12, 16, 3\), got"):
        cbam_ops.gates(_network(attention=_cbam), images[0])
    batches = tf.data.Dataset.from_tensors(images)
    with pytest.raises(ValueError, match=r"`images` must be an array, or several, got _Tensor"):
        cbam_ops.gates(_network(attention=_cbam), batches)
    with pytest.raises(ValueError, match=r"`images` must be one array of shape .*, got 2 values"):
        cbam_ops.gates(_network(attention=_cbam), [images, images])
    for size in (0, 2.5, "all", None):
        with pytest.raises(
            ValueError, match=f"`batch_size` must be a positive integer, got {size!r}"
        ):
            cbam_ops.gates(_network(attention=_cbam), images, batch_size=size)
    assert not tf.config.functions_run_eagerly()


# --- explain --------------------------------------------------------------------------------------


def _explain(capsys, *arguments) -> subprocess.CompletedProcess:
    code = command.main(["explain", *map(str, arguments)])
    shown = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, code, shown.out, shown.err)


def _photograph(path: Path, mode: str = "RGB", size=(50, 30)) -> Path:
    """A picture file with a bright disc in it."""
    y, x = np.mgrid[: size[1], : size[0]]
    disc = np.where((x - 30) ** 2 + (y - 12) ** 2 < 80, 220, 40).astype("uint8")
    if mode == "I;16":
        Image.fromarray(disc.astype("uint16") * 257).save(path)
    else:
        Image.fromarray(disc).convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.keras"
    _network((None, None, 3), _cbam).save(path)
    return path


def test_explain_draws_every_image(tmp_path, capsys, model_file):
    """Fails when an image's format or size is not read, or its picture is missing or blank."""
    (tmp_path / "other").mkdir()
    images = [
        _photograph(tmp_path / "a.jpg", size=(700, 90)),
        _photograph(tmp_path / "b.png", "RGBA", size=(3, 5)),
        _photograph(tmp_path / "c.png", "I;16"),
        _photograph(tmp_path / "other" / "a.png", "P"),
    ]
    output = tmp_path / "new" / "folder"
    result = _explain(capsys, *images, "--model", model_file, "--output", output)
    assert (result.returncode, result.stderr) == (0, "")
    names = ["a_explained.png", "b_explained.png", "c_explained.png", "a_2_explained.png"]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    assert [line.split(": ")[1] for line in result.stdout.splitlines()] == [
        str(output / name) for name in names
    ]
    for name in names:
        pixels = np.asarray(Image.open(output / name).convert("RGB")).astype(int)
        assert (pixels[0, 0] == 255).all()
        assert 0.1 < np.mean(pixels.min(axis=2) == 255) < 0.9  # white paper, with things on it
        assert np.mean(np.ptp(pixels, axis=2) > 30) > 0.1  # heat maps


def test_explain_an_image_whose_name_is_no_text(tmp_path, capsys, model_file):
    """Fails when a name in another encoding than the system's cannot be drawn or printed."""
    image = _photograph(tmp_path / os.fsdecode(b"\xff.png"))
    result = _explain(capsys, image, "--model", model_file, "--output", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / os.fsdecode(b"\xff_explained.png")).stat().st_size > 10_000


@pytest.mark.parametrize("attention", [cbam_ops.ChannelAttention, cbam_ops.SpatialAttention])
def test_explain_half_a_module_on_grey_images(tmp_path, capsys, monkeypatch, attention):
    """Fails when a model must have both gates, or take colours; or a terminal sees no progress."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    options = {} if attention is cbam_ops.SpatialAttention else {"ratio": 2}
    _network((*SIZE, 1), lambda **name: attention(**options, **name)).save(tmp_path / "m.keras")
    image = _photograph(tmp_path / "a.png")
    result = _explain(capsys, image, "--model", tmp_path / "m.keras", "--output", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "explaining" in result.stdout and "100%" in result.stdout
    assert (tmp_path / "a_explained.png").stat().st_size > 10_000


def test_columns_reach_every_channel_gate():
    """Fails when sums of two gates, which are up to 2, are cut off."""
    figure = matplotlib.figure.Figure()
    explain._draw_channel(figure, {"one": np.array([0.5, 1.5]), "two": np.array([0.25, 0.5])})
    assert figure.axes[0].get_ylim() == (0.0, 1.5)
    figure = matplotlib.figure.Figure()
    explain._draw_channel(figure, {"two": np.array([0.25, 0.5])})
    assert figure.axes[0].get_ylim() == (0.0, 1.0)


@pytest.mark.parametrize("channels_first", [False, True])
def test_grad_cam_and_gates_of_a_photograph(channels_first):
    """Grad-CAM before global pooling is the classifier's own map of its class (CAM)."""
    shape = (3, *SIZE) if channels_first else (*SIZE, 3)
    layout = "channels_first" if channels_first else "channels_last"
    x = image = keras.Input(shape)
    x = _cbam(name="one", data_format=layout)(x)
    pooled = keras.layers.GlobalAveragePooling2D(layout)(x)
    model = keras.Model(image, keras.layers.Dense(4, "softmax", use_bias=False)(pooled))
    network = explain._Network(model, Path("m.keras"), "unit")
    photograph = np.random.default_rng(0).uniform(0, 255, (*SIZE, 3)).astype("float32")
    look = network.look(photograph)

    batch = photograph[None] / 255
    batch = np.moveaxis(batch, 3, 1) if channels_first else batch
    y = keras.Model(image, x)(batch).numpy()[0]
    y = np.moveaxis(y, 0, 2) if channels_first else y
    best = int(np.argmax(model(batch)))
    assert look.verdict.startswith(f"class {best} (")
    cam = np.maximum(y @ model.layers[-1].get_weights()[0][:, best], 0)
    assert_close(look.cam, cam / cam.max(), FLOAT32, "Grad-CAM")
    channel_gate, spatial_gate = cbam_ops.gates(model, batch)["one"]
    assert np.array_equal(look.spatial["one"], spatial_gate[0])
    assert np.array_equal(look.channel["one"], channel_gate[0])


def test_pixels_are_what_the_model_takes():
    """Fails when an image reaches a model in another range than it was made for."""
    scaled = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), _cbam()])
    later = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 1), _cbam(), keras.layers.Rescaling(4)]
    )
    grey = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 1), _cbam()])
    white = np.full((8, 8, 3), 255.0, "float32")
    for model, pixels, value in (
        (scaled, None, 255.0),
        (later, "tf", 1.0),
        (later, "unit", 1.0),
        (later, None, (1 - 0.485) / 0.229),
        (later, "caffe", 255 - 103.939),
        (grey, None, 1.0),
    ):
        network = explain._Network(model, Path("m.keras"), pixels)
        batch = network._batch(white[..., : model.input_shape[-1]])
        assert_close(batch[0, 0, 0, 0], np.float32(value), FLOAT32, f"{pixels} pixels")


def test_explain_refuses_in_one_sentence(tmp_path, capsys, model_file):
    """Fails when a bad image, model or folder gives a traceback, or a picture of nothing."""
    image = _photograph(tmp_path / "good.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(image.read_bytes()[:300])
    text = tmp_path / "text.png"
    text.write_text("no image")
    plain = tmp_path / "plain.keras"
    keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()]).save(plain)
    series = tmp_path / "series.keras"
    keras.Sequential([keras.Input((4, 4, 8)), _cbam()]).save(series)
    output = tmp_path / "pictures"
    for images, model, folder, words in (
        ([image, cut], model_file, output, f"cannot read the image {cut}"),
        ([image, text], model_file, output, f"{text} is no image"),
        ([tmp_path / "none.png"], model_file, output, "there is no file"),
        ([image], tmp_path / "none.keras", output, "there is no file"),
        ([image], plain, output, "has no layer of cbam_ops; cbam-ops fuse"),
        ([image], series, output, "must take images of 1 or 3 channels"),
        ([image], model_file, image / "inside", "--output DIR"),
    ):
        result = _explain(capsys, *images, "--model", model, "--output", folder)
        assert result.returncode == 2, words
        (line,) = result.stderr.splitlines()
        assert line.startswith("cbam-ops explain: ") and words in line
        assert not output.exists() or not list(output.iterdir())
