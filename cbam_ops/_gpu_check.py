"""A GPU proves itself before TensorFlow computes on it with the CUDA kernels.

Once for a GPU of a kind (name, compute capability, driver, build of the kernels) a process of its
own compares the kernels with the CPU's: :mod:`cbam_ops._cli.gpu_kernels`. How that went is a record
in the user's cache folder, which later processes read. A file lock there lets one process check
while others wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import _loader, options

ENVIRONMENT_VARIABLE = "CBAM_OPS_GPU_CHECK"
WORDS = ("auto", "require", "skip")

# How long the check may take to its first line, and then for each case; what another process's may
# take in all.
_START_SECONDS = 300.0
_CASE_SECONDS = 120.0  # the first ones load the kernels, and may have to translate them
_OTHER_SECONDS = 600.0
# `python -m cbam_ops`; without TensorFlow it starts in a second, and leaves TensorFlow's GPU alone.
# Nor is it to find another package of this name in the current folder, which is "" in the path.
_COMMAND = (
    *(sys.executable, "-c"),
    "import sys; sys.modules['tensorflow'] = None; sys.path = [p for p in sys.path if p]; "
    "from cbam_ops.__main__ import main; sys.exit(main())",
)
# What ends a process without it being the kernels' fault.
_SIGNALS_OF_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)


def word() -> str:
    """What CBAM_OPS_GPU_CHECK says: "auto", "require" or "skip".

    Raises:
      ValueError: it says something else.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or "auto"
    if value not in WORDS:
        known = ", ".join(f'"{name}"' for name in WORDS)
        raise ValueError(
            f"the environment variable {ENVIRONMENT_VARIABLE} must be one of {known}, got {value!r}"
        )
    return value


class Gpu(NamedTuple):
    """A kind of GPU: its name, and its compute capability as 10 * major + minor."""

    name: str
    capability: int

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability / 10})"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a check went: "passed", "failed" or "not run", and a sentence on it.

    Attributes:
      verdict: see above.
      detail: how many cases passed; the first that failed, with what came and what was expected; or
        why none could be run.
      date: in UTC.
      unkept: why there is no record of it; empty if there is one.
    """

    verdict: Literal["passed", "failed", "not run"]
    detail: str
    date: str = ""
    unkept: str = ""


# --- records --------------------------------------------------------------------------------------


def _driver() -> str:
    """The release of the driver and the newest CUDA that it knows."""
    version = _loader.load_core().cuda.driver_version()
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:  # not everywhere is there such a file
        text = ""
    release = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", text)
    return f"{release[1] if release else '?'}, CUDA {version // 1000}.{version % 1000 // 10}"


def _key(gpu: Gpu) -> dict[str, Any]:
    """What a record is about: on any other GPU, driver or build it says nothing."""
    build = _loader.build_record().get("libraries", {}).get(_loader.CORE_LIBRARY, "")
    return {**gpu._asdict(), "driver": _driver(), "build": build}


def _folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("cbam_ops") / "gpu_checks"


def _path(gpu: Gpu) -> Path:
    text = json.dumps(_key(gpu), sort_keys=True)
    return _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def recorded(gpu: Gpu) -> Outcome | None:
    """What the record on a GPU says, None without a record that can be read."""
    try:
        record = json.loads(_path(gpu).read_text(encoding="utf-8"))
        if record["key"] == _key(gpu) and record["verdict"] in ("passed", "failed"):
            return Outcome(record["verdict"], str(record["detail"]), str(record["date"]))
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _write(gpu: Gpu, outcome: Outcome) -> None:
    path = _path(gpu)
    record = {"key": _key(gpu), **dataclasses.asdict(outcome)}
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(record, indent=2), encoding="utf-8")
    os.replace(part, path)


@contextlib.contextmanager
def _the_only_one(path: Path) -> Iterator[str]:
    """Waits for the others who check the same; gives why a record cannot be kept, "" if it can."""
    import filelock

    lock = filelock.FileLock(path.with_suffix(".lock"), timeout=_OTHER_SECONDS)
    try:
        if not path.is_absolute():  # without a home, the folder would be made in the current one
            raise OSError(f"this user has no home folder for {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        problem = ""
    except (OSError, NotImplementedError, filelock.Timeout) as error:
        problem = str(error)
    try:
        yield problem
    finally:
        lock.release()


# --- the check ------------------------------------------------------------------------------------


def _devices() -> list[Gpu]:
    """What CUDA finds, in its order; nothing where the build, the driver or a device has none."""
    cuda = _loader.load_core().cuda
    with contextlib.suppress(RuntimeError):
        return [Gpu(*device) for device in cuda.devices()] if cuda.built else []
    return []


def found() -> list[Gpu]:
    """The kinds of GPU that CUDA finds."""
    return list(dict.fromkeys(_devices()))


def report() -> dict[str, str]:
    """For `build_info()`: what the records say, by the kind of GPU."""
    said = {}
    for gpu in found():
        known = recorded(gpu)
        said[str(gpu)] = f"{known.verdict}, {known.date}: {known.detail}" if known else "none yet"
    return said


def check(gpu: Gpu, *, quick: bool) -> Outcome:
    """Compares the kernels with the CPU's on a GPU, whatever its record says, and records it.

    Args:
      gpu: one of those that CUDA finds.
      quick: on small shapes only.
    """
    with _the_only_one(_path(gpu)) as problem:
        return _checked(gpu, quick, problem)


def outcome_of(gpu: Gpu) -> Outcome:
    """What the record says, or what the check says that is made where there is none."""
    known = recorded(gpu)
    if known is not None:
        return known
    with _the_only_one(_path(gpu)) as problem:
        return recorded(gpu) or _checked(gpu, True, problem)


def _checked(gpu: Gpu, quick: bool, problem: str) -> Outcome:
    verdict, detail = _run(gpu, quick)
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    outcome = Outcome(verdict, detail, date)
    if verdict != "not run" and not problem:
        try:
            _write(gpu, outcome)
        except OSError as error:
            problem = str(error)
    return dataclasses.replace(outcome, unkept=problem)


def _run(gpu: Gpu, quick: bool) -> tuple[Literal["passed", "failed", "not run"], str]:
    """The verdict of a process that checks, and a sentence."""
    devices = _devices()
    if gpu not in devices:
        return "not run", f"CUDA finds no {gpu}."
    command = [*_COMMAND, "check", "--gpu-kernels", str(devices.index(gpu))]
    command += ["--quick"] if quick else []
    # It finds what this process finds.
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # what a terminal or a scheduler sends is not for it
            )
        except OSError as error:
            return "not run", f"{command[0]} does not start: {error}."
        try:
            output, in_time = _read(process)
            code = process.wait(_CASE_SECONDS) if in_time else None
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)  # the driver may hold it for longer
            process.stdout.close()  # type: ignore[union-attr]
        errors.seek(0)
        complaint = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return _judge(output, code, *complaint)


def _read(process: subprocess.Popen[bytes]) -> tuple[str, bool]:
    """What the process prints, and whether it went on printing until its end."""
    from cbam_ops._cli.gpu_kernels import STARTED

    assert process.stdout is not None
    data = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            started = data.startswith(STARTED.encode())
            if not selector.select(_CASE_SECONDS if started else _START_SECONDS):
                return data.decode(errors="replace"), False
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                return data.decode(errors="replace"), True
            data += part


def _judge(
    output: str, code: int | None, complaint: str = ""
) -> tuple[Literal["passed", "failed", "not run"], str]:
    """What it means that a process printed this and ended so (None: it did not end)."""
    from cbam_ops._cli.gpu_kernels import STARTED

    lines = [line.strip() for line in output.splitlines()]
    if code is None:
        end = "nothing came for a while"
    elif code < 0:
        end = f"the process was ended by {signal.Signals(-code).name}"
    else:
        end = f"the process ended with code {code}"
    if not output.startswith(STARTED) or code == 2 or -(code or 0) in _SIGNALS_OF_OTHERS:
        return "not run", f"{complaint or end}."
    if code == 0 and lines[-1].startswith("All "):
        return "passed", lines[-1]
    if code == 1:
        return "failed", next((line for line in lines[1:] if not line.endswith(": ok")), end)
    return "failed", f"{lines[-1]} {end}"


# --- the decision ---------------------------------------------------------------------------------


def _under_tensorflow() -> list[Gpu]:
    """The kinds of GPU that TensorFlow uses."""
    import tensorflow as tf

    found = []
    for device in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        major, minor = details.get("compute_capability", (0, 0))
        found.append(Gpu(details.get("device_name", device.name), 10 * major + minor))
    return list(dict.fromkeys(found))


class _Decision(NamedTuple):
    cause: _loader.Cause | None = None  # why the kernels shall not run
    warnings: tuple[tuple[str, _loader.Cause], ...] = ()  # consequences and their causes


_lock = threading.Lock()
_decision: _Decision | None = None


def cause() -> _loader.Cause | None:
    """Why the CUDA kernels shall not run on TensorFlow's GPUs; found out once in a process."""
    global _decision
    with _lock:
        if _decision is None:
            _decision = _decide()
    for consequence, problem in _decision.warnings:
        options.warn_once(problem, consequence)
    return _decision.cause


