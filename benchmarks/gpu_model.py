"""How long the CUDA kernels should take on GPUs that nobody here has, and what bounds them.

    python benchmarks/gpu_model.py                          all GPUs, a batch of 64
    python benchmarks/gpu_model.py --gpu H100 --stage 56x56x256 --batch 256

What there is to do comes from csrc/core/cuda/counts.csv (tests/ptx_counts.py: counted from the
PTX), how fast a GPU does it from published limits. A phase takes as long as the resource that it
needs most: issue slots, floating-point units, L1 and shared memory, L2, or memory. Blocks work on
different phases at once, so the whole takes at least what the busiest resource needs over all
phases ("least"), and at most about the sum of the phases ("most").

Good to a factor of 1.5 or so: PTX is not machine code, latencies are taken to be hidden, and what
several phases read is taken to stay in L2 between them (`python tests/ptx_counts.py --memory` says
whether it would).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cbam_ops._console import CommandError, require, say

COUNTS = Path(__file__).resolve().parents[1] / "csrc" / "core" / "cuda" / "counts.csv"
# Maps that have to move: forward one copy; backward two reads and a write.
IDEAL_MAPS = {"forward": 2, "backward": 3}
# Of the published bandwidth a copy reaches so much.
COPY = 0.9
# Machine instructions of a division or an approximate function beyond the one that is counted.
DIVISION = 8
# A launch and the memset before it, with nothing to overlap them.
LAUNCH = 5e-6


@dataclass(frozen=True)
class Gpu:
    """Limits of a GPU.

    From NVIDIA's data sheets, L2's bandwidth aside: that is what others have measured.

    Attributes:
      multiprocessors: how many, each issuing 128 lanes a clock.
      ghz: their clock, sustained.
      float_lanes: float32 operations of one a clock.
      memory: TB/s.
      l2: TB/s.
    """

    multiprocessors: int
    ghz: float
    float_lanes: int
    memory: float
    l2: float


GPUS = {
    "H100": Gpu(132, 1.7, 128, 3.35, 5.5),
    "H200": Gpu(132, 1.7, 128, 4.8, 5.5),
    "A100": Gpu(108, 1.41, 64, 2.04, 4.5),
    "L4": Gpu(58, 1.6, 128, 0.3, 1.6),
    "RTX 4090": Gpu(128, 2.5, 128, 1.008, 5.0),
}


def resources(counts: pd.DataFrame, gpu: Gpu) -> pd.DataFrame:
    """Nanoseconds for each element that a phase keeps each resource of the whole GPU busy."""
    clocks = gpu.multiprocessors * gpu.ghz  # per ns
    l1 = (counts["read"] + counts["written"]) / 128 + counts["wavefronts"] / 32
    return pd.DataFrame(
        {
            "issue": (counts["instructions"] + DIVISION * counts["division"]) / 128 / clocks,
            "math": counts["math"] / gpu.float_lanes / clocks,
            "L1": l1 / clocks,
            "L2": counts["l2"] / (1e3 * gpu.l2),
            "memory": counts["dram"] / (1e3 * COPY * gpu.memory),
        }
    )


def predict(counts: pd.DataFrame, gpu: Gpu, batch: int) -> pd.DataFrame:
    """A row for each map and direction.

    Args:
      counts: rows of counts.csv.
      gpu: whose limits.
      batch: samples.

    Returns:
      Its case, `least` and `most` in microseconds, `ideal` (how many times what moving the maps
      once takes, at least), `bound` (by what), and each phase's microseconds with what bounds it.
    """
    busy = resources(counts, gpu)
    rows = []
    for case, group in counts.groupby(["stage", "dtype", "layout", "direction"], sort=False):
        stage, dtype, _, direction = case
        h, w, c = map(int, stage.split("x"))
        elements = batch * h * w * c
        phases = group["phase"]
        by_phase = busy.loc[group.index[phases != "all"]] * elements / 1e3
        whole = busy.loc[group.index[phases == "all"]].iloc[0] * elements / 1e3
        names = phases[phases != "all"]
        launch = 1e6 * LAUNCH
        maps = elements * (4 if dtype == "float32" else 2) * IDEAL_MAPS[direction]
        ideal = maps / (1e6 * COPY * gpu.memory)
        rows.append(
            dict(zip(("stage", "dtype", "layout", "direction"), case, strict=True))
            | {"least": whole.max() + launch, "most": by_phase.max(axis=1).sum() + launch}
            | {"ideal": (whole.max() + launch) / ideal, "bound": whole.idxmax()}
            | {
                name: f"{times.max():.3g} {times.idxmax()}"
                for name, (_, times) in zip(names, by_phase.iterrows(), strict=True)
            }
        )
    return pd.DataFrame(rows).fillna("")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for each GPU; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", choices=list(GPUS), help="one of them (default: all)")
    parser.add_argument("--stage", help="one map, like 56x56x256 (default: all)")
    parser.add_argument("--batch", type=int, default=64, help="samples (default: %(default)s)")
    parser.add_argument("--counts", type=Path, default=COUNTS, help="another table of counts")
    arguments = parser.parse_args(argv)
    try:
        require(["tabulate"], "the model")
        counts = pd.read_csv(arguments.counts)
        if arguments.stage is not None:
            counts = counts[counts["stage"] == arguments.stage]
        if counts.empty:
            raise CommandError(f"{arguments.counts} has no map {arguments.stage}")
    except (CommandError, OSError) as error:
        sys.stderr.write(f"gpu_model: {error}\n")
        return 2
    for name, gpu in GPUS.items():
        if arguments.gpu not in (None, name):
            continue
        table = predict(counts, gpu, arguments.batch).round({"least": 1, "most": 1, "ideal": 2})
        say(f"\n{name}, batch {arguments.batch}: microseconds, and what they are bound by\n")
        say(table.to_markdown(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
