"""`cbam-ops demo`: a CBAM network trained on real images, compared, saved, reloaded and drawn."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbam_ops._console import (
    import_tensorflow,
    prepare_folder,
    print_table,
    require,
    say,
    why_reference,
    written,
)

if TYPE_CHECKING:
    from cbam_ops._cli.compare import Comparison

ACCURACY = 0.97
MODEL_FILE = "digits.keras"
PHOTOGRAPHS_FILE = "photographs.keras"
PICTURE_FILE = "demo.png"
_BATCH = 64
# Two correct float32 evaluations of a whole network; a wrong gradient is off by far more.
_FUSED_TOLERANCE = 1e-2
_RELOAD_TOLERANCE = 1e-6


def _verbose() -> int:
    """For Keras: its progress bar on a terminal, a line per epoch elsewhere."""
    return 1 if sys.stdout.isatty() else 2


def _train_digits(model: Any, data: Any, epochs: int) -> dict[str, list[float]]:
    """Trains; the loss and both accuracies of every epoch, by Keras's names."""
    import keras

    steps = -(-len(data.train_images) // _BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, epochs * steps)
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    history: dict[str, list[float]] = model.fit(
        data.train_images,
        data.train_labels,
        batch_size=_BATCH,
        epochs=epochs,
        validation_data=(data.test_images, data.test_labels),
        validation_batch_size=len(data.test_images),
        verbose=_verbose(),
    ).history
    return history


def _train_photographs(model: Any, patches: Iterator[Any], steps: int) -> float:
    """Trains on patches; the share of the last epoch's (a fifth's) that are told right."""
    import keras

    def accuracy(targets: Any, logits: Any) -> Any:
        return keras.ops.all((logits > 0) == (targets > 0.5), axis=1)

    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(5e-3, steps)),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[accuracy],
        jit_compile=False,
    )
    fit = model.fit(patches, epochs=5, steps_per_epoch=steps // 5, verbose=_verbose())
    model.compile(model.optimizer, model.loss)  # its file loads where there is no such metric
    return float(fit.history["accuracy"][-1])


def _predict(model: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(model(images, training=False))


def _save_and_reload(model: Any, path: Path, images: np.ndarray) -> float:
    """Saves, loads the file into a new model; the largest difference of their predictions."""
    import keras

    with written(path) as part:
        model.save(part)
    again = keras.models.load_model(path)
    return float(np.max(np.abs(_predict(again, images) - _predict(model, images))))


def _comparisons(
    quick: bool, digits_model: Any, data: Any, photo_model: Any, patches: Iterator[Any]
) -> Iterator[Comparison]:
    import keras

    from cbam_ops._cli import compare

    yield compare.compare_model(
        f"digits network, batch {_BATCH}",
        digits_model,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        data.train_images[:_BATCH],
        data.train_labels[:_BATCH],
        repeats=10 if quick else 40,
    )
    images, targets = next(patches)
    yield compare.compare_model(
        f"photograph network, batch {len(images)}",
        photo_model,
        keras.losses.BinaryCrossentropy(from_logits=True),
        images,
        targets,
        repeats=5 if quick else 20,
    )
    shape = (4, 28, 28, 256) if quick else (8, 28, 28, 512)
    yield compare.compare_module(
        f"one CBAM, {'x'.join(map(str, shape))}", shape, repeats=5 if quick else 15
    )


def _print_comparisons(found: list[Comparison]) -> None:
    rows = []
    for item in found:
        (fused, reference), (ours, stock) = item.seconds, item.kept_bytes
        milliseconds = (f"{1e3 * fused:.1f} ms", f"{1e3 * reference:.1f} ms")
        sizes = (f"{ours / 2**20:.2f} MiB", f"{stock / 2**20:.2f} MiB")
        rows += [
            [item.name],
            ["  time per training step", *milliseconds, f"{fused / reference:.2f}"],
            ["  memory kept for the gradient", *sizes, f"{ours / stock:.2f}"],
            ["  largest error of the output", f"{item.output_error:.1e}"],
            ["  largest error of a gradient", f"{item.gradient_error:.1e}"],
        ]
    print_table([["", "fused", "reference", "ratio"], *rows], "<>>>")


def verdict(accuracy: float | None, fused_error: float, reload_error: float) -> list[str]:
    """What went wrong, in words; empty if nothing did. An accuracy of None is not asked for."""
    failures = []
    if accuracy is not None and not accuracy >= ACCURACY:
        failures.append(f"the test accuracy is {accuracy:.2%}, below {ACCURACY:.0%}")
    if not fused_error <= _FUSED_TOLERANCE:
        failures.append(f"fused and reference differ by {fused_error:.1e}")
    if not reload_error <= _RELOAD_TOLERANCE:
        failures.append(f"the reloaded model predicts otherwise, by {reload_error:.1e}")
    return failures


def run(output: Path, quick: bool, epochs: int | None, seed: int, allow_reference: bool) -> int:
    """Runs the demo; see `cbam-ops demo --help`.

    Returns:
      0; or 1 if the accuracy is missed (not with `quick`), or if fused and reference, or the model
      and its reloaded self, differ.

    Raises:
      CommandError: a package is missing, the fused ops do not run, or a file cannot be written.
    """
    started = time.perf_counter()
    prepare_folder(output)
    require(["sklearn", "matplotlib", "PIL"], "the demo")
    import_tensorflow()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import cbam_ops

    reason = why_reference(allow_reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if reason:
            say(f"The fused ops do not run here: {reason}")
            say('Everything below runs the reference, also where it says "fused".')
        else:
            active = cbam_ops.build_info()["instruction_set"]["active"]
            say(f"Fused ops: native kernels, instruction set {active}.")
        with cbam_ops.use_implementation("reference" if reason else "native"):
            failures = _run(output, quick, epochs or (3 if quick else 10), seed)
    say()
    for failure in failures:
        say(f"FAILED: {failure}")
    say(f"Done in {time.perf_counter() - started:.0f} s.")
    return 1 if failures else 0


def _run(output: Path, quick: bool, epochs: int, seed: int) -> list[str]:
    """The four parts; what went wrong, in words."""
    import keras

    from cbam_ops._cli import networks, picture

    say()
    say("1. Train on handwritten digits")
    keras.utils.set_random_seed(seed)
    data = networks.load_digits()
    model, gates = networks.digits_network()
    say(
        f"  {len(data.train_images)} images of 8 x 8 pixels to train on, {len(data.test_images)} "
        f"held out for the test (stratified, fixed seed); {model.count_params():,} parameters, "
        "2 residual blocks with CBAM"
    )
    history = _train_digits(model, data, epochs)
    predicted = np.argmax(_predict(model, data.test_images), axis=1)
    accuracy = float(np.mean(predicted == data.test_labels))
    say(f"  test accuracy: {accuracy:.2%}")
    if quick:
        say("  (a quick run: too short for an accuracy to be asked for)")

    say()
    say("2. Train on patches of two photographs, to see what the spatial gates look at")
    photographs = networks.load_photographs()
    keras.utils.set_random_seed(seed)  # the same start whatever happened before
    photo_model, photo_gates = networks.photograph_network()
    share = _train_photographs(
        photo_model, networks.draw_patches(photographs, seed), steps=30 if quick else 180
    )
    say(
        f"  does a patch show the {' or the '.join(networks.OBJECTS)}? right for {share:.1%} of "
        "the patches of the last epoch"
    )

    say()
    say("3. Fused against reference, on these weights")
    patches = networks.draw_patches(photographs, seed + 1)
    found = list(_comparisons(quick, model, data, photo_model, patches))
    _print_comparisons(found)
    say("  Time: median of steps that take turns (network: forward, backward, Adam; one CBAM:")
    say("  forward, backward). Memory: bytes of the tensors that the forward pass makes and the")
    say("  gradient reads, counted in the traced graph. Errors: largest difference between fused")
    say("  and reference, both float32, relative to the largest value of that tensor.")
    worst = max(max(item.output_error, item.gradient_error) for item in found)

    say()
    say("4. Save, reload, draw")
    model_path, picture_path = output / MODEL_FILE, output / PICTURE_FILE
    difference = _save_and_reload(model, model_path, data.test_images)
    say(f"  model:   {model_path}")
    say(f"  reloaded: largest difference of its predictions {difference:.1e}")
    with written(output / PHOTOGRAPHS_FILE) as part:
        photo_model.save(part)
    say(f"  the other network: {output / PHOTOGRAPHS_FILE}, for cbam-ops explain --pixels unit")
    with written(picture_path) as part:
        picture.draw(part, model, gates, data, history, ACCURACY, photo_gates, photographs)
    say(f"  picture: {picture_path}")
    return verdict(None if quick else accuracy, worst, difference)
