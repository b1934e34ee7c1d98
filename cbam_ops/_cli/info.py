"""`cbam-ops info`: what this installation is, for bug reports."""

from __future__ import annotations

import json
import os
import platform
import warnings
from typing import Any

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
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or "-"
    return str(value)


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in record.items():
        label = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows.extend(_flat(value, f"{label} "))
        else:
            rows.append((label, value))
    return rows


def _sections(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    report = dict(report)

    def take(key: str) -> Any:
        return report.pop(key, None)

    version, native = take("version"), take("native")
    off_because, implementation = take("native_off_because"), take("implementation")
    xla, xla_off_because = take("xla"), take("xla_off_because")
    instructions = take("instruction_set") or {}
    if not isinstance(instructions, dict):
        instructions = {"active": instructions}
    gpu = take("gpu") or {}
    processor, build = take("processor"), take("build") or {}
    environment = take("environment")
    # `platform` is in `operating_system`.
    take("platform")
    sections = [
        (
            "cbam_ops",
            [
                ("version", version),
                ("native kernels", "on" if native else "off"),
                *([("why they are off", off_because)] if not native else []),
                ("native kernels inside XLA", "on" if xla else "off"),
                *([("why they are off there", xla_off_because)] if native and not xla else []),
                ("implementation", implementation),
                ("instruction set in use", instructions.get("active")),
                ("instruction sets that run here", instructions.get("available")),
                *([("_core", instructions["error"])] if instructions.get("error") else []),
                ("Python files", take("package")),
                ("compiled files", take("compiled")),
            ],
        ),
        (
            "versions",
            [
                ("TensorFlow", take("tensorflow")),
                ("Keras", take("keras")),
                ("numpy", take("numpy")),
                ("Python", take("python")),
                *(
                    [("problem", take("tensorflow_problem"))]
                    if "tensorflow_problem" in report
                    else []
                ),
            ],
        ),
        (
            "machine",
            [
                ("operating system", take("operating_system")),
                ("processor", processor["name"]),
                ("cores usable", processor["cores"]),
                ("vector extensions", processor["extensions"]),
                ("devices", take("devices")),
            ],
        ),
        (
            "GPU kernels",
            [
                ("built", gpu.get("built")),
                *(
                    [
                        ("with CUDA", gpu.get("cuda")),
                        ("for architectures", gpu.get("architectures")),
                        ("CUDA of the driver", gpu.get("driver_cuda") or "no driver"),
                    ]
                    if gpu.get("built")
                    else []
                ),
                *([("why they do not run", gpu["why_not"])] if gpu.get("why_not") else []),
            ],
        ),
        ("build", _flat(build) if build else [("record", "none: the native parts are not built")]),
    ]
    if environment:
        sections.append(("environment", list(environment.items())))
    if report:  # whatever else build_info says
        sections.append(("other", _flat(report)))
    return sections


def run(as_json: bool) -> int:
    """Prints the report as text or as one JSON object; always exit code 0."""
    report = collect()
    if as_json:
        say(json.dumps(report, indent=2, sort_keys=True, default=str))
        return 0
    sections = _sections(report)
    width = max(len(label) for _, rows in sections for label, _ in rows)
    for index, (title, rows) in enumerate(sections):
        say(("\n" if index else "") + title)
        for label, value in rows:
            say(f"  {label:<{width}}  {_text(value)}")
    return 0
