"""The benchmark suite on a tiny selection: that it is right, never how fast anything is."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import baselines
import cases
import compare
import machine
import measure
import numpy as np
import numpy_oracle
import pandas as pd
import pytest
import report
import results
import run
import tensorflow as tf
from cases import NetworkCase
from network import ARCHITECTURES, measure_network
from programs import HANGS

from cbam_ops import __main__ as command
from cbam_ops import _bench, _loader, testing
from cbam_ops._bench import Case, Row
from cbam_ops._cli import bench
from cbam_ops._console import CommandError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = 2**12  # small, so that few maps are made to go round
TINY = [dataclasses.replace(case, threads=2) for case in cases.tiny_cases()]


# --- cases ----------------------------------------------------------------------------------------


def test_the_cases_are_what_they_are_said_to_be():
    """A shape, type or layout that drops out of the suite would be missed by nobody else."""
    found = [case for case in cases.all_cases() if isinstance(case, Case)]
    for sizes in (_bench.RESNET50, cases.RESNET18, cases.MOBILENET, cases.UNFRIENDLY):
        assert set(sizes) <= {(case.h, case.w, case.c) for case in found}
    assert {1, 16, 64} <= {case.n for case in found}
    stages = [case for case in found if case.group == "resnet50" and case.n == 16]
    for dtype in ("float32", "bfloat16", "float16"):
        for layout in ("NHWC", "NCHW"):
            here = [case for case in stages if (case.dtype, case.layout) == (dtype, layout)]
            assert {(case.h, case.w, case.c) for case in here} == set(_bench.RESNET50)
            assert all({"forward", "step"} <= set(case.modes) for case in here)
    assert {case.providers for case in found if case.layout == "NCHW"} and all(
        "tf-graph-transposed" in case.providers for case in found if case.layout == "NCHW"
    )
    assert all(case.providers[0] == _bench.OURS for case in found)
    assert all(name in baselines.PROVIDERS for case in found for name in case.providers)
    networks = [case for case in cases.all_cases() if isinstance(case, NetworkCase)]
    assert {case.mode for case in networks} == {"inference", "training"}
    assert {case.network for case in networks} <= ARCHITECTURES.keys()
    (training,) = [case for case in networks if case.mode == "training"]
    assert set(training.providers) >= {"ours", "stock-xla", "ours-xla"}


@pytest.mark.long
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_network_is_fused_checked_and_timed(mode):
    """Fails when a module of the stock network is not fused, or the two do not agree."""
    case = NetworkCase(
        "network", "resnet18", 2, mode, size=32, providers=("plain", "stock", "ours")
    )
    outcome = measure_network(case, 0.01)
    assert not outcome.wrong
    rows = {row["provider"]: row for row in outcome.rows}
    assert rows.keys() == {"plain", "stock", "ours"}
    assert rows["ours"]["error"] < 1e-3


def test_no_two_cases_write_the_same_row():
    """One of them would replace the other's figures in the CSV."""
    for chosen in (cases.all_cases(), _bench.quick_cases(), cases.tiny_cases()):
        plan = run.resolve(chosen, 2)
        rows = [
            {"machine": "m", **case.columns, "mode": mode, "provider": name}
            for case in plan
            for mode in case.modes
            for name in case.providers
        ]
        assert not pd.DataFrame(rows).duplicated(results.KEY).any()


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
    """A baseline that computes something else is none; ours must be as accurate as TensorFlow."""
    _, prepared, outcome = _bench.prepare(case, CACHE, baselines.PROVIDERS)
    assert not outcome.wrong
    assert not any(baselines.PROVIDERS[name].installed for name in outcome.absent), outcome.absent
    for mode in case.modes:
        ours, stock = (_bench.error_of(prepared[p].errors, mode) for p in ("ours", "tf-graph"))
        floor = testing.FLOOR_ROUNDINGS * testing.EPSILON[case.dtype]
        assert ours <= testing.STOCK_FACTOR * stock + floor, mode


