"""The benchmark suite on a tiny selection: that it is right, never how fast anything is."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy_oracle
import pytest
import tensorflow as tf

from cbam_ops import __main__ as command
from cbam_ops import testing
from cbam_ops._bench import cases, compare, measure, providers, report, results, run
from cbam_ops._bench.cases import Case, NetworkCase
from cbam_ops._console import CommandError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = 2**12  # small, so that few maps are made to go round
TINY = [dataclasses.replace(case, threads=2) for case in cases.tiny_cases()]


# --- cases ----------------------------------------------------------------------------------------


def test_the_cases_are_what_they_are_said_to_be():
    """A shape, type or layout that drops out of the suite would be missed by nobody else."""
    found = [case for case in cases.all_cases() if isinstance(case, Case)]
    for sizes in (cases.RESNET50, cases.RESNET18, cases.MOBILENET, cases.UNFRIENDLY):
        assert set(sizes) <= {(case.h, case.w, case.c) for case in found}
    assert {1, 16, 64} <= {case.n for case in found}
    stages = [case for case in found if case.group == "resnet50" and case.n == 16]
    for dtype in ("float32", "bfloat16", "float16"):
        for layout in ("NHWC", "NCHW"):
            here = [case for case in stages if (case.dtype, case.layout) == (dtype, layout)]
            assert {(case.h, case.w, case.c) for case in here} == set(cases.RESNET50)
            assert all({"forward", "step"} <= set(case.modes) for case in here)
    assert {case.providers for case in found if case.layout == "NCHW"} and all(
        "tf-graph-transposed" in case.providers for case in found if case.layout == "NCHW"
    )
    assert all(case.providers[0] == cases.OURS for case in found)
    assert all(name in providers.PROVIDERS for case in found for name in case.providers)
    networks = [case for case in cases.all_cases() if isinstance(case, NetworkCase)]
    assert {case.mode for case in networks} == {"inference", "training"}
    (training,) = [case for case in networks if case.mode == "training"]
    assert set(training.providers) >= {"ours", "stock-xla", "ours-xla"}


def test_no_two_cases_write_the_same_row():
    """One of them would replace the other's figures in the CSV."""
    for chosen in (cases.all_cases(), cases.quick_cases(), cases.tiny_cases()):
        plan = run._resolve(chosen, 2)
        rows = [
            results.key({"machine": "m", **run._columns(case), "mode": mode, "provider": name})
            for case in plan
            for mode in (case.modes if isinstance(case, Case) else (case.mode,))
            for name in case.providers
        ]
        assert len(rows) == len(set(rows))


def test_filters():
    """A filter that takes too much costs forty minutes; one that takes nothing says so."""
    everything = cases.all_cases()
    chosen = cases.select(everything, ["resnet50/16x+bfloat16", "unfriendly+1x1"], ["xla"])
    assert chosen and len(chosen) < len(everything)
    for case in chosen:
        assert case.dtype == "bfloat16" or "1x1" in case.name
        assert set(case.providers) <= {"ours", "xla"}
    assert run.main(["--cases", "no such case"]) == 2


def test_bytes_moved():
    """The share of the bandwidth that the tables show rests on these."""
    case = Case("x", 2, 3, 5, 32)
    map_bytes, weights = 2 * 3 * 5 * 32 * 4, 4 * (32 * 2 + 2 + 2 * 32 + 32 + 98 + 1)
    assert case.bytes_moved("forward") == 2 * map_bytes + weights
    assert case.bytes_moved("backward") == 3 * map_bytes + 2 * weights
    assert case.bytes_moved("step") == 5 * map_bytes + 3 * weights


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_provider_agrees(case):
    """A peer that computes something else is no peer; ours must be as accurate as TensorFlow."""
    outcome = measure.measure(case, 0.0, CACHE, timed=False)
    assert not outcome.wrong
    assert all(not providers.installed(name) for name in outcome.absent), outcome.absent
    errors = {(row["provider"], row["mode"]): row["error"] for row in outcome.rows}
    for mode in case.modes:
        floor = testing.FLOOR_ROUNDINGS * testing.EPSILON[case.dtype]
        stock = errors["tf-graph", mode]
        assert errors["ours", mode] <= testing.STOCK_FACTOR * stock + floor, mode


