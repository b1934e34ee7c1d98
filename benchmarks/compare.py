"""Finds regressions between two CSVs of the benchmarks: `compare.py OLD NEW --fail`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import results
from results import KEY

from cbam_ops._bench import OURS
from cbam_ops._console import CommandError, say

# A median must be higher by more than this, however steady both runs were ...
_LEAST_SLACK = 0.05
# ... and, where they were not, by more than this many times the spread between the 20 % and the
# 80 % quantile that both runs show, added up.
_SPREADS = 1.0
# Errors differ a little with the order of sums, peaks of memory with pages and threads.
_ERROR_FACTOR = 2.0
_MEMORY_PERCENT_OF_X = 2.0


def compare(
    old: pd.DataFrame, new: pd.DataFrame, provider: str = OURS, unit: str = "seconds"
) -> tuple[pd.DataFrame, int]:
    """Every figure of one provider's rows in both, and how many of the old rows the new one lacks.

    Args:
      old: the rows to compare with.
      new: the rows to judge.
      provider: whose rows; "all" for everybody's.
      unit: "seconds", or "copies" of a map in the same run, which a slower day slows as well.

    Returns:
      KEY, figure, old, new, ratio (new over old), limit (what that may be).
    """
    if provider != "all":
        old = old[old["provider"] == provider]
    both = old.merge(new, on=KEY, suffixes=("_old", "_new"))
    spreads = sum(
        (both[f"q80_s_{which}"] - both[f"q20_s_{which}"]) / both[f"median_s_{which}"]
        for which in ("old", "new")
    )

    def figure(title: str, column: str) -> pd.DataFrame:
        names = {f"{column}_old": "old", f"{column}_new": "new"}
        found = both[[*KEY, *names]].rename(columns=names).assign(figure=title)
        return found.dropna(subset=["old", "new"])

    times = figure(unit, {"seconds": "median_s", "copies": "copies"}[unit])
    times["ratio"] = times["new"] / times["old"]
    times["limit"] = 1 + (_SPREADS * spreads).clip(lower=_LEAST_SLACK)
    errors = figure("error", "error").query("old > 0")
    errors["ratio"], errors["limit"] = errors["new"] / errors["old"], _ERROR_FACTOR
    memory = figure("memory, % of x", "extra_percent_of_x")
    # Relative to x: a peak of nearly nothing may well be three times as large.
    memory["ratio"] = (100 + memory["new"]) / (100 + memory["old"])
    memory["limit"] = 1 + _MEMORY_PERCENT_OF_X / 100
    return pd.concat([times, errors, memory], ignore_index=True), len(old) - len(both)


def _lines(changes: pd.DataFrame) -> str:
    size = changes[["n", "h", "w", "c"]].astype("str").agg("x".join, axis=1)
    shown = changes[["op", "dtype", "layout", "threads", "mode", "provider", "figure", "old", "new",
                     "ratio", "limit"]]  # fmt: skip
    shown.insert(1, "size", size)
    return shown.to_markdown(index=False, tablefmt="simple", floatfmt=".4g")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Compares two CSVs of benchmarks/run.py row by row: times, errors, memory.",
        epilog="A time is a regression where the median grew by more than 5 %% and by more than "
        "the spread (80 %% less 20 %% quantile) of both runs together. Exit codes: 0 success; 1 "
        "with --fail and one or more regressions; 2 files that cannot be compared.",
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--fail", action="store_true", help="exit code 1 on any regression")
    parser.add_argument(
        "--provider", default=OURS, help='whose rows: a name, or "all" (default: %(default)s)'
    )
    parser.add_argument(
        "--unit",
        choices=("seconds", "copies"),
        default="seconds",
        help="copies: times relative to a copy of the map in the same run (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        old, new = results.load(arguments.old), results.load(arguments.new)
        changes, missing = compare(old, new, arguments.provider, arguments.unit)
        if changes.empty:
            raise CommandError("the files have no row in common (is it the same machine?)")
    except CommandError as error:
        sys.stderr.write(f"compare: {error}\n")
        return 2
    changes["over"] = changes["ratio"] / changes["limit"]
    worse = changes[changes["over"] > 1].sort_values("over", ascending=False)
    better = changes[changes["ratio"] * changes["limit"] < 1].sort_values("over")
    for some, how in ((better, "better"), (worse, "worse than the slack allows")):
        if len(some):
            say(f"{len(some)} figures are {how}:\n{_lines(some)}")
    rows = len(changes.drop_duplicates(KEY))
    say(
        f"{rows} rows compared: {len(worse)} regressions, {len(better)} improvements"
        + (f"; {missing} rows of {arguments.old} are not in {arguments.new}" if missing else "")
    )
    return 1 if len(worse) and arguments.fail else 0


if __name__ == "__main__":
    sys.exit(main())