@pytest.mark.parametrize("name", ["ours", "tf-graph", "keras"])
def test_the_backward_pass_that_is_timed_is_that_of_the_step(name):
    """It is a graph of its own: were it another's, or on other inputs, its time would be too."""
    case = Case("tiny", 2, 6, 5, 32, modes=("backward",))
    inputs = _bench.draw_inputs(case, CACHE)
    prepared = baselines.PROVIDERS[name].setup(case, inputs)
    # The first value of each gradient, of the last of the chained calls; in the order of capture.
    last = _bench.chain_length(case) - 1
    assert last > 0
    gradients = prepared.run["backward"](0)[: 1 + len(_bench.WEIGHTS)]
    found = [float(value.numpy().reshape(-1)[0]) for value in gradients]
    turned = _bench.Inputs(inputs.sets[last:] + inputs.sets[:last], inputs.weights)
    truth = baselines.PROVIDERS[name].setup(case, turned).results()
    expected = [truth[f"d{weight}"].reshape(-1)[0] for weight in ("x", *_bench.WEIGHTS)]
    testing.assert_close(
        np.sort(found), np.sort(expected), testing.FLOAT32, "first values of the gradients"
    )


def test_every_call_of_a_chain_runs():
    """TensorFlow drops a call whose results nobody reads: its time would be that of nothing."""
    case = Case("tiny", 2, 6, 5, 32, modes=("forward",))
    inputs = _bench.draw_inputs(case, CACHE)
    seen = []

    def forward(maps, weights):
        x = maps["x"]

        def count(x):
            seen.append(float(x.reshape(-1)[0]))
            return x

        # Stateless, as the module is: TensorFlow may leave it out.
        return tf.ensure_shape(tf.numpy_function(count, [x], x.dtype, stateful=False), x.shape)

    prepared = _bench.setup_tensorflow(case, inputs, forward, {})
    assert prepared.calls > 1
    prepared.run["forward"](0)
    assert seen == [float(maps["x"].reshape(-1)[0]) for maps in inputs.sets[: prepared.calls]]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_the_truth_is_the_definition(layout):
    """What all providers are checked against must itself be the function of the tests' oracle."""
    case = Case("tiny", 2, 5, 4, 32, layout=layout, op="cbam+add+relu")
    inputs = _bench.draw_inputs(case, CACHE)
    truth = _bench.truth_of(case, inputs)
    tensors = {**inputs.weights, **inputs.sets[0]}
    dy = tensors.pop("dy")
    options: dict[str, Any] = {"layout": layout, "activation": "relu"}
    expected = {"y": numpy_oracle.forward(**tensors, **options)["y"]}
    expected |= numpy_oracle.backward(dy=dy, **tensors, **options)
    for name, value in truth.items():
        testing.assert_close(value, expected[name], testing.MODEL_FORWARD, name)


def test_a_large_cache_does_not_take_all_memory():
    """Two cores with 23 GB of memory saw 480 MB of cache, and the maps of nine providers did not
    fit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert _bench.rotated_bytes(2**50) * 2 * 10 < memory / 2
    case = Case("tiny", 16, 56, 56, 256)
    assert _bench.rotated_bytes(CACHE) == 4 * CACHE < case.map_bytes


@pytest.mark.parametrize("wrong_draws", [testing.DRAWS, 1])
def test_a_wrong_result_is_not_timed(monkeypatch, wrong_draws):
    """Otherwise a broken provider, ours above all, could win by leaving work out. One draw of four
    may be wrong: of a volume's 262,144 positions one had two equal maxima but for rounding."""
    draws: list[_bench.Inputs] = []
    case = dataclasses.replace(TINY[0], providers=("ours", "tf-graph"), modes=("forward",))
    right = baselines.PROVIDERS["ours"].setup

    def setup(case: Case, inputs: _bench.Inputs) -> _bench.Prepared:
        prepared = right(case, inputs)
        draws.append(inputs)
        if len(draws) > wrong_draws:
            return prepared
        found = {**prepared.results(), "dkernel": np.zeros((7, 7, 2, 1))}
        return dataclasses.replace(prepared, results=lambda: found)

    provider = dataclasses.replace(baselines.PROVIDERS["ours"], setup=setup)
    monkeypatch.setitem(baselines.PROVIDERS, "ours", provider)
    outcome = measure.measure(case, 0.0, CACHE)
    assert len({float(inputs.sets[0]["x"].flat[0]) for inputs in draws}) == len(draws)
    if wrong_draws == 1:
        assert len(draws) == 2 and not outcome.wrong
        assert [row["provider"] for row in outcome.rows] == ["ours", "tf-graph"]
        return
    assert list(outcome.wrong) == ["ours"] and "dkernel" in outcome.wrong["ours"]
    assert [row["provider"] for row in outcome.rows] == ["tf-graph"]