def is_proved() -> bool:
    """Whether it is known that the kernels may run: costs nothing, and finds nothing out."""
    return _decision is not None and _decision.cause is None


_ANEW = "`cbam-ops check` checks the GPU anew"
_SKIP = f"{ENVIRONMENT_VARIABLE}=skip takes the kernels as they are"


def _decide() -> _Decision:
    choice = word()
    if choice == "skip":
        return _Decision()
    warned = []
    for gpu in _under_tensorflow():
        outcome = outcome_of(gpu)
        if outcome.verdict == "failed":
            cause = _loader.Cause(
                "gpu_check",
                f"On the GPU {gpu} the CUDA kernels failed when compared with the CPU's: "
                f"{outcome.detail}",
                "Please report it with what `cbam-ops info` prints, which has the record. "
                f"{_ANEW}; {_SKIP}.",
            )
            return _Decision(cause)
        if outcome.verdict == "not run":
            cause = _loader.Cause(
                "gpu_check",
                f"On the GPU {gpu} the CUDA kernels could not be compared with the CPU's: "
                f"{outcome.detail}",
                f"{_ANEW}, before other processes use it; {_SKIP}.",
            )
            if choice == "require":
                return _Decision(cause)
            unproved = (
                f"cbam_ops computes with CUDA kernels that nothing has compared with the CPU's "
                f"here ({ENVIRONMENT_VARIABLE}=require would take the reference)."
            )
            warned.append((unproved, cause))
        elif outcome.unkept:
            kept = _loader.Cause(
                "gpu_check",
                f"On the GPU {gpu} the CUDA kernels agree with the CPU's, but no record of it can "
                f"be kept: {outcome.unkept}.",
                f"Let the cache folder be written, or set XDG_CACHE_HOME to another; {_SKIP}.",
            )
            warned.append(("Every process will check the GPU again, for some seconds.", kept))
    return _Decision(None, tuple(warned))
