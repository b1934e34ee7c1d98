"""What a GPU has to do for each element of a map, counted from the PTX: no GPU is needed.

    python tests/ptx_counts.py            compares with the committed table (needs nvcc; minutes)
    python tests/ptx_counts.py --write    replaces it (csrc/core/cuda/counts.csv)
    python tests/ptx_counts.py --lines 56x56x256 float32 NHWC backward
                                          the source lines that cost most
    python tests/ptx_counts.py --memory 56x56x256 float32 NHWC
                                          bytes from and to memory of a whole H100

For the maps of ResNet's four stages, with C / 16 hidden units and a kernel of 7 x 7, both
directions, by phase, per element of the map:

    instructions  issue slots of a lane: 32 per instruction of a warp, whoever takes part. Moves,
                  parameters and conversions of addresses are not in them: ptxas folds those
    math          of these, floating point, conversions included
    memory        of these, loads and stores of global, shared and local memory, shuffles
    division      of these, divisions and approximate functions, which are several machine
                  instructions each
    read, written bytes of 32-byte sectors of global memory, over all accesses of warps
    l2            bytes between L1 and L2: what L1 did not have, and all that is written
    dram          bytes between L2 and memory, the written ones included: of so small
                  batches, what has to move at least
    wavefronts    cycles of shared memory, 32 per wavefront of a warp's access
    conflicts     of these, those above what the bytes need
    barriers, atomics, spins
                  instructions of warps like those above; spins are polls that found nothing new

An H100's caches are pretended, and few multiprocessors. nvcc 13.0 and 13.5 give the same counts.
"""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cuda_on_cpu import CSRC
from kernel_calls import Problem
from ptx_machine import PtxKernels

from cbam_ops.testing import Case

TABLE = CSRC / "core" / "cuda" / "counts.csv"
# Batches of one to three million elements: what the gradients of the weights cost beside their
# sums, many samples share.
STAGES = {
    "56x56x256": (2, 56, 56, 256),
    "28x28x512": (2, 28, 28, 512),
    "14x14x1024": (16, 14, 14, 1024),
    "7x7x2048": (32, 7, 7, 2048),
}
# As in the paper, with a kernel of 7 x 7.
REDUCTION = 16
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("NHWC", "NCHW")
KEYS = ("stage", "dtype", "layout", "direction", "phase")
COUNTS = ("instructions", "math", "memory", "division", "read", "written", "l2", "dram",
          "wavefronts", "conflicts", "barriers", "atomics", "spins")  # fmt: skip
MARGIN = 0.03
# What 100 KB of shared memory, the least that three or four blocks of 21 KB can have, leave of 256.
L1_BYTES, L2_BYTES = 156 << 10, 50 << 20

_PASSES = ("channel pool", "spatial pool", "spatial gradient", "channel gradient")
# Phases whose work is that of the elements; the others' is partly that of the call.
OVER_MAPS = (*_PASSES, "apply", "map gradient", "convolution")
_PHASES = {"Apply": "apply", "MapGrad": "map gradient"}
_PHASES |= dict.fromkeys(("Hidden", "FoldHidden", "Gate", "HiddenGrad", "ChannelSides"), "MLP")
_PHASES |= dict.fromkeys(("Convolution", "PositionSides", "NormGrad", "Normalise"), "convolution")
_PHASES |= dict.fromkeys(("WeightGradient", "Taps", "Totals", "Statistics"), "weights")

Row = dict[str, Any]


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Names without their parameters."""
    listed = sorted(set(names))
    done = subprocess.run(
        ["c++filt", "-p"], input="\n".join(listed), capture_output=True, text=True, check=True
    )
    return dict(zip(listed, done.stdout.splitlines(), strict=True))


def phase_of(chain: Iterable[str]) -> str:
    """By functions that were inlined into one another, the outermost first."""
    for name in chain:
        base = re.sub(r"<.*", "", name).rpartition("::")[2]
        found = re.search(r"Reduce\w*<.*\((?:\w+::)*Pass\)(\d)", name)
        if found:
            return _PASSES[int(found[1])]
        if base in _PHASES:
            return _PHASES[base]
    return "schedule"


def instructions(kernels: PtxKernels) -> Iterator[tuple[str, str, Row]]:
    """Phase, source line and counts of every instruction that ran."""
    rows = [
        ([name for name, _, _ in reversed(row["lines"]) if name], row)
        for kernel in kernels.counts()
        for row in kernel["instructions"]
    ]
    names = demangle(name for chain, _ in rows for name in chain)
    for chain, row in rows:
        _, file, line = row["lines"][0] if row["lines"] else ("", "", 0)
        yield phase_of(names[name] for name in chain), f"{Path(file).name}:{line}", row


def measure(row: Row) -> Counter[str]:
    """Of one instruction, in the table's terms, before the division by elements."""
    family, slots = row["family"], 32 * row["issued"]
    kind, _, where = family.partition(" ")
    result = Counter(dict.fromkeys(COUNTS, 0))
    if family not in ("move", "none"):
        result["instructions"] = slots
    result["math"] = slots * (family in ("float32", "float64", "conversion"))
    result["memory"] = slots * (kind in ("load", "store", "shuffle") and where != "parameter")
    result["division"] = slots * (family in ("division", "special"))
    if where == "global":
        result["read" if kind == "load" else "written"] = 32 * row["sectors"]
        result["l2"] = 32 * row["from_l2"]
        result["dram"] = 32 * row["from_dram"] * (kind == "load")
    result["wavefronts"] = 32 * row["wavefronts"]
    result["conflicts"] = 32 * (row["wavefronts"] - row["least_wavefronts"])
    result["barriers"] = slots * (family == "barrier")
    result["atomics"] = slots * (kind == "atomic")
    result["spins"] = 32 * row["spins"]
    return result


