"""The gradients of the ops, and of their gradients, by the names in the ops' definitions.

The gradient of the op ``CbamOps>Cbam`` is the op ``CbamOps>CbamGrad``, and so for the others. It
takes inputs and outputs of the op under their names and the gradients of its outputs, and gives
those of its inputs; the gradient of an argument ``a`` is called ``da`` or ``d_a``. The gradient of
that comes from the reference. Importing this module registers both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import tensorflow as tf

from cbam_ops import _call, options


def _d(name: str, arguments: Mapping[str, Any]) -> str:
    """The name of an argument's gradient among the arguments of the gradient op."""
    return f"d{name}" if f"d{name}" in arguments else f"d_{name}"


def named(op: Any, arguments: Mapping[str, str], tensors: Iterable[Any]) -> dict[str, Any]:
    """Flat tensors by the names of an op's arguments; where there may be none, as a list."""
    rest = iter(tensors)
    return {
        name: list(islice(rest, op.get_attr(count))) if count else next(rest)
        for name, count in arguments.items()
    }


def flat(values: Iterable[Any]) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def attributes_of(op: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those attributes of an op, words as texts."""
    values = {name: op.get_attr(name) for name in names}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


def _gradient(op: Any, *d_outputs: tf.Tensor) -> list[tf.Tensor]:
    """The registered gradient of every op."""
    inputs, outputs, attributes = _call.signature(op.type)
    taken, given, _ = _call.signature(f"{op.type}Grad")
    values = attributes_of(op, attributes)
    values.update(named(op, inputs, op.inputs))
    values.update(zip(outputs, op.outputs, strict=True))
    values.update((_d(name, taken), d) for name, d in zip(outputs, d_outputs, strict=True))
    if "y" in outputs:
        # Without an activation y is not needed, and the gradient of the residual is dy itself.
        relu, residuals = values["activation"] == "relu", len(values["residual"])
        values.update(y=[values["y"]] if relu else [], num_d_residual=residuals if relu else 0)
    gradients = _call.run(options.loaded_ops(), f"{op.type}Grad", values)
    if "y" in outputs and not relu:
        gradients["d_residual"] = [values["dy"]] * residuals
    return flat(gradients[_d(name, given)] for name in inputs)


def _second_gradient(op: Any, *upstream: tf.Tensor) -> list[tf.Tensor | None]:
    """The registered gradient of every gradient op, through the reference.

    The outputs of the op that its gradient op takes are functions of the inputs, which account for
    the whole derivative; so they get none.
    """
    taken, given, attributes = _call.signature(op.type)
    values = named(op, taken, op.inputs) | attributes_of(op, attributes)
    d_gradients = named(op, given, upstream)
    forward = op.type.removesuffix("Grad")
    step = _Step(forward, _call.signature(forward), values)
    d_primals, d_cotangents = _gradient_of_gradient(
        step.outputs,
        step.primals,
        step.cotangents,
        flat(d_gradients[_d(name, given)] for name in step.inputs),
    )
    result = step.by_input(d_primals)
    result.update(zip(step.d_outputs, d_cotangents, strict=True))
    if "dy" in values:
        for d_residual in d_gradients["d_residual"]:
            result["dy"] += d_residual
        result["dy"] = step.mask(result["dy"])
    result["y"] = [None] * len(values.get("y", []))
    return flat(result.get(name) for name in taken)


class _Step:
    """What a gradient op differentiates, by the definition of the op that it belongs to."""

    def __init__(self, op: str, signature: _call.Signature, values: Mapping[str, Any]) -> None:
        """Takes the op, and the inputs and attributes of its gradient op by name."""
        self._op = op
        inputs, outputs, _ = signature
        self._values = values
        self._y = values.get("y", [])
        self.inputs = [name for name in inputs if name in values]
        # The gradients of the outputs by name, with the outputs.
        self.d_outputs = {_d(name, values): name for name in outputs if _d(name, values) in values}
        self.primals = flat(values[name] for name in self.inputs)
        self.cotangents = [
            self.mask(values[name]) if name == "dy" else values[name] for name in self.d_outputs
        ]

    def by_input(self, tensors: Iterable[Any]) -> dict[str, Any]:
        rest = iter(tensors)
        return {
            name: [next(rest) for _ in value] if isinstance(value, list) else next(rest)
            for name, value in ((name, self._values[name]) for name in self.inputs)
        }

    def outputs(self, *primals: tf.Tensor) -> list[tf.Tensor]:
        """The outputs before residual and activation."""
        values = {**self._values, **self.by_input(primals), "residual": [], "activation": "none"}
        results = _call.by_definition(self._op, values)
        return [results[name] for name in self.d_outputs.values()]

    def mask(self, gradient: tf.Tensor) -> tf.Tensor:
        """With an activation dy is masked before anything else; the mask is locally constant."""
        if not self._y:
            return gradient
        return tf.where(self._y[0] > 0, gradient, tf.zeros_like(gradient))


def by_definition(
    op: str, signature: _call.Signature, given: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The outputs of a gradient op by name, in plain TensorFlow.

    Args:
        op: The op whose gradient it is, by its registered name.
        signature: That op's.
        given: The names of the outputs.
        values: The gradient op's inputs and attributes by name.
    """
    step = _Step(op, signature, values)
    with tf.GradientTape() as tape:
        tape.watch(step.primals)
        outputs = step.outputs(*step.primals)
    gradients = step.by_input(
        tape.gradient(
            outputs,
            step.primals,
            output_gradients=step.cotangents,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
    )
    results = {_d(name, given): gradient for name, gradient in gradients.items()}
    if "d_residual" in given:
        dy = step.cotangents[list(step.d_outputs).index("dy")]
        results["d_residual"] = [dy] * values["num_d_residual"]
    return results


def _gradient_of_gradient(
    function: Callable[..., Sequence[tf.Tensor]],
    primals: Sequence[tf.Tensor],
    cotangents: Sequence[tf.Tensor],
    upstream: Sequence[tf.Tensor],
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Differentiates the gradient of ``function`` (its vector-Jacobian product).

    Args:
        function: Maps the primals to a list of outputs, in plain TensorFlow.
        primals: What the gradient was taken with respect to.
        cotangents: The gradients of the outputs, one each.
        upstream: The gradients that reach the gradients of the primals, one each.

    Returns:
        The gradients with respect to the primals and to the cotangents.
    """
    with tf.GradientTape() as outer:
        outer.watch([*primals, *cotangents])
        with tf.GradientTape() as inner:
            inner.watch(primals)
            outputs = function(*primals)
        gradients = inner.gradient(
            outputs,
            primals,
            output_gradients=cotangents,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
    result = outer.gradient(gradients, [*primals, *cotangents], output_gradients=upstream)
    return result[: len(primals)], result[len(primals) :]


OPS = [
    f"CbamOps>{name}"
    for name in ("Cbam", "ChannelAttention", "SpatialAttention", "ChannelPool", "SpatialPool")
]
for _op in OPS:
    tf.RegisterGradient(_op)(_gradient)
    tf.RegisterGradient(f"{_op}Grad")(_second_gradient)
