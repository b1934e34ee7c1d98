"""What the figures were measured on, and with."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import cbam_ops
from cbam_ops._bench import Row, cache_bytes, cpus

_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "torch", "jax")


def processor() -> str:
    """The processor's name with its family and model, which tell virtual machines' names apart."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        first = ""
    pairs = (line.partition(":") for line in first.splitlines())
    values = {name.strip(): value.strip() for name, _, value in pairs}
    name = values.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in values and "model" in values:
        name += f" (family {values['cpu family']}, model {values['model']})"
    return name


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


def gpu() -> str | None:
    """The first GPU's name, by the driver's tool."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _instruction_set() -> str | None:
    try:
        from cbam_ops import _core
    except ImportError:
        return None
    return _core.instruction_set()


def describe(name: str | None = None) -> Row:
    """The columns that all rows of a run share.

    Args:
      name: how to call this machine in the CSV; by default after what it is.
    """
    versions = [f"cbam_ops {cbam_ops.__version__}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    instruction_set = _instruction_set()
    return {
        "machine": name or gpu() or f"{processor()}, {cpus()} CPUs, {instruction_set}",
        "processor": gpu() or processor(),
        "cpus": cpus(),
        "cache_bytes": cache_bytes(),
        "instruction_set": instruction_set,
        "versions": "; ".join(versions),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
