"""Everything there is to check and time on a GPU, in one command, within nine minutes.

    python benchmarks/gpu_check.py [STEP ...] [--output DIR] [--quick] [--device cpu] [--plan]

Needs PyTorch with CUDA and cbam_ops with its CUDA kernels. Where no such cbam_ops is installed, the
part that needs no TensorFlow is built here for this machine's GPU, with nvcc, cmake and pybind11.
The kernels run on PyTorch's memory and streams; where TensorFlow is, the ops are checked and timed
too. JAX is timed where it is. Correctness, streams and sanitizers have run on
an H200, and timing as it was before ours was timed alone.

1. correctness   options, sizes, types and layouts of `cbam_ops.testing`, misaligned maps,
                 against `_core` on the CPU in float64
2. streams       a long operation ahead of ours on a stream of its own, 50 repeats, bitwise equal
3. tensorflow    `pytest -m gpu`: the ops against the CPU ops and the float64 reference, placement,
                 stream order, repeats
4. timing        the suite's cases.gpu_cases(): ours alone, in both layouts; then PyTorch,
                 torch.compile, JAX, TensorFlow's graph and XLA; each beside a device copy; batch
                 256, 32, 1
5. network       CBAM's share of a training step of ResNet-50, in PyTorch
6. counters      `ncu --set full` of both kernels at ResNet-50's stages: time, instructions, bytes
                 from memory, L2's hits, conflicts, resident blocks; what the model counts beside it
7. sanitizers    compute-sanitizer's memcheck, initcheck, synccheck and racecheck over small shapes,
                 without PyTorch, each array in an allocation of its own

Prints a short table and the targets last; writes checks.csv, timing.csv, network.csv, counters.csv
and a picture, rows as they come. Each part runs in a process of its own, which may crash. Exit code
1 if anything is wrong. Each STEP can run alone, in under four minutes with the build; without one
all run. `--plan` prints how long each may take, and needs nothing. `--device cpu` runs the steps
that are PyTorch's without a GPU: correctness, streams, timing, network.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Seconds that each part may take on a GPU machine, which is borrowed. The timings begin nothing new
# after theirs, programs of their own are cut off.
PLAN = {
    "build": 75,
    "correctness": 40,
    "streams": 15,
    "tensorflow": 70,
    "timing": 100,
    "network": 35,
    "counters": 120,  # 32 kernels; 6 took 20 s on an H200
    "sanitizers": 80,
}
SANITIZERS = ("memcheck", "initcheck", "synccheck", "racecheck")
QUICK_PLAN = {**PLAN, "timing": 50, "network": 0}
# JAX shares the GPU here, TensorFlow too. Kernels that have no code for this GPU are compiled at
# their first use: TensorFlow's own may be such, once and not in every process.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "CUDA_CACHE_PATH": str(Path(tempfile.gettempdir()) / "cbam_ops_cuda_cache"),
    "CUDA_CACHE_MAXSIZE": str(4 << 30),
}


def build(folder: Path) -> None:
    """Builds the package without its TensorFlow libraries into a folder, for this machine's GPU."""
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
        sys.exit("gpu_check needs nvcc: put it on PATH or set CUDACXX.")
    try:
        import pybind11
    except ImportError:
        sys.exit("gpu_check needs pybind11 and cmake to build: pip install pybind11 cmake")
    shutil.copytree(ROOT / "cbam_ops", folder / "cbam_ops")
    made = folder / "build"
    configure = ["cmake", "-S", ROOT, "-B", made, f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCBAM_OPS_TENSORFLOW=OFF"]
    configure += ["-DCBAM_OPS_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"]
    parallel = ["--parallel", str(os.cpu_count() or 2)]
    for command in (
        configure,
        ["cmake", "--build", made, *parallel],
        ["cmake", "--install", made, "--prefix", folder],
    ):
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}")


def has_kernels() -> bool:
    """Whether the cbam_ops that Python finds has CUDA kernels."""
    if importlib.util.find_spec("cbam_ops") is None:
        return False
    try:
        from cbam_ops import _core
    except ImportError:
        sys.modules.pop("cbam_ops", None)  # the one that is built comes first on the path
        return False
    return bool(_core.cuda.built)


# ---- correctness ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
    """A case (of `cbam_ops.testing`), and how far its maps are off a boundary."""

    kind: str
    case: Any
    offset: int = 0