def test_errors_see_shapes_and_nan():
    """A NaN compares as no error at all where nobody looks for it."""
    truth = {"y": np.ones((2, 3))}
    assert _bench.errors_of({"y": np.ones((2, 3))}, truth)["y"] == (0, 0)
    for wrong in (np.ones((3, 2)), np.full((2, 3), np.nan), None):
        errors = _bench.errors_of({} if wrong is None else {"y": wrong}, truth)
        assert errors["y"] == (math.inf, math.inf)
        assert _bench.disagreement(TINY[0], "xla", errors)


def test_turns():
    """Each function must run as often as is counted, and go on from input to input."""
    seen: dict[str, list[int]] = {"a": [], "b": []}
    functions = {name: seen[name].append for name in seen}
    times = _bench.interleave(functions, 0.0)
    for name, indices in seen.items():
        assert indices == list(range(1, len(indices) + 1))
        assert _bench._RUNS <= len(times[name]) <= len(indices)
    times = _bench.interleave(functions, 0.0, pairs=True)
    assert len(times["a"]) == len(times["b"])


def test_a_call_that_goes_on_after_it_returns_has_two_times():
    """On a GPU: the device's, of which its timer knows, and the host's."""

    def prepared(timer: _bench.Timer | None) -> _bench.Prepared:
        run = {"forward": lambda index: None}
        errors = {"y": (0.0, 0.0)}
        return _bench.Prepared(run, 2, print, dict, lambda index: None, timer=timer, errors=errors)

    def timer(call: Callable[[], object]) -> float:
        call()
        return 1e6

    case = dataclasses.replace(TINY[0], modes=("forward",))
    both = {"on a GPU": prepared(timer), "on a CPU": prepared(None)}
    rows = _bench.time_prepared(case, _bench.draw_inputs(case, CACHE), both, 0.0)
    gpu, cpu = rows
    assert gpu["median_s"] == 1e6 / 2 and 0 < gpu["host_s"] < 1e6
    assert "host_s" not in cpu


def test_peak_memory():
    """A peak that is not seen would pass for a kernel without a workspace."""
    size = 64 * 2**20
    peak = measure.peak_bytes(lambda: np.ones(size, np.uint8)[:1].copy())
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    assert size * 0.9 < peak < size * 1.5


def test_peak_memory_of_another_thread():
    """What a thread had before was kept for it, and its next use did not show."""
    size = 4 * 2**20
    with concurrent.futures.ThreadPoolExecutor(1) as thread:

        def ones(count):
            return thread.submit(np.ones, count, np.uint8).result()[:1].copy()

        ones(2 * size)  # what is freed tells the C library what is worth keeping
        ones(size)
        peak = measure.peak_bytes(lambda: ones(size))
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    assert size * 0.8 < peak < size * 1.5


