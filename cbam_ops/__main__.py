"""The command `cbam-ops`, which is also `python -m cbam_ops`.

The exit codes are in what `--help` shows: see `cbam_ops._cli.arguments`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from cbam_ops._cli.arguments import parser
from cbam_ops._console import CommandError, check_environment, interruptible


def _run(arguments: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "traceback")}
    command = arguments.command
    if given.get("device") is not None:
        command = "gpu_kernels"
    else:
        given.pop("device", None)
    # A command's parts load only for that command, and --help loads nothing.
    run: Callable[..., int] = importlib.import_module(f"cbam_ops._cli.{command}").run
    return run(**given)


def _complain(text: str) -> None:
    """Says it on stderr, if that takes it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (see `--help`).

    Args:
      argv: the arguments after the program's name; None takes them from `sys.argv`.

    Raises:
      SystemExit: from argparse, after --help (0) or wrong arguments (2).
    """
    if sys.stderr is None:  # closed by the caller; libraries write to it unasked
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        _complain("cbam-ops: standard output is closed")
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may not know the letters of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    program, traceback = "cbam-ops", False
    try:
        try:
            arguments = parser().parse_args(argv)
            program, traceback = f"cbam-ops {arguments.command}", arguments.traceback
            check_environment()
            with interruptible():
                return _run(arguments)
        finally:
            sys.stdout.flush()
    except CommandError as error:
        _complain(f"{program}: {error}")
    except KeyboardInterrupt:
        _complain(f"\n{program}: interrupted")
        return 130
    except OSError as error:
        if traceback:
            raise
        place = f" {error.filename}" if error.filename else ""
        _complain(f"{program}: cannot read or write{place}: {error.strerror or error}")
        # What stdout did not take would be tried once more when Python ends, and fail again.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if traceback:
            raise
        _complain(
            f"{program}: unexpected {type(error).__name__}: {error}\n"
            f"{program}: this is a bug; `cbam-ops --traceback ...` shows where."
        )
    return 2


if __name__ == "__main__":
    sys.exit(main())
