"""Saves files with the installed cbam_ops, for later versions to load (test_saved_files.py).

    python tests/saved/make.py

writes the archive `tests/saved/<version>.tar.xz`. Run it before a release and commit the archive.
What is in it, each with the inputs and the outputs that went with it:

- `layers.keras`: one model with the layers in many configurations, with the state of its optimizer;
- `network.keras`: CBAMResNet18 with weights of few different values, so that it is small packed;
- `functions`: a SavedModel of the native functions and their gradients;
- `weights.npz`: paths and shapes of the weights of every network, in order.
"""

from __future__ import annotations

import math
import os
import tarfile
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import cbam_ops
from cbam_ops import models, ops

CHANNELS = 8


def draw(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight without zeros and ones; of few different values, which pack well."""
    fan_in = math.prod(shape[:-1]) if len(shape) > 1 else 4
    values = random.standard_normal(61) / math.sqrt(fan_in)
    return np.resize(np.abs(values) + 0.5 if "variance" in name else values, shape)


def set_weights(model: keras.Model) -> None:
    random = np.random.RandomState(1)  # its numbers are frozen, unlike those of a Generator
    for weight in model.weights:
        weight.assign(draw(random, weight.name, tuple(weight.shape)))


def maps(*shape: int) -> np.ndarray:
    return np.random.RandomState(len(shape)).standard_normal(shape).astype("float32")


def layers_model() -> keras.Model:
    """Every layer and every option that changes weights, call or configuration."""
    x = keras.Input((None, None, CHANNELS), name="x")
    residual = keras.Input((None, None, CHANNELS), name="residual")
    cbam, channel, spatial = cbam_ops.CBAM, cbam_ops.ChannelAttention, cbam_ops.SpatialAttention

    def first(layer: keras.layers.Layer) -> keras.KerasTensor:
        return keras.layers.Permute((2, 3, 1))(layer(keras.layers.Permute((3, 1, 2))(x)))

    shared = cbam(4, name="shared")
    inner_input = keras.Input((None, None, CHANNELS))
    inner = keras.Model(inner_input, cbam(4, 3, True, name="inner")(inner_input), name="nested")
    sequential = keras.Sequential([channel(2), spatial(3)], name="sequential")
    normed = cbam(
        ratio=2,
        kernel_size=5,
        spatial_batch_norm=True,
        order="spatial_first",
        activation="relu",
        batch_norm_momentum=0.75,
        batch_norm_epsilon=0.125,
        batch_norm_gamma_initializer="zeros",
        batch_norm_beta_regularizer="l2",
        batch_norm_gamma_constraint="non_neg",
        name="normed",
    )
    bare = cbam(
        hidden=3,
        order="parallel",
        mlp_activation="relu",
        use_bias=False,
        spatial_use_bias=False,
        mlp_kernel_initializer=keras.initializers.HeNormal(seed=5),
        mlp_kernel_regularizer=keras.regularizers.L2(0.25),
        spatial_kernel_constraint=keras.constraints.MaxNorm(3),
        name="bare",
    )
    outputs = {
        "plain": cbam(ratio=4, name="plain")(x),
        "normed": normed(x, residual=residual),
        "bare": bare(x),
        "gates": cbam(4, name="gates")(x, return_gates=True),
        "first": first(cbam(4, spatial_batch_norm=True, data_format="channels_first", name="f")),
        "half": cbam(4, dtype="mixed_float16", name="half")(x, residual=residual),
        "half_normed": cbam(4, 3, True, dtype="mixed_bfloat16", name="half_normed")(x),
        "average": channel(4, pooling="avg", activation="relu", name="average")(x),
        "maximum": channel(hidden=2, pooling="max", use_bias=False, name="maximum")(
            x, residual=residual
        ),
        "spatial": spatial(spatial_use_bias=False, name="spatial")(x, residual=residual),
        "spatial_normed": spatial(3, True, batch_norm_momentum=0.5, name="spatial_normed")(x),
        "shared": [shared(x), shared(residual)],
        "nested": inner(x),
        "sequential": sequential(x),
    }
    model = keras.Model({"x": x, "residual": residual}, outputs, name="layers")
    set_weights(model)
    return model


def save_layers(folder: Path) -> None:
    model = layers_model()
    inputs = {"x": maps(2, 5, 6, CHANNELS), "residual": maps(2, 5, 6, CHANNELS)[::-1]}
    # A step, so that moving statistics and the optimizer's state are saved too.
    with tf.GradientTape() as tape:
        outputs = model(inputs, training=True)
        loss = sum(tf.reduce_sum(tf.cast(y, "float32") ** 2) for y in tf.nest.flatten(outputs))
    gradients = tape.gradient(loss, model.trainable_variables)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.5), "mse")
    model.optimizer.apply(gradients, model.trainable_variables)
    model.save(folder / "layers.keras")
    model = keras.models.load_model(folder / "layers.keras")  # Keras changes some paths here

    outputs = model(inputs)
    arrays = {f"input/{name}": value for name, value in inputs.items()}
    for name in model.output:
        for index, y in enumerate(tf.nest.flatten(outputs[name])):
            arrays[f"output/{name}/{index}"] = tf.cast(y, "float32").numpy()
    arrays |= {f"weight/{w.path}": w.numpy() for w in model.weights}
    arrays |= {f"optimizer/{v.path}": v.numpy() for v in model.optimizer.variables}
    np.savez(folder / "layers.npz", **arrays)


def save_network(folder: Path) -> None:
    model = models.CBAMResNet18(input_shape=(32, 32, 3), classes=5)
    set_weights(model)
    model.save(folder / "network.keras")
    x = np.resize(maps(61), (2, 32, 32, 3))
    np.savez(folder / "network.npz", x=x, y=model(x).numpy())


def save_weight_paths(folder: Path) -> None:
    networks = {}
    for name in models.__all__:
        if "CBAM" in name:
            model = getattr(models, name)(input_shape=(32, 32, 3), classes=5)
            networks[name] = [f"{weight.path} {tuple(weight.shape)}" for weight in model.weights]
    np.savez(folder / "weights.npz", **networks)


MLP, NORM = ("w0", "b0", "w1", "b1"), ("kernel", "gamma", "beta")
RELU = {"activation": "relu"}
ALL = {**RELU, "mlp_activation": "relu", "data_format": "NCHW", "return_gates": True}
# Name of the case: the function, its arguments, its options, the type of the maps.
FUNCTIONS = {
    "cbam": ("cbam", ("x", *MLP, "kernel"), {}, "float32"),
    "cbam_all": (
        "cbam", ("x", *MLP, "kernel", "bias", "residual"), {**ALL, "order": "parallel"}, "float32",
    ),
    "cbam_half": ("cbam", ("x", *MLP, "kernel", "bias"), {"order": "spatial_first"}, "float16"),
    "cbam_norm": ("cbam_with_batch_norm", ("x", *MLP, *NORM), {}, "float32"),
    "cbam_norm_all": (
        "cbam_with_batch_norm", ("x", *MLP, *NORM, "residual"), {**ALL, "epsilon": 0.5}, "float64",
    ),
    "channel": ("channel_attention", ("x", *MLP), {}, "float32"),
    "channel_all": (
        "channel_attention", ("x", *MLP, "residual"), {**ALL, "pooling": "max"}, "bfloat16",
    ),
    "spatial": ("spatial_attention", ("x", "kernel"), {}, "float32"),
    "spatial_all": ("spatial_attention", ("x", "kernel", "bias", "residual"), RELU, "float32"),
    "spatial_norm": ("spatial_attention_with_batch_norm", ("x", *NORM), {}, "float32"),
    "channel_pool": ("channel_pool", ("x",), {}, "float32"),
    "spatial_pool": ("spatial_pool", ("x",), {"data_format": "NCHW"}, "float64"),
}  # fmt: skip
WEIGHT_SHAPES = {
    "w0": (CHANNELS, 2), "b0": (2,), "w1": (2, CHANNELS), "b1": (CHANNELS,),
    "kernel": (3, 3, 2, 1), "bias": (1,), "gamma": (1,), "beta": (1,),
}  # fmt: skip


def save_functions(folder: Path) -> None:
    """For each case its results, and the gradients of half the sum of their squares."""
    module, arrays = tf.Module(), {}
    module.cases = {}
    for case, (function, names, options, dtype) in FUNCTIONS.items():
        first = options.get("data_format") == "NCHW"
        unknown = (None, CHANNELS, None, None) if first else (None, None, None, CHANNELS)
        weight_type = "float64" if dtype == "float64" else "float32"
        signature = [
            tf.TensorSpec(WEIGHT_SHAPES[n], weight_type, n)
            if n in WEIGHT_SHAPES
            else tf.TensorSpec(unknown, dtype, n)
            for n in names
        ]
        random = np.random.RandomState(3)
        values = [
            tf.cast(random.standard_normal([3 if s is None else s for s in spec.shape]), spec.dtype)
            for spec in signature
        ]

        def call(*tensors, function=function, names=names, options=options):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                results = getattr(ops, function)(
                    **dict(zip(names, tensors, strict=True)), **options
                )
                results = tf.nest.flatten(results)
                loss = sum(tf.reduce_sum(tf.cast(y, tf.float32) ** 2) / 2 for y in results)
            return results, tape.gradient(loss, tensors)

        module.cases[case] = tf.function(call, input_signature=signature)
        results, gradients = module.cases[case](*values)
        groups = {"input": values, "result": results, "gradient": gradients}
        for group, tensors in groups.items():
            for index, tensor in enumerate(tensors):
                wide = tf.cast(tensor, weight_type)
                arrays[f"{case}/{group}/{index}"] = wide.numpy()
    tf.saved_model.save(module, folder / "functions")
    np.savez(folder / "functions.npz", **arrays)


if __name__ == "__main__":
    archive = Path(__file__).parent / f"{cbam_ops.__version__}.tar.xz"
    with tempfile.TemporaryDirectory() as folder, cbam_ops.use_implementation("native"):
        for save in (save_layers, save_network, save_weight_paths, save_functions):
            save(Path(folder))
        with tarfile.open(archive, "x:xz", preset=9) as tar:
            tar.add(folder, arcname=".")