def checks(quick: bool) -> Iterator[Check]:
    """Everything that is checked."""
    import cases

    from cbam_ops import testing

    def of_the_core(case: testing.Case) -> bool:
        """Whether one call of the kernels is the whole case, and a gate is in it."""
        return case.is_one_call and not case.function.endswith("pool")

    for layout in ("NHWC", "NCHW"):
        for case in filter(of_the_core, testing.OPTIONS):
            for dtype in ("float32", "float16", "bfloat16", "float64"):
                yield Check("options", case.replace(dtype=dtype, data_format=layout))
        for case in filter(of_the_core, testing.SIZES):
            for dtype in ("float32", "float16"):
                yield Check("sizes", case.replace(dtype=dtype, data_format=layout))
        for dtype in ("float32", "bfloat16"):
            case = testing.Case(size=(2, 8, 8, 32), dtype=dtype, data_format=layout)
            yield Check("misaligned", case, offset=1)
            for stage in () if quick else cases.gpu_cases([3]):
                case = stage.problem.replace(dtype=dtype, data_format=layout)
                yield Check("stage", case)


def arrays_of(case: Any) -> dict[str, np.ndarray]:
    """The arguments in the kernels' names, and `dy`."""
    arrays = case.arrays()
    if "beta" in arrays:
        arrays["bias"] = arrays.pop("beta")
    (dy,) = case.cotangents([arrays["x"]])
    return {**arrays, "dy": dy}


def run_check(check: Check, cuda: Any = None, memory: Any = None) -> dict[str, Any]:
    """Runs both passes; what is off, and how much of its bound the worst error takes."""
    import device

    from cbam_ops import _core

    cuda, memory = cuda or device.kernels(), memory or device.TorchMemory()
    arrays = arrays_of(check.case)
    call = device.Call(check.case, cuda, _core.signatures(), memory, arrays, check.offset)
    call.step()
    found = device.findings(check.case, call, arrays)
    faults = [finding.fault for finding in found if finding.fault]
    return {
        "kind": check.kind, "case": str(check.case), "offset": check.offset,
        "worst": max(finding.strain for finding in found), "wrong": "; ".join(faults),
    }  # fmt: skip


def check_all(worker: Any, quick: bool, path: Path, limit: float) -> list[dict[str, Any]]:
    """A row per check, written as they come; a crash is a wrong row, and the others go on."""
    from cbam_ops._cli.bench import write_rows
    from cbam_ops._console import CommandError

    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + limit
    for check in checks(quick):
        if time.monotonic() > deadline:
            print(f"time is up: the checks from {check.kind} on were not run")
            break
        current = worker()
        try:
            rows.append(current.ask(limit, run_check, check))
        except CommandError as error:
            rows.append({"kind": check.kind, "case": str(check.case), "offset": check.offset,
                         "worst": np.inf, "wrong": str(error)})  # fmt: skip
            current.alive = False  # an illegal access spoils the process
        write_rows(path, rows)
    return rows


def check_streams() -> bool:
    """Ours after a long operation on the same stream, inputs written just before, 50 times."""
    import device
    import torch

    from cbam_ops import _core, testing

    good = True
    size = (8, 28, 28, 512) if device.DEVICE == "cuda" else (2, 5, 6, 32)
    case = testing.Case(size=size, hidden=32, kernel_size=7)
    memory = device.TorchMemory()
    call = device.Call(case, device.kernels(), _core.signatures(), memory, arrays_of(case))
    call.step()
    expected = call.results()
    sources = {name: call.inputs[name].clone() for name in ("x", "dy")}
    backend = getattr(torch, device.DEVICE)
    stream = backend.Stream()
    long = torch.randn(2**26 if device.DEVICE == "cuda" else 2**10, device=device.DEVICE)
    backend.synchronize()
    for _ in range(50 if device.DEVICE == "cuda" else 2):
        with backend.stream(stream):
            for name in sources:
                call.inputs[name].fill_(float("nan"))
            for _ in range(8):  # a kernel on another stream would run first
                long.mul_(1.0)
            for name, source in sources.items():
                call.inputs[name].copy_(source)
            call.step()
        backend.synchronize()
        found = call.results()
        good &= all(found[n].tobytes() == expected[n].tobytes() for n in expected)
    return good


