"""`cbam-ops info`: what this installation is, for bug reports."""

from __future__ import annotations

import json
import os
import platform
import warnings
from typing import Any

from cbam_ops import _loader
from cbam_ops._console import CommandError, import_tensorflow, say


def _processor() -> dict[str, Any]:
    """The processor's name, how many cores this process may use, and its vector extensions."""
    name = ""
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name" and not name:
                    name = value.strip()
                elif key.strip() == "flags" and not flags:
                    flags = set(value.split())
    except OSError:
        pass
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 0
    vectors = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512_bf16")
    return {
        "name": name or platform.processor() or platform.machine(),
        "cores": cores,
        "extensions": [flag for flag in vectors if flag in flags],
    }


def _operating_system() -> str:
    try:
        release = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except (OSError, AttributeError):
        release = ""
    return f"{release}, {platform.platform()}" if release else platform.platform()


def collect() -> dict[str, Any]:
    """`cbam_ops.build_info()` and what it does not say about the machine; plain values."""
    problem = None
    try:
        import_tensorflow()
    except CommandError as error:  # this report must come out of a broken installation too
        problem = str(error)
    import cbam_ops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = dict(cbam_ops.build_info())
    report["operating_system"] = _operating_system()
    report["processor"] = _processor()
    report["environment"] = {
        key: value
        for key, value in sorted(os.environ.items())
        if key.startswith("CBAM_OPS_") or key in ("TF_ENABLE_ONEDNN_OPTS", "CUDA_VISIBLE_DEVICES")
    }
    if problem is not None:
        report["tensorflow_problem"] = problem
    return report


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value) or "-"


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in record.items():
        label = f"{prefix}{key}".replace("_", " ")
        rows |= _flat(value, f"{label} ") if isinstance(value, dict) else {label: value}
    return rows


def _sections(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The report by title and label; None where there is nothing to say."""
    native, processor = report["native"], report["processor"]
    instructions, gpu = report["instruction_set"], report["gpu"]
    absent = "not installed"
    return {
        "cbam_ops": {
            "version": report["version"],
            "native kernels": "on" if native else "off",
            "why they are off": report["native_off_because"],
            "native kernels inside XLA": "on" if report["xla"] else "off",
            "why they are off there": report["xla_off_because"] if native else None,
            "implementation": report["implementation"],
            "instruction set in use": instructions["active"] or "none",
            "instruction sets that run here": instructions["available"],
            "_core": instructions.get("error"),
            "Python files": report["package"],
            "compiled files": report["compiled"] or "none",
        },
        "versions": {
            "TensorFlow": report["tensorflow"] or absent,
            "Keras": report["keras"] or absent,
            "numpy": report["numpy"] or absent,
            "Python": report["python"],
            "problem": report.get("tensorflow_problem"),
        },
        "machine": {
            "operating system": report["operating_system"],
            "processor": processor["name"],
            "cores usable": processor["cores"],
            "vector extensions": processor["extensions"],
            "devices": report["devices"],
        },
        "GPU kernels": {
            "built": gpu["built"],
            "with CUDA": gpu.get("cuda"),
            "for architectures": gpu.get("architectures"),
            "CUDA of the driver": (gpu["driver_cuda"] or "no driver") if gpu["built"] else None,
            "why they do not run": gpu["why_not"],
            **{f"check on {name}": record for name, record in gpu.get("checks", {}).items()},
        },
        "build": _flat(report["build"]) or {"record": "none: the native parts are not built"},
        "environment": report["environment"],
    }


def run(as_json: bool, ops_library: bool = False) -> int:
    """Prints the report as text or as one JSON object, or the path of the library of ops.

    Raises:
      CommandError: the library is asked for and cannot be loaded.
    """
    if ops_library:
        import_tensorflow()
        loaded = _loader.load_ops()
        if isinstance(loaded, _loader.Cause):
            raise CommandError(str(loaded))
        say(str(_loader.ops_library()))
        return 0
    report = collect()
    if as_json:
        say(json.dumps(report, indent=2, sort_keys=True, default=str))
        return 0
    sections = [
        (title, {label: value for label, value in rows.items() if value is not None})
        for title, rows in _sections(report).items()
    ]
    width = max(len(label) for _, rows in sections for label in rows)
    blocks = [
        "\n".join([title, *(f"  {label:<{width}}  {_text(rows[label])}" for label in rows)])
        for title, rows in sections
        if rows
    ]
    say("\n\n".join(blocks))
    return 0
