"""The demo's picture: photographs and digits under their spatial gates, and the learning curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HEAT = "inferno"


def overlay(axes: Any, photograph: np.ndarray, gate: np.ndarray) -> Any:
    """The photograph, in colours or grey, in grey under the gate as heat.

    Returns:
      What a colour bar needs.
    """
    height, width, channels = photograph.shape
    weights = [0.299, 0.587, 0.114] if channels == 3 else [1.0]
    grey = photograph @ np.array(weights, "float32")
    axes.imshow(grey, cmap="gray", vmin=-0.1, vmax=1.1)
    low, high = np.percentile(gate, [0.5, 99.5])
    heat = axes.imshow(
        gate, cmap=HEAT, alpha=0.65, vmin=low, vmax=high,
        interpolation="bilinear", extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip
    axes.set_axis_off()
    return heat


def draw(
    path: Path,
    digits_model: Any,
    digits_gates: Any,
    data: Any,
    history: dict[str, list[float]],
    asked: float,
    photo_gates: Any,
    photographs: dict[str, np.ndarray],
) -> None:
    """Writes the picture as PNG.

    Args:
      path: where to.
      digits_model: the trained network of the digits.
      digits_gates: from digits to its spatial gates by name.
      data: the digits.
      history: of the digits' training, as Keras's `History` has it.
      asked: the accuracy on the test images that the demo asks for.
      photo_gates: from a photograph to the spatial gates of the network trained on patches.
      photographs: `[H, W, 3]` in [0, 1] each, by name.
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
    for row, (title, photograph) in enumerate(photographs.items()):
        gates = photo_gates(photograph[np.newaxis], training=False)
        grid[row, 0].imshow(np.clip(photograph, 0, 1))
        grid[row, 0].set_axis_off()
        grid[row, 0].set_title(f'photograph "{title}"', fontsize=10)
        for column, (name, gate) in enumerate(gates.items(), start=1):
            axes = grid[row, column]
            heat = overlay(axes, photograph, np.asarray(gate)[0])
            axes.set_title(f"spatial gate of block {name[-1]}", fontsize=10)
            bar = top.colorbar(heat, ax=axes, fraction=0.032, pad=0.02)
            bar.solids.set_alpha(1)
            bar.ax.tick_params(labelsize=8)

    _draw_digits(middle, digits_model, digits_gates, data)
    _draw_history(bottom, history, asked)
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
        heat = grid[1, column].imshow(gate, cmap=HEAT, vmin=low, vmax=high)
        for axes in grid[:, column]:
            axes.set_axis_off()
    bar = figure.colorbar(heat, ax=grid, fraction=0.015, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("gate", fontsize=9)


def _draw_history(figure: Any, history: dict[str, list[float]], asked: float) -> None:
    left, right = figure.subplots(1, 2)
    train, test = history["accuracy"], history["val_accuracy"]
    epochs = np.arange(1, len(train) + 1)
    line: dict[str, Any] = {"marker": "o", "markersize": 3}
    left.plot(epochs, history["loss"], color="tab:red", **line)
    left.set_yscale("log")
    left.set_title("Digits: training loss", fontsize=10)
    right.plot(epochs, train, label="training images", **line)
    right.plot(epochs, test, label="test images", **line)
    right.axhline(asked, color="grey", linestyle="--", linewidth=1, label=f"{asked:.0%}")
    right.set_ylim(max(0.0, min(train + test) - 0.03), 1.005)
    right.set_title(f"Digits: accuracy ({test[-1]:.2%} on the test images)", fontsize=10)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.set_xlabel("epoch", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
