"""What a user would run instead of the fused op, beside the stock graphs that the package times.

None has a definition of its own where the package has one: TensorFlow's run `cbam_ops.reference`,
Keras's the stock layers of `cbam_ops.models`. PyTorch's and JAX's are written here, once, for CPUs
and GPUs; all are checked before they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from cases import OURS_XLA

import cbam_ops
from cbam_ops import _bench
from cbam_ops._bench import KERNEL_SIZE, RATIO, WEIGHTS, Case, Inputs, Prepared, Provider

# Forward passes of PyTorch that wait for their backward pass to be timed: at most so many, and not
# more than this many bytes of x, each with all that it keeps.
_RECORDED_LIMIT, _RECORDED_BYTES = 8, 400 * 2**20

# Half a millisecond of a GPU's clock and more: longer than a call takes to enqueue.
_BUSY_CYCLES = 2_000_000
_JAX_CHAIN = 5  # calls that one wait is shared by


# --- TensorFlow -----------------------------------------------------------------------------------


def _transposed_cbam(x: Any, *weights: Any, residual: Any = None, **options: Any) -> Any:
    """The reference on NCHW maps by way of NHWC."""
    import tensorflow as tf

    to_nhwc = functools.partial(tf.transpose, perm=[0, 2, 3, 1])
    options["data_format"] = "NHWC"
    if residual is not None:
        options["residual"] = to_nhwc(residual)
    y, *gates = cbam_ops.reference.cbam(to_nhwc(x), *weights, **options)
    return tf.transpose(y, [0, 3, 1, 2]), *gates


def _keras(case: Case, inputs: Inputs) -> Prepared:
    """The stock layers that `cbam_ops.models` builds its comparison networks of."""
    import keras

    from cbam_ops import models

    policy = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy[case.dtype])
    try:
        shape = inputs.sets[0]["x"].shape[1:]
        map_, shortcut = (keras.Input(shape, dtype=case.dtype) for _ in range(2))
        options = {
            "ratio": min(RATIO, case.c),
            "kernel_size": KERNEL_SIZE,
            "data_format": "channels_last" if case.layout == "NHWC" else "channels_first",
        }
        output = models._stock_module(map_, shortcut, "cbam", "out", options)
        model = keras.Model([map_, shortcut], output)
        if case.op == "cbam":
            model = keras.Model(map_, model.get_layer("cbam_spatial_scale").output)
    finally:
        keras.config.set_dtype_policy(before)

    # Keras's order of the variables is its own; their layers say what each is.
    layers = {"cbam_mlp_0": ("w0", "b0"), "cbam_mlp_1": ("w1", "b1")}
    layers["cbam_spatial_conv"] = ("kernel", "bias")
    variables = {}
    for layer, names in layers.items():
        for name, variable in zip(names, model.get_layer(layer).weights, strict=True):
            variable.assign(inputs.weights[name])
            variables[name] = variable.value

    def forward(maps: _bench.Tensors, weights: _bench.Tensors) -> Any:
        return model([maps["x"], maps["residual"]] if "residual" in maps else maps["x"],
                     training=True)  # fmt: skip

    return _bench.setup_tensorflow(case, inputs, forward, variables)


# --- PyTorch --------------------------------------------------------------------------------------


def torch_cbam(x: Any, w0: Any, b0: Any, w1: Any, b1: Any, kernel: Any, bias: Any,
               residual: Any = None) -> Any:  # fmt: skip
    """The stock lines in PyTorch; x is [N, C, H, W], kernel [1, 2, k, k]."""
    import torch
    from torch.nn import functional

    def mlp(t: Any) -> Any:
        return torch.addmm(b1, torch.relu(torch.addmm(b0, t, w0)), w1)

    gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))
    u = x * gate[:, :, None, None]
    descriptors = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)
    z = functional.conv2d(descriptors, kernel, bias, padding=kernel.shape[-1] // 2)
    y = u * torch.sigmoid(z)
    return y if residual is None else torch.relu(y + residual)


def compiled_torch_cbam() -> Callable[..., Any]:
    """`torch_cbam` compiled for one shape; earlier shapes do not count as recompilations."""
    import torch
    import torch._functorch.config

    # What the tape keeps may be used again: backward is timed from one forward pass.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()
    return torch.compile(torch_cbam, dynamic=False, fullgraph=True)


def cuda_seconds(call: Callable[[], Any]) -> float:
    """The time of a call on the GPU alone.

    The stream is kept busy while the host enqueues: events around work on an idle GPU would show
    the host's time.
    """
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_BUSY_CYCLES)
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop) / 1e3


def _torch(case: Case, inputs: Inputs, compiled: bool, channels_last: bool) -> Prepared:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case.dtype)
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def map_tensor(array: np.ndarray) -> Any:
        tensor = torch.from_numpy(array)
        if case.layout == "NHWC":
            tensor = tensor.permute(0, 3, 1, 2)  # PyTorch names the axes N, C, H, W
        return tensor.to(device, dtype, memory_format=memory, copy=True)

    maps = inputs.as_tensors(("torch", channels_last), map_tensor)
    values = {**inputs.weights, "kernel": inputs.weights["kernel"].transpose(3, 2, 0, 1)}
    weights = {
        name: torch.from_numpy(values[name].copy()).to(device, dtype).requires_grad_()
        for name in WEIGHTS
    }
    sources = [{k: v.requires_grad_() for k, v in each.items() if k != "dy"} for each in maps]
    cbam = compiled_torch_cbam() if compiled else torch_cbam

    def forward(i: int) -> Any:
        return cbam(**sources[i], **weights)

    def gradients(y: Any, i: int, **options: Any) -> Any:
        wanted = [*sources[i].values(), *weights.values()]
        return torch.autograd.grad(y, wanted, maps[i]["dy"], **options)

    def run_forward(i: int) -> Any:
        with torch.no_grad():
            return forward(i % len(maps))

    def step(i: int) -> Any:
        y = forward(i % len(maps))
        return y, gradients(y, i % len(maps))

    @functools.cache
    def recorded() -> list[Any]:
        count = min(len(maps), max(1, _RECORDED_BYTES // case.map_bytes), _RECORDED_LIMIT)
        return [forward(j) for j in range(count)]

    def backward(i: int) -> Any:
        j = i % len(recorded())
        return gradients(recorded()[j], j, retain_graph=True)

    def results() -> dict[str, np.ndarray]:
        from cbam_ops.testing import gradient_name

        y, found = step(0)
        names = [gradient_name(name) for name in (*sources[0], *WEIGHTS)]
        tensors = dict(zip(names, found, strict=True)) | {"y": y}
        for name in ("y", *names[: len(sources[0])]):
            if case.layout == "NHWC":
                tensors[name] = tensors[name].permute(0, 2, 3, 1)
        tensors["dkernel"] = tensors["dkernel"].permute(2, 3, 1, 0)
        return {name: t.detach().cpu().to(torch.float64).numpy() for name, t in tensors.items()}

    functions = {"forward": run_forward, "backward": backward, "step": step}
    return Prepared(
        run={mode: functions[mode] for mode in case.modes},
        calls=1,
        step=lambda: step(0),
        results=results,
        copy=lambda i: maps[i % len(maps)]["x"].detach().clone(),
        framework="torch",
        timer=cuda_seconds if device == "cuda" else None,
    )


# --- JAX ------------------------------------------------------------------------------------------


def jax_cbam(x: Any, w0: Any, b0: Any, w1: Any, b1: Any, kernel: Any, bias: Any) -> Any:
    """The stock lines in JAX; x is [N, H, W, C], kernel [k, k, 2, 1]."""
    import jax
    import jax.numpy as jnp

    def mlp(t: Any) -> Any:
        return jax.nn.relu(t @ w0 + b0) @ w1 + b1

    u = x * jax.nn.sigmoid(mlp(x.mean((1, 2))) + mlp(x.max((1, 2))))[:, None, None, :]
    descriptors = jnp.stack([u.mean(3), u.max(3)], 3)
    z = jax.lax.conv_general_dilated(
        descriptors, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return u * jax.nn.sigmoid(z + bias)


def _jax(case: Case, inputs: Inputs) -> Prepared:
    """XLA's forward and step, NHWC; results are waited for after a chain of calls."""
    import jax
    import jax.numpy as jnp

    if case.layout != "NHWC" or case.op != "cbam":
        raise ValueError("the baseline in JAX is cbam on NHWC maps")
    dtype = jnp.dtype(case.dtype)
    maps = inputs.as_tensors("jax", lambda array: jnp.asarray(array).astype(dtype))
    weights = {name: jnp.asarray(value).astype(dtype) for name, value in inputs.weights.items()}
    forward = jax.jit(lambda x, w: jax_cbam(x, **w))

    @jax.jit
    def step(x: Any, w: Any, dy: Any) -> Any:
        y, gradient = jax.vjp(lambda x, w: jax_cbam(x, **w), x, w)
        return y, gradient(dy)

    def chained(function: Callable[..., Any]) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            chosen = [maps[(i * _JAX_CHAIN + j) % len(maps)] for j in range(_JAX_CHAIN)]
            return jax.block_until_ready([function(each["x"], each) for each in chosen])

        return run

    def results() -> dict[str, np.ndarray]:
        y, (dx, gradients) = step(maps[0]["x"], weights, maps[0]["dy"])
        found = {"y": y, "dx": dx, **{f"d{name}": value for name, value in gradients.items()}}
        return {name: np.asarray(value.astype(jnp.float32)) for name, value in found.items()}

    runs = {
        "forward": chained(lambda x, each: forward(x, weights)),
        "step": chained(lambda x, each: step(x, weights, each["dy"])),
    }
    return Prepared(
        run=runs,
        calls=_JAX_CHAIN,
        step=lambda: step(maps[0]["x"], weights, maps[0]["dy"]),
        results=results,
        copy=chained(jax.jit(lambda x, each: jnp.copy(x))),
        framework="jax",
    )


# --- the list -------------------------------------------------------------------------------------


def _torch_provider(compiled: bool, channels_last: bool) -> Provider:
    return Provider("torch", lambda case, inputs: _torch(case, inputs, compiled, channels_last))


def _transposed(jit: bool) -> Provider:
    return _bench.tensorflow_provider(lambda: SimpleNamespace(cbam=_transposed_cbam), jit=jit)


PROVIDERS: dict[str, Provider] = {
    **_bench.PROVIDERS,
    OURS_XLA: _bench.tensorflow_provider(lambda: cbam_ops, jit=True),
    "tf-graph-transposed": _transposed(jit=False),
    "xla-transposed": _transposed(jit=True),
    "keras": Provider("tensorflow", _keras),
    "torch-eager-channels-last": _torch_provider(False, True),
    "torch-eager-contiguous": _torch_provider(False, False),
    "torch-compile-channels-last": _torch_provider(True, True),
    "torch-compile-contiguous": _torch_provider(True, False),
    "jax": Provider("jax", _jax),
}
