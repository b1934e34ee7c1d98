"""Runs cases in worker processes, with a progress bar, and puts the figures into a CSV."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cbam_ops._bench import cases as cases_module
from cbam_ops._bench import machine, report, results
from cbam_ops._bench.cases import NETWORKS, Case, NetworkCase
from cbam_ops._bench.providers import PROVIDERS
from cbam_ops._bench.results import Row
from cbam_ops._console import CommandError, import_tensorflow, say

AnyCase = Case | NetworkCase

FULL_MINUTES, QUICK_MINUTES = 40.0, 1.8
# Seconds of timing per provider and mode.
_LEAST_SECONDS, _MOST_SECONDS = 0.1, 1.5
_CASE_TIMEOUT = 900.0


# --- the worker -----------------------------------------------------------------------------------


class _Worker:
    """A process that measures with one number of threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
        environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cbam_ops._bench.worker", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def ask(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a job; `{"failed": why}` if the process dies or takes too long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write((json.dumps(job) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"failed": self._epitaph()}
        if not self._selector.select(timeout):
            self._process.kill()
            return {"failed": f"no answer within {timeout:.0f} s"}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": self._epitaph()}

    def _epitaph(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with {code}: {lines[-1] if lines else 'no message'}"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._selector.close()
        self._errors.close()


# --- progress -------------------------------------------------------------------------------------


class _Progress:
    """A progress bar on a terminal; elsewhere a line per case."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="case", leave=False, dynamic_ncols=True)
            except ImportError:
                pass

    def start(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(name)
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K[{self._done}/{self._total}] {name}")
            sys.stderr.flush()

    def finish(self, name: str, seconds: float) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif not sys.stderr.isatty():
            sys.stderr.write(f"[{self._done}/{self._total}] {name}: {seconds:.1f} s\n")
            sys.stderr.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")


# --- the run --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What a run brought.

    Attributes:
      rows: the figures, with all columns.
      wrong: results that are not the module's, by case and provider. Fails a run.
      failed: cases that could not be measured, and why. Fails a run.
      absent: providers that could not compute a case, and why.
      left_out: cases for which there was no time.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    absent: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)


def run_cases(
    chosen: Sequence[AnyCase],
    minutes: float,
    *,
    threads: int = 0,
    seconds: float | None = None,
    machine_name: str | None = None,
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
) -> Run:
    """Measures the cases.

    Args:
      chosen: in the order in which to measure; what does not fit into the time is left out.
      minutes: the time for all, which sets how long each provider is timed. What is begun is ended.
      threads: for the cases that name no number; 0 for all processors.
      seconds: to time each provider and mode for; None fits it to `minutes`.
      machine_name: see `machine.describe`.
      on_rows: called with the rows of each case as it is done.
    """
    common = machine.describe(machine_name)
    default = threads or common["cpus"]
    plan = _resolve(chosen, default)
    run = Run()
    progress = _Progress(len(plan))
    deadline = time.monotonic() + 60 * minutes
    # How long a row takes beside its timing (tracing, compiling, checking), a running mean.
    overhead = 0.5
    rows_left = sum(_rows_of(case) for case in plan)
    worker: _Worker | None = None
    try:
        for case in plan:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                run.left_out.append(case.name)
                continue
            if worker is None or not worker.alive or worker.threads != case.threads:
                if worker is not None:
                    worker.close()
                worker = _Worker(case.threads)
            per_row = seconds or min(
                max(remaining / rows_left - overhead, _LEAST_SECONDS), _MOST_SECONDS
            )
            progress.start(case.name)
            started = time.monotonic()
            job = {
                "case": dataclasses.asdict(case),
                "seconds": per_row,
                "cache_bytes": common["cache_bytes"],
            }
            answer = worker.ask(job, _CASE_TIMEOUT)
            elapsed = time.monotonic() - started
            overhead += 0.3 * (max(elapsed / _rows_of(case) - per_row, 0) - overhead)
            rows_left -= _rows_of(case)
            progress.finish(case.name, elapsed)
            if "failed" in answer:
                run.failed.append(f"{case.name}: {answer['failed']}")
                continue
            run.wrong += [f"{case.name}: {p}: {why}" for p, why in answer["wrong"].items()]
            for provider, why in answer["absent"].items():
                if provider == cases_module.OURS:
                    run.failed.append(f"{case.name}: {why}")
                    continue
                run.absent.setdefault(f"{provider}: {why}", []).append(case.name)
            rows = [{**common, **_columns(case), **row} for row in answer["rows"]]
            run.rows += rows
            on_rows(rows)
    finally:
        progress.close()
        if worker is not None:
            worker.close()
    return run


def _resolve(chosen: Sequence[AnyCase], threads: int) -> list[AnyCase]:
    """Gives every case its number of threads; of two that are the same then, keeps the first."""
    found: dict[Any, AnyCase] = {}
    for case in chosen:
        case = dataclasses.replace(case, threads=case.threads or threads)
        found.setdefault(tuple(sorted((k, str(v)) for k, v in _identity(case).items())), case)
    return list(found.values())


def _identity(case: AnyCase) -> Row:
    columns = _columns(case)
    del columns["group"]
    if isinstance(case, NetworkCase):
        columns["mode"] = case.mode
    return columns


def _rows_of(case: AnyCase) -> int:
    return len(case.providers) * (len(case.modes) if isinstance(case, Case) else 12)


def _columns(case: AnyCase) -> Row:
    """The columns of a row that say what the case is."""
    if isinstance(case, NetworkCase):
        return {
            "op": f"resnet{case.depth}", "n": case.n, "h": case.size, "w": case.size, "c": 3,
            "dtype": "float32", "layout": "NHWC", "threads": case.threads, "group": case.group,
        }  # fmt: skip
    return {
        "op": case.op, "n": case.n, "h": case.h, "w": case.w, "c": case.c, "dtype": case.dtype,
        "layout": case.layout, "threads": case.threads, "group": case.group,
    }  # fmt: skip


def warn_if_busy() -> None:
    """Says so where other programs keep the machine busy: they would be in the figures."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return
    if load > 0.5 * machine.cpus():
        say(
            f"This machine is busy (load {load:.1f}, {machine.cpus()} processors): the figures "
            "will show that too. Best run it again in quiet."
        )


def report_problems(run: Run) -> int:
    """Says what went wrong or is missing; the exit code: 1 if anything went wrong."""
    for why, names in run.absent.items():
        where = names[0] if len(names) == 1 else f"{len(names)} cases, e.g. {names[0]}"
        say(f"Not measured: {why} ({where})")
    if run.left_out:
        say(f"No time was left for {len(run.left_out)} cases: {', '.join(run.left_out)}")
        say("Run these with --cases; their rows join the others in the CSV.")
    for text in run.failed:
        say(f"FAILED: {text}")
    for text in run.wrong:
        say(f"WRONG RESULT, not timed: {text}")
    return 1 if run.failed or run.wrong else 0


def check_native() -> None:
    """Stops where the fused ops do not run: there would be nothing to measure.

    Raises:
      CommandError: with the cause and its cure.
    """
    import_tensorflow()
    from cbam_ops import _loader

    cause = _loader.load_ops()
    if isinstance(cause, _loader.Cause):
        raise CommandError(f"the fused ops do not run here, so there is nothing to time. {cause}")


def _parser(default_output: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Times the fused CBAM beside what a user would run instead, and puts the "
        "figures into a CSV: a row replaces the one of the same machine, case, mode and provider.",
        epilog="Exit codes: 0 success; 1 a wrong result or a case that failed; 2 wrong arguments.",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only cases whose name contains a text; A+B: both texts (see --list)",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--quick", action="store_true", help="the two-minute selection of cases")
    parser.add_argument(
        "--providers",
        nargs="+",
        default=[],
        choices=list(dict.fromkeys([*PROVIDERS, *NETWORKS])),
        metavar="NAME",
        help="time only these beside cbam_ops: "
        + ", ".join(dict.fromkeys([*PROVIDERS, *NETWORKS])),
    )
    parser.add_argument(
        "--output", type=Path, default=default_output, metavar="CSV", help="default: %(default)s"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="MINUTES",
        help=f"time for all (default: {FULL_MINUTES:g}, with --quick {QUICK_MINUTES:g}); cases "
        "that do not fit are left out, and named",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=None,
        metavar="S",
        help="time each provider in each mode this long, whatever the budget",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="default: all processors"
    )
    parser.add_argument("--machine", metavar="NAME", help="name of this machine in the CSV")
    return parser


def main(argv: Sequence[str] | None = None, default_output: Path = Path("results.csv")) -> int:
    """`benchmarks/run.py`; returns the exit code.

    Args:
      argv: the arguments; None takes them from `sys.argv`.
      default_output: the CSV where none is named.
    """
    arguments = _parser(default_output).parse_args(argv)
    available = cases_module.quick_cases() if arguments.quick else cases_module.all_cases()
    chosen = cases_module.select(available, arguments.cases, arguments.providers)
    if arguments.list:
        for case in chosen:
            say(case.name)
        return 0
    try:
        if not chosen:
            raise CommandError(
                f"no case has {' or '.join(arguments.cases)} in its name; see --list"
            )
        warn_if_busy()
        check_native()
        known = results.load(arguments.output) if arguments.output.exists() else []
        results.save(arguments.output, known)  # an unwritable folder should not show at the end

        def keep(rows: list[Row]) -> None:
            nonlocal known
            known = results.replace(known, rows)
            results.save(arguments.output, known)

        run = run_cases(
            chosen,
            arguments.budget or (QUICK_MINUTES if arguments.quick else FULL_MINUTES),
            threads=arguments.threads,
            seconds=arguments.seconds,
            machine_name=arguments.machine,
            on_rows=keep,
        )
    except CommandError as error:
        sys.stderr.write(f"run: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("run: interrupted; what was done is in the CSV\n")
        return 130
    say(report.console_table(run.rows))
    say()
    say(f"{len(run.rows)} rows in {arguments.output}")
    return report_problems(run)
