"""Whole networks: plain, with the module in stock Keras layers, and that one fused.

The fused network is what one call of `cbam_ops.fuse` makes of the stock one, with the same weights.
All are also compiled by XLA, whole, as Keras compiles a model with `jit_compile=True`.

The share of the time that the module takes is what the network with it takes more than the plain
one, in runs that take turns: the addition and the ReLU that end a block are in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from cases import OURS_XLA, NetworkCase
from measure import peak_bytes, shows_memory

from cbam_ops._bench import OURS, Outcome, interleave, spread

_NETWORK = {
    "plain": "plain",
    "stock": "stock",
    OURS: "fused",
    "plain-xla": "plain",
    "stock-xla": "stock",
    OURS_XLA: "fused",
}
_COMPILED = ("plain-xla", "stock-xla", OURS_XLA)
# What `build_resnet` makes of a network's name.
ARCHITECTURES: dict[str, tuple[int, str]] = {
    "resnet18": (18, "released"),
    "resnet50": (50, "released"),
    "mobilenet": (28, "mobilenet"),
}
# Two correct float32 evaluations of fifty layers, relative to the largest logit.
_AGREE = 1e-2
# A network is timed for longer than a module: the module's share is a small difference.
_TIMES_A_ROW = 10


def _attends(name: str) -> bool:
    """Whether a provider's network has the modules."""
    return _NETWORK[name] != "plain"


def _function(model: Any, mode: str, images: Any, labels: Any, jit: bool) -> Callable[[int], Any]:
    """A graph of one inference, or of one training step with SGD."""
    import keras
    import tensorflow as tf

    if mode == "inference":

        @tf.function(autograph=False, jit_compile=jit or None)
        def infer(x: Any) -> Any:
            return model(x, training=False)

        return lambda i: infer(images[i % len(images)])

    # So small a step leaves the weights what they are.
    optimizer = keras.optimizers.SGD(1e-12)
    optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(autograph=False, jit_compile=jit or None)
    def train(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        variables = [variable.value for variable in model.trainable_variables]
        optimizer.apply(tape.gradient(value, variables), model.trainable_variables)
        return value

    return lambda i: train(images[i % len(images)], labels)


def measure_network(case: NetworkCase, seconds: float) -> Outcome:
    """Checks that stock and fused agree, then times all three."""
    import keras
    import tensorflow as tf

    import cbam_ops
    from cbam_ops import models

    outcome = Outcome()
    random = np.random.default_rng(50)
    shape = (case.n, case.size, case.size, 3)
    images = [tf.constant(random.standard_normal(shape, dtype=np.float32)) for _ in range(2)]
    labels = tf.constant(random.integers(0, 1000, case.n))

    built: dict[str, Any] = {}
    depth, family = ARCHITECTURES[case.network]
    with cbam_ops.use_implementation("native"):
        for name, attention in (("plain", None), ("stock", "stock")):
            keras.utils.set_random_seed(50)
            built[name] = models.build_resnet(
                depth,
                network=family,
                attention=attention,
                input_shape=shape[1:],
                classifier_activation=None,
            )
        for weight in built["stock"].trainable_weights:
            if "gamma" in weight.path and weight.shape == (1,):
                weight.assign([1.0])  # of 0 they would hide the modules
        built["fused"], report = cbam_ops.fuse(built["stock"], return_report=True)
        left = [f"{row.layer}: {row.reason}" for row in report if row.reason]
        if left or not report:
            outcome.wrong[OURS] = f"not fused: {', '.join(left) or 'no module was found'}"
            return outcome
        networks = {name: built[_NETWORK[name]] for name in case.providers}
        a, b = (
            np.asarray(built[name](images[0][:2], training=False)) for name in ("fused", "stock")
        )
        difference = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        if not difference <= _AGREE:
            outcome.wrong[OURS] = f"the logits differ from the stock network's by {difference:.2g}"
            return outcome
        functions = {
            name: _function(network, case.mode, images, labels, name in _COMPILED)
            for name, network in networks.items()
        }
        for function in functions.values():
            function(0)  # traces with the fused ops
    if case.mode == "training" and "stock" in functions:
        losses = {name: float(f(0)) for name, f in functions.items() if _attends(name)}
        stock_loss = losses["stock"]
        for name, loss in losses.items():
            if not abs(loss - stock_loss) <= _AGREE * abs(stock_loss):
                outcome.wrong[name] = f"the loss is {loss}, the stock network's {stock_loss}"
        if outcome.wrong:
            return outcome
    times = interleave(functions, _TIMES_A_ROW * seconds, pairs=True)
    extra = {
        name: peak_bytes(lambda f=f: f(1)) if shows_memory("tensorflow") else None  # type: ignore[misc]
        for name, f in functions.items()
    }
    ours = spread(times[OURS])["median_s"] if OURS in times else None
    for name, values in times.items():
        figures = spread(values)
        share = None
        plain = "plain-xla" if name in _COMPILED else "plain"
        if _attends(name) and plain in times:
            pairs = zip(values, times[plain], strict=True)
            share = 100 * float(np.median([(v - p) / v for v, p in pairs]))
        outcome.rows.append(
            {
                "mode": case.mode,
                "provider": name,
                **figures,
                "inputs": len(images),
                "ours_is_faster": ours and figures["median_s"] / ours,
                "error": difference if _attends(name) else None,
                "extra_bytes": extra[name],
                "module_percent_of_time": share,
            }
        )
    return outcome