@pytest.mark.parametrize("name", ["ours", "tf-graph", "keras"])
def test_the_backward_pass_that_is_timed_is_that_of_the_step(name):
    """It is a graph of its own: were it another's, or on other inputs, its time would be too."""
    case = Case("tiny", 2, 6, 5, 32, modes=("backward",))
    inputs = providers.draw_inputs(case, CACHE)
    prepared = providers.PROVIDERS[name].setup(case, inputs)
    # The first value of each gradient, of the last of the chained calls; in the order of capture.
    last = providers.chain_length(case) - 1
    assert last > 0
    gradients = prepared.run["backward"](0)[: 1 + len(providers.WEIGHTS)]
    found = [float(value.numpy().reshape(-1)[0]) for value in gradients]
    turned = {key: maps[last:] + maps[:last] for key, maps in (("x", inputs.x), ("dy", inputs.dy))}
    inputs = dataclasses.replace(inputs, **turned, _made={})
    truth = providers.PROVIDERS[name].setup(case, inputs).results()
    expected = [truth[f"d{weight}"].reshape(-1)[0] for weight in ("x", *providers.WEIGHTS)]
    testing.assert_close(
        np.sort(found), np.sort(expected), testing.FLOAT32, "first values of the gradients"
    )


def test_every_call_of_a_chain_runs():
    """TensorFlow drops a call whose results nobody reads: its time would be that of nothing."""
    case = Case("tiny", 2, 6, 5, 32, modes=("forward",))
    inputs = providers.draw_inputs(case, CACHE)
    seen = []

    def forward(x, residual, weights):
        def count(x):
            seen.append(float(x.reshape(-1)[0]))
            return x

        # Stateless, as the module is: TensorFlow may leave it out.
        return tf.ensure_shape(tf.numpy_function(count, [x], x.dtype, stateful=False), x.shape)

    prepared = providers._setup_tensorflow(case, inputs, forward, [])
    calls = prepared.calls["forward"]
    assert calls > 1
    prepared.run["forward"](0)
    assert seen == [float(x.reshape(-1)[0]) for x in inputs.x[:calls]]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_the_truth_is_the_definition(layout):
    """What all providers are checked against must itself be the function of the tests' oracle."""
    case = Case("tiny", 2, 5, 4, 32, layout=layout, op="cbam+add+relu")
    inputs = providers.draw_inputs(case, CACHE)
    truth = measure.Truth.of(case, inputs).values
    tensors = {name: inputs.weights[name] for name in providers.WEIGHTS}
    tensors |= {"x": inputs.x[0], "residual": inputs.residual[0]}
    options: dict[str, Any] = {"layout": layout, "activation": "relu"}
    expected = {"y": numpy_oracle.forward(**tensors, **options)["y"]}
    expected |= numpy_oracle.backward(dy=inputs.dy[0], **tensors, **options)
    for name, value in truth.items():
        testing.assert_close(value, expected[name], testing.MODEL_FORWARD, name)


def test_a_wrong_result_is_not_timed(monkeypatch):
    """Otherwise a broken provider, ours above all, could win by leaving work out."""
    case = dataclasses.replace(TINY[0], providers=("ours", "tf-graph"), modes=("forward",))
    right = providers.PROVIDERS["ours"].setup

    def setup(case: Case, inputs: providers.Inputs) -> providers.Prepared:
        prepared = right(case, inputs)
        found = {**prepared.results(), "dkernel": np.zeros((7, 7, 2, 1))}
        return dataclasses.replace(prepared, results=lambda: found)

    provider = dataclasses.replace(providers.PROVIDERS["ours"], setup=setup)
    monkeypatch.setitem(providers.PROVIDERS, "ours", provider)
    outcome = measure.measure(case, 0.0, CACHE)
    assert list(outcome.wrong) == ["ours"] and "dkernel" in outcome.wrong["ours"]
    assert [row["provider"] for row in outcome.rows] == ["tf-graph"]


