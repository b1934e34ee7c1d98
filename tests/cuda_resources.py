"""Registers, stack and spills of the CUDA kernels, from the compiler's own report.

    python tests/cuda_resources.py            compares all architectures with the committed table
    python tests/cuda_resources.py --write    replaces the table (csrc/core/cuda/resources.csv)

Needs nvcc, no GPU; about a minute on two cores.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_on_cpu import CSRC, cuda_sources

TABLE = CSRC / "core" / "cuda" / "resources.csv"
ARCHITECTURES = ("75", "80", "90", "100", "120")
COLUMNS = ("source", "kernel", "architecture", "registers", "stack", "spills")
_ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)

Row = dict[str, str | int]


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def _names(mangled: Sequence[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = []
    for name in done.stdout.splitlines():
        name = name.removeprefix("void ").replace("cbam_ops::cuda::", "")
        names.append(re.sub(r"\(.*", "", name).strip())
    return names


def compile_report(architectures: Sequence[str], only: Sequence[str] | None = None) -> list[Row]:
    """Compiles the kernels with warnings as errors and reads what the assembler says of each."""

    # As csrc/cmake/OptionalCuda.cmake does.
    code = [f"arch=compute_75,code=sm_{a}" for a in architectures if a == "75"]
    code += [f"arch=compute_80,code=sm_{a}" for a in architectures if a != "75"]

    def one(source: Path) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc() or "nvcc", "-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas=-v"]
            command += ["-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings"]
            command += [f"-gencode={each}" for each in code]
            command += ["-c", str(source), "-o", f"{folder}/out.o"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name}:\n{done.stderr[-3000:]}")
        found = _ENTRY.findall(done.stderr)
        names = _names([entry[0] for entry in found])
        return [
            dict(
                zip(
                    COLUMNS,
                    (source.stem, name, int(e[1]), int(e[5]), int(e[2]), int(e[3]) + int(e[4])),
                    strict=True,
                )
            )
            for name, e in zip(names, found, strict=True)
        ]

    sources = [s for s in cuda_sources(CSRC) if only is None or s.stem in only]
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        rows = [row for rows in pool.map(one, sources) for row in rows]
    return sorted(rows, key=lambda r: (str(r["source"]), str(r["kernel"]), int(r["architecture"])))


def read_table() -> list[Row]:
    """The committed table."""
    with TABLE.open(newline="") as file:
        return [
            {key: int(value) if value.isdigit() else value for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def differences(got: Sequence[Row], table: Sequence[Row]) -> list[str]:
    """More spills than the table says, and kernels that use over 8 registers more."""

    def key(row: Row) -> tuple[str | int, ...]:
        return row["source"], row["kernel"], row["architecture"]

    known = {key(row): row for row in table}
    found = []
    for row in got:
        label = " ".join(map(str, key(row)))
        if key(row) not in known:
            found.append(f"{label}: not in {TABLE.name}: python tests/cuda_resources.py --write")
        elif int(row["spills"]) > int(known[key(row)]["spills"]):
            found.append(f"{label}: {row['spills']} bytes of spills")
        elif int(row["registers"]) > int(known[key(row)]["registers"]) + 8:
            was = known[key(row)]["registers"]
            found.append(f"{label}: {row['registers']} registers, the table has {was}")
    return found


if __name__ == "__main__":
    report = compile_report(ARCHITECTURES)
    if "--write" in sys.argv:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(report)
        problems = differences(report, report)
    else:
        problems = differences(report, read_table())
    print("\n".join(problems) or f"{len(report)} kernels, as the table says")
    sys.exit(1 if problems else 0)
