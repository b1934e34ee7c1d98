"""Finds regressions between two CSVs of `run`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from cbam_ops._bench import results
from cbam_ops._bench.cases import OURS
from cbam_ops._bench.results import Row
from cbam_ops._console import CommandError, say, table

# A median must be higher by more than this, however steady both runs were ...
_LEAST_SLACK = 0.05
# ... and, where they were not, by more than this many times the spread between the 20 % and the
# 80 % quantile that both runs show, added up.
_SPREADS = 1.0
# Errors differ a little with the order of sums, peaks of memory with pages and threads.
_ERROR_FACTOR = 2.0
_MEMORY_PERCENT_OF_X = 2.0


@dataclasses.dataclass(frozen=True)
class Change:
    """One figure of one row in both files; `ratio` is new over old, `limit` what it may be."""

    row: Row
    what: str
    old: float
    new: float
    ratio: float
    limit: float

    @property
    def regressed(self) -> bool:
        """Whether the new figure is worse than the slack allows."""
        return self.ratio > self.limit

    @property
    def improved(self) -> bool:
        """Whether it is better by as much."""
        return self.ratio < 1 / self.limit


def _spread(row: Row) -> float:
    """How far the middle 60 % of the times spread, relative to their median."""
    return (row["q80_s"] - row["q20_s"]) / row["median_s"]


def slack(old: Row, new: Row) -> float:
    """By what part the new median may exceed the old one."""
    return max(_LEAST_SLACK, _SPREADS * (_spread(old) + _spread(new)))


def compare(
    old: Sequence[Row], new: Sequence[Row], provider: str = OURS, unit: str = "seconds"
) -> tuple[list[Change], int]:
    """All changes of one provider's rows, and how many of the old rows the new file lacks.

    Args:
      old: the rows to compare with.
      new: the rows to judge.
      provider: whose rows; "all" for everybody's.
      unit: "seconds", or "copies" of a map in the same run, which a slower day slows as well.
    """
    column = {"seconds": "median_s", "copies": "copies"}[unit]
    by_key = {results.key(row): row for row in new}
    changes: list[Change] = []
    missing = 0
    for before in old:
        if provider not in ("all", before["provider"]):
            continue
        after = by_key.get(results.key(before))
        if after is None:
            missing += 1
            continue
        if before[column] and after[column]:
            ratio = after[column] / before[column]
            limit = 1 + slack(before, after)
            changes.append(Change(after, unit, before[column], after[column], ratio, limit))
        if before["error"] and after["error"]:
            ratio = after["error"] / before["error"]
            changes.append(
                Change(after, "error", before["error"], after["error"], ratio, _ERROR_FACTOR)
            )
        if before["extra_percent_of_x"] is not None and after["extra_percent_of_x"] is not None:
            a, b = before["extra_percent_of_x"], after["extra_percent_of_x"]
            # Relative to x: a peak of nearly nothing may well be three times as large.
            ratio, limit = (100 + b) / (100 + a), 1 + _MEMORY_PERCENT_OF_X / 100
            changes.append(Change(after, "memory, % of x", a, b, ratio, limit))
    return changes, missing


def describe(row: Row) -> str:
    """The row's case in a few words."""
    size = "x".join(str(row[name]) for name in "nhwc")
    words = [row["op"], size, row["dtype"], row["layout"], row["mode"], row["provider"]]
    return " ".join([*words, f"{row['threads']} threads"])


def _lines(changes: Sequence[Change]) -> str:
    head = ["row", "figure", "old", "new", "new/old", "allowed"]
    body = [
        [
            describe(change.row), change.what, f"{change.old:.4g}", f"{change.new:.4g}",
            f"{change.ratio:.3f}", f"{change.limit:.3f}",
        ]
        for change in changes
    ]  # fmt: skip
    return table([head, *body], "<<>>>>")


def main(argv: Sequence[str] | None = None) -> int:
    """`benchmarks/compare.py OLD NEW`; returns the exit code."""
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
        if not changes:
            raise CommandError("the files have no row in common (is it the same machine?)")
    except CommandError as error:
        sys.stderr.write(f"compare: {error}\n")
        return 2
    worse = sorted((c for c in changes if c.regressed), key=lambda c: -c.ratio / c.limit)
    better = sorted((c for c in changes if c.improved), key=lambda c: c.ratio * c.limit)
    rows = len({results.key(change.row) for change in changes})
    if better:
        say(f"{len(better)} figures are better:")
        say(_lines(better))
    if worse:
        say(f"{len(worse)} figures are worse than the slack allows:")
        say(_lines(worse))
    say(
        f"{rows} rows compared: {len(worse)} regressions, {len(better)} improvements"
        + (f"; {missing} rows of {arguments.old} are not in {arguments.new}" if missing else "")
    )
    return 1 if worse and arguments.fail else 0
