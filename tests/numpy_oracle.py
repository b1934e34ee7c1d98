"""CBAM forward and backward in plain numpy: the definition the kernels are measured against.

Written from the equations alone (Woo et al., 2018, section 3, and the README's "what it computes"),
without TensorFlow and without the kernels' tricks: every intermediate is stored, nothing is fused.
Evaluated in float64 it is the truth of the tests; evaluated in float32 it says what error an
ordinary evaluation in that type has.

Words and shapes: ``x`` is the feature map, ``[N, H, W, C]`` or ``[N, C, H, W]``, or a series or a
volume, which have one or three sides; channel gate and
channel descriptors ``[N, C]`` and ``[2, N, C]``; spatial gate and spatial descriptors ``[N, H, W]``
and ``[N, 2, H, W]`` (mean, then max, for both layouts); ``w0 [C, hidden]``, ``w1 [hidden, C]``,
``kernel [kh, kw, 2, 1]`` (plane 0 reads the mean, plane 1 the max).

``gates`` is one of

* ``channel_first``: ``y = u * g_s(u)`` with ``u = x * g_c(x)`` (the paper),
* ``spatial_first``: ``y = u * g_c(u)`` with ``u = x * g_s(x)``,
* ``parallel``: ``y = x * g_c(x) * g_s(x)``,
* ``channel_only``, ``spatial_only``: one gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

Array = np.ndarray
Tensors = dict[str, Array]
MLP = ("w0", "b0", "w1", "b1")


def to_nhwc(x: Array, layout: str) -> Array:
    """``x`` with its channels last."""
    return x if layout == "NHWC" else np.moveaxis(x, 1, -1)


def from_nhwc(x: Array, layout: str) -> Array:
    """The inverse of :func:`to_nhwc`."""
    return x if layout == "NHWC" else np.moveaxis(x, -1, 1)


def _sides(x: Array) -> tuple[int, ...]:
    """The axes of positions."""
    return tuple(range(1, x.ndim - 1))


def _everywhere(values: Array, x: Array) -> Array:
    """``[N, C]`` for all positions of ``x``."""
    return np.expand_dims(values, _sides(x))


def sigmoid(z: Array) -> Array:
    """``1 / (1 + exp(-z))`` without overflow at either end."""
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, np.ones_like(z), small) / (1 + small)


def _relu(v: Array) -> Array:
    return np.maximum(v, 0)  # NaN stays NaN


def _normal_density(v: Array) -> Array:
    return np.exp(-v * v / 2) / math.sqrt(2 * math.pi)


def _normal_distribution(v: Array) -> Array:
    erf = np.vectorize(math.erf, otypes=[v.dtype])
    return (1 + erf(v / math.sqrt(2))) / 2


def _mish_slope(v: Array) -> Array:
    t = np.tanh(np.logaddexp(v, 0))
    return t + v * (1 - t * t) * sigmoid(v)


# Functions with their derivatives.
_HIDDEN: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "relu": (_relu, lambda v: v > 0),
    "swish": (
        lambda v: v * sigmoid(v),
        lambda v: sigmoid(v) * (1 + v * (1 - sigmoid(v))),
    ),
    "gelu": (
        lambda v: v * _normal_distribution(v),
        lambda v: _normal_distribution(v) + v * _normal_density(v),
    ),
    "elu": (
        lambda v: np.where(v > 0, v, np.expm1(np.minimum(v, 0))),
        lambda v: np.where(v > 0, 1, np.exp(np.minimum(v, 0))),
    ),
    "mish": (lambda v: v * np.tanh(np.logaddexp(v, 0)), _mish_slope),
}
_GATES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * (1 - sigmoid(z))),
    "hard_sigmoid": (
        lambda z: np.clip(z + 3, 0, 6) / 6,
        lambda z: (np.abs(z) < 3).astype(z.dtype) / 6,
    ),
}


def _affine(values: Array, weights: Array, bias: Array | None) -> Array:
    return values @ weights + (0 if bias is None else bias)


def _share(values: Array, largest: Array, axes: tuple[int, ...], ties: str = "even") -> Array:
    """How the gradient of a maximum falls on ``values``: evenly over those equal to it.

    Or to the first of them, in the order of rows. Without any equal (the maximum is NaN) the share
    is 0 / 0 = NaN, as in ``tf.reduce_max``.
    """
    equal = values == largest
    if ties == "first":
        over_channels = axes == (-1,)
        positions = equal if over_channels else equal.reshape(len(equal), -1, equal.shape[-1])
        axis = -1 if over_channels else 1
        first = positions & (np.cumsum(positions, axis=axis) == 1)
        return first.reshape(equal.shape).astype(values.dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        return equal / np.sum(equal, axis=axes, keepdims=True).astype(values.dtype)


def _windows(planes: Array, size: tuple[int, ...]) -> Array:
    """The surroundings of every position, zeros outside: ``[N, planes, H, W, kh, kw]``."""
    padded = np.pad(planes, ((0, 0), (0, 0), *((k // 2, k // 2) for k in size)))
    return np.lib.stride_tricks.sliding_window_view(padded, size, axis=tuple(range(2, planes.ndim)))


def conv(planes: Array, kernel: Array) -> Array:
    """``[N, 2, H, W]`` by ``[kh, kw, 2, 1]`` to ``[N, H, W]``: stride 1, zero padding."""
    size = kernel.shape[:-2]
    taps = range(2 + len(size), 2 + 2 * len(size))
    ours, theirs = (*taps, 1), tuple(range(len(size) + 1))
    return np.tensordot(_windows(planes, size), kernel[..., 0], (ours, theirs))


def conv_grad(planes: Array, kernel: Array, dz: Array) -> tuple[Array, Array]:
    """Gradients of :func:`conv` with respect to ``planes`` and ``kernel``."""
    size, sides = kernel.shape[:-2], dz.ndim - 1
    everywhere = (0, *range(2, 2 + sides)), tuple(range(1 + sides))
    d_kernel = np.tensordot(_windows(planes, size), dz, everywhere)  # [2, kh, kw]
    turned = np.flip(kernel[..., 0], tuple(range(sides)))
    taps = tuple(range(1 + sides, 1 + 2 * sides)), tuple(range(sides))
    d_planes = np.tensordot(_windows(dz[:, None], size)[:, 0], turned, taps)
    return np.moveaxis(d_planes, -1, 1), np.moveaxis(d_kernel, 0, -1)[..., None]


def channel_pool(x: Array, layout: str = "NHWC", dtype: DTypeLike = np.float64) -> Tensors:
    """Mean and maximum over positions, each ``[N, C]``."""
    v = to_nhwc(x, layout).astype(dtype)
    return {"mean": v.mean(axis=_sides(v)), "maximum": v.max(axis=_sides(v))}


def channel_pool_grad(
    x: Array, d_mean: Array, d_maximum: Array, layout: str = "NHWC", dtype: DTypeLike = np.float64
) -> Tensors:
    """Gradient of :func:`channel_pool` with respect to ``x``."""
    v = to_nhwc(x, layout).astype(dtype)
    positions = np.prod(v.shape[1:-1])
    share = _share(v, v.max(axis=_sides(v), keepdims=True), _sides(v))
    dx = _everywhere(d_mean.astype(dtype), v) / positions
    dx = dx + share * _everywhere(d_maximum.astype(dtype), v)
    return {"dx": from_nhwc(dx, layout)}


def spatial_pool(x: Array, layout: str = "NHWC", dtype: DTypeLike = np.float64) -> Tensors:
    """Mean and maximum over channels in one tensor, ``[N, H, W, 2]`` or ``[N, 2, H, W]``."""
    v = to_nhwc(x, layout).astype(dtype)
    return {"descriptors": from_nhwc(np.stack([v.mean(axis=-1), v.max(axis=-1)], axis=-1), layout)}


def spatial_pool_grad(
    x: Array, d_descriptors: Array, layout: str = "NHWC", dtype: DTypeLike = np.float64
) -> Tensors:
    """Gradient of :func:`spatial_pool` with respect to ``x``."""
    v = to_nhwc(x, layout).astype(dtype)
    d = to_nhwc(d_descriptors, layout).astype(dtype)
    share = _share(v, v.max(axis=-1, keepdims=True), (-1,))
    return {"dx": from_nhwc(d[..., :1] / v.shape[-1] + share * d[..., 1:], layout)}


def forward(
    x: Array,
    w0: Array | None = None,
    b0: Array | None = None,
    w1: Array | None = None,
    b1: Array | None = None,
    kernel: Array | None = None,
    bias: Array | None = None,
    gamma: Array | None = None,
    residual: Array | None = None,
    *,
    layout: str = "NHWC",
    gates: str = "channel_first",
    pooling: str = "avg+max",
    mlp_activation: str = "none",
    hidden_activation: str = "relu",
    gate_activation: str = "sigmoid",
    mlp_merge: str = "logits",
    ties: str = "even",
    activation: str = "none",
    batch_norm: bool = False,
    epsilon: float = 1e-5,
    dtype: DTypeLike = np.float64,
    between: Array | None = None,
) -> Tensors:
    """The module, with every intermediate a gradient needs.

    All inputs are cast to ``dtype`` and everything is computed and returned in it. Gates the module
    does not have, and what belongs to them, are absent from the result. The names without an
    underscore are those of the kernels' outputs; those with one are for :func:`backward`. For
    ``between`` see there.
    """
    if gates == "spatial_first":
        first = forward(
            x, kernel=kernel, bias=bias, gamma=gamma, layout=layout, gates="spatial_only",
            gate_activation=gate_activation, batch_norm=batch_norm, epsilon=epsilon, dtype=dtype,
        )  # fmt: skip
        second = forward(
            first["y"] if between is None else between, w0, b0, w1, b1, residual=residual,
            layout=layout, gates="channel_only", pooling=pooling, mlp_activation=mlp_activation,
            hidden_activation=hidden_activation, gate_activation=gate_activation,
            mlp_merge=mlp_merge, activation=activation, dtype=dtype,
        )  # fmt: skip
        return {**first, **second}

    def cast(v: Array) -> Array:
        return np.asarray(v).astype(dtype)

    v = cast(to_nhwc(x, layout))
    out: Tensors = {}
    gate, slope = _GATES[gate_activation]
    u = v
    if gates != "spatial_only":
        mean, maximum = v.mean(axis=_sides(v)), v.max(axis=_sides(v))
        if pooling == "max":
            mean = np.zeros_like(mean)
        if pooling == "avg":
            maximum = np.zeros_like(maximum)
        out["channel_descriptors"] = np.stack([mean, maximum])
        branches = {"mean": mean} if pooling != "max" else {}
        branches |= {"max": maximum} if pooling != "avg" else {}
        for name, t in branches.items():
            branches[name] = _affine(t, cast(w0), None if b0 is None else cast(b0))
            out["_pre_" + name] = branches[name]
            if w1 is not None:
                branches[name] = _HIDDEN[hidden_activation][0](branches[name])
                out["_hidden_" + name] = branches[name]
        if mlp_merge == "hidden":
            branches = dict.fromkeys(branches, sum(branches.values()))
        for name, t in branches.items():
            if w1 is not None:
                t = _affine(t, cast(w1), None if b1 is None else cast(b1))
            out["_branch_" + name] = t
            branches[name] = _relu(t) if mlp_activation == "relu" else t
        if mlp_merge == "logits":
            branches = dict.fromkeys(branches, sum(branches.values()))
        for name, logits in branches.items():
            out["_gate_slope_" + name] = slope(logits)
        gates_of = [gate(logits) for logits in branches.values()]
        out["channel_gate"] = sum(gates_of) if mlp_merge == "gates" else gates_of[0]
        u = v * _everywhere(out["channel_gate"], v)
    gated = u
    if gates != "channel_only":
        s = v if gates == "parallel" else u
        out["spatial_descriptors"] = np.stack([s.mean(axis=-1), s.max(axis=-1)], axis=1)
        z = conv(out["spatial_descriptors"], cast(kernel))
        if batch_norm:
            # An empty batch has no statistics: 0 here.
            mean, variance = (z.mean(), z.var()) if z.size else (z.sum(), z.sum())
            out["batch_statistics"] = np.stack([mean, variance])
            out["_normalised"] = (z - mean) / np.sqrt(variance + cast(np.asarray(epsilon)))
            z = out["_normalised"] * cast(gamma)
        if bias is not None:
            z = z + cast(bias)
        out["spatial_gate"], out["_spatial_slope"] = gate(z), slope(z)
        gated = u * out["spatial_gate"][..., None]
    if residual is not None:
        gated = gated + cast(to_nhwc(residual, layout))
    if activation == "relu":
        gated = _relu(gated)
    out["y"] = from_nhwc(gated, layout)
    return out


def backward(
    x: Array,
    dy: Array,
    w0: Array | None = None,
    b0: Array | None = None,
    w1: Array | None = None,
    b1: Array | None = None,
    kernel: Array | None = None,
    bias: Array | None = None,
    gamma: Array | None = None,
    residual: Array | None = None,
    *,
    layout: str = "NHWC",
    gates: str = "channel_first",
    pooling: str = "avg+max",
    mlp_activation: str = "none",
    hidden_activation: str = "relu",
    gate_activation: str = "sigmoid",
    mlp_merge: str = "logits",
    ties: str = "even",
    activation: str = "none",
    batch_norm: bool = False,
    epsilon: float = 1e-5,
    dtype: DTypeLike = np.float64,
    d_channel_gate: Array | None = None,
    d_spatial_gate: Array | None = None,
    y: Array | None = None,
    tie_gate: Array | None = None,
    between: Array | None = None,
    magnitude: bool = False,
) -> Tensors:
    """Gradients of :func:`forward` with respect to every input, by the chain rule.

    Args (beside those of :func:`forward`):
      dy: gradient with respect to ``y``; ``d_channel_gate``, ``d_spatial_gate``: with respect to
        the gates where they are results themselves.
      y: the module's result whose sign decides where ``activation="relu"`` lets gradients pass;
        default: the one computed here. Given, a result rounded to a narrow type decides alone.
      tie_gate: ``[N, C]`` channel gate whose products with ``x``, *in the gate's type*, decide
        which channels are equal maxima (``channel_first``); default: the one computed here. Two
        products can be equal in float32 and different in float64, so a comparison needs it.
      between: the map that ``spatial_first`` hands from one gate to the other; default: the one
        computed here. Given, one rounded to a narrow type decides what its maxima are.
      magnitude: with every factor and term replaced by its absolute value: how large the sums were
        before they cancelled, which is what rounding errors are proportional to.
    """
    options: dict[str, Any] = {"layout": layout, "dtype": dtype}
    options["gate_activation"] = gate_activation
    mlp = {
        "pooling": pooling,
        "mlp_activation": mlp_activation,
        "hidden_activation": hidden_activation,
        "mlp_merge": mlp_merge,
    }
    norm = {"batch_norm": batch_norm, "epsilon": epsilon}
    if gates == "spatial_first":
        u = between
        if u is None:
            u = forward(
                x, kernel=kernel, bias=bias, gamma=gamma, gates="spatial_only", **norm, **options
            )["y"]
        second = backward(
            u, dy, w0, b0, w1, b1, residual=residual, gates="channel_only", activation=activation,
            d_channel_gate=d_channel_gate, y=y, magnitude=magnitude, ties=ties, **mlp, **options,
        )  # fmt: skip
        first = backward(
            x, second.pop("dx"), kernel=kernel, bias=bias, gamma=gamma, gates="spatial_only",
            d_spatial_gate=d_spatial_gate, magnitude=magnitude, ties=ties, **norm, **options,
        )  # fmt: skip
        return {**second, **first}

    saved = forward(
        x, w0, b0, w1, b1, kernel, bias, gamma, residual,
        gates=gates, activation=activation, **mlp, **norm, **options,
    )  # fmt: skip
    absolute = np.abs if magnitude else np.asarray
    minus = 1 if magnitude else -1

    def cast(v: Array) -> Array:
        return absolute(np.asarray(v).astype(dtype))

    exact = to_nhwc(x, layout).astype(dtype)  # not absolute: decides the ties
    v = cast(exact)
    n, c, ones = v.shape[0], v.shape[-1], np.ones((1,) * v.ndim, dtype)
    dv = cast(to_nhwc(dy, layout))
    out: Tensors = {}
    if activation == "relu":
        dv = dv * (to_nhwc(saved["y"] if y is None else y, layout) > 0)
    if residual is not None:
        out["d_residual"] = from_nhwc(dv, layout)

    has_channel, has_spatial = gates != "spatial_only", gates != "channel_only"
    g_c = _everywhere(saved["channel_gate"], v) if has_channel else ones
    g_s = saved["spatial_gate"][..., None] if has_spatial else ones

    # What reaches the map the spatial gate is taken from by way of that gate.
    d_spatial_input = np.zeros_like(v)
    if has_spatial:
        t = np.sum(dv * v * g_c, axis=-1)
        if d_spatial_gate is not None:
            t = t + cast(d_spatial_gate)
        dz = t * saved["_spatial_slope"]
        if bias is not None:
            out["dbias"] = np.sum(dz).reshape(1)
        if batch_norm:
            normalised = absolute(saved["_normalised"])
            variance = saved["batch_statistics"][1]
            out["dgamma"] = np.sum(dz * normalised).reshape(1)
            centred = dz + minus * dz.mean() if n else dz
            if n:
                centred = centred + minus * normalised * np.mean(dz * normalised)
            dz = centred * cast(gamma) / np.sqrt(variance + np.asarray(epsilon).astype(dtype))
        d_planes, out["dkernel"] = conv_grad(
            absolute(saved["spatial_descriptors"]), cast(kernel), dz
        )
        if gates == "channel_first":
            gate = g_c if tie_gate is None else _everywhere(tie_gate, v)
            u = to_nhwc(x, layout).astype(gate.dtype) * gate
        else:
            u = exact
        share = _share(u, u.max(axis=-1, keepdims=True), (-1,), ties).astype(dtype)
        d_spatial_input = d_planes[:, 0, ..., None] / c + d_planes[:, 1, ..., None] * share

    if gates == "parallel":
        d_gated = dv * g_s
        dx = dv * g_c * g_s + d_spatial_input
    else:
        d_gated = dv * g_s + d_spatial_input
        dx = d_gated * g_c

    if has_channel:
        d_gate = np.sum(d_gated * v, axis=_sides(v))
        if d_channel_gate is not None:
            d_gate = d_gate + cast(d_channel_gate)
        for name, source in (("dw0", w0), ("db0", b0), ("dw1", w1), ("db1", b1)):
            if source is not None:
                out[name] = np.zeros(np.shape(source), dtype)
        units = 0.0
        for index, name in enumerate(("mean", "max")):
            if "_branch_" + name not in saved:
                continue
            pre, branch = saved["_pre_" + name], saved["_branch_" + name]
            d_hidden = d_gate * saved["_gate_slope_" + name]
            if mlp_activation == "relu":
                d_hidden = d_hidden * (branch > 0)
            t = absolute(saved["channel_descriptors"][index])
            if w1 is not None:
                d_branch = d_hidden
                hidden, slope = saved["_hidden_" + name], _HIDDEN[hidden_activation][1](pre)
                d_hidden = (d_branch @ cast(w1).T) * absolute(slope)
                if magnitude:  # the hidden unit is a sum that cancels too
                    hidden = _affine(t, cast(w0), None if b0 is None else cast(b0))
                    hidden = hidden * absolute(slope)
                units = units + hidden
                if mlp_merge != "hidden" or name == "max" or pooling == "avg":
                    out["dw1"] += units.T @ d_branch
                    if b1 is not None:
                        out["db1"] += d_branch.sum(axis=0)
                    units = 0.0
            out["dw0"] += t.T @ d_hidden
            if b0 is not None:
                out["db0"] += d_hidden.sum(axis=0)
            d_t = _everywhere(d_hidden @ cast(w0).T, v)
            if name == "mean":
                dx = dx + d_t / np.prod(v.shape[1:-1])
            else:
                share = _share(exact, exact.max(axis=_sides(v), keepdims=True), _sides(v), ties)
                dx = dx + d_t * share
    out["dx"] = from_nhwc(dx, layout)
    return out


def channel_gate_magnitude(values: Tensors, results: Tensors, options: dict[str, Any]) -> Array:
    """What the sums behind a channel gate come to without their signs, at the gate's slope."""
    sizes = {name: np.abs(values[name]) if name in values else None for name in MLP}
    total = results["channel_gate"]
    for index, name in enumerate(("mean", "max")):
        if "_branch_" + name not in results:
            continue
        size = _affine(np.abs(results["channel_descriptors"][index]), sizes["w0"], sizes["b0"])
        if sizes["w1"] is not None:
            slope = _HIDDEN[options.get("hidden_activation", "relu")][1](results["_pre_" + name])
            size = _affine(size * np.abs(slope), sizes["w1"], sizes["b1"])
        total = total + np.abs(results["_gate_slope_" + name]) * size
    return total


