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


def _named(op: Any, arguments: Mapping[str, str], tensors: Iterable[Any]) -> dict[str, Any]:
    """Flat tensors by the names of an op's arguments; where there may be none, as a list."""
    rest = iter(tensors)
    return {
        name: list(islice(rest, op.get_attr(count))) if count else next(rest)
        for name, count in arguments.items()
    }


def _flat(values: Iterable[Any]) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def _attributes(op: Any, names: Iterable[str]) -> dict[str, Any]:
    values = {name: op.get_attr(name) for name in names}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


def _gradient(op: Any, *d_outputs: tf.Tensor) -> list[tf.Tensor]:
    """The registered gradient of every op."""
    inputs, outputs, attributes = _call.signature(op.type)
    taken, given, _ = _call.signature(f"{op.type}Grad")
    values = _attributes(op, attributes)
    values.update(_named(op, inputs, op.inputs))
    values.update(zip(outputs, op.outputs, strict=True))
    values.update((_d(name, taken), d) for name, d in zip(outputs, d_outputs, strict=True))
    if "y" in outputs:
        # Without an activation y is not needed, and the gradient of the residual is dy itself.
        relu, residuals = values["activation"] == "relu", len(values["residual"])
        values.update(y=[values["y"]] if relu else [], num_d_residual=residuals if relu else 0)
    gradients = _call.run(options.loaded_ops(), f"{op.type}Grad", values)
    if "y" in outputs and not relu:
        gradients["d_residual"] = [values["dy"]] * residuals
    return _flat(gradients[_d(name, given)] for name in inputs)


def _second_gradient(op: Any, *upstream: tf.Tensor) -> list[tf.Tensor | None]:
    """The registered gradient of every gradient op, through the reference.

    The outputs of the op that its gradient op takes are functions of the inputs, which account for
    the whole derivative; so they get none.
    """
    forward = op.type.removesuffix("Grad")
    inputs, outputs, _ = _call.signature(forward)
    taken, given, attributes = _call.signature(op.type)
    values = _named(op, taken, op.inputs)
    d_gradients = _named(op, given, upstream)
    primals = {name: count for name, count in inputs.items() if name in taken}
    cotangents = {_d(name, taken): name for name in outputs if _d(name, taken) in taken}
    words = _attributes(op, attributes)
    y = values.get("y", [])

    def function(*tensors: tf.Tensor) -> list[tf.Tensor]:
        """The outputs before residual and activation."""
        arguments = {**_named(op, primals, tensors), "activation": None}
        gamma = arguments.pop("gamma", [])
        if gamma:
            arguments.update(gamma=gamma[0], beta=arguments.pop("bias"))
        for name, word in words.items():
            arguments.setdefault(name, None if word == "none" else word)
        results = _call.definition_of(forward)(_call.Arguments(**arguments))
        return [results[name] for name in cotangents.values()]

    def mask(gradient: tf.Tensor) -> tf.Tensor:
        """With an activation dy is masked before anything else; the mask is locally constant."""
        return tf.where(y[0] > 0, gradient, tf.zeros_like(gradient)) if y else gradient

    if "dy" in values:
        values["dy"] = mask(values["dy"])
    d_primals, d_cotangents = _gradient_of_gradient(
        function,
        _flat(values[name] for name in primals),
        [values[name] for name in cotangents],
        _flat(d_gradients[_d(name, given)] for name in primals),
    )
    result = _named(op, primals, d_primals)
    result.update(zip(cotangents, d_cotangents, strict=True))
    if "dy" in values:
        for d_residual in d_gradients["d_residual"]:
            result["dy"] += d_residual
        result["dy"] = mask(result["dy"])
    result["y"] = [None] * len(y)
    return _flat(result.get(name) for name in taken)


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


for _op in ("Cbam", "ChannelAttention", "SpatialAttention", "ChannelPool", "SpatialPool"):
    tf.RegisterGradient(f"CbamOps>{_op}")(_gradient)
    tf.RegisterGradient(f"CbamOps>{_op}Grad")(_second_gradient)
