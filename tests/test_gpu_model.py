"""The model of what GPUs should take: benchmarks/gpu_model.py, on counts made up for it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

gpu_model = pytest.importorskip("gpu_model")

ZERO = dict.fromkeys(
    ("instructions", "math", "division", "read", "written", "wavefronts", "l2", "dram"), 0.0
)
CASE = {"stage": "10x10x100", "dtype": "float32", "layout": "NHWC", "direction": "forward"}
GPU = gpu_model.Gpu(multiprocessors=100, ghz=2.0, float_lanes=64, memory=1.0, l2=4.0)


def predicted(**phases: dict[str, float]) -> dict[str, Any]:
    whole: dict[str, float] = {}
    for counts in phases.values():
        for name, value in counts.items():
            whole[name] = whole.get(name, 0) + value
    rows = [CASE | ZERO | counts | {"phase": name} for name, counts in phases.items()]
    table = pd.DataFrame([*rows, CASE | ZERO | whole | {"phase": "all"}])
    return gpu_model.predict(table, GPU, 100).iloc[0].to_dict()


@pytest.mark.parametrize(
    ("counts", "bound", "microseconds"),
    [
        # A million elements. 25,600 slots a nanosecond, 12,800 of them float32 operations.
        ({"instructions": 25.6}, "issue", 1),
        ({"instructions": 25.6, "division": 3.2}, "issue", 2),
        ({"instructions": 25.6, "math": 25.6}, "math", 2),
        ({"read": 12.8, "written": 12.8}, "L1", 1),
        ({"wavefronts": 6.4}, "L1", 1),
        ({"l2": 4.0}, "L2", 1),
        ({"dram": 0.9}, "memory", 1),
    ],
)
def test_what_bounds_a_phase(counts: dict[str, float], bound: str, microseconds: float) -> None:
    row = predicted(apply=counts)
    assert row["bound"] == bound
    assert row["least"] == pytest.approx(microseconds + 5)
    assert row["apply"] == f"{microseconds} {bound}"


def test_phases_overlap_at_best_and_follow_each_other_at_worst() -> None:
    row = predicted(pool={"dram": 3.6, "l2": 4.0}, apply={"dram": 0.9, "l2": 16.0})
    assert row["least"] == pytest.approx(5 + 5)  # both wait for L2, or memory, together
    assert row["most"] == pytest.approx(4 + 4 + 5)
    # A copy moves 8 bytes of each element.
    assert row["ideal"] == pytest.approx(10 / (8 / 0.9))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """On the committed counts: every GPU, every map."""
    assert gpu_model.main(["--stage", "7x7x2048"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}, batch 64" in printed for name in gpu_model.GPUS)
    assert printed.count("| 7x7x2048") == 8 * len(gpu_model.GPUS)
    assert gpu_model.main(["--stage", "8x8x8"]) == 2
    assert "has no map 8x8x8" in capsys.readouterr().err
