"""What the figures were measured on, and with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import cbam_ops
from cbam_ops._bench.results import Row

_PACKAGES = ("tensorflow", "keras", "numpy", "torch")
_ASSUMED_CACHE = 32 * 2**20


def cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name with its family and model, which tell virtual machines' names apart."""
    values: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if not name.strip():
                break
            values[name.strip()] = value.strip()
    except OSError:
        pass
    name = values.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in values and "model" in values:
        name += f" (family {values['cpu family']}, model {values['model']})"
    return name


def cache_bytes() -> int:
    """The size of the last-level cache; 32 MB where the system does not tell."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        scale = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        largest = max(largest, int(digits) * scale if digits.isdigit() else 0)
    return largest or _ASSUMED_CACHE


def commit() -> str | None:
    """The commit of the source tree that the package is imported from; "+" if it was changed."""
    package = Path(cbam_ops.__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed copy


def _instruction_set() -> str | None:
    try:
        from cbam_ops import _core
    except ImportError:
        return None
    return _core.instruction_set()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(name: str | None = None) -> Row:
    """The columns that all rows of a run share.

    Args:
      name: how to call this machine in the CSV; by default after what it is.
    """
    instruction_set = _instruction_set()
    versions = {"cbam_ops": cbam_ops.__version__} | {p: _version(p) or "" for p in _PACKAGES}
    return {
        "machine": name or f"{processor()}, {cpus()} CPUs, {instruction_set}",
        "processor": processor(),
        "cpus": cpus(),
        "cache_bytes": cache_bytes(),
        "instruction_set": instruction_set,
        "versions": "; ".join(f"{p} {version}" for p, version in versions.items() if version),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
