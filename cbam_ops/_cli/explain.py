"""`cbam-ops explain`: what a model's attention makes of photographs, a picture of each."""

from __future__ import annotations

import collections
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbam_ops._cli import picture
from cbam_ops._cli.fuse import load_model
from cbam_ops._console import (
    CommandError,
    first_line,
    import_tensorflow,
    prepare_folder,
    require,
    written,
)

# Where a model takes images of any size: the longest side, and what every side is a multiple of.
_LONGEST, _STEP = 512, 32


def run(
    *,
    images: Sequence[Path],
    model: Path,
    output: Path,
    pixels: str | None,
    modules: Sequence[str],
    trust: bool,
) -> int:
    """Runs the command and returns its exit code.

    Raises:
      CommandError: a package is missing, an image or the model cannot be read, the model takes no
        images or has no attention, or a picture cannot be written.
    """
    require(["matplotlib", "PIL", "rich"], "explain")
    prepare_folder(output)
    for path in images:
        _read(path)  # a bad one shows before the work
    import_tensorflow()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from rich.console import Console
    from rich.progress import Progress

    network = _Network(load_model(model, modules, trust, compiled=False), model, pixels)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    bar = Progress(console=console, disable=not sys.stdout.isatty(), transient=True)
    with bar as progress:
        for path, target in progress.track(_targets(images, output), description="explaining"):
            photograph = network.fit(_read(path))
            found = network.look(photograph)
            with written(target) as part:
                # A name may hold bytes that are no text.
                title = os.fsencode(f"{path.name} in {model.name}").decode(errors="replace")
                _draw(part, title, photograph, found)
            console.print(f"{path}: {target}")
    return 0


