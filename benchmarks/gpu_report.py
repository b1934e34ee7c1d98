"""What a run of gpu_check.py found: CSV, the short table, the targets, the picture. No GPU needed.

A row is one timing: who, what (forward, backward or step), batch, map, dtype, us (microseconds, a
median), copy_us (a device copy of the map, in the same run), map_bytes, l2_bytes, and for ours the
path ("cluster" or "portable") and, at batch 1, the number of kernel launches.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# What must move, in copies of the map (a copy: one read, one write).
IDEAL = {"forward": 1.0, "backward": 1.5, "step": 2.5}

OURS, PORTABLE, OURS_IN_TENSORFLOW = "ours", "ours (portable)", "ours (TF op)"
COMPILED = ("torch.compile", "JAX", "TF XLA")
EAGER = ("torch eager", "TF graph")
PEERS = (*EAGER, *COMPILED)
_NUMBERS = {"us", "copy_us"}
_INTEGERS = {"batch", "map_bytes", "l2_bytes", "launches"}


def write(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    def typed(name: str, text: str) -> Any:
        if name in _NUMBERS:
            return float(text)
        return int(text) if name in _INTEGERS and text else text

    with path.open(newline="") as file:
        return [{k: typed(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def of_ideal(row: Row) -> float:
    """Its time over that of what must move, at the speed of the copy."""
    return float(row["us"]) / (IDEAL[row["what"]] * float(row["copy_us"]))


def by_case(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The rows of each batch, map, type and direction, by who."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["batch"], row["dtype"], row["map"], row["what"])
        cases.setdefault(key, {})[row["who"]] = row
    return cases


def _ours(found: dict[str, Row]) -> Row | None:
    return found.get(OURS) or found.get(PORTABLE)


def table(rows: Sequence[Row]) -> str:
    """One line per case: our time, in multiples of the ideal, and how many times faster we are."""
    columns = (PORTABLE, OURS_IN_TENSORFLOW, *PEERS)
    head = ["batch", "type", "map", "pass", "us", "x ideal", "path", *columns]
    lines = [head]
    for (batch, dtype, size, what), found in by_case(rows).items():
        ours = _ours(found)
        if ours is None:
            continue
        ratios = [f"{found[c]['us'] / ours['us']:.2f}" if c in found else "-" for c in columns]
        own = [f"{ours['us']:.1f}", f"{of_ideal(ours):.2f}", str(ours.get("path", "-"))]
        lines.append([str(batch), dtype, size, what, *own, *ratios])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _judge(name: str, values: Sequence[float], limit: float, at_most: bool) -> str:
    if not values:
        return f"{name}: not measured"
    good = sum(value <= limit if at_most else value >= limit for value in values)
    worst = max(values) if at_most else min(values)
    sign = "at most" if at_most else "at least"
    return (
        f"{name}: {sign} {limit:g} wanted; {good} of {len(values)} met, worst {worst:.2f}, "
        f"median {statistics.median(values):.2f}"
    )


def verdict(rows: Sequence[Row]) -> list[str]:
    """What the kernels are to reach, line by line; on maps of at least three times the L2."""
    cases = by_case(rows)
    large = {
        key: found
        for key, found in cases.items()
        if (ours := _ours(found)) and ours["map_bytes"] >= 3 * ours["l2_bytes"]
    }

    def ideal(what: str, path: str) -> list[float]:
        return [
            of_ideal(row)
            for key, found in large.items()
            for row in found.values()
            if key[3] == what and row["who"] in (OURS, PORTABLE) and row.get("path") == path
        ]

    def against(what: str, peers: Sequence[str]) -> list[float]:
        speeds = []
        for key, found in large.items():
            times = [found[peer]["us"] for peer in peers if peer in found]
            if key[3] == what and times:
                speeds.append(min(times) / found.get(OURS, _ours(found) or {})["us"])
        return speeds

    lines = [
        _judge("forward, copies, clusters", ideal("forward", "cluster"), 1.25, True),
        _judge("forward, copies, portable", ideal("forward", "portable"), 1.9, True),
        _judge("backward, times the ideal, clusters", ideal("backward", "cluster"), 1.35, True),
        _judge("backward, times the ideal, portable", ideal("backward", "portable"), 2.2, True),
    ]
    for peers, least in ((COMPILED, {"forward": 2, "step": 3}), (EAGER, {"forward": 4, "step": 6})):
        for what, limit in least.items():
            name = f"{what}, against the faster of {', '.join(peers)}"
            lines.append(_judge(name, against(what, peers), limit, False))
    small = cases.get((1, "float32", "14x14x1024", "forward"), {})
    ours = _ours(small)
    if ours is None:
        lines.append("batch 1, 14x14x1024: not measured")
    else:
        beaten = [peer for peer in PEERS if peer in small and small[peer]["us"] <= ours["us"]]
        launches = ours.get("launches") or "unknown"
        lines.append(
            f"batch 1, 14x14x1024: fewer than 4 launches wanted, {launches}; faster than us: "
            f"{', '.join(beaten) or 'none'}"
        )
    return lines


def network_table(rows: Sequence[Row]) -> str:
    """A training step of ResNet-50 without CBAM, and what each kind of CBAM adds to it."""
    if not rows:
        return "ResNet-50: not measured"
    bare = {row["dtype"]: row["ms"] for row in rows if row["who"] == "without CBAM"}
    lines = []
    for row in rows:
        line = f"ResNet-50, batch {row['batch']}, {row['dtype']}, {row['who']}: {row['ms']:.1f} ms"
        if row["who"] != "without CBAM" and row["dtype"] in bare:
            line += f", CBAM's share {100 * (1 - bare[row['dtype']] / row['ms']):.0f} %"
        lines.append(line)
    return "\n".join(lines)


_COLORS = {
    OURS: "#1b7837",
    PORTABLE: "#a6dba0",
    OURS_IN_TENSORFLOW: "#5aae61",
    "torch eager": "#4e79a7",
    "torch.compile": "#76b7b2",
    "JAX": "#9467bd",
    "TF graph": "#f28e2b",
    "TF XLA": "#e15759",
}


def draw(rows: Sequence[Row], path: Path, device: str) -> None:
    """Bars: everybody's time in copies of the map, forward and step, at the middle batch."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in rows})
    batch = 32 if 32 in batches else batches[-1]
    kinds = [(d, w) for d in ("float32", "bfloat16") for w in ("forward", "step")]
    figure = Figure(figsize=(13, 8), dpi=110, layout="constrained")
    for axis, (dtype, what) in zip(figure.subplots(2, 2).flat, kinds, strict=True):
        chosen = {
            key[2]: found
            for key, found in by_case(rows).items()
            if key[0] == batch and key[1] == dtype and key[3] == what
        }
        names = [n for n in _COLORS if any(n in found for found in chosen.values())]
        width = 0.8 / max(1, len(names))
        for i, name in enumerate(names):
            for j, found in enumerate(chosen.values()):
                if name not in found:
                    continue
                copies = found[name]["us"] / found[name]["copy_us"]
                place = j + (i - (len(names) - 1) / 2) * width
                axis.bar(place, copies, 0.92 * width, color=_COLORS[name])
                axis.annotate(
                    f"{copies:.1f}", (place, copies), ha="center", va="bottom", fontsize=6
                )
        for name in names:
            axis.bar(0, 0, color=_COLORS[name], label=name)
        axis.axhline(IDEAL[what], color="black", lw=0.8, ls="--")
        axis.set_xticks(range(len(chosen)), [f"{batch}x{size}" for size in chosen])
        axis.set_ylabel("copies of the map")
        axis.set_title(f"{what}, {dtype}; dashed: what must move", loc="left", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        if names:
            axis.legend(fontsize=7, ncols=2)
    figure.suptitle(f"Time of one CBAM in copies of its map, {device} (lower is better)")
    figure.savefig(path)