def sanitize(folder: Path) -> dict[str, str]:
    """compute-sanitizer over a few small problems: what each of its tools says."""
    tool = shutil.which("compute-sanitizer")
    limit = PLAN["sanitizers"] / len(SANITIZERS)
    result = {}
    for name in SANITIZERS:
        if not tool:
            result[name] = "not run: compute-sanitizer not found"
            continue
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, __file__]
        try:
            done = subprocess.run(
                [*command, "--small-shapes", str(folder)],
                capture_output=True, text=True, check=False, timeout=limit,
            )  # fmt: skip
            result[name] = "ok" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]
        except subprocess.TimeoutExpired:
            result[name] = f"not run to the end within {limit:.0f} seconds"
    return result


def small_shapes() -> list[Any]:
    """What compute-sanitizer looks at."""
    from cbam_ops import testing

    relu = testing.options(activation="relu")
    case = testing.Case(size=(5, 8, 8, 32), residual=True, options=relu)
    return [
        case.replace(data_format=layout, dtype=dtype)
        for layout, dtype in itertools.product(("NHWC", "NCHW"), ("float32", "bfloat16"))
    ]


def run_apart(cases: Iterable[Any], cuda: Any = None) -> None:
    """Both passes without PyTorch, each array in an allocation of its own."""
    import device

    from cbam_ops import _core
    from cbam_ops._cli import gpu_kernels

    for case in cases:
        gpu_kernels.both_passes(device.Apart(cuda or _core.cuda), case)


# ---- counters ------------------------------------------------------------------------------------

# What ncu calls them, and the units that it may give them in.
COUNTERS = {
    "microseconds": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_written": "dram__bytes_write.sum",
    "l2_hits_percent": "lts__t_sector_hit_rate.pct",
    "conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "registers": "launch__registers_per_thread",
    "blocks_by_registers": "launch__occupancy_limit_registers",
    "blocks_by_shared_memory": "launch__occupancy_limit_shared_mem",
    "shared_memory": "launch__shared_mem_config_size",
    "active_warps": "sm__warps_active.avg.per_cycle_active",
    "issued_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    # Warps that wait, for each that issues.
    "at_barrier": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "for_memory": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "for_shared": "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
}
UNITS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3}
UNITS |= {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def profiled_cases() -> list[Any]:
    """The maps of counts.csv, larger."""
    import cases

    return [
        stage.problem.replace(dtype=stage.dtype, data_format=layout)
        for stage in cases.gpu_cases([32])
        for layout in ("NHWC", "NCHW")
    ]


def counters_of(output: str, cases: Sequence[Any]) -> list[dict[str, Any]]:
    """What ncu printed, a row for each kernel, with what the model takes it to be.

    Args:
      output: of `ncu --csv --page raw`: names, units, and a line for each kernel.
      cases: what ran, a forward and a backward kernel of each.

    Raises:
      ValueError: it has other kernels than those.
    """
    start = output.find('"ID"')
    names, units, *lines = csv.reader(output[start:].splitlines()) if start >= 0 else ([], [])
    kernels = [dict(zip(names, line, strict=True)) for line in lines if len(line) == len(names)]
    unit = dict(zip(names, units, strict=True))
    directions = [
        "forward" if "Forward" in kernel["Kernel Name"] else "backward" for kernel in kernels
    ]
    if directions != ["forward", "backward"] * len(cases):
        raise ValueError(f"ncu saw {len(kernels)} kernels, {2 * len(cases)} were expected")
    with (ROOT / "csrc" / "core" / "cuda" / "counts.csv").open() as file:
        counts = {tuple(row.values())[:5]: row for row in csv.DictReader(file)}
    rows = []
    for case, kernel, direction in zip(np.repeat(cases, 2), kernels, directions, strict=True):
        stage = "x".join(map(str, case.size[1:]))
        elements = int(np.prod(case.size))
        row = {"stage": stage, "dtype": case.dtype, "layout": case.data_format}
        row |= {"direction": direction, "n": case.size[0]}
        for name, metric in COUNTERS.items():
            if kernel.get(metric):
                value = float(kernel[metric].replace(",", "")) * UNITS.get(unit[metric], 1)
                row[name] = value
        expected = counts[stage, case.dtype, case.data_format, direction, "all"]
        row["instructions_counted"] = float(expected["instructions"]) * elements / 32
        row["dram_counted"] = float(expected["dram"]) * elements
        rows.append(row)
    return rows


def profile(folder: Path, path: Path) -> str:
    """ncu over the stages: writes a row for each kernel; "ok", or why there are none."""
    from cbam_ops._cli.bench import write_rows

    tool = shutil.which("ncu")
    if not tool:
        return "not run: ncu not found"
    command = [tool, "--csv", "--page", "raw", "--set", "full", "--kernel-name", "regex:ward"]
    command += [sys.executable, __file__, "--stages", str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PLAN["counters"]
        )
        rows = counters_of(done.stdout, profiled_cases())
    except subprocess.TimeoutExpired:
        return f"not run to the end within {PLAN['counters']} seconds"
    except ValueError as error:
        return f"not run: {error}\n{(done.stdout + done.stderr)[-1500:]}"
    write_rows(path, rows)
    return "ok"


# ---- TensorFlow, in a process of its own ---------------------------------------------------------


def tensorflow_tests() -> str:
    """`pytest -m gpu`: "ok", why it did not run, or what failed."""
    tests = ROOT / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "test_gpu.py"]
    limit = PLAN["tensorflow"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit, cwd=tests
        )
    except subprocess.TimeoutExpired:
        return f"not run to the end: more than {limit} seconds"
    return judge_pytest(done.returncode, done.stdout + done.stderr)