def _targets(images: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Each image with the file of its picture; those of images of one name are numbered."""
    times: collections.Counter[str] = collections.Counter()
    pairs = []
    for path in images:
        times[path.stem] += 1
        number = f"_{times[path.stem]}" if times[path.stem] > 1 else ""
        pairs.append((path, output / f"{path.stem}{number}_explained.png"))
    return pairs


def _read(path: Path) -> Any:
    """An image of PIL, upright, in grey or in colours, on white where it is transparent.

    Raises:
      CommandError: it cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise CommandError(f"{path} is no image that can be read (PNG, JPEG, ...)") from error
    except FileNotFoundError as error:
        raise CommandError(f"there is no file {path}") from error
    except Exception as error:  # of many types, for a damaged file
        raise CommandError(f"cannot read the image {path}: {first_line(error)}") from error
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L", "I", "F") else "RGB")


class _Look(NamedTuple):
    """What a model makes of a photograph.

    Attributes:
      spatial: the spatial gates `[H, W]`, by the names of the layers.
      channel: the channel gates `[C]`.
      verdict: what the model says, in words.
      cam: Grad-CAM of that, `[H, W]` in [0, 1]; None if it depends on no attention.
      cam_layer: the layer whose result it is taken from.
    """

    spatial: dict[str, np.ndarray]
    channel: dict[str, np.ndarray]
    verdict: str
    cam: np.ndarray | None
    cam_layer: str


class _Network:
    """A model that takes one image."""

    def __init__(self, model: Any, path: Path, pixels: str | None) -> None:
        """A model with its file's path, and what its pixels are, in the words of `--pixels`.

        Raises:
          CommandError: it takes no images or has no attention.
        """
        from cbam_ops import layers

        self._model = model
        attention = [v for v in model._flatten_layers() if isinstance(v, layers._Attention)]
        if not attention:
            raise CommandError(
                f"{path} has no layer of cbam_ops; cbam-ops fuse replaces hand-written attention "
                "by such layers"
            )
        self._channels_first = attention[0].data_format == "channels_first"
        shapes = [tuple(tensor.shape) for tensor in getattr(model, "inputs", None) or ()]
        shapes = shapes or [tuple(shape) for shape in (model._build_shapes_dict or {}).values()]
        shape = shapes[0][1:] if len(shapes) == 1 else ()
        if self._channels_first:
            shape = (*shape[1:], *shape[:1])
        if len(shape) != 3 or shape[2] not in (1, 3):
            raise CommandError(
                f"{path} must take images of 1 or 3 channels, its inputs have the shapes {shapes}"
            )
        self._height, self._width, self._channels = shape
        self._pixels = pixels or self._usual_pixels()

    def _usual_pixels(self) -> str:
        """`raw` where the model begins with scaling them."""
        import keras

        scaling = (keras.layers.Rescaling, keras.layers.Normalization)
        for layer in self._model._flatten_layers():
            if isinstance(layer, scaling):
                return "raw"
            if any(len(weight.shape) == 4 for weight in getattr(layer, "_trainable_variables", ())):
                break
        return "torch" if self._channels == 3 else "unit"

    def fit(self, image: Any) -> np.ndarray:
        """An image of PIL at a size that the model takes, `[H, W, channels]` in [0, 255]."""
        from PIL import ImageOps

        shrink = min(1.0, _LONGEST / max(image.size))
        width, height = (
            known or max(1, round(side * shrink / _STEP)) * _STEP
            for known, side in zip((self._width, self._height), image.size, strict=True)
        )
        image = ImageOps.fit(image.convert("L" if self._channels == 1 else "RGB"), (width, height))
        return np.asarray(image, "float32").reshape(height, width, self._channels)

    def _batch(self, photograph: np.ndarray) -> np.ndarray:
        """A photograph as the model takes it."""
        import keras

        batch = photograph[np.newaxis].copy()
        if self._pixels == "unit":
            batch /= 255
        elif self._pixels != "raw":
            batch = keras.applications.imagenet_utils.preprocess_input(
                batch, "channels_last", self._pixels
            )
        return np.moveaxis(batch, 3, 1) if self._channels_first else batch

    def look(self, photograph: np.ndarray) -> _Look:
        """Runs the model on a photograph."""
        import tensorflow as tf

        from cbam_ops import inspecting

        x = tf.constant(self._batch(photograph))
        with inspecting.calls(self._model) as calls, tf.GradientTape() as tape:
            tape.watch(x)
            score, verdict = _score(self._model(x, training=False))
        slopes = tape.gradient(score, [call.result for call in calls])
        cam, cam_layer = None, ""
        for call, slope in zip(calls, slopes, strict=True):
            if slope is not None and len(slope.shape) == 4:
                cam, cam_layer = self._cam(call.result, slope), call.name
        spatial = {c.name: c.spatial_gate.numpy()[0] for c in calls if c.spatial_gate is not None}
        return _Look(
            {name: gate for name, gate in spatial.items() if gate.ndim == 2},  # of no series
            {c.name: c.channel_gate.numpy()[0] for c in calls if c.channel_gate is not None},
            verdict,
            cam,
            cam_layer,
        )

    def _cam(self, result: Any, slope: Any) -> np.ndarray:
        """Grad-CAM (Selvaraju et al., 2017): channels weighted by their mean gradients."""
        y, dy = (np.asarray(t, "float32")[0] for t in (result, slope))
        if self._channels_first:
            y, dy = np.moveaxis(y, 0, 2), np.moveaxis(dy, 0, 2)
        cam = np.maximum(y @ dy.mean(axis=(0, 1)), 0)
        return cam / max(float(cam.max()), np.finfo("float32").tiny)


def _score(outputs: Any) -> tuple[Any, str]:
    """What Grad-CAM explains, a number, and what the model says, in words."""
    import keras
    import tensorflow as tf

    output = keras.tree.flatten(outputs)[0]
    if len(output.shape) != 2:
        return tf.reduce_mean(output), "the mean of the output"
    best = int(tf.argmax(output[0]))
    value = float(output[0, best])
    # A saturated softmax or sigmoid has no gradient; Keras keeps what goes into it.
    logits = getattr(output, "_keras_logits", output)
    if logits is output:
        return output[0, best], f"output {best} ({value:.3g})"
    return logits[0, best], f"class {best} ({value:.1%})"


def _short(name: str, length: int = 30) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"


def _draw(path: Path, title: str, photograph: np.ndarray, look: _Look) -> None:
    """Writes the picture of one photograph as PNG."""
    from matplotlib.figure import Figure

    ratio = photograph.shape[0] / photograph.shape[1]
    across = max(2, min(6, math.ceil(math.sqrt(2 * len(look.spatial)))))
    down = math.ceil(len(look.spatial) / across)
    width = 12.0
    heights = [width / 2 * ratio + 0.4, down * (width / across * ratio + 0.3) + 0.3 * bool(down)]
    heights.append(2.8 * bool(look.channel))
    shown = [height for height in heights if height]
    figure = Figure((width, sum(shown) + 0.5), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=13)
    parts: Any = figure.subfigures(len(shown), 1, height_ratios=shown, squeeze=False)
    rows = iter(parts[:, 0])

    left, right = next(rows).subplots(1, 2)
    left.imshow(photograph.squeeze() / 255, cmap="gray", vmin=0, vmax=1)
    left.set_title("what the model sees", fontsize=11)
    left.set_axis_off()
    if look.cam is None:
        right.text(0.5, 0.5, "the output depends on no attention", ha="center", va="center")
        right.set_axis_off()
    else:
        picture.overlay(right, photograph / 255, look.cam)
        right.set_title(f"Grad-CAM of {look.verdict}, at {_short(look.cam_layer)}", fontsize=11)
    if look.spatial:
        _draw_spatial(next(rows), photograph / 255, look.spatial, (down, across))
    if look.channel:
        _draw_channel(next(rows), look.channel)
    figure.savefig(path, format="png", facecolor="white")


def _draw_spatial(
    figure: Any, photograph: np.ndarray, gates: dict[str, np.ndarray], grid: tuple[int, int]
) -> None:
    figure.suptitle(
        "spatial gates over the photograph: dark is the lowest of a gate's values, bright the "
        "highest",
        fontsize=11,
    )
    places = figure.subplots(*grid, squeeze=False).flatten()
    for axes, (name, gate) in zip(places, gates.items(), strict=False):
        picture.overlay(axes, photograph, gate)
        axes.set_title(f"{_short(name)}\n{gate.min():.2f} to {gate.max():.2f}", fontsize=8)
    for axes in places[len(gates) :]:
        axes.set_axis_off()


def _draw_channel(figure: Any, gates: dict[str, np.ndarray]) -> None:
    """A column per layer, with its gates from the highest to the lowest."""
    from matplotlib import colormaps

    axes = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0.1, 0.8, len(gates)))
    for place, (gate, colour) in enumerate(zip(gates.values(), colours, strict=True)):
        edges = place + np.linspace(-0.45, 0.45, len(gate) + 1)
        axes.stairs(np.sort(gate)[::-1], edges, fill=True, color=colour)
    axes.set_title("channel gates of every layer, from the highest to the lowest", fontsize=11)
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(gates) > 6 else {}
    axes.set_xticks(range(len(gates)), [_short(name) for name in gates], fontsize=8, **slanted)
    axes.set_xlim(-0.5, len(gates) - 0.5)
    axes.set_ylim(0, max([1.0, *map(np.max, gates.values())]))  # sums of two gates are up to 2
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