def test_a_weighing_leaves_the_allocator_as_it_was():
    """Who was timed after another was weighed faulted in fresh pages, call by call."""
    measure.peak_bytes(lambda: None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        np.ones(2**20, np.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 50 * 2**20 / resource.getpagesize() / 4


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
    save(csv, synthetic(machine="another"), synthetic(machine="here", **tiny))
    arguments = ["--output", str(csv), "--providers", "tf-graph", "--seconds", "0.001"]
    assert run.main([*arguments, "--threads", "1", "--machine", "here"]) == 0
    rows = results.load(csv).to_dict("records")
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
    """`cbam-ops bench` is the face for those who have no copy of the repository."""
    chosen = dataclasses.replace(TINY[0], modes=("forward",), providers=("ours", "xla"))
    monkeypatch.setattr(_bench, "quick_cases", lambda: [chosen])
    monkeypatch.setattr(bench, "MINUTES", 0.01)
    csv = tmp_path / "bench.csv"
    assert command.main(["bench", "--output", str(csv)]) == 0
    rows = results.load(csv)  # for the reports, and to compare with another run
    assert set(rows["provider"]) == {"ours", "xla"} and len(rows) == 2
    assert compare.main([str(csv), str(csv)]) == 0
    assert "vs XLA" in capfd.readouterr().out
    assert command.main(["bench", "--output", str(tmp_path / "bench.csv" / "x.csv")]) == 2


def test_the_command_without_the_fused_ops(monkeypatch, capfd):
    """Figures of the baselines alone are not what was asked for, unless it was said so."""
    chosen = dataclasses.replace(TINY[0], modes=("forward",), providers=("ours", "tf-graph"))
    monkeypatch.setattr(_bench, "quick_cases", lambda: [chosen])
    monkeypatch.setattr(bench, "MINUTES", 0.01)
    cause = _loader.Cause("not_built", "They are not built.", "Build them.")
    monkeypatch.setattr(_loader, "load_ops", lambda: cause)
    assert command.main(["bench"]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("They are not built") == 1 and not captured.out
    assert command.main(["bench", "--allow-reference"]) == 0
    assert "2x6x5x32" in capfd.readouterr().out


def test_a_process_that_dies_hangs_or_fails():
    """A crash in one framework must neither end the run nor hang it."""
    worker = run.Worker(1, run.redirect)
    with pytest.raises(CommandError, match="ValueError: invalid literal"):
        worker.ask(HANGS, int, "x")
    assert worker.alive and worker.ask(HANGS, int, "7") == 7
    worker.ask(HANGS, os.write, 2, b"a last word\n")
    with pytest.raises(CommandError, match="the process ended: a last word"):
        worker.ask(HANGS, os._exit, 3)
    assert not worker.alive
    worker.close()
    worker = run.Worker(1, run.redirect)
    assert worker.ask(HANGS, int, "7") == 7
    with pytest.raises(CommandError, match="no answer within 0 s"):
        worker.ask(0.2, time.sleep, 600)
    assert not worker.alive
    worker.close()
    assert not multiprocessing.active_children()  # else it would sleep on


def test_a_run_goes_on_after_a_failed_case(monkeypatch):
    """The cases after it are measured, in another process."""
    asked: list[Any] = []

    class Worker:
        def __init__(self, threads: int, begin: Any) -> None:
            self.threads, self.alive = threads, True

        def ask(self, timeout: float, function: Any, case: Case, *rest: Any) -> _bench.Outcome:
            asked.append(self)
            if len(asked) == 1:
                self.alive = False
                raise CommandError("the process ended: a last word")
            return _bench.Outcome(rows=[{"mode": "step"}])

        def close(self) -> None:
            pass

    monkeypatch.setattr(run, "Worker", Worker)
    done = run.run_cases(TINY[:3], 1.0)
    assert len(done.rows) == 2 and len(done.failed) == 1 and "a last word" in done.failed[0]
    assert asked[0] is not asked[1] and asked[1] is asked[2]
    assert done.report_problems() == 1


# --- the CSV --------------------------------------------------------------------------------------


def synthetic(**values: Any) -> Row:
    """A row with figures of the right kinds."""
    row: Row = {
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


def save(path: Path, *rows: Row) -> None:
    results.save(path, results.frame(rows))


def test_rows_are_replaced_by_their_key(tmp_path):
    """Figures of another machine, or of another case, must outlive a run."""
    old = [synthetic(), synthetic(machine="n"), synthetic(provider="xla"), synthetic(threads=1)]
    new = [synthetic(median_s=0.5), synthetic(mode="step")]
    merged = results.replace(results.frame(old), results.frame(new))
    assert list(merged["median_s"]) == [0.5, 0.01, 0.01, 0.01, 0.01]
    path = tmp_path / "folder" / "r.csv"
    results.save(path, merged)
    pd.testing.assert_frame_equal(results.load(path), merged)


def test_the_record_survives_being_read_and_written(tmp_path):
    """Every run reads the committed figures and writes them back: not a byte may change."""
    rows = results.load(RESULTS / "results.csv")
    results.save(tmp_path / "r.csv", results.replace(rows, rows.iloc[:5]))
    assert (tmp_path / "r.csv").read_bytes() == (RESULTS / "results.csv").read_bytes()


def test_a_file_that_is_no_csv_of_ours(tmp_path):
    """One sentence instead of a KeyError."""
    path = tmp_path / "r.csv"
    with pytest.raises(CommandError, match="cannot read"):
        results.load(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CommandError, match="no column 'machine'"):
        results.load(path)
    path.write_text(f"{','.join(results.KEY)},median_s\n{',' * len(results.KEY)}soon\n")
    with pytest.raises(CommandError, match="median_s is not a number"):
        results.load(path)


# --- regressions ----------------------------------------------------------------------------------


def test_a_planted_regression_is_found(tmp_path, capsys):
    """The reason for having compare at all."""
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    rows = [synthetic(), synthetic(mode="step", extra_percent_of_x=1.0, extra_bytes=514_000)]
    save(old, *rows)
    save(new, *rows)
    assert compare.main([str(old), str(new), "--fail"]) == 0

    def judged(**values: Any) -> int:
        save(new, rows[0], {**rows[1], **values})
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
    assert judged(provider="xla", median_s=1.0) == 0  # a baseline's, and ours is missing
    assert judged(median_s=0.0001) == 0


def test_files_that_cannot_be_compared(tmp_path):
    """Nothing in common is no success."""
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    save(old, synthetic())
    assert compare.main([str(old), str(new), "--fail"]) == 2
    save(new, synthetic(machine="another"))
    assert compare.main([str(old), str(new), "--fail"]) == 2


# --- the report -----------------------------------------------------------------------------------


def _planted() -> list[Row]:
    rows = []
    for mode in ("forward", "backward", "step"):
        for h, w, c in _bench.RESNET50:
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


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_shows_where_we_lose():
    """A table without its losses is an advertisement."""
    rows = results.frame(_planted())
    text = report.details(rows)
    lines = text.splitlines()
    (loss,) = [line for line in lines if "1×1×1×512" in line]
    assert "XLA" in loss and "**0.70×**" in loss
    assert "slower" in text
    first = ["16×56×56×256", "forward", "10 ms"]
    stage, inside_xla = (_cells(line) for line in lines if _cells(line)[:3] == first)
    assert {"4.0×", "3.0×", "50×"} <= set(stage)
    assert "90×" not in stage  # the faster memory format of PyTorch
    assert inside_xla[3:] == ["5 ms", "30 ms", "6.0×"]
    (network,) = [line for line in lines if "ResNet-50 at 224 px" in line]
    assert all(text in network for text in ("4.8 %", "830 ms", "710 ms"))
    (half,) = [line for line in lines if "bfloat16" in line]
    assert "7.0×" in half
    assert "1×56×56×256 forward 1.7× with 2 threads" in text
    full = report.full_table(rows)
    assert "**0.70×**" in full and "torch-eager-contiguous" in full
    without = rows[(rows["c"] != 512) | (rows["h"] != 1)]
    assert "cbam_ops is the faster one" in report.details(without)
    # Twelve stages beside three, a half type beside one, the loss.
    assert "is the faster one in 37 of 38 comparisons" in report.short_table(rows)


def test_report_writes_what_it_says(tmp_path, capsys):
    """Both tables between their markers, all rows, and both pictures, from the CSV alone."""
    csv, readme, output = tmp_path / "r.csv", tmp_path / "README.md", tmp_path / "out"
    save(csv, *_planted())
    assert report.main([str(csv)]) == 0
    assert "16×56×56×256" in capsys.readouterr().out
    assert report.main([str(csv), "--all"]) == 0
    assert "torch-eager-contiguous" in capsys.readouterr().out
    readme.write_text("no markers\n")
    assert report.main([str(csv), "--update", str(readme)]) == 2
    marked = [f"{report.BEGIN.format(name)}\nold\n{report.END}\n" for name in report.TABLES]
    readme.write_text(f"before\n{''.join(marked)}after\n")
    for _ in range(2):
        arguments = [str(csv), "--update", str(readme), "--pictures", str(output)]
        assert report.main(arguments) == 0
        text = readme.read_text(encoding="utf-8")
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        first = ["16×56×56×256", "forward", "10 ms"]
        # Short, in detail, and inside XLA.
        assert sum(_cells(line)[:3] == first for line in text.splitlines()) == 3
    for name in ("baselines.png", "roofline.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert report.main([str(csv), "--machine", "another"]) == 2


@pytest.mark.parametrize("file", ["README.md", "docs/benchmarks.md"])
def test_the_committed_tables_are_those_of_the_committed_csv(file):
    """Edited by hand, or left behind by a newer run, they would show figures nobody measured."""
    own = report.one_machine(results.load(RESULTS / "results.csv"))
    text = (ROOT / file).read_text(encoding="utf-8")
    assert report.update(text, own) == text


def test_every_loss_is_shown():
    """The details, which a reader is pointed to, leave none out: of the committed figures, were XLA
    five times as fast."""
    own = report.one_machine(results.load(RESULTS / "results.csv"))
    own.loc[own["provider"] == "xla", "median_s"] /= 5
    text = report.details(own)
    lost = report.losses(report.ours(own))
    assert len(lost) and all(report._size(row) in text for _, row in lost.iterrows())


def test_machine():
    """Figures without what they were measured on, and with, are worth nothing."""
    here = machine.describe("here")
    assert here["machine"] == "here" and here["cpus"] >= 1 and here["cache_bytes"] >= 2**20
    assert here["versions"].startswith("cbam_ops ") and "tensorflow" in here["versions"]
