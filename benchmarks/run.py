"""Times cbam_ops beside its baselines: `python benchmarks/run.py --help`."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as NoAnswerError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cases
import machine
from baselines import PROVIDERS
from cases import NETWORKS, AnyCase, NetworkCase

from cbam_ops import _bench
from cbam_ops._bench import OURS, Outcome, Row
from cbam_ops._cli import bench
from cbam_ops._console import CommandError, say, why_reference

CSV = Path(__file__).parent / "results" / "results.csv"
FULL_MINUTES = 40.0
_CASE_TIMEOUT = 900.0


# --- the process that measures --------------------------------------------------------------------


def redirect(threads: int, log: str) -> None:
    """Whatever the process prints goes into the file `log`."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)


def start(threads: int, log: str) -> None:
    """The beginning of a process that measures with a number of threads."""
    redirect(threads, log)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    try:
        import torch

        torch.set_num_threads(threads)
    except ImportError:
        pass


def work(case: AnyCase, seconds: float, cache_bytes: int) -> Outcome:
    """One case, in that process."""
    if isinstance(case, NetworkCase):
        from network import measure_network

        return measure_network(case, seconds)
    import measure

    return measure.measure(case, seconds, cache_bytes)


class Worker:
    """A process that measures, which may hang or die without taking the run with it.

    Args:
      threads: how many the frameworks get in it.
      begin: what it does first, given `threads` and a file for its output.
    """

    def __init__(self, threads: int, begin: Callable[[int, str], None] = start) -> None:
        self.threads = threads
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115  (as long as it lives)
        # Read by libraries as they load, before `start`.
        os.environ |= {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), begin, (threads, self._log.name)
        )
        self.alive = True

    def ask(self, timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns there.

        Raises:
          CommandError: it raised something, took too long, or the process ended.
        """
        future = self._pool.submit(function, *arguments)
        try:
            return future.result(timeout)
        except BrokenProcessPool as error:
            self.alive = False
            raise CommandError(f"the process ended: {self._last_line()}") from error
        except NoAnswerError as error:
            self.alive = False
            for process in multiprocessing.active_children():
                process.kill()
            raise CommandError(f"no answer within {timeout:.0f} s") from error
        except Exception as error:  # the next case may go well
            text = " ".join(str(error).split())[:300]
            raise CommandError(f"{type(error).__name__}: {text}") from error

    def _last_line(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()
        self._log.close()


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

    def report_problems(self) -> int:
        """Says what went wrong or is missing; the exit code: 1 if anything went wrong."""
        for why, names in self.absent.items():
            where = names[0] if len(names) == 1 else f"{len(names)} cases, e.g. {names[0]}"
            say(f"Not measured: {why} ({where})")
        if self.left_out:
            say(f"No time was left for {len(self.left_out)} cases: {', '.join(self.left_out)}")
            say("Run these with --cases; their rows join the others in the CSV.")
        for text in self.failed:
            say(f"FAILED: {text}")
        for text in self.wrong:
            say(f"WRONG RESULT, not timed: {text}")
        return 1 if self.failed or self.wrong else 0


def run_cases(
    chosen: Sequence[AnyCase],
    minutes: float,
    *,
    threads: int = 0,
    seconds: float | None = None,
    machine_name: str | None = None,
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
    begin: Callable[[int, str], None] = start,
    work: Callable[[AnyCase, float, int], Outcome] = work,
) -> Run:
    """Measures the cases.

    Args:
      chosen: in the order in which to measure; what does not fit into the time is left out.
      minutes: the time for all, which sets how long each provider is timed. What is begun is ended.
      threads: for the cases that name no number; 0 for all processors.
      seconds: to time each provider and mode for; None fits it to `minutes`.
      machine_name: see `machine.describe`.
      on_rows: called with the rows of each case as it is done.
      begin: see `Worker`.
      work: what measures a case there.
    """
    common = machine.describe(machine_name)
    plan = resolve(chosen, threads or common["cpus"])
    run = Run()
    deadline = time.monotonic() + 60 * minutes
    # How long a row takes beside its timing (tracing, compiling, checking), a running mean.
    overhead = 0.5
    rows_left = sum(map(_rows_of, plan))
    worker: Worker | None = None
    from tqdm import tqdm

    progress = tqdm(plan, unit="case", dynamic_ncols=True)
    try:
        for case in progress:
            progress.set_description_str(case.name)
            if time.monotonic() >= deadline:
                run.left_out.append(case.name)
                continue
            if worker is None or not worker.alive or worker.threads != case.threads:
                if worker is not None:
                    worker.close()
                worker = Worker(case.threads, begin)
            each = seconds or bench.seconds_each(deadline, rows_left, overhead)
            started = time.monotonic()
            try:
                outcome = worker.ask(_CASE_TIMEOUT, work, case, each, common["cache_bytes"])
            except CommandError as error:
                run.failed.append(f"{case.name}: {error}")
                continue
            finally:
                beside = (time.monotonic() - started) / _rows_of(case) - each
                overhead += 0.3 * (max(beside, 0) - overhead)
                rows_left -= _rows_of(case)
            run.wrong += [f"{case.name}: {name}: {why}" for name, why in outcome.wrong.items()]
            for name, why in outcome.absent.items():
                if name == OURS:
                    run.failed.append(f"{case.name}: {why}")
                else:
                    run.absent.setdefault(f"{name}: {why}", []).append(case.name)
            rows = [{**common, **case.columns, **row} for row in outcome.rows]
            run.rows += rows
            on_rows(rows)
    finally:
        progress.close()
        if worker is not None:
            worker.close()
    return run


def resolve(chosen: Sequence[AnyCase], threads: int) -> list[AnyCase]:
    """Gives every case its number of threads; of two that are the same then, keeps the first."""
    found: dict[Any, AnyCase] = {}
    for case in chosen:
        case = dataclasses.replace(case, threads=case.threads or threads)
        mode = case.mode if isinstance(case, NetworkCase) else ""
        found.setdefault((mode, *({**case.columns, "group": ""}.values())), case)
    return list(found.values())


def _rows_of(case: AnyCase) -> int:
    """How many rows' time a case takes; a network is as many."""
    return len(case.providers) * (12 if isinstance(case, NetworkCase) else len(case.modes))


def _parser() -> argparse.ArgumentParser:
    providers = list(dict.fromkeys([*PROVIDERS, *NETWORKS]))
    parser = argparse.ArgumentParser(
        description="Times the fused CBAM beside what a user would run instead, and puts the "
        "figures into a CSV: a row replaces the one of the same machine, case, mode and provider.",
        epilog="Exit codes: 0 success; 1 a wrong result or a case that failed; 2 wrong arguments.",
    )
    add = parser.add_argument
    add("--cases", nargs="+", default=[], metavar="TEXT",
        help="only cases whose name contains a text; A+B: both texts (see --list)")  # fmt: skip
    add("--list", action="store_true", help="print the names of the cases and end")
    add("--quick", action="store_true", help="the two-minute selection of cases")
    add("--providers", nargs="+", default=[], choices=providers, metavar="NAME",
        help=f"time only these beside cbam_ops: {', '.join(providers)}")  # fmt: skip
    add("--output", type=Path, default=CSV, metavar="CSV", help="default: %(default)s")
    add("--budget", type=float, metavar="MINUTES",
        help=f"time for all (default: {FULL_MINUTES:g}, with --quick {bench.MINUTES:g}); cases "
        "that do not fit are left out, and named")  # fmt: skip
    add("--seconds", type=float, metavar="S",
        help="time each provider in each mode this long, whatever the budget")  # fmt: skip
    add("--threads", type=int, default=0, metavar="N", help="default: all processors")
    add("--machine", metavar="NAME", help="name of this machine in the CSV")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    import report
    import results

    arguments = _parser().parse_args(argv)
    available = _bench.quick_cases() if arguments.quick else cases.all_cases()
    chosen = cases.select(available, arguments.cases, arguments.providers)
    if arguments.list:
        for case in chosen:
            say(case.name)
        return 0
    try:
        if not chosen:
            raise CommandError(
                f"no case has {' or '.join(arguments.cases)} in its name; see --list"
            )
        why_reference(allow_reference=False)
        bench.warn_if_busy()
        known = results.load(arguments.output) if arguments.output.exists() else results.frame([])
        results.save(arguments.output, known)  # an unwritable folder should not show at the end

        def keep(rows: list[Row]) -> None:
            nonlocal known
            known = results.replace(known, results.frame(rows))
            results.save(arguments.output, known)

        run = run_cases(
            chosen,
            arguments.budget or (bench.MINUTES if arguments.quick else FULL_MINUTES),
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
    if run.rows:
        say(report.console_table(results.frame(run.rows)))
    say(f"\n{len(run.rows)} rows in {arguments.output}")
    return run.report_problems()


if __name__ == "__main__":
    sys.exit(main())
