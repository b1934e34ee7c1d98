"""The CSV of the figures: one row per machine, case, mode and provider."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cbam_ops._console import CommandError

Row = dict[str, Any]

# What a row is about. A new row replaces the one that has all of these in common with it.
KEY = (
    "machine", "op", "n", "h", "w", "c", "dtype", "layout", "threads", "mode", "provider",
)  # fmt: skip
_NUMBERS = {
    "n": int,
    "h": int,
    "w": int,
    "c": int,
    "threads": int,
    # Seconds of one run of the module: the median, the 20 % and the 80 % quantile.
    "median_s": float,
    "q20_s": float,
    "q80_s": float,
    "runs": int,  # how many timed calls
    "calls": int,  # how many runs of the module, one after the other, in each
    "inputs": int,  # how many different maps the calls go round
    "bytes": int,  # that the arithmetic must move
    "operations": int,  # floating-point operations of the arithmetic
    "gb_per_s": float,  # those bytes over the median
    "copy_s": float,  # the same framework's copy of one map into a fresh output, in the same run
    "copies": float,  # the median in those copies
    "percent_of_copy_bandwidth": float,
    "ours_is_faster": float,  # this provider's median over that of cbam_ops in the same run
    "error": float,  # largest, against float64, relative to the largest value: y or the gradients
    "extra_bytes": int,  # peak of a step beyond maps and gradients (networks: of the whole call)
    "extra_percent_of_x": float,
    "module_percent_of_time": float,  # networks: what the CBAMs take of the whole
    "cpus": int,
    "cache_bytes": int,  # last-level cache
}
FIELDS = (
    *KEY, "group", "median_s", "q20_s", "q80_s", "runs", "calls", "inputs", "bytes", "operations",
    "gb_per_s", "copy_s", "copies", "percent_of_copy_bandwidth", "ours_is_faster", "error",
    "extra_bytes", "extra_percent_of_x", "module_percent_of_time", "processor", "cpus",
    "cache_bytes", "instruction_set", "versions", "commit", "date",
)  # fmt: skip


def key(row: Row) -> tuple[str, ...]:
    """What a row is about, for comparisons."""
    return tuple(str(row[name]) for name in KEY)


def load(path: Path) -> list[Row]:
    """Reads a CSV; empty cells become None, numbers numbers.

    Raises:
      CommandError: the file cannot be read or is none of ours.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in FIELDS if name not in (reader.fieldnames or ())]
            if missing:
                raise CommandError(
                    f"{path} is not a CSV of benchmarks/run.py: it has no column {missing[0]!r}"
                )
            return [_typed(row, f"{path}:{reader.line_num}") for row in reader]
    except OSError as error:
        raise CommandError(f"cannot read {path} ({error.strerror or error})") from error


def _typed(row: dict[str, str], where: str) -> Row:
    typed: Row = {}
    for name in FIELDS:
        text = row.get(name) or ""
        try:
            typed[name] = None if text == "" else _NUMBERS.get(name, str)(text)
        except ValueError as error:
            raise CommandError(f"{where}: {name} is not a number: {text!r}") from error
    return typed


def replace(rows: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """`rows` with those of the same keys replaced by `new`, and the others of `new` at the end."""
    merged = {key(row): row for row in rows}
    for row in new:
        merged[key(row)] = row
    return list(merged.values())


def save(path: Path, rows: Sequence[Row]) -> None:
    """Writes the CSV; a reader sees the old file or the new one, never a part.

    Raises:
      CommandError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(FIELDS)
            writer.writerows([_text(row.get(name)) for name in FIELDS] for row in rows)
        os.replace(partial, path)
    except OSError as error:
        raise CommandError(f"cannot write {path} ({error.strerror or error})") from error


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
