"""`cbam-ops bench`: two minutes of the benchmark suite on this machine, as a table."""

from __future__ import annotations

from pathlib import Path

from cbam_ops._console import say


def run(output: Path | None) -> int:
    """Times a selection of cases and prints the table.

    Args:
      output: a CSV for the figures, whose rows of the same cases and machine are replaced; or None.

    Returns:
      The exit code: 1 if a result was wrong or a case could not be measured.

    Raises:
      CommandError: the fused ops do not run here, or the CSV cannot be read or written.
    """
    from cbam_ops._bench import cases, machine, report, results
    from cbam_ops._bench import run as suite

    suite.warn_if_busy()
    suite.check_native()
    known = []
    if output is not None:
        known = results.load(output) if output.exists() else []
        results.save(output, known)
    chosen = cases.quick_cases()
    here = machine.describe()
    say(f"{here['machine']}; {here['versions']}")
    say(f"{len(chosen)} cases, about two minutes. Every result is checked before it is timed.")
    done = suite.run_cases(chosen, suite.QUICK_MINUTES)
    if output is not None:
        results.save(output, results.replace(known, done.rows))
    say()
    say(report.console_table(done.rows))
    say()
    say("copies: the time in TensorFlow's copies of one map in the same run; at least 1 forward,")
    say(
        "2.5 a step. % of copy: bytes that must move, per second, beside those of the copy. vs: how"
    )
    say("many times faster cbam_ops is (for NCHW, than the faster of NCHW and a transposed graph).")
    say("error: the largest against float64. memory: peak of a step beyond maps and gradients.")
    if output is not None:
        say(f"{len(done.rows)} rows in {output}")
    return suite.report_problems(done)
