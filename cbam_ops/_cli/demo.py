"""`cbam-ops demo`: a CBAM network trained on real images, compared, saved, reloaded and drawn."""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cbam_ops._console import CommandError, import_tensorflow, require, say, table

ACCURACY = 0.97
MODEL_FILE = "digits.keras"
PICTURE_FILE = "demo.png"
_BATCH = 64
# Two correct float32 evaluations of a whole network; a wrong gradient is off by far more.
_FUSED_TOLERANCE = 1e-2
_RELOAD_TOLERANCE = 1e-6


@dataclasses.dataclass
class Curve:
    """Per epoch: training loss, training and test accuracy."""

    loss: list[float] = dataclasses.field(default_factory=list)
    train: list[float] = dataclasses.field(default_factory=list)
    test: list[float] = dataclasses.field(default_factory=list)


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(
            f"cannot write to the folder {folder} ({error.strerror or error}); choose another with "
            "--output DIR"
        ) from error


class _Progress:
    """A progress bar on a terminal; elsewhere one line now and then."""

    def __init__(self, what: str, total: int) -> None:
        from tqdm import tqdm

        self.live = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=what,
            disable=not self.live,
            leave=False,
            bar_format="  {desc}: {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} steps, "
            "{remaining} left{postfix}",
        )

    def step(self, note: str = "") -> None:
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()

    def line(self, text: str) -> None:
        """Says a line; above the bar where there is one."""
        if self.live:
            self._bar.write(text, file=sys.stdout)
        else:
            say(text)

    def close(self) -> None:
        self._bar.close()