def judge_pytest(code: int, output: str) -> str:
    """What a run of pytest means: no TensorFlow, or no GPU for it, is "not run" and no fault."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"
    if code == 0 and " passed" in last:
        return f"ok ({last.strip('= ')})"
    if code in (0, 5) or "No module named" in output or "has no compiled parts" in output:
        return f"not run ({last.strip('= ')})"
    return f"FAILED: {output[-1500:]}"


# ---- what was reached ----------------------------------------------------------------------------

COMPILED = ["torch-compile-channels-last", "jax", "xla"]
EAGER = ["torch-eager-channels-last", "tf-graph"]


def launches() -> int | None:
    """How many kernels of ours a forward pass of one sample starts, as the profiler sees it."""
    import device
    import torch

    from cbam_ops import _core, testing

    size = (1, 14, 14, 1024) if device.DEVICE == "cuda" else (1, 5, 6, 32)
    case = testing.Case(size=size, hidden=64, kernel_size=7)
    memory = device.TorchMemory()
    call = device.Call(case, device.kernels(), _core.signatures(), memory, arrays_of(case))
    call.forward()
    activities = [getattr(torch.profiler.ProfilerActivity, device.DEVICE.upper())]
    with torch.profiler.profile(activities=activities) as profile:
        call.forward()
        getattr(torch, device.DEVICE).synchronize()
    return sum(e.count for e in profile.key_averages() if "cbam_ops" in e.key) or None


def _judge(name: str, values: Sequence[float], limit: float, at_most: bool) -> str:
    if not len(values):
        return f"{name}: not measured"
    good = sum(value <= limit if at_most else value >= limit for value in values)
    worst = max(values) if at_most else min(values)
    sign = "at most" if at_most else "at least"
    return (
        f"{name}: {sign} {limit:g} wanted; {good} of {len(values)} met, worst {worst:.2f}, "
        f"median {statistics.median(values):.2f}"
    )


def verdict(rows: Any, launched: int | None = None) -> list[str]:
    """What the kernels are to reach, line by line; one sample alone is judged on its own."""
    import report

    key = ["n", "h", "w", "c", "dtype", "layout", "mode"]
    times = rows.pivot_table("median_s", key, "provider", sort=False).reset_index()
    large, lines = times[times["n"] > 1], []
    for mode, limit in {"forward": 1.25, "backward": 1.35}.items():
        own = rows[(rows["provider"] == "ours") & (rows["mode"] == mode) & (rows["n"] > 1)]
        ideal = list(own["copies"] / report.IDEAL[mode])
        lines.append(_judge(f"ours, {mode}, times the ideal", ideal, limit, True))
    for names, least in ((COMPILED, {"forward": 2, "step": 3}), (EAGER, {"forward": 4, "step": 6})):
        for mode, limit in least.items():
            chosen = large[large["mode"] == mode].reindex(columns=["ours", *names])
            speeds = (chosen[names].min(axis=1) / chosen["ours"]).dropna()
            title = f"{mode}, against the faster of {', '.join(names)}"
            lines.append(_judge(title, list(speeds), limit, False))
    small = times[(times["n"] == 1) & (times["c"] == 1024) & (times["dtype"] == "float32")]
    small = small[small["mode"] == "forward"].reindex(columns=["ours", *COMPILED, *EAGER])
    if small["ours"].dropna().empty:
        return [*lines, "batch 1, 14x14x1024: not measured"]
    row = small.iloc[0]
    beaten = [name for name in (*COMPILED, *EAGER) if row[name] <= row["ours"]]
    return [
        *lines,
        f"batch 1, 14x14x1024: fewer than 4 launches wanted, {launched or 'unknown'}; faster than "
        f"us: {', '.join(beaten) or 'none'}",
    ]


def network_table(rows: Sequence[dict[str, Any]]) -> str:
    """A training step of ResNet-50 without CBAM, and what each kind of CBAM adds to it."""
    if not rows:
        return "ResNet-50: not measured"
    bare = {row["dtype"]: row["ms"] for row in rows if row["provider"] == "plain"}
    lines = []
    for row in rows:
        line = f"ResNet-50, batch {row['n']}, {row['dtype']}, {row['provider']}: {row['ms']:.1f} ms"
        if row["provider"] != "plain" and row["dtype"] in bare:
            line += f", CBAM's share {100 * (1 - bare[row['dtype']] / row['ms']):.0f} %"
        lines.append(line)
    return "\n".join(lines)


# ---- the command ---------------------------------------------------------------------------------


# Each in processes of its own: two frameworks in one would fight over the GPU's memory.
GROUPS = (
    ("ours",),  # first: nothing of it waits for a baseline
    ("torch-eager-channels-last", "torch-compile-channels-last"),
    ("jax",),
    ("ours-tf", "tf-graph", "xla"),
)


def timed_cases(batches: Sequence[int]) -> list[list[Any]]:
    """The suite's cases, a list for every group of providers whose framework is here."""
    import cases

    frameworks = ("torch", "torch", "jax", "tensorflow")
    return [
        [
            dataclasses.replace(case, providers=names, layout=layout)
            for case in cases.gpu_cases(batches)
            for layout in (("NHWC", "NCHW") if names == GROUPS[0] else ("NHWC",))
        ]
        for names, framework in zip(GROUPS, frameworks, strict=True)
        if importlib.util.find_spec(framework) is not None
    ]