def options_of(case: Any) -> dict[str, Any]:
    """The options of a case of `cbam_ops.testing`, in the words of :func:`forward`."""
    words = dict(case.options)
    order = words.pop("order", "channel_first")
    kind = case.function.removesuffix("_with_batch_norm")
    gates = {"channel_attention": "channel_only", "spatial_attention": "spatial_only"}
    return {
        "layout": case.data_format,
        "gates": gates.get(kind, order),
        "batch_norm": kind != case.function,
        **words,
    }


def evaluate(
    case: Any,
    tensors: dict[str, Any],
    *,
    y: Array | None = None,
    tie_gate: Array | None = None,
    between: Array | None = None,
    magnitude: bool = False,
    dtype: DTypeLike = np.float64,
) -> Tensors:
    """What `cbam_ops.testing.Case.evaluate` gives, from this definition.

    Args:
      case: of any function.
      tensors: its arguments.
      y: see :func:`backward`, as for `tie_gate`, `between` and `magnitude`.
      dtype: to compute in.
    """
    values = {name: np.asarray(tensor).astype(np.float64) for name, tensor in tensors.items()}
    options = options_of(case)
    if case.function.endswith("pool"):
        x, layout = values["x"], options["layout"]
        channel = case.function == "channel_pool"
        absolute = np.abs if magnitude else np.asarray
        results = (channel_pool if channel else spatial_pool)(absolute(x), layout, dtype)
        d = map(absolute, case.cotangents([results[name] for name in case.output_names()]))
        pool_grad = channel_pool_grad if channel else spatial_pool_grad
        return {**results, **pool_grad(x, *d, layout, dtype)}
    if "gamma" in values:
        values["bias"] = values.pop("beta")
    results = forward(**values, **options, dtype=dtype, between=between)
    if "batch_statistics" in results:
        results["mean"], results["variance"] = results["batch_statistics"].reshape(2, 1)
        if magnitude and results["spatial_gate"].size:
            logits = conv(np.abs(results["spatial_descriptors"]), np.abs(values["kernel"])).mean()
            results["variance"] = results["variance"] + logits * np.sqrt(results["variance"])
            results["mean"] = np.full(1, logits)
    names = case.output_names()
    cotangents = case.cotangents([results[name] for name in names])
    if magnitude and "channel_gate" in results:
        results["channel_gate"] = channel_gate_magnitude(values, results, options)
    d = {f"d_{name}": v for name, v in zip(names, cotangents, strict=True) if "gate" in name}
    gradients = backward(
        dy=cotangents[0],
        y=y,
        tie_gate=tie_gate,
        between=between,
        magnitude=magnitude,
        dtype=dtype,
        **d,
        **values,
        **options,
    )
    if "gamma" in values:
        gradients["dbeta"] = gradients["dbias"]
    return {**results, **gradients}


def gradient_magnitudes(case: Any, tensors: dict[str, Any]) -> Tensors:
    """What the sums behind each result come to without their signs, where it is known."""
    return evaluate(case, tensors, magnitude=True)