def _train_digits(model: Any, data: Any, epochs: int, seed: int) -> Curve:
    import keras

    steps = -(-len(data.train_images) // _BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, epochs * steps)
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    curve = Curve()
    progress = _Progress("training", epochs * steps)

    class Report(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
            progress.step(f", loss {(logs or {}).get('loss', float('nan')):.3f}")

        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            logs = logs or {}
            curve.loss.append(float(logs["loss"]))
            curve.train.append(float(logs["accuracy"]))
            curve.test.append(float(logs["val_accuracy"]))
            progress.line(
                f"  epoch {epoch + 1:2d}/{epochs}: loss {curve.loss[-1]:.3f}, accuracy "
                f"{curve.train[-1]:6.2%} in training, {curve.test[-1]:6.2%} on the test images"
            )

    try:
        model.fit(
            data.train_images,
            data.train_labels,
            batch_size=_BATCH,
            epochs=epochs,
            validation_data=(data.test_images, data.test_labels),
            validation_batch_size=len(data.test_images),
            verbose=0,
            callbacks=[Report()],
        )
    finally:
        progress.close()
    return curve


def _train_photographs(model: Any, patches: Any, steps: int) -> float:
    """Trains on patches; the share of the last fifth's patches that are told right."""
    import keras
    import tensorflow as tf

    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(5e-3, steps))
    optimizer.build(model.trainable_variables)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)

    @tf.function(autograph=False)
    def step(images: Any, targets: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            value = loss(targets, logits)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        right = tf.reduce_all((logits > 0) == (targets > 0.5), axis=1)
        return value, tf.reduce_mean(tf.cast(right, tf.float32))

    shares: list[float] = []
    progress = _Progress("training", steps)
    try:
        for _ in range(steps):
            images, targets = patches.batch(32)
            value, right = step(tf.constant(images), tf.constant(targets))
            shares.append(float(right))
            progress.step(f", loss {float(value):.3f}")
    finally:
        progress.close()
    return float(np.mean(shares[-max(1, steps // 5) :]))


def _predict(model: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(model(images, training=False))


def _save_and_reload(model: Any, path: Path, images: np.ndarray) -> float:
    """Saves, loads the file into a new model; the largest difference of their predictions."""
    import keras

    model.save(path)
    again = keras.models.load_model(path)
    return float(np.max(np.abs(_predict(again, images) - _predict(model, images))))


def _comparisons(
    quick: bool, digits_model: Any, data: Any, photo_model: Any, patches: Any
) -> Iterator[Any]:
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
    if not quick:
        images, targets = patches.batch(32)
        yield compare.compare_model(
            "photograph network, batch 32",
            photo_model,
            keras.losses.BinaryCrossentropy(from_logits=True),
            images,
            targets,
            repeats=20,
        )
    shape = (4, 28, 28, 256) if quick else (8, 28, 28, 512)
    yield compare.compare_module(
        f"one CBAM, {'x'.join(map(str, shape))}", shape, repeats=5 if quick else 15
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _print_comparisons(found: list[Any]) -> None:
    rows = [["", "fused", "reference", "ratio"]]
    for item in found:
        rows.append([item.name, "", "", ""])
        rows.append(
            [
                "  time per training step",
                _milliseconds(item.fused_seconds),
                _milliseconds(item.reference_seconds),
                f"{item.fused_seconds / item.reference_seconds:.2f}",
            ]
        )
        rows.append(
            [
                "  memory kept for the gradient",
                _size(item.fused_bytes),
                _size(item.reference_bytes),
                f"{item.fused_bytes / item.reference_bytes:.2f}",
            ]
        )
        rows.append(["  largest error of the output", f"{item.output_error:.1e}", "", ""])
        rows.append(["  largest error of a gradient", f"{item.gradient_error:.1e}", "", ""])
    say(table(rows, "<>>>"))


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


def run(output: Path, quick: bool, epochs: int | None, seed: int) -> int:
    """Runs the demo; see `cbam-ops demo --help`.

    Returns:
      0; or 1 if the accuracy is missed (not with `quick`), or if fused and reference, or the model
      and its reloaded self, differ.

    Raises:
      CommandError: the folder cannot be written to, a package is missing.
    """
    started = time.perf_counter()
    _prepare_folder(output)
    require(["sklearn", "matplotlib", "tqdm", "PIL"], "the demo")
    import_tensorflow()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Why native is off is said in plain words below.
        warnings.simplefilter("ignore")
        try:
            return _run(output, quick, epochs or (3 if quick else 10), seed, started)
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            raise CommandError(f"cannot write the results: {error}") from error


def _run(output: Path, quick: bool, epochs: int, seed: int, started: float) -> int:
    import keras

    import cbam_ops
    from cbam_ops._cli import networks, picture

    keras.utils.set_random_seed(seed)
    info = cbam_ops.build_info()
    reason = info["native_off_because"]
    if info["native"] and info["implementation"] == "reference":
        reason = "the reference was asked for (CBAM_OPS_IMPLEMENTATION)."
    if reason:
        say(f"The fused ops do not run here: {reason}")
        say('Everything below runs the reference, also where it says "fused".')
    else:
        active = (info.get("instruction_set") or {}).get("active")
        say(f"Fused ops: native kernels, instruction set {active}.")

    say()
    say("1. Train on handwritten digits")
    data = networks.load_digits()
    model, gates = networks.digits_network()
    say(
        f"  {len(data.train_images)} images of 8 x 8 pixels to train on, {len(data.test_images)} "
        f"held out for the test (stratified, fixed seed); {model.count_params():,} parameters, "
        "2 residual blocks with CBAM"
    )
    train_started = time.perf_counter()
    curve = _train_digits(model, data, epochs, seed)
    predicted = np.argmax(_predict(model, data.test_images), axis=1)
    accuracy = float(np.mean(predicted == data.test_labels))
    say(f"  test accuracy: {accuracy:.2%} ({time.perf_counter() - train_started:.0f} s)")
    if quick:
        say("  (a quick run: too short for an accuracy to be asked for)")

    say()
    say("2. Train on patches of two photographs, to see what the spatial gates look at")
    photographs = networks.load_photographs()
    keras.utils.set_random_seed(seed)  # the same start whatever happened before
    photo_model, photo_gates = networks.photograph_network()
    patches = networks.Patches(photographs, seed)
    train_started = time.perf_counter()
    share = _train_photographs(photo_model, patches, steps=30 if quick else 180)
    say(
        f"  does a patch show the {' or the '.join(networks.OBJECTS)}? right for {share:.1%} of "
        f"the patches at the end of training ({time.perf_counter() - train_started:.0f} s)"
    )

    say()
    say("3. Fused against reference, on these weights")
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
    picture.draw(picture_path, model, gates, data, curve, accuracy, photo_gates, photographs)
    say(f"  picture: {picture_path}")

    say()
    seconds = time.perf_counter() - started
    failures = verdict(None if quick else accuracy, worst, difference)
    for failure in failures:
        say(f"FAILED: {failure}")
    say(f"Done in {seconds:.0f} s.")
    return 1 if failures else 0
