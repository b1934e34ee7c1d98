"""The CSV of the figures: one row per machine, case, mode and provider."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cbam_ops._bench import Row
from cbam_ops._console import CommandError

# What a row is about. A new row replaces the one that has all of these in common with it.
KEY = ["machine", "op", "n", "h", "w", "c", "dtype", "layout", "threads", "mode", "provider"]
# The columns and their types.
FIELDS = {
    "machine": "str",
    "op": "str",
    "n": "Int64",
    "h": "Int64",
    "w": "Int64",
    "c": "Int64",
    "dtype": "str",
    "layout": "str",
    "threads": "Int64",
    "mode": "str",
    "provider": "str",
    "group": "str",
    # Seconds of one run of the module: the median, the 20 % and the 80 % quantile.
    "median_s": "float",
    "q20_s": "float",
    "q80_s": "float",
    "runs": "Int64",  # how many timed calls
    "calls": "Int64",  # how many runs of the module, one after the other, in each
    "inputs": "Int64",  # how many different maps the calls go round
    "bytes": "Int64",  # that the arithmetic must move
    "operations": "Int64",  # floating-point operations of the arithmetic
    "gb_per_s": "float",  # those bytes over the median
    "copy_s": "float",  # the same framework's copy of one map into a fresh output, in the same run
    "copies": "float",  # the median in those copies
    "percent_of_copy_bandwidth": "float",
    "ours_is_faster": "float",  # this provider's median over that of cbam_ops in the same run
    "error": "float",  # largest, against float64, relative to the largest value: y or gradients
    "extra_bytes": "Int64",  # peak of a step beyond maps and gradients (networks: of the call)
    "extra_percent_of_x": "float",
    "module_percent_of_time": "float",  # networks: what the CBAMs take of the whole
    "processor": "str",
    "cpus": "Int64",
    "cache_bytes": "Int64",  # last-level cache (of a GPU: L2)
    "instruction_set": "str",
    "versions": "str",
    "commit": "str",
    "date": "str",
}
_REQUIRED = [*KEY, "median_s"]


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as they were measured, with all columns."""
    made = pd.DataFrame(list(rows))
    return made.reindex(columns=list(dict.fromkeys([*FIELDS, *made.columns]))).astype(FIELDS)


def load(path: Path) -> pd.DataFrame:
    """Reads a CSV; columns that it lacks are empty, those that it has besides stay.

    Raises:
      CommandError: the file cannot be read or is none of ours.
    """
    try:
        read = pd.read_csv(path, dtype="str")
    except OSError as error:
        raise CommandError(f"cannot read {path} ({error.strerror or error})") from error
    except ValueError as error:  # pandas' errors of the format
        raise CommandError(f"cannot read {path} ({error})") from error
    for name in _REQUIRED:
        if name not in read:
            raise CommandError(f"{path} is not a CSV of the benchmarks: it has no column {name!r}")
    for name, kind in FIELDS.items():
        if name in read and kind != "str":
            numbers = pd.to_numeric(read[name], errors="coerce")
            wrong = read[name][numbers.isna() & read[name].notna()]
            if len(wrong):
                where = f"{path}:{wrong.index[0] + 2}"
                raise CommandError(f"{where}: {name} is not a number: {wrong.iloc[0]!r}")
            read[name] = numbers
    return read.reindex(columns=list(dict.fromkeys([*FIELDS, *read.columns]))).astype(FIELDS)


def replace(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """`old` with rows of the same keys replaced by `new`, and the others of `new` at the end."""
    both = pd.concat([old, new]).set_index(KEY)
    last = both[~both.index.duplicated(keep="last")]
    return last.loc[both.index.unique()].reset_index()


def save(path: Path, rows: pd.DataFrame) -> None:
    """Writes the CSV; a reader sees the old file or the new one, never a part.

    Raises:
      CommandError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(partial, index=False, float_format="%.4g", lineterminator="\n")
        os.replace(partial, path)
    except OSError as error:
        raise CommandError(f"cannot write {path} ({error.strerror or error})") from error
