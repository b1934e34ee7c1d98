"""Times one CBAM under TensorFlow on its GPU: the fused op, the stock graph, and XLA.

    python benchmarks/gpu_tensorflow.py --output FILE [--seconds S] [--device GPU]

Part of gpu_check.py, which runs it in a process of its own: two frameworks in one would fight over
the GPU's memory. Needs an installed cbam_ops. Writes one row per timing, without the time of a
copy, which gpu_check.py has.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_report  # noqa: E402

import cbam_ops  # noqa: E402

CHAIN = 5  # calls per timing, each on the result of the one before: the first waits, the rest queue


def draw(batch: int, h: int, w: int, c: int, dtype: str) -> tuple[tf.Tensor, list[tf.Tensor]]:
    generator = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (generator.standard_normal(shape) * scale).astype(np.float32)

    hidden = max(1, c // 16)
    weights = [
        normal(c, hidden, scale=c**-0.5),
        normal(hidden),
        normal(hidden, c, scale=hidden**-0.5),
        normal(c),
        normal(7, 7, 2, 1, scale=1 / 7),
        normal(1),
    ]
    return tf.cast(normal(batch, h, w, c), dtype), [tf.constant(weight) for weight in weights]


def programs(module: Any, weights: Sequence[tf.Tensor], jit: bool) -> dict[str, Callable[..., Any]]:
    """CHAIN passes forward, and CHAIN training steps, as one function each."""

    def call(x: tf.Tensor) -> tf.Tensor:
        return module.cbam(x, *weights)

    @tf.function(jit_compile=jit)
    def forward(x: tf.Tensor) -> tf.Tensor:
        for _ in range(CHAIN):
            x = call(x)
        return x

    @tf.function(jit_compile=jit)
    def step(x: tf.Tensor) -> Any:
        total = [tf.zeros_like(weight) for weight in weights]
        for _ in range(CHAIN):
            with tf.GradientTape() as tape:
                tape.watch([x, *weights])
                y = call(x)
            dx, *gradients = tape.gradient(y, [x, *weights], output_gradients=x)
            total = [t + tf.cast(g, t.dtype) for t, g in zip(total, gradients, strict=True)]
            x = dx
        return x, total

    return {"forward": forward, "step": step}


def seconds_per_call(function: Callable[..., Any], x: tf.Tensor) -> float:
    """The median; a scalar is fetched at the end, which waits for everything before it."""

    def run() -> None:
        result = tf.nest.flatten(function(x))[0]
        result[0, 0, 0, 0].numpy()

    run()
    run()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) / CHAIN)
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", default="GPU")
    parser.add_argument("--cases", nargs="+", default=[], help="batch,h,w,c,dtype ...")
    arguments = parser.parse_args(argv)
    if not tf.config.list_physical_devices(arguments.device):
        print(f"TensorFlow {tf.__version__} sees no {arguments.device}.", file=sys.stderr)
        return 3
    rows: list[gpu_report.Row] = []
    end = time.perf_counter() + arguments.seconds
    for text in arguments.cases:
        batch, h, w, c = map(int, text.split(",")[:4])
        dtype = text.split(",")[4]
        with tf.device(arguments.device):
            x, weights = draw(batch, h, w, c, dtype)
            for who, module, jit in (
                (gpu_report.OURS_IN_TENSORFLOW, cbam_ops, False),
                ("TF graph", cbam_ops.reference, False),
                ("TF XLA", cbam_ops.reference, True),
            ):
                for what, function in programs(module, weights, jit).items():
                    if time.perf_counter() > end:
                        break
                    with cbam_ops.use_implementation("native"):
                        microseconds = 1e6 * seconds_per_call(function, x)
                    case = {"batch": batch, "dtype": dtype, "map": f"{h}x{w}x{c}"}
                    rows.append({**case, "who": who, "what": what, "us": microseconds})
    gpu_report.write(arguments.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