def test_errors_see_shapes_and_nan():
    """A NaN compares as no error at all where nobody looks for it."""
    truth = measure.Truth({"y": np.ones((2, 3))})
    assert truth.errors({"y": np.ones((2, 3))})["y"] == (0, 0)
    for wrong in (np.ones((3, 2)), np.full((2, 3), np.nan), None):
        errors = truth.errors({} if wrong is None else {"y": wrong})
        assert errors["y"] == (math.inf, math.inf)
        assert measure.disagreement(TINY[0], "xla", errors)


def test_turns():
    """Each function must run as often as is counted, and go on from input to input."""
    seen: dict[str, list[int]] = {"a": [], "b": []}
    functions = {name: seen[name].append for name in seen}
    times = measure.interleave(functions, 0.0)
    for name, indices in seen.items():
        assert indices == list(range(1, len(indices) + 1))
        assert measure._RUNS <= len(times[name]) <= len(indices)
    times = measure.interleave(functions, 0.0, pairs=True)
    assert len(times["a"]) == len(times["b"])


def test_peak_memory():
    """A peak that is not seen would pass for a kernel without a workspace."""
    size = 64 * 2**20
    peak = measure.peak_bytes(lambda: np.ones(size, np.uint8)[:1].copy())
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    assert size * 0.9 < peak < size * 1.5


# --- the run --------------------------------------------------------------------------------------


def test_memory_that_an_allocator_keeps_is_no_figure(monkeypatch):
    """A step in memory that the allocator already had would read as no memory at all."""
    for seen, shows in ((0, False), (None, False), (2**26, True)):
        monkeypatch.setattr(measure, "peak_bytes", lambda function, seen=seen: seen)
        measure.shows_memory.cache_clear()
        assert measure.shows_memory("tensorflow") is shows, seen
        assert measure.shows_memory("torch")
    measure.shows_memory.cache_clear()


def test_run_from_end_to_end(tmp_path, monkeypatch, capfd):
    """The script, its worker process and the CSV, in which an older row must be replaced."""
    chosen = dataclasses.replace(cases.tiny_cases()[0], modes=("forward", "backward"))
    monkeypatch.setattr(cases, "all_cases", lambda: [chosen])
    csv = tmp_path / "results.csv"
    tiny = {"n": 2, "h": 6, "w": 5, "c": 32, "threads": 1, "median_s": 99.0}
    results.save(csv, [synthetic(machine="another"), synthetic(machine="here", **tiny)])
    arguments = ["--output", str(csv), "--providers", "tf-graph", "--seconds", "0.001"]
    assert run.main([*arguments, "--threads", "1", "--machine", "here"]) == 0
    rows = results.load(csv)
    assert rows[0]["machine"] == "another" and len(rows) == 5
    assert {(row["provider"], row["mode"]) for row in rows[1:]} == {
        (name, mode) for name in ("ours", "tf-graph") for mode in chosen.modes
    }
    for row in rows[1:]:
        assert row["threads"] == 1 and row["runs"] >= 3 and row["q20_s"] <= row["median_s"]
        assert row["median_s"] <= row["q80_s"] and row["copies"] > 0 and row["error"] < 1e-4
        assert row["versions"].startswith("cbam_ops ") and row["processor"] and row["cache_bytes"]
    assert "2x6x5x32" in capfd.readouterr().out


def test_the_command(tmp_path, monkeypatch, capfd):
    """`cbam-ops bench` is the suite's face for those who have no copy of the repository."""
    chosen = dataclasses.replace(TINY[0], modes=("forward",), providers=("ours", "xla"))
    monkeypatch.setattr(cases, "quick_cases", lambda: [chosen])
    monkeypatch.setattr(run, "QUICK_MINUTES", 0.01)
    csv = tmp_path / "bench.csv"
    assert command.main(["bench", "--output", str(csv)]) == 0
    assert {row["provider"] for row in results.load(csv)} == {"ours", "xla"}
    assert "vs XLA" in capfd.readouterr().out
    assert command.main(["bench", "--output", str(tmp_path / "bench.csv" / "x.csv")]) == 2


def test_a_worker_that_dies_is_a_failed_case(monkeypatch):
    """A crash in one framework must neither end the run nor hang it."""
    monkeypatch.setattr(run.sys, "executable", shutil.which("false"))
    done = run.run_cases(TINY[:2], 1.0)
    assert not done.rows and len(done.failed) == 2
    assert all("the process ended with 1" in text for text in done.failed)
    assert run.report_problems(done) == 1


