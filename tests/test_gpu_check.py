"""The command for a GPU machine (benchmarks/gpu_check.py): all of it that a CPU can run."""

from __future__ import annotations

import csv
import ctypes
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_on_cpu
import device
import gpu_check
import numpy as np
import pytest
import report
import results
from gpu_model import COUNTS
from programs import HANGS

from cbam_ops import _bench, testing
from cbam_ops._cli import gpu_kernels
from cbam_ops._cli.bench import write_rows
from cbam_ops._console import CommandError

BENCHMARKS = Path(gpu_check.__file__).parent


class NumpyMemory:
    """Memory for the kernels' sources as a CPU runs them."""

    def empty(self, shape: Any, dtype: str, offset: int = 0) -> np.ndarray:
        return cuda_on_cpu.empty(shape, np.dtype(dtype), offset)

    def place(self, array: np.ndarray, offset: int = 0) -> np.ndarray:
        return cuda_on_cpu.place(array, offset)

    def host(self, array: np.ndarray) -> np.ndarray:
        return array

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def stream(self) -> int:
        return 0


# Figures that nobody measured: they exercise the arithmetic of the report and nothing else.
COPY = 100e-6
MADE_UP = {"ours": 110e-6, "torch-eager-channels-last": 500e-6}
MADE_UP |= {"tf-graph": 450e-6, "torch-compile-channels-last": 300e-6, "jax": 230e-6}


def made_up_rows() -> list[dict[str, Any]]:
    rows = []
    for n, dtype, (h, w, c), mode in itertools.product(
        (256, 1), ("float32", "bfloat16"), _bench.RESNET50, ("forward", "backward", "step")
    ):
        for provider, seconds in MADE_UP.items():
            median = seconds * report.IDEAL[mode]
            rows.append(
                {
                    "machine": "made up", "op": "cbam", "group": "resnet50", "n": n, "h": h, "w": w,
                    "c": c, "dtype": dtype, "layout": "NHWC", "threads": 2, "mode": mode,
                    "provider": provider, "median_s": median, "copy_s": COPY,
                    "copies": median / COPY, "error": 1e-7,
                }
            )  # fmt: skip
    return rows


def test_the_plan_fits_nine_minutes(capsys):
    assert gpu_check.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu_check.PLAN) + 1
    assert int(lines[-1].split()[0]) == sum(gpu_check.PLAN.values()) <= 9 * 60
    assert sum(gpu_check.QUICK_PLAN.values()) < sum(gpu_check.PLAN.values())


def test_without_a_gpu_it_stops_with_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="needs PyTorch with CUDA and an NVIDIA GPU"):
        gpu_check.main([])


def test_on_a_cpu_the_steps_with_pytorch_run(tmp_path):
    """The same code as on a GPU, but for the device: what is misspelt there fails here."""
    pytest.importorskip("torch")
    command = [sys.executable, gpu_check.__file__, "correctness", "streams", "--device", "cpu"]
    command += ["--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONSAFEPATH": ""}  # as for a user: it imports its neighbours
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"correctness: \d{3} checks, 0 wrong", done.stdout), done.stdout
    assert "streams: ok" in done.stdout


def test_on_a_cpu_what_is_checked_takes_its_time(monkeypatch):
    """On a slow machine the first check took longer than a GPU machine is there for all of them."""
    pytest.importorskip("torch")
    plans: list[dict[str, int]] = []
    monkeypatch.setattr(gpu_check, "_everything", lambda *given: plans.append(given[1]) or 0)
    monkeypatch.setattr(os, "environ", {**os.environ})
    gpu_check.main(["--device", "cpu"])
    assert min(plans[0][step] for step in ("correctness", "streams")) >= HANGS