def run(
    kernels: PtxKernels, stage: str, dtype: str, layout: str, batch: int = 0, **machine: Any
) -> Iterator[tuple[str, int]]:
    """Runs both directions and stops after each, to be counted: its name, the map's elements."""
    size = (batch or STAGES[stage][0], *STAGES[stage][1:])
    case = Case(
        size=size, hidden=size[-1] // REDUCTION, kernel_size=7, dtype=dtype, data_format=layout
    )
    problem = Problem(case, gate_gradients=False)
    outputs: Any = None
    for direction in ("forward", "backward"):
        kernels.configure(races=False, **{"l1": L1_BYTES, "l2": L2_BYTES, **machine})
        if direction == "forward":
            outputs = problem.forward(kernels)
        else:
            problem.backward(kernels, outputs)
        yield direction, math.prod(size)


def count(
    kernels: PtxKernels, stage: str, dtype: str, layout: str, batch: int = 0, **machine: Any
) -> list[Row]:
    """The rows of one map."""
    table = []
    for direction, elements in run(kernels, stage, dtype, layout, batch, **machine):
        phases: dict[str, Counter[str]] = defaultdict(Counter)
        for phase, _, row in instructions(kernels):
            phases[phase].update(measure(row))
            phases["all"].update(measure(row))
        phases["all"]["dram"] += 32 * kernels.sectors_written()
        for phase, counts in sorted(phases.items()):
            keys = dict(zip(KEYS, (stage, dtype, layout, direction, phase), strict=True))
            values = {name: float(f"{counts[name] / elements:.4g}") for name in COUNTS}
            table.append(keys | values)
    return table


def count_all(kernels: PtxKernels) -> list[Row]:
    """The whole table."""
    return [
        row
        for stage in STAGES
        for dtype in DTYPES
        for layout in LAYOUTS
        for row in count(kernels, stage, dtype, layout)
    ]


def read_table(path: Path = TABLE) -> list[Row]:
    """The committed rows."""
    with path.open(newline="") as file:
        return [
            {k: v if k in KEYS else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def write_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, KEYS + COUNTS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def differences(got: Iterable[Row], table: Iterable[Row]) -> list[str]:
    """Where more is to be done than the table says, by more than the margin. Less is welcome."""
    known = {tuple(row[k] for k in KEYS): row for row in table}
    found = []
    for row in got:
        key = tuple(row[k] for k in KEYS)
        if key not in known:
            found.append(
                f"{' '.join(key)}: not in {TABLE.name}: python tests/ptx_counts.py --write"
            )
            continue
        for name in COUNTS:
            was, now = known[key][name], row[name]
            # What is next to nothing may double; polls depend on who happens to be first.
            if name != "spins" and now > was * (1 + MARGIN) + 0.02:
                found.append(f"{' '.join(key)}: {name} {now}, the table has {was}")
    return found


def print_memory(kernels: PtxKernels, stage: str, dtype: str, layout: str) -> None:
    """What L2 does not hold between two passes, with all blocks of an H100 and 16 samples.

    Of L2 one half is what can be counted on: what a multiprocessor reads from the other half is
    there twice.
    """
    for l2 in (50, 25):
        machine = {"l2": l2 << 20, "multiprocessors": 132, "seed": 1}
        for direction, elements in run(kernels, stage, dtype, layout, 16, **machine):
            counts = sum((measure(row) for _, _, row in instructions(kernels)), Counter())
            written = 32 * kernels.sectors_written()
            print(f"L2 of {l2} MB, {direction}: {counts['dram'] / elements:.2f} bytes read and "
                  f"{written / elements:.2f} written for each element", flush=True)  # fmt: skip


def print_lines(kernels: PtxKernels, stage: str, dtype: str, layout: str, direction: str) -> None:
    """The lines that issue most instructions, with what they read and how they conflict."""
    for name, elements in run(kernels, stage, dtype, layout):
        if name != direction:
            continue
        lines: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for phase, line, row in instructions(kernels):
            lines[phase, line].update(measure(row))
        columns = ("instructions", "l2", "wavefronts", "conflicts")
        print(f"{'phase':18}{'line':24}" + "".join(f"{c:>14}" for c in columns))
        for (phase, line), counts in sorted(lines.items(), key=lambda x: -x[1]["instructions"])[
            :40
        ]:
            values = "".join(f"{counts[c] / elements:14.3f}" for c in columns)
            print(f"{phase:18}{line:24}{values}")


if __name__ == "__main__":
    if "--lines" in sys.argv:
        print_lines(PtxKernels(), *sys.argv[2:6])
    elif "--memory" in sys.argv:
        print_memory(PtxKernels(), *sys.argv[2:5])
    elif "--write" in sys.argv:
        write_table(count_all(PtxKernels()))
    else:
        problems = differences(count_all(PtxKernels()), read_table())
        print("\n".join(problems) or f"no more than in {TABLE.name}")
        sys.exit(1 if problems else 0)