# --- the CSV --------------------------------------------------------------------------------------


def synthetic(**values: Any) -> results.Row:
    """A row with figures of the right kinds."""
    row: results.Row = {
        "machine": "m", "op": "cbam", "n": 16, "h": 56, "w": 56, "c": 256, "dtype": "float32",
        "layout": "NHWC", "threads": 2, "mode": "forward", "provider": "ours", "group": "resnet50",
        "median_s": 0.010, "q20_s": 0.0099, "q80_s": 0.0101, "runs": 50, "calls": 1, "inputs": 3,
        "bytes": 102_827_980, "operations": 100_000_000, "gb_per_s": 10.0, "copy_s": 0.007,
        "copies": 1.4, "percent_of_copy_bandwidth": 70.0, "ours_is_faster": 1.0, "error": 3e-7,
        "extra_bytes": None, "extra_percent_of_x": None, "module_percent_of_time": None,
        "processor": "p", "cpus": 2, "cache_bytes": 2**25, "instruction_set": "avx2",
        "versions": "cbam_ops 0; tensorflow 0", "commit": "0123", "date": "2000-01-01",
    }  # fmt: skip
    return {**row, **values}


def test_rows_are_replaced_by_their_key(tmp_path):
    """Figures of another machine, or of another case, must outlive a run."""
    old = [synthetic(), synthetic(machine="n"), synthetic(provider="xla"), synthetic(threads=1)]
    merged = results.replace(old, [synthetic(median_s=0.5), synthetic(mode="step")])
    assert len(merged) == 5
    assert [row["median_s"] for row in merged] == [0.5, 0.01, 0.01, 0.01, 0.01]
    path = tmp_path / "folder" / "r.csv"
    results.save(path, merged)
    assert results.load(path) == merged


def test_a_file_that_is_no_csv_of_ours(tmp_path):
    """One sentence instead of a KeyError."""
    path = tmp_path / "r.csv"
    with pytest.raises(CommandError, match="cannot read"):
        results.load(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CommandError, match="no column 'machine'"):
        results.load(path)
    results.save(path, [synthetic(median_s="soon")])
    with pytest.raises(CommandError, match="median_s is not a number"):
        results.load(path)


# --- regressions ----------------------------------------------------------------------------------


def test_a_planted_regression_is_found(tmp_path, capsys):
    """The reason for having compare at all."""
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    rows = [synthetic(), synthetic(mode="step", extra_percent_of_x=1.0, extra_bytes=514_000)]
    results.save(old, rows)
    results.save(new, rows)
    assert compare.main([str(old), str(new), "--fail"]) == 0

    def judged(**values: Any) -> int:
        results.save(new, [rows[0], {**rows[1], **values}])
        capsys.readouterr()
        code = compare.main([str(old), str(new), "--fail"])
        assert ("1 regressions" in capsys.readouterr().out) == (code == 1)
        assert compare.main([str(old), str(new)]) == 0
        return code

    assert judged(median_s=0.0111) == 1
    assert judged(median_s=0.0103) == 0  # within the least slack
    assert judged(median_s=0.0111, q20_s=0.0105, q80_s=0.0121) == 0  # within the spread
    assert judged(median_s=0.0135, q20_s=0.0129, q80_s=0.0145) == 1
    assert judged(error=1e-6) == 1
    assert judged(extra_percent_of_x=9.0) == 1
    assert judged(provider="xla", median_s=1.0) == 0  # a peer's, and ours is missing
    assert judged(median_s=0.0001) == 0


def test_files_that_cannot_be_compared(tmp_path):
    """Nothing in common is no success."""
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    results.save(old, [synthetic()])
    assert compare.main([str(old), str(new), "--fail"]) == 2
    results.save(new, [synthetic(machine="another")])
    assert compare.main([str(old), str(new), "--fail"]) == 2


# --- the report -----------------------------------------------------------------------------------