@pytest.mark.parametrize(
    ("framework", "providers"),
    [("torch", ("ours",)), ("torch", ("torch-eager-channels-last",)), ("jax", ("jax",))],
)
def test_on_a_cpu_the_frameworks_are_timed(framework, providers):
    """Fails where a baseline of another framework computes something else than CBAM."""
    pytest.importorskip(framework)
    program = f"""
import dataclasses, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import cases, gpu_check
case = dataclasses.replace(cases.gpu_cases([5])[0], h=4, w=5, c=32, providers={providers})
done = gpu_check.work(case, 0.1, 2**12)
print(tuple({{row["provider"] for row in done.rows}}), done.wrong, done.absent)
"""
    environment = {**os.environ, **gpu_check.ENVIRONMENT, "CBAM_OPS_BENCHMARK_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{providers} {{}} {{}}"


def test_a_step_that_there_is_not_is_an_error(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["timing", "racecheck"])
    assert "there is no step racecheck: the steps are correctness" in capsys.readouterr().err


class Memory:
    """The kernels' sources, and what they were given memory for, full of one byte.

    `unwritten` are the sizes of copies to the host of what still is."""

    BYTE = 0xA5

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.freed: list[int] = []
        self.unwritten: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda_on_cpu.module(), name)

    def allocate(self, size: int) -> int:
        address = cuda_on_cpu.module().allocate(size)
        self.sizes[address] = size
        ctypes.memset(address, self.BYTE, size)
        return address

    def copy_to_host(self, to: np.ndarray, address: int) -> None:
        cuda_on_cpu.module().copy_to_host(to, address)
        sectors = to.reshape(-1).view(np.uint8)[: to.nbytes // 32 * 32].reshape(-1, 32)
        if (sectors == self.BYTE).all(axis=1).any():
            self.unwritten.append(to.nbytes)

    def free(self, address: int) -> None:
        self.freed.append(address)
        cuda_on_cpu.module().free(address)


def test_the_sanitizers_see_every_array_s_bounds():
    """Fails where arrays share an allocation: a read beyond one would be inside of it."""
    case = testing.Case(residual=True, dtype="float16")
    memory = Memory()
    apart = device.Apart(memory)
    map_bytes, one_byte = 2 * 910, 1  # where there is no array
    expected = gpu_kernels.both_passes(gpu_kernels.Kernels(cuda_on_cpu.module()), case)
    for name, value in gpu_kernels.both_passes(apart, case).items():
        testing.assert_same_bits(value, expected[name], name)
    assert not memory.unwritten, "initcheck would report it"
    assert {map_bytes, one_byte} <= set(memory.sizes.values())
    assert set(memory.freed) == set(memory.sizes) - {apart._memory}


def test_what_the_sanitizers_look_at_runs():
    gpu_check.run_apart(gpu_check.small_shapes(), cuda_on_cpu.module())


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","dram__bytes_read.sum","gpu__time_duration.sum","launch__registers_per_thread"
"","","Mbyte","us","register/thread"
"""


def as_ncu_prints(directions: Sequence[str]) -> str:
    lines = (
        f'"{i}","void cbam_ops::cuda::{direction.title()}Kernel<M>(Call)","1,024.5","2.5","128"'
        for i, direction in enumerate(directions)
    )
    return NCU + "\n".join(lines)


def test_counters_stand_beside_what_the_model_counts():
    both = gpu_check.profiled_cases()
    rows = gpu_check.counters_of(as_ncu_prints(["forward", "backward"] * len(both)), both)
    counted = list(csv.DictReader(COUNTS.read_text().splitlines()))
    keys = ("stage", "dtype", "layout", "direction")
    assert {tuple(row[key] for key in keys) for row in rows} == {
        tuple(row[key] for key in keys) for row in counted
    }
    assert rows[1]["direction"] == "backward"
    assert (rows[1]["dram_read"], rows[1]["microseconds"]) == (1024.5e6, 2.5)
    assert "l2_hits_percent" not in rows[1], "ncu did not say it"
    ideal = 2 * np.prod(both[0].size) * 4
    assert ideal <= rows[0]["dram_counted"] < 1.05 * ideal
    with pytest.raises(ValueError, match="ncu saw 3 kernels, 32 were expected"):
        gpu_check.counters_of(as_ncu_prints(["forward"] * 3), both)


@pytest.mark.parametrize("fault", ["", "ERR_NVGPUCTRPERM"])
def test_the_profiler_runs_or_is_not_run(monkeypatch, tmp_path, fault):
    pairs = ["forward", "backward"] * len(gpu_check.profiled_cases())
    tool = tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{fault or as_ncu_prints(pairs)}\nEND\n")
    monkeypatch.setenv("PATH", "")
    assert gpu_check.profile(tmp_path, tmp_path / "rows.csv") == "not run: ncu not found"
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    said = gpu_check.profile(tmp_path, tmp_path / "rows.csv")
    if fault:
        assert said.startswith("not run: ncu saw 0 kernels") and fault in said
    else:
        assert said == "ok"
        assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(pairs)


def test_what_the_profiler_looks_at_runs():
    case = testing.Case(size=(1, 4, 4, 32), dtype="bfloat16", data_format="NCHW")
    gpu_check.run_apart([case], cuda_on_cpu.module())


def test_the_checks_cover_every_function_type_and_layout():
    full, quick = list(gpu_check.checks(quick=False)), list(gpu_check.checks(quick=True))
    options = [check for check in full if check.kind == "options"]
    assert {check.case.function for check in options} == {
        name for name in testing.ARGUMENTS if not name.endswith("pool")
    }
    assert {dict(check.case.options).get("order") for check in options} == {None, "parallel"}
    assert {(check.case.dtype, check.case.data_format) for check in options} == set(
        itertools.product(("float32", "float16", "bfloat16", "float64"), ("NHWC", "NCHW"))
    )
    assert {check.kind for check in full} == {"options", "sizes", "misaligned", "stage"}
    assert any(check.offset for check in full) and len(quick) < len(full)


def checks_for_a_test() -> list[Any]:
    """Every option, spread over types and layouts, and a misaligned map."""
    options = [check for check in gpu_check.checks(quick=True) if check.kind == "options"]
    misaligned = [check for check in gpu_check.checks(quick=True) if check.kind == "misaligned"]
    return [*options[::7], misaligned[0]]


@pytest.mark.parametrize("check", checks_for_a_test(), ids=lambda check: str(check.case))
def test_the_checks_pass_on_the_kernels_sources(check):
    """What runs on a GPU, on the same sources: were a check wrong, it would fail on the day."""
    row = gpu_check.run_check(check, cuda_on_cpu.module(), NumpyMemory())
    assert not row["wrong"] and 0 <= row["worst"] <= 1


def test_a_wrong_result_is_found(monkeypatch):
    """A check that cannot fail is none."""
    right = device.Call.results

    def results_with_a_fault(call: device.Call) -> dict[str, np.ndarray]:
        found = right(call)
        return {**found, "dkernel": found["dkernel"] * np.float32(1.001)}

    monkeypatch.setattr(device.Call, "results", results_with_a_fault)
    check = gpu_check.Check("options", testing.Case())
    row = gpu_check.run_check(check, cuda_on_cpu.module(), NumpyMemory())
    assert row["wrong"].startswith("dkernel")


def test_a_crash_is_a_wrong_row_and_the_checks_go_on(monkeypatch, tmp_path):
    """One illegal access spoils a process: the next check needs another."""
    asked: list[Any] = []

    class Worker:
        alive = True

        def ask(self, timeout: float, function: Any, check: Any) -> dict[str, Any]:
            asked.append(self)
            if len(asked) == 1:
                raise CommandError("the process ended: an illegal memory access")
            return {"kind": check.kind, "worst": 0.5, "wrong": ""}

    workers: list[Worker] = []

    def worker() -> Worker:
        if not workers or not workers[-1].alive:
            workers.append(Worker())
        return workers[-1]

    some = checks_for_a_test()[:3]
    monkeypatch.setattr(gpu_check, "checks", lambda quick: iter(some))
    rows = gpu_check.check_all(worker, True, tmp_path / "checks.csv", 60)
    assert [bool(row["wrong"]) for row in rows] == [True, False, False]
    assert asked[0] is not asked[1] and asked[1] is asked[2]
    assert "illegal memory access" in (tmp_path / "checks.csv").read_text()


def test_the_truth_without_tensorflow_is_the_reference():
    """On a machine without TensorFlow `_core` in float64 stands for it."""
    case = _bench.Case("tiny", 2, 5, 4, 32, layout="NCHW", op="cbam+add+relu")
    inputs = _bench.draw_inputs(case, 1)
    expected, found = _bench.truth_of(case, inputs), device.truth_of(case, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        testing.assert_close(found[name], value, testing.FLOAT64, name)


def test_ours_alone_and_batch_256_are_timed_first():
    """The maps that matter, should the time run out."""
    pytest.importorskip("torch")
    first, *others = gpu_check.timed_cases((256, 32, 1))
    assert {case.providers for case in first} == {("ours",)}
    assert {case.layout for case in first[:2]} == {"NHWC", "NCHW"}
    for group in (first[::2], *others):
        assert [case.n for case in group] == [256] * 8 + [32] * 8 + [1] * 8
        assert all(case.providers in gpu_check.GROUPS for case in group)


def alone(monkeypatch: pytest.MonkeyPatch, n: int) -> tuple[Any, list[Any]]:
    """What becomes of timing ours alone on the kernels' sources, and the calls that were made."""
    made: list[Any] = []

    class Call(device.Call):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(device, "DEVICE", "cpu")
    monkeypatch.setattr(device, "Call", Call)
    case = _bench.Case("tiny", n, 4, 5, 32, providers=("ours",))
    done = device.measure_alone(case, 0.01)
    assert not done.absent
    return done, made


def test_ours_alone_repeats_one_sample(monkeypatch):
    """Fails where 256 samples are drawn, or where fewer are timed."""
    pytest.importorskip("torch")
    done, (checked, *_, timed) = alone(monkeypatch, n=7)
    assert {(row["mode"], row["provider"]) for row in done.rows} == {
        (mode, "ours") for mode in ("forward", "backward", "step")
    }
    assert all(0 < row["error"] < 1e-5 and row["copies"] > 0 for row in done.rows)
    assert (checked.inputs["x"].shape[0], timed.inputs["x"].shape[0]) == (2, 7)
    results = timed.results()
    for name in ("y", "dx"):
        for sample in results[name]:
            testing.assert_same_bits(sample, results[name][0], name)
        testing.assert_same_bits(results[name][0], checked.results()[name][0], name)


def test_ours_alone_is_not_timed_where_it_is_wrong(monkeypatch):
    pytest.importorskip("torch")
    truth_of = device.truth_of
    monkeypatch.setattr(
        device, "truth_of", lambda *a: {k: v + (k == "dx") for k, v in truth_of(*a).items()}
    )
    done, _ = alone(monkeypatch, n=3)
    assert not done.rows and done.wrong["ours"].startswith("dx is off")


@pytest.mark.parametrize(
    ("code", "output", "start"),
    [
        (0, "....\n== 300 passed, 2 skipped in 41.00s ==", "ok (300 passed"),
        (0, "== 312 skipped in 3.00s ==", "not run (312 skipped"),
        (1, "E  AssertionError\n== 1 failed, 300 passed in 41.00s ==", "FAILED"),
        (4, "ModuleNotFoundError: No module named 'tensorflow'", "not run"),
        (1, "/usr/bin/python: No module named pytest", "not run"),
        (4, "Exit: cbam_ops (nowhere) has no compiled parts: run pip install", "not run"),
    ],
)
def test_what_a_run_of_the_ops_tests_means(code, output, start):
    assert gpu_check.judge_pytest(code, output).startswith(start)


def test_rows_survive_the_csv(tmp_path):
    """They are written without pandas, and read by the reports."""
    rows = made_up_rows()
    write_rows(tmp_path / "timing.csv", rows)
    read = results.load(tmp_path / "timing.csv")
    assert len(read) == len(rows)
    for name in ("n", "provider", "median_s"):
        assert list(read[name]) == pytest.approx([row[name] for row in rows]) or name == "provider"
    assert set(read["provider"]) == set(MADE_UP)


def test_the_verdict_compares_with_the_targets():
    rows = results.frame(made_up_rows())
    lines = gpu_check.verdict(rows, launched=1)
    text = "\n".join(lines)
    # 1.1 of 1.25 copies. Batch 1 is left out.
    assert "ours, forward, times the ideal: at most 1.25 wanted; 8 of 8 met, worst 1.10" in text
    # The faster compiled baseline takes 230, which is 2.09 times ours.
    names = ", ".join(gpu_check.COMPILED)
    assert f"step, against the faster of {names}: at least 3 wanted; 0 of 8 met, worst 2.09" in text
    assert lines[-1].startswith("batch 1, 14x14x1024: fewer than 4 launches wanted, 1; faster")
    assert lines[-1].endswith("none")
    nothing = gpu_check.verdict(rows.iloc[:0])
    assert nothing and all("not measured" in line for line in nothing)


def test_the_tables_and_the_picture_are_those_of_the_suite(tmp_path):
    rows = results.frame(made_up_rows())
    table = report.console_table(rows)
    assert "vs JAX" in table and "2.09" in table and f"{500 / 110:.2f}" in table
    report.draw_baselines(rows, tmp_path / "timing.png")
    assert (tmp_path / "timing.png").read_bytes().startswith(b"\x89PNG")


def test_the_network_s_shares():
    rows = [
        {"n": 32, "dtype": "float32", "provider": "plain", "ms": 80.0},
        {"n": 32, "dtype": "float32", "provider": "ours", "ms": 100.0},
    ]
    assert "ours: 100.0 ms, CBAM's share 20 %" in gpu_check.network_table(rows)
    assert gpu_check.network_table([]) == "ResNet-50: not measured"


def test_what_a_gpu_machine_runs_needs_no_tensorflow():
    """There may be none on it."""
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
sys.modules["tensorflow"] = sys.modules["keras"] = None
import cases, device, gpu_check, machine, measure, run
from cbam_ops import _bench
check = next(gpu_check.checks(True))
arrays = gpu_check.arrays_of(check.case)
found = device.on_the_cpu(check.case, arrays, "float64")
assert found["dx"].shape == arrays["x"].shape
_bench.draw_inputs(cases.tiny_cases()[2], 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
