"""The demo's picture: photographs and digits under their spatial gates, and the learning curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_HEAT = "inferno"
_TITLES = ("china", "flower")


def _enlarge(gate: np.ndarray, height: int, width: int) -> np.ndarray:
    """The gate at the photograph's size, interpolated linearly."""
    from PIL import Image

    image = Image.fromarray(np.asarray(gate, "float32"))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _overlay(axes: Any, photograph: np.ndarray, gate: np.ndarray) -> Any:
    """The photograph in grey under the gate as heat; what a colour bar needs."""
    grey = photograph @ np.array([0.299, 0.587, 0.114], "float32")
    axes.imshow(grey, cmap="gray", vmin=-0.1, vmax=1.1)
    low, high = np.percentile(gate, [0.5, 99.5])
    heat = axes.imshow(gate, cmap=_HEAT, alpha=0.65, vmin=low, vmax=high)
    axes.set_axis_off()
    return heat


def draw(
    path: Path,
    digits_model: Any,
    digits_gates: Any,
    data: Any,
    curve: Any,
    accuracy: float,
    photo_gates: Any,
    photographs: list[np.ndarray],
) -> None:
    """Writes the picture as PNG.

    Args:
      path: where to.
      digits_model: the trained network of the digits.
      digits_gates: from digits to its spatial gates by name.
      data: the digits.
      curve: per epoch `loss`, `train` and `test`.
      accuracy: on the test images, at the end.
      photo_gates: from a photograph to the spatial gates of the network trained on patches.
      photographs: `[H, W, 3]` in [0, 1] each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 10.2), dpi=100, facecolor="white", layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[5.4, 2.3, 2.6], hspace=0.03)
    top, middle, bottom = parts

    top.suptitle(
        "What the spatial gates look at: a CBAM network trained on 64 x 64 patches\n"
        "to tell the tower, the flower and neither, applied to the whole photographs",
        fontsize=12,
    )
    grid = top.subplots(len(photographs), 3, squeeze=False)
    for row, photograph in enumerate(photographs):
        height, width = photograph.shape[:2]
        gates = photo_gates(photograph[np.newaxis], training=False)
        grid[row, 0].imshow(np.clip(photograph, 0, 1))
        grid[row, 0].set_axis_off()
        grid[row, 0].set_title(f'photograph "{_TITLES[row]}"', fontsize=10)
        for column, (name, gate) in enumerate(gates.items(), start=1):
            axes = grid[row, column]
            heat = _overlay(axes, photograph, _enlarge(np.asarray(gate)[0], height, width))
            axes.set_title(f"spatial gate of block {name[-1]}", fontsize=10)
            bar = top.colorbar(heat, ax=axes, fraction=0.032, pad=0.02)
            bar.solids.set_alpha(1)
            bar.ax.tick_params(labelsize=8)

    _draw_digits(middle, digits_model, digits_gates, data)
    _draw_curve(bottom, curve, accuracy)
    figure.savefig(path, format="png", facecolor="white")


def _draw_digits(figure: Any, model: Any, gates_model: Any, data: Any) -> None:
    chosen = [int(np.flatnonzero(data.test_labels == digit)[0]) for digit in range(10)]
    images = data.test_images[chosen]
    predicted = np.argmax(np.asarray(model(images, training=False)), axis=1)
    name = "cbam_1"
    gates = np.asarray(gates_model(images, training=False)[name])
    figure.suptitle(
        f"Handwritten digits of the test set, and the spatial gate of block {name[-1]}",
        fontsize=12,
    )
    grid = figure.subplots(2, 10)
    low, high = float(gates.min()), float(gates.max())
    for column in range(10):
        image, gate = images[column, ..., 0], gates[column]
        grid[0, column].imshow(image, cmap="gray_r", vmin=0, vmax=1)
        right = predicted[column] == data.test_labels[chosen[column]]
        grid[0, column].set_title(
            f"read as {predicted[column]}", fontsize=9, color="black" if right else "crimson"
        )
        heat = grid[1, column].imshow(gate, cmap=_HEAT, vmin=low, vmax=high)
        for axes in grid[:, column]:
            axes.set_axis_off()
    bar = figure.colorbar(heat, ax=grid, fraction=0.015, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("gate", fontsize=9)


def _draw_curve(figure: Any, curve: Any, accuracy: float) -> None:
    left, right = figure.subplots(1, 2)
    epochs = np.arange(1, len(curve.loss) + 1)
    left.plot(epochs, curve.loss, marker="o", markersize=3, color="tab:red")
    left.set_yscale("log")
    left.set_title("Digits: training loss", fontsize=10)
    right.plot(epochs, curve.train, marker="o", markersize=3, label="training images")
    right.plot(epochs, curve.test, marker="o", markersize=3, label="test images")
    right.axhline(0.97, color="grey", linestyle="--", linewidth=1, label="97 %")
    lowest = min(curve.train + curve.test)
    right.set_ylim(max(0.0, lowest - 0.03), 1.005)
    right.set_title(f"Digits: accuracy ({accuracy:.2%} on the test images)", fontsize=10)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.set_xlabel("epoch", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
