"""Fused against reference on the same weights: largest difference, time per step, memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Loss = Callable[[Any, Any], Any]

# Operations of the gradient that look at the shape of a tensor, not at its values.
_SHAPE_ONLY = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "BroadcastGradientArgs"}
# Operations whose output is the memory of their input.
_ALIASES = {"Identity", "Reshape", "ExpandDims", "Squeeze", "StopGradient", "PreventGradient"}
# Outputs that exist with or without a gradient: weights, constants and the batch itself.
_NOT_ACTIVATIONS = {"Const", "ReadVariableOp", "VarHandleOp", "Placeholder"}


class Traced:
    """A `tf.function` of a forward pass and its gradient, and what the first keeps for the second.

    Args:
      forward: from the input tensors to the outputs, the first of which is differentiated.
      sources: what to differentiate by, beside the inputs where `watch` is set.
      watch: whether to differentiate by the inputs too.
      apply: what to do with the gradients, for instance an optimizer's step.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        sources: Sequence[Any] = (),
        watch: bool = False,
        apply: Callable[[Any], Any] | None = None,
    ) -> None:
        import tensorflow as tf

        self._borders = (0, 0)  # operations before the gradient's first and after its last

        def count() -> int:
            return len(tf.compat.v1.get_default_graph().get_operations())

        def step(*inputs: Any) -> Any:
            with tf.GradientTape() as tape:
                if watch:
                    tape.watch(inputs)
                value = forward(*inputs)
            begin = count()
            gradients = tape.gradient(value, [*sources, *(inputs if watch else ())])
            self._borders = (begin, count())
            if apply is not None:
                apply(gradients)
            return value, gradients

        self._function = tf.function(step, autograph=False)

    def __call__(self, *inputs: Any) -> Any:
        """The differentiated value and the gradients."""
        return self._function(*inputs)

    def kept_bytes(self, *inputs: Any) -> int:
        """Bytes of the tensors that the forward pass must keep for the gradient.

        Counts, in the traced graph, every tensor which the forward part makes and the gradient part
        reads: each once, however often it is read; not the weights, the constants and the inputs.
        """
        import tensorflow as tf

        operations = self._function.get_concrete_function(*inputs).graph.get_operations()
        begin, end = self._borders
        forward = {operation.name for operation in operations[:begin]}
        kept: dict[str, int] = {}
        for operation in operations[begin:end]:
            if operation.type in _SHAPE_ONLY:
                continue
            for tensor in operation.inputs:
                if tensor.op.name not in forward:
                    continue
                while tensor.op.type in _ALIASES:
                    tensor = tensor.op.inputs[0]
                if tensor.op.type in _NOT_ACTIVATIONS or tensor.dtype in (tf.resource, tf.variant):
                    continue
                kept[tensor.name] = (tensor.shape.num_elements() or 0) * tensor.dtype.size
        return sum(kept.values())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One network, or one module: fused and reference, and the largest difference of the two."""

    name: str
    seconds: tuple[float, float]
    kept_bytes: tuple[int, int]
    output_error: float
    gradient_error: float


def _largest_difference(a: Any, b: Any) -> float:
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    scale = float(np.max(np.abs(b)))
    return float(np.max(np.abs(a - b))) / scale if scale else float(np.max(np.abs(a - b)))


def compare_model(
    name: str, model: Any, loss: Loss, images: np.ndarray, targets: np.ndarray, repeats: int
) -> Comparison:
    """Compares one training step of a Keras model (forward, backward, Adam) on one batch.

    The model keeps its weights: the steps run on copies.
    """
    import keras
    import tensorflow as tf

    x, y = tf.constant(images), tf.constant(targets)

    def prepare() -> tuple[Traced, Any]:
        # Not clone_model: it would also copy how the model was compiled.
        copy = keras.Model.from_config(model.get_config())
        copy.set_weights(model.get_weights())
        optimizer = keras.optimizers.Adam(1e-4)
        optimizer.build(copy.trainable_variables)
        traced = Traced(
            lambda x: loss(y, copy(x, training=True)),
            [variable.value for variable in copy.trainable_variables],
            apply=lambda found: optimizer.apply(found, copy.trainable_variables),
        )
        return traced, copy(x, training=False)

    return _compare(name, prepare, [x], repeats)


def compare_module(name: str, shape: tuple[int, int, int, int], repeats: int) -> Comparison:
    """Compares one CBAM, forward and backward, on random values (NHWC, float32, ratio 16)."""
    import cbam_ops
    from cbam_ops.testing import Case

    tensors = list(Case("cbam", shape, hidden=shape[-1] // 16, kernel_size=7).draw().values())

    def prepare() -> tuple[Traced, Any]:
        return Traced(cbam_ops.cbam, watch=True), cbam_ops.cbam(*tensors)

    return _compare(name, prepare, tensors, repeats)


def _compare(
    name: str, prepare: Callable[[], tuple[Traced, Any]], inputs: list[Any], repeats: int
) -> Comparison:
    """Prepares, traces and runs under the implementation in force and under the reference."""
    import cbam_ops
    from cbam_ops import options

    traced, outputs, gradients, kept = [], [], [], []
    for implementation in (options.implementation(), "reference"):
        with cbam_ops.use_implementation(implementation):  # type: ignore[arg-type]
            step, output = prepare()
            traced.append(step)
            outputs.append(output)
            gradients.append(step(*inputs)[1])
            kept.append(step.kept_bytes(*inputs))
    return Comparison(
        name,
        _interleaved_medians(traced, inputs, repeats),
        (kept[0], kept[1]),
        output_error=_largest_difference(*outputs),
        gradient_error=max(_largest_difference(*pair) for pair in zip(*gradients, strict=True)),
    )


def _interleaved_medians(
    functions: Sequence[Traced], inputs: list[Any], repeats: int
) -> tuple[float, float]:
    """Median seconds of both; they take turns, so that a busy moment hits them alike."""
    times = np.empty((repeats + 2, len(functions)))
    for row in times:
        for i, function in enumerate(functions):
            started = time.perf_counter()
            np.asarray(function(*inputs)[0])  # waits
            row[i] = time.perf_counter() - started
    fused, reference = np.median(times[2:], axis=0)
    return fused, reference
