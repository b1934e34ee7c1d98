"""Checks, times and weighs one case; runs in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cases
import numpy as np
from baselines import PROVIDERS

from cbam_ops import _bench
from cbam_ops._bench import Case, Inputs, Outcome, Provider

# Peaks are read from counters of pages that lag by up to 256 KB for each thread.
_LEAST_MAP_FOR_MEMORY = 12 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    for line in status.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@contextlib.contextmanager
def _memory_that_shows() -> Iterator[Callable[[], object]]:
    """Has the C library give back what is freed, in every thread, so that its next use shows.

    Yields a function that gives back what the main thread kept until then; what another kept goes
    when it next frees anything. Afterwards the library keeps as much as it comes to by itself: who
    is timed in this process later must not fault in fresh pages.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):  # another C library: peaks may come out wrong
        yield lambda: None
        return
    try:
        mallopt(_M_MMAP_THRESHOLD, 2**16)
        mallopt(_M_TRIM_THRESHOLD, 2**16)
        yield lambda: trim(0)
    finally:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**26)


def peak_bytes(function: Callable[[], Any], attempts: int = 3) -> int | None:
    """How many bytes the process has more, at most, during a call than before it.

    The least of some attempts, since other threads of the process allocate too. None where the
    system does not let a process reset its peak (other than Linux, some containers).
    """
    found = []
    try:
        with _memory_that_shows() as give_back:
            function()  # in what its threads kept
            for _ in range(attempts):
                gc.collect()
                give_back()
                before = _status_bytes("VmRSS")
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                result = function()
                found.append(_status_bytes("VmHWM") - before)
                del result
    except OSError:
        return None
    return max(0, min(found))


@functools.lru_cache
def shows_memory(framework: str) -> bool:
    """Whether `peak_bytes` sees what a framework allocates.

    TensorFlow's allocator with oneDNN, the default on processors with AVX512_VNNI, keeps what it
    has had; with TF_ENABLE_ONEDNN_OPTS=0 the system's is used.
    """
    if framework != "tensorflow":
        return True
    import tensorflow as tf

    values = 2**24
    seen = peak_bytes(lambda: tf.ones([values]))
    return seen is not None and seen >= 2 * values  # half of it


def measure(
    case: Case,
    seconds: float,
    cache_bytes: int,
    providers: Mapping[str, Provider] = PROVIDERS,
    truth_of: Callable[[Case, Inputs], dict[str, np.ndarray]] = _bench.truth_of,
) -> Outcome:
    """Checks, times and weighs a case.

    Args:
      case: what to measure, with a known number of threads.
      seconds: how long to time each provider in each mode.
      cache_bytes: the size of the last-level cache, which the rotated inputs must exceed.
      providers: who there is, by name.
      truth_of: what results are checked against.
    """
    inputs, prepared, outcome = _bench.prepare(case, cache_bytes, providers, truth_of)
    outcome.rows = _bench.time_prepared(case, inputs, prepared, seconds)
    # What a step returns is no extra: y, the gradients of the maps and of the weights.
    returned = len(inputs.sets[0]) * case.map_bytes + case.weight_bytes
    extra: dict[str, int] = {}
    for name, candidate in prepared.items():
        on_the_host = candidate.timer is None
        if (
            on_the_host
            and case.map_bytes >= _LEAST_MAP_FOR_MEMORY
            and shows_memory(candidate.framework)
        ):
            peak = peak_bytes(candidate.step)
            if peak is not None:
                extra[name] = max(0, peak - returned)
    for row in outcome.rows:
        row["operations"] = cases.operations(case, row["mode"])
        if row["mode"] == "step" and row["provider"] in extra:
            row["extra_bytes"] = extra[row["provider"]]
            row["extra_percent_of_x"] = 100 * extra[row["provider"]] / case.map_bytes
    return outcome
