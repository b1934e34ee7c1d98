"""Whole residual networks: plain, with the module in stock Keras layers, with the fused one.

The latter two also compiled by XLA, whole, as Keras compiles a model with `jit_compile=True`.

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

ATTENTION = {
    "plain": None,
    "stock": "stock",
    OURS: "cbam",
    "plain-xla": None,
    "stock-xla": "stock",
    OURS_XLA: "cbam",
}
_COMPILED = ("plain-xla", "stock-xla", OURS_XLA)
# Two correct float32 evaluations of fifty layers, relative to the largest logit.
_AGREE = 1e-2
# A network is timed for longer than a module: the module's share is a small difference.
_TIMES_A_ROW = 10


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


def _give_weights(source: Any, target: Any) -> None:
    """Copies the weights by the order of layers; both networks have weights of the same shapes."""
    values: dict[str, np.ndarray] = {}
    for weight in source.weights:
        values[weight.path] = weight.numpy()
    rest = [w for w in target.weights if w.path not in values]
    for weight in target.weights:
        if weight.path in values:
            weight.assign(values.pop(weight.path))
    # What is left are the modules' weights, whose layers have other names.
    left = list(values.values())
    for weight in rest:
        index = next(i for i, value in enumerate(left) if value.shape == tuple(weight.shape))
        weight.assign(left.pop(index))
    if left:
        raise ValueError(f"{len(left)} weights of {source.name} have no place in {target.name}")


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

    built: dict[str | None, Any] = {}
    with cbam_ops.use_implementation("native"):
        for attention in dict.fromkeys(ATTENTION[name] for name in case.providers):
            keras.utils.set_random_seed(50)
            built[attention] = models.build_resnet(
                case.depth,
                attention=attention,
                input_shape=shape[1:],
                classifier_activation=None,
            )
        networks = {name: built[ATTENTION[name]] for name in case.providers}
        if OURS in networks and "stock" in networks:
            fused = networks[OURS]
            for weight in fused.trainable_weights:  # gammas of 0 would hide the modules
                if "gamma" in weight.path and weight.shape == (1,):
                    weight.assign([1.0])
            _give_weights(fused, networks["stock"])
            a, b = (
                np.asarray(networks[name](images[0][:2], training=False))
                for name in (OURS, "stock")
            )
            difference = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
            if not difference <= _AGREE:
                outcome.wrong[OURS] = (
                    f"the logits differ from the stock network's by {difference:.2g}"
                )
                return outcome
        else:
            difference = float("nan")
        functions = {
            name: _function(network, case.mode, images, labels, name in _COMPILED)
            for name, network in networks.items()
        }
        for function in functions.values():
            function(0)  # traces with the fused ops
    extra = {
        name: peak_bytes(lambda f=f: f(1)) if shows_memory("tensorflow") else None  # type: ignore[misc]
        for name, f in functions.items()
    }
    if case.mode == "training" and "stock" in functions:
        losses = {name: float(f(0)) for name, f in functions.items() if ATTENTION[name]}
        stock_loss = losses["stock"]
        for name, loss in losses.items():
            if not abs(loss - stock_loss) <= _AGREE * abs(stock_loss):
                outcome.wrong[name] = f"the loss is {loss}, the stock network's {stock_loss}"
        if outcome.wrong:
            return outcome
    times = interleave(functions, _TIMES_A_ROW * seconds, pairs=True)
    ours = spread(times[OURS])["median_s"] if OURS in times else None
    for name, values in times.items():
        figures = spread(values)
        share = None
        plain = "plain-xla" if name in _COMPILED else "plain"
        if ATTENTION[name] and plain in times:
            pairs = zip(values, times[plain], strict=True)
            share = 100 * float(np.median([(v - p) / v for v, p in pairs]))
        outcome.rows.append(
            {
                "mode": case.mode,
                "provider": name,
                **figures,
                "inputs": len(images),
                "ours_is_faster": ours and figures["median_s"] / ours,
                "error": None if not ATTENTION[name] or np.isnan(difference) else difference,
                "extra_bytes": extra[name],
                "module_percent_of_time": share,
            }
        )
    return outcome