def work(case: Any, seconds: float, cache_bytes: int) -> Any:
    """Measures one of them, in its process."""
    import baselines
    import device
    import measure

    if case.providers == GROUPS[0]:
        return device.measure_alone(case, seconds)
    providers = {**baselines.PROVIDERS, "ours-tf": baselines.PROVIDERS["ours"]}
    return measure.measure(case, seconds, cache_bytes, providers, device.truth_of)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    steps = [name for name in PLAN if name != "build"]  # which happens where it must
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(steps)}")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument("--quick", action="store_true", help="fewer checks and shapes, batch 256")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: the same code on a CPU and small maps, to try it without a GPU; no times of it",
    )
    parser.add_argument("--plan", action="store_true", help="print how long each part may take")
    # What other programs look at: the folder with the package.
    parser.add_argument("--small-shapes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    unknown = set(arguments.steps) - set(steps)
    if unknown:
        parser.error(f"there is no step {', '.join(unknown)}: the steps are {', '.join(steps)}")
    arguments.steps = arguments.steps or steps
    if looked_at := arguments.small_shapes or arguments.stages:
        sys.modules["tensorflow"] = None  # type: ignore[assignment]
        sys.path[:0] = [str(looked_at), str(Path(__file__).parent)]
        run_apart(small_shapes() if arguments.small_shapes else profiled_cases())
        return 0
    plan = QUICK_PLAN if arguments.quick else PLAN
    if arguments.device == "cpu":  # nobody waits for it: what is checked is checked to the end
        plan = {**plan, "correctness": 3600, "streams": 3600}
    if arguments.plan:
        for name, seconds in plan.items():
            print(f"{seconds:4} s  {name}")
        print(f"{sum(plan.values()):4} s  in all, at most")
        return 0
    try:
        import torch
    except ImportError:
        torch = None
    on_a_gpu = arguments.device == "cuda"
    if torch is None or (on_a_gpu and not torch.cuda.is_available()):
        sys.exit("gpu_check needs PyTorch with CUDA and an NVIDIA GPU that it can use.")
    os.environ |= {**ENVIRONMENT, "CBAM_OPS_BENCHMARK_DEVICE": arguments.device}
    with tempfile.TemporaryDirectory() as folder:
        return _everything(arguments, plan, Path(folder))


def _everything(arguments: argparse.Namespace, plan: dict[str, int], folder: Path) -> int:
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    on_a_gpu = arguments.device == "cuda"
    if on_a_gpu and not has_kernels():
        build(folder)
        sys.path.insert(0, str(folder))  # of the processes that are started too
        say("built")
    import run

    from cbam_ops._cli.bench import write_rows
    from cbam_ops._console import CommandError

    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    workers: list[run.Worker] = []

    def worker() -> run.Worker:
        """The process that checks; another one where it died."""
        if not workers or not workers[-1].alive:
            for old in workers:
                old.close()
            workers[:] = [run.Worker(os.cpu_count() or 2, run.redirect)]
        return workers[-1]

    def asked(name: str, function: Callable[..., Any], *more: Any) -> Any:
        """What a function returns in that process; None, and why, if nothing."""
        try:
            return worker().ask(plan[name], function, *more)
        except CommandError as error:
            say(f"{name}: {error}")
            return None

    failed = False
    if "correctness" in arguments.steps:
        quick = arguments.quick or not on_a_gpu
        found = check_all(worker, quick, output / "checks.csv", plan["correctness"])
        bad = [row for row in found if row["wrong"]]
        say(f"correctness: {len(found)} checks, {len(bad)} wrong")
        for row in bad[:20]:
            print("   ", row)
        failed |= bool(bad)
    if "streams" in arguments.steps:
        streams = asked("streams", check_streams)
        say(f"streams: {'ok' if streams else 'WRONG'}")
        failed |= not streams
    if "tensorflow" in arguments.steps:
        tests = tensorflow_tests()
        say(f"tensorflow: {tests}")
        failed |= tests.startswith("FAILED")
    if "timing" in arguments.steps:
        launched = asked("streams", launches)
        groups = timed_cases((256,) if arguments.quick else (256, 32, 1))
        if not on_a_gpu:
            groups = [[dataclasses.replace(g[0], n=2, h=4, w=5, c=32)] for g in groups]
        timing: list[dict[str, Any]] = []

        def keep(rows: list[dict[str, Any]]) -> None:
            timing.extend(rows)
            write_rows(output / "timing.csv", timing)

        for chosen in groups:
            minutes = plan["timing"] / 60 / len(groups)
            done = run.run_cases(chosen, minutes, on_rows=keep, begin=run.redirect, work=work)
            failed |= bool(done.report_problems())
        say("timed")
        try:
            _report(timing, launched, output)
        except ImportError as error:
            say(f"no tables ({error}): benchmarks/report.py makes them of timing.csv")
    if "network" in arguments.steps and plan["network"]:
        network = asked("network", _network, plan["network"]) or []
        write_rows(output / "network.csv", network)
        print(network_table(network))
    for old in workers:
        old.close()
    if "counters" in arguments.steps:
        say(f"counters: {profile(folder, output / 'counters.csv')}")
    if "sanitizers" in arguments.steps:
        for tool, text in sanitize(folder).items():
            say(f"{tool}: {text}")
            failed |= text != "ok" and not text.startswith("not run")
    say("done: FAILED" if failed else "done")
    return 1 if failed else 0


def _report(rows: list[dict[str, Any]], launched: int | None, output: Path) -> None:
    import report
    import results

    if rows:
        timing = results.frame(rows)
        print(report.console_table(timing))
        print("\n".join(verdict(timing, launched)))
        report.draw_baselines(timing, output / "baselines.png")


def _network(seconds: float) -> list[dict[str, Any]]:
    import device
    import gpu_network

    if device.DEVICE != "cuda":
        return gpu_network.time_network(seconds, batch=2, side=32, repeats=1)
    return gpu_network.time_network(seconds)


if __name__ == "__main__":
    sys.exit(main())