def _planted() -> list[results.Row]:
    rows = []
    for mode in ("forward", "backward", "step"):
        for h, w, c in cases.RESNET50:
            size = {"h": h, "w": w, "c": c, "mode": mode}
            rows += [
                synthetic(**size),
                synthetic(**size, provider="tf-graph", median_s=0.04),
                synthetic(**size, provider="xla", median_s=0.03),
                synthetic(**size, provider="ours-xla", median_s=0.005),
                synthetic(**size, provider="torch-eager-contiguous", median_s=0.9),
                synthetic(**size, provider="torch-eager-channels-last", median_s=0.5),
            ]
    rows += [synthetic(dtype="bfloat16", median_s=0.005), synthetic(n=1, threads=1, median_s=0.017)]
    rows += [synthetic(n=1, median_s=0.01)]
    rows += [synthetic(dtype="bfloat16", median_s=0.035, provider="tf-graph")]
    tiny = {"n": 1, "h": 1, "w": 1, "c": 512, "group": "unfriendly"}
    rows += [synthetic(**tiny), synthetic(**tiny, provider="xla", median_s=0.007)]
    network = {"op": "resnet50", "n": 8, "h": 224, "w": 224, "c": 3, "mode": "inference"}
    network |= {"copies": None, "copy_s": None, "group": "network"}
    rows += [
        synthetic(**network, provider="plain", median_s=1.0),
        synthetic(**network, provider="stock", median_s=1.2, module_percent_of_time=16.7),
        synthetic(**network, median_s=1.05, module_percent_of_time=4.8),
        synthetic(**network, provider="stock-xla", median_s=0.83),
        synthetic(**network, provider="ours-xla", median_s=0.71),
    ]
    return rows


def test_the_table_shows_where_we_lose():
    """A table without its losses is an advertisement."""
    text = report.readme_table(_planted())
    lines = text.splitlines()
    (loss,) = [line for line in lines if "1×1×1×512" in line]
    assert "XLA" in loss and "**0.70×**" in loss
    assert "slower" in text
    stage, inside_xla = (
        line for line in lines if line.startswith("| 16×56×56×256 | forward | 10 ms | ")
    )
    assert "4.0×" in stage and "3.0×" in stage
    assert "50×" in stage and "90×" not in stage  # the faster memory format of PyTorch
    assert "5 ms | 30 ms | 6.0×" in inside_xla
    (network,) = [line for line in lines if "ResNet-50 at 224 px" in line]
    assert all(text in network for text in ("4.8 %", "830 ms", "710 ms"))
    (half,) = [line for line in lines if "| bfloat16 |" in line]
    assert "7.0×" in half
    assert "1×56×56×256 forward 1.7× with 2 threads" in text
    full = report.full_table(_planted())
    assert "**0.70×**" in full and "torch-eager-contiguous" in full
    without = [row for row in _planted() if row["c"] != 512 or row["h"] != 1]
    assert "cbam_ops is the faster one" in report.readme_table(without)


def test_report_writes_what_it_says(tmp_path, capsys):
    """The README, the full table and both pictures, from the CSV alone."""
    pytest.importorskip("matplotlib")
    csv, readme, output = tmp_path / "r.csv", tmp_path / "README.md", tmp_path / "out"
    results.save(csv, _planted())
    assert report.main([str(csv)]) == 0
    assert "16×56×56×256" in capsys.readouterr().out
    readme.write_text("no markers\n")
    assert report.main([str(csv), "--readme", str(readme)]) == 2
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        assert report.main([str(csv), "--readme", str(readme), "--output", str(output)]) == 0
        text = readme.read_text(encoding="utf-8")
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("16×56×56×256 | forward | 10 ms | 1.4 |") == 1
        assert text.count("16×56×56×256 | forward | 10 ms | 5 ms | 30 ms | 6.0×") == 1
    for name in ("peers.png", "roofline.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert report.main([str(csv), "--machine", "another"]) == 2


def test_the_committed_tables_are_those_of_the_committed_csv():
    """Edited by hand, or left behind by a newer run, they would show figures nobody measured."""
    csv = RESULTS / "results.csv"
    if not csv.is_file():
        pytest.skip("no results are committed")
    rows = results.load(csv)
    own = report._one_machine(rows, None)
    assert (RESULTS / "table.md").read_text(encoding="utf-8") == report.full_table(rows)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if report.BEGIN in readme:
        assert report.put_between_markers(readme, report.readme_table(own)) == readme
    for row, _, _ in report.Figures(own).losses():
        assert report._size(row) in report.readme_table(own)
