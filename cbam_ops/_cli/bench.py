"""`cbam-ops bench`: the fused ops beside stock TensorFlow on this machine, as a table."""

from __future__ import annotations

import csv
import dataclasses
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from cbam_ops import _bench
from cbam_ops._bench import OURS, Case, Row
from cbam_ops._console import print_table, say, why_reference, written

MINUTES = 1.8
# Seconds of timing per provider and mode.
_LEAST_SECONDS, _MOST_SECONDS = 0.1, 1.5
_BASELINES = {"tf-graph": "TF graph", "xla": "XLA"}

_LEGEND = """\
copies: the time in TensorFlow's copies of one map in the same run; at least 1 forward, 2.5 a step.
% of copy: bytes that must move, per second, beside those of the copy. vs: how many times faster
cbam_ops is. error: the largest of cbam_ops against float64, relative to the largest value."""


def warn_if_busy() -> None:
    """Says so where other programs keep the machine busy: they would be in the figures."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return
    if load > 0.5 * _bench.cpus():
        say(
            f"This machine is busy (load {load:.1f}, {_bench.cpus()} processors): the figures will "
            "show that too. Best run it again in quiet."
        )


def seconds_each(deadline: float, rows: int, overhead: float) -> float:
    """How long to time each of the rows that are left, each with some time beside that."""
    left = deadline - time.monotonic()
    return min(max(left / max(rows, 1) - overhead, _LEAST_SECONDS), _MOST_SECONDS)


def _versus(row: Row | None, ours: Row | None) -> str:
    """How many times faster ours is; a baseline's own time where ours does not run."""
    if row is None:
        return "-"
    if ours is None:
        return f"{1e3 * row['median_s']:.3g} ms"
    return f"{row['median_s'] / ours['median_s']:.1f}x"


def _print_figures(rows: Sequence[Row]) -> None:
    groups: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        key = (*(row[name] for name in "nhwc"), row["dtype"], row["mode"])
        groups.setdefault(key, {})[row["provider"]] = row
    head = ["N x H x W x C", "type", "pass", "cbam_ops", "copies", "% of copy"]
    lines = [[*head, *(f"vs {title}" for title in _BASELINES.values()), "error"]]
    for (n, h, w, c, dtype, mode), group in groups.items():
        ours = group.get(OURS)
        own, error = ["-", "-", "-"], "-"
        if ours is not None:
            own = [f"{1e3 * ours['median_s']:.3g} ms", f"{ours['copies']:.1f}"]
            own.append(f"{ours['percent_of_copy_bandwidth']:.0f} %")
            error = f"{ours['error']:.0e}"
        versus = [_versus(group.get(name), ours) for name in _BASELINES]
        lines.append([f"{n}x{h}x{w}x{c}", str(dtype), str(mode), *own, *versus, error])
    print_table(lines, "<<<" + ">" * (len(lines[0]) - 3))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The rows as the suite's reports read them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with written(path) as part:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(cells)


def run(output: Path | None, allow_reference: bool = False) -> int:
    """Times a selection of cases and prints the table.

    Args:
      output: a CSV to write the figures into; or None.
      allow_reference: whether to time the baselines alone where the fused ops do not run.

    Returns:
      The exit code: 1 if a result was wrong or a case could not be measured.

    Raises:
      CommandError: the fused ops do not run here, or the CSV cannot be written.
    """
    chosen = _bench.quick_cases()
    cause = why_reference(allow_reference)
    if cause is not None:
        say(f"The fused ops do not run here: {cause}")
        chosen = [dataclasses.replace(case, providers=tuple(_BASELINES)) for case in chosen]
    warn_if_busy()
    rows: list[Row] = []
    if output is not None:  # an unwritable folder should not show at the end
        write_rows(output, rows)
    say(f"{len(chosen)} cases, about two minutes. Every result is checked before it is timed.")
    failed = _time(chosen, rows)
    _print_figures(rows)
    say(_LEGEND)
    if output is not None:
        write_rows(output, rows)
        say(f"{len(rows)} rows in {output}")
    return 1 if failed else 0


def _time(chosen: Sequence[Case], rows: list[Row]) -> bool:
    """Adds the cases' rows to `rows`; whether anything went wrong, which it says."""
    from rich.progress import track

    failed = False
    machine = f"{platform.processor() or platform.machine()}, {_bench.cpus()} CPUs"
    deadline = time.monotonic() + 60 * MINUTES
    left = sum(len(case.modes) * len(case.providers) for case in chosen)
    for case in track(chosen, "Timing", transient=True):
        if time.monotonic() > deadline:
            say(f"Not timed: {case.name}: no time was left")
            continue
        inputs, prepared, outcome = _bench.prepare(case, _bench.cache_bytes())
        seconds = seconds_each(deadline, left, overhead=0.5)
        left -= len(case.modes) * len(case.providers)
        common = {"machine": machine, **case.columns, "threads": case.threads or _bench.cpus()}
        timed = _bench.time_prepared(case, inputs, prepared, seconds)
        rows += [{**common, **row} for row in timed]
        for kind in (outcome.wrong, outcome.absent):
            for name, why in kind.items():
                failed |= kind is outcome.wrong or name == OURS
                say(f"Not timed: {case.name}, {name}: {why}")
    return failed
