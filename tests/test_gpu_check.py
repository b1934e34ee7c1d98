"""The command for a GPU machine (benchmarks/gpu_check.py): all of it that a CPU can run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("gpu_check", "gpu_network", "gpu_report", "gpu_tensorflow")


@pytest.fixture
def command(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the programs put folders there
    import gpu_check

    yield gpu_check
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def report(command) -> ModuleType:
    return sys.modules["gpu_report"]


# Figures that nobody measured: they exercise the arithmetic of the report and nothing else.
COPY = 100.0
MADE_UP = {"ours": 110.0, "ours (portable)": 170.0, "torch eager": 500.0, "TF graph": 450.0}
MADE_UP |= {"torch.compile": 300.0, "JAX": 230.0}
STAGES = ("56x56x256", "28x28x512", "14x14x1024", "7x7x2048")


def made_up_rows() -> list[dict[str, object]]:
    rows = []
    for batch, dtype, size, what in (
        (b, d, s, w)
        for b in (32, 1)
        for d in ("float32", "bfloat16")
        for s in STAGES
        for w in ("forward", "backward", "step")
    ):
        ideal = {"forward": 1.0, "backward": 1.5, "step": 2.5}[what]
        for who, us in MADE_UP.items():
            row = {"batch": batch, "dtype": dtype, "map": size, "copy_us": COPY}
            row |= {"map_bytes": batch * 10**7, "l2_bytes": 6 * 10**7, "who": who, "what": what}
            row["us"] = us * ideal
            if who.startswith("ours"):
                row["path"] = "cluster" if who == "ours" else "portable"
                if batch == 1:
                    row["launches"] = 1 if who == "ours" else 5
            rows.append(row)
    return rows


def test_the_plan_fits_eight_minutes(command, capsys):
    assert command.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(command.PLAN) + 1
    assert int(lines[-1].split()[0]) == sum(command.PLAN.values()) <= 8 * 60
    assert sum(command.QUICK_PLAN.values()) < sum(command.PLAN.values())


def test_without_a_gpu_it_stops_with_a_sentence(command, monkeypatch):
    monkeypatch.setattr(command, "torch", None)
    with pytest.raises(SystemExit, match="needs PyTorch with CUDA and an NVIDIA GPU"):
        command.main([])


def test_the_checks_cover_every_kind_type_layout_and_path(command):
    full, quick = list(command.cases(quick=False)), list(command.cases(quick=True))
    gates = [arguments for name, arguments in full if name == "gates"]
    for key, values in {
        "gates": {"channel_first", "parallel", "channel_only", "spatial_only"},
        "dtype": {"float32", "float16", "bfloat16", "float64"},
        "layout": {"NHWC", "NCHW"},
        "path": {"portable", "cluster"},
    }.items():
        assert {arguments[key] for arguments in gates} == values
    assert {name for name, _ in full} == {
        *("gates", "options", "sizes", "misaligned", "batch norm", "stage")
    }
    assert len(quick) < len(full)


def test_batch_32_is_timed_first(command):
    assert [shape[0] for shape in command.shapes((32, 256, 1))] == [32] * 8 + [256] * 8 + [1] * 8


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
def test_what_a_run_of_the_ops_tests_means(command, code, output, start):
    assert command.judge_pytest(code, output).startswith(start)


def test_rows_survive_the_csv(report, tmp_path):
    rows = made_up_rows()
    report.write(tmp_path / "timing.csv", rows)
    again = report.read(tmp_path / "timing.csv")
    assert [{k: v for k, v in row.items() if v != ""} for row in again] == rows


def test_the_table_has_a_line_per_case_and_the_ratios(report):
    lines = report.table(made_up_rows()).splitlines()
    assert len(lines) == 1 + 2 * 2 * 4 * 3
    cells = dict(
        zip(lines[0].replace("x ideal", "x_ideal").split(), lines[1].split(), strict=False)
    )
    assert cells["us"] == "110.0" and cells["x_ideal"] == "1.10" and cells["path"] == "cluster"
    assert f"{500 / 110:.2f}" in lines[1] and f"{230 / 110:.2f}" in lines[1]


def test_the_verdict_compares_with_the_targets(report):
    lines = report.verdict(made_up_rows())
    text = "\n".join(lines)
    # On clusters 1.1 of 1.25 copies; portable 1.7 of 1.9. Batch 1 is left out: it fits the L2.
    assert "forward, copies, clusters: at most 1.25 wanted; 8 of 8 met, worst 1.10" in text
    assert "forward, copies, portable: at most 1.9 wanted; 8 of 8 met, worst 1.70" in text
    # The faster compiled peer takes 230, which is 2.09 times ours.
    assert (
        "step, against the faster of torch.compile, JAX, TF XLA: at least 3 wanted; 0 of 8" in text
    )
    assert "worst 2.09" in text
    assert lines[-1].startswith("batch 1, 14x14x1024: fewer than 4 launches wanted, 1; faster")
    assert lines[-1].endswith("none")
    assert all("not measured" in line for line in report.verdict([]))


def test_the_picture_is_drawn(report, tmp_path):
    report.draw(made_up_rows(), tmp_path / "timing.png", "no device: made-up figures")
    assert (tmp_path / "timing.png").read_bytes().startswith(b"\x89PNG")


def test_the_network_s_shares(report):
    rows = [
        {"batch": 32, "dtype": "float32", "who": "without CBAM", "ms": 80.0},
        {"batch": 32, "dtype": "float32", "who": "ours", "ms": 100.0},
    ]
    assert "ours: 100.0 ms, CBAM's share 20 %" in report.network_table(rows)
    assert report.network_table([]) == "ResNet-50: not measured"


def test_tensorflow_s_rows_are_joined_with_what_else_is_known(command):
    timed = made_up_rows()[:1]
    row = {"batch": 32, "dtype": "float32", "map": STAGES[0], "who": "TF XLA", "what": "step"}
    joined = command.with_copies([{**row, "us": 5.0}, {**row, "batch": 7, "us": 5.0}], timed)
    assert len(joined) == 1 and joined[0]["copy_us"] == COPY


def test_tensorflow_is_timed(command, report, tmp_path):
    """The program itself, on a CPU and a map of a few pixels."""
    import subprocess

    output = tmp_path / "rows.csv"
    done = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "gpu_tensorflow.py", "--output", output),
            *("--device", "CPU", "--cases", "2,4,4,32,float32"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = report.read(output)
    assert {(row["who"], row["what"]) for row in rows} == {
        (who, what)
        for who in ("ours (TF op)", "TF graph", "TF XLA")
        for what in ("forward", "step")
    }
    assert all(row["us"] > 0 for row in rows)
