"""Everything there is to check and time on a GPU, in one command, within eight minutes.

    python benchmarks/gpu_check.py [--output DIR] [--quick] [--no-sanitizer] [--no-timing] [--plan]

Needs cbam_ops installed with its CUDA kernels, and PyTorch with CUDA. The kernels are called
through `cbam_ops._core.cuda` on PyTorch's memory, on PyTorch's streams; where TensorFlow finds the
GPU, the ops are checked and timed too. JAX is timed where it is.

1. correctness   every kind of gates, layout, type and option against the float64 definition
                 (tests/numpy_oracle.py), both paths; ties, odd sizes, misaligned maps, repeats
2. stream order  a long operation ahead of ours on a stream of its own, 50 repeats, bitwise equal
3. TensorFlow    `pytest -m gpu`: the ops against the CPU ops and the float64 reference, placement,
                 stream order, repeats
4. timing        medians of device events over maps several times the L2, against a device copy,
                 PyTorch eager, torch.compile, JAX, TensorFlow's graph and XLA; forward, backward,
                 step; batch 1, 32, 256
5. network       CBAM's share of a training step of ResNet-50, in PyTorch
6. sanitizer     compute-sanitizer memcheck and racecheck over small shapes

Prints a short table and the targets last; writes checks.csv, timing.csv, network.csv, timing.png.
Exit code 1 if anything is wrong. `--plan` prints how long each part may take, and needs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_network  # noqa: E402
import gpu_report  # noqa: E402
import numpy_oracle as oracle  # noqa: E402

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX shares the GPU here

try:
    import torch
except ImportError:  # the plan can be read without
    torch = None

STAGES = ((56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048))
TYPES = ("float32", "float16", "bfloat16", "float64")
# Seconds that each part may take. The timings begin nothing new after theirs, programs of their own
# are cut off, and the first three are estimates: they have not run on a GPU yet.
PLAN = {
    "correctness": 40,
    "stream order": 10,
    "TensorFlow: tests": 70,
    "timing": 140,
    "TensorFlow: timing": 50,
    "network": 35,
    "memcheck": 45,
    "racecheck": 45,
}
QUICK_PLAN = {**PLAN, "TensorFlow: timing": 30, "timing": 50, "network": 0}
# Largest error of a tensor over its largest value (before cancellation), as in the CPU tests.
MAP_ERROR = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "float64": 1e-13}
COMPUTE_ERROR = {"float32": 2e-5, "float16": 2e-5, "bfloat16": 2e-5, "float64": 1e-13}
MAPS = {"y", "dx", "d_residual"}


class Library:
    """The kernels on tensors of PyTorch, on PyTorch's current stream.

    A problem is a dict of what a function of `_core.cuda` takes beside the tensors.
    """

    def __init__(self) -> None:
        # Without the package around it, which would import TensorFlow.
        package = importlib.util.find_spec("cbam_ops")
        folders = [Path(package.origin).parent] if package else []
        folders.append(Path(sysconfig.get_path("platlib"), "cbam_ops"))
        found = [path for folder in folders for path in folder.glob("_core.*.so")]
        if not found:
            sys.exit("gpu_check needs cbam_ops: run pip install . first.")
        spec = importlib.util.spec_from_file_location("_core", found[0])
        core = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(core)
        if not core.cuda.built:
            sys.exit("gpu_check needs CUDA kernels: run pip install . where nvcc is on PATH.")
        self.cuda = core.cuda
        self.set_path = core.cuda.set_path

    def space(self, op: str, problem: dict[str, Any]) -> torch.Tensor:
        """Memory for a call."""
        size = getattr(self.cuda, f"{op}_workspace")(**problem)
        return torch.empty((size + 256,), dtype=torch.uint8, device="cuda")

    def path(self, op: str, problem: dict[str, Any]) -> str:
        return getattr(self.cuda, f"{op}_path")(**problem)

    def run(self, op: str, problem: dict[str, Any], space: torch.Tensor, **tensors: Any) -> None:
        addresses = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
        getattr(self.cuda, op)(
            **problem | addresses,
            workspace=space.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )


OPS = {
    "channel_first": ("cbam", {}),
    "parallel": ("cbam", {"order": "parallel"}),
    "channel_only": ("channel_attention", {}),
    "spatial_only": ("spatial_attention", {}),
}


class Case:
    """One problem with its tensors on the GPU."""

    def __init__(
        self,
        library: Library,
        n: int,
        h: int,
        w: int,
        c: int,
        *,
        hidden: int = 0,
        k: int = 7,
        dtype: str = "float32",
        layout: str = "NHWC",
        gates: str = "channel_first",
        pooling: str = "avg+max",
        mlp_activation: str = "none",
        activation: str = "none",
        batch_norm: bool = False,
        residual: bool = False,
        offset: int = 0,
        ties: bool = True,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        self.library, self.dtype, self.layout, self.gates, self.k = library, dtype, layout, gates, k
        self.offset = offset
        hidden = hidden or max(1, c // 16)
        map_type = getattr(torch, dtype)
        compute = torch.float64 if dtype == "float64" else torch.float32
        self.map_type, self.compute = map_type, compute
        self.shape = (n, h, w, c) if layout == "NHWC" else (n, c, h, w)
        self.sizes = (n, h, w, c, hidden)

        def random_map() -> torch.Tensor:
            values = torch.randn(self.shape, generator=generator, device="cuda")
            values = torch.round(values * 8) / 8 if ties else values
            return self.empty_map().copy_(values)

        def weight(*size: int) -> torch.Tensor:
            values = torch.randn(size, generator=generator, device="cuda") * 0.5
            return values.to(compute).contiguous()

        self.x, self.dy = random_map(), random_map()
        self.residual = random_map() if residual else None
        self.has_channel, self.has_spatial = gates != "spatial_only", gates != "channel_only"
        scale = c**-0.5
        self.weights: dict[str, torch.Tensor] = {}
        if self.has_channel:
            self.weights |= {"w0": weight(c, hidden) * scale, "b0": weight(hidden)}
            self.weights |= {"w1": weight(hidden, c) * hidden**-0.5, "b1": weight(c)}
        if self.has_spatial:
            self.weights |= {"kernel": weight(k, k, 2) / k, "bias": weight(1)}
        if batch_norm:
            self.weights["gamma"] = weight(1)
        self.options = {
            "layout": layout,
            "gates": gates,
            "pooling": pooling,
            "mlp_activation": mlp_activation,
            "activation": activation,
            "batch_norm": batch_norm,
        }
        self.op, words = OPS[gates]
        if self.has_channel:
            words = {"pooling": pooling, "mlp_activation": mlp_activation, **words}
        self.problem = {
            "shape": self.shape, "dtype": dtype, "hidden": hidden, "kernel_size": k,
            "data_format": layout, "activation": activation, **words,
        }  # fmt: skip
        if batch_norm:
            self.problem["gamma"] = self.weights["gamma"].data_ptr()
        self.outputs = self._outputs()
        self.gradients = self._gradients()
        self.forward_space = library.space(self.op, self.problem).fill_(255)
        space = library.space(f"{self.op}_grad", self.gradient_problem())
        self.backward_space = space.fill_(255)

    def empty_map(self) -> torch.Tensor:
        """NaN everywhere; `offset` elements off an aligned address."""
        count = int(np.prod(self.shape))
        flat = torch.full((count + self.offset,), float("nan"), dtype=self.map_type, device="cuda")
        return flat[self.offset :].view(self.shape)

    def _nan(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=self.compute, device="cuda")

    def gradient_problem(self) -> dict[str, Any]:
        relu = self.options["activation"] == "relu"
        return self.problem | ({"y": self.outputs["y"].data_ptr()} if relu else {})

    def _outputs(self) -> dict[str, torch.Tensor]:
        n, h, w, c, _ = self.sizes
        out = {"y": self.empty_map()}
        if self.has_channel:
            out |= {"channel_descriptors": self._nan(2, n, c), "channel_gate": self._nan(n, c)}
        if self.has_spatial:
            out |= {
                "spatial_descriptors": self._nan(n, 2, h, w),
                "spatial_gate": self._nan(n, h, w),
            }
            if self.options["batch_norm"]:
                out["batch_statistics"] = self._nan(2)
        return out

    def _gradients(self) -> dict[str, torch.Tensor]:
        out = {"dx": self.empty_map()}
        if self.options["activation"] == "relu" and self.residual is not None:
            out["d_residual"] = self.empty_map()
        return out | {"d" + name: self._nan(*w.shape) for name, w in self.weights.items()}

    def forward(self) -> None:
        self.library.run(
            self.op, self.problem, self.forward_space, x=self.x, residual=self.residual,
            **self.weights, **self.outputs,
        )  # fmt: skip

    def backward(self) -> None:
        saved = {name: v for name, v in self.outputs.items() if name != "y"}
        self.library.run(
            f"{self.op}_grad", self.gradient_problem(), self.backward_space,
            x=self.x, dy=self.dy, **self.weights, **saved, **self.gradients,
        )  # fmt: skip

    def results(self) -> dict[str, torch.Tensor]:
        return {**self.outputs, **self.gradients}

    def check(self) -> float:
        """Runs both passes; the largest error over its bound, infinite where NaNs differ."""
        self.forward()
        self.backward()
        torch.cuda.synchronize()

        def host(t: torch.Tensor | None) -> np.ndarray | None:
            return None if t is None else t.to(torch.float64).cpu().numpy()

        weights = {name: host(w) for name, w in self.weights.items()}
        if "kernel" in weights:
            weights["kernel"] = weights["kernel"].reshape(self.k, self.k, 2, 1)
        inputs = {"x": host(self.x), "residual": host(self.residual), **weights, **self.options}
        extra: dict[str, Any] = {"dy": host(self.dy)}
        if self.options["activation"] == "relu":
            extra["y"] = host(self.outputs["y"])
        if self.gates == "channel_first":
            extra["tie_gate"] = self.outputs["channel_gate"].cpu().numpy()
        truth = {**oracle.forward(**inputs), **oracle.backward(**extra, **inputs)}
        sizes = oracle.backward(**extra, **inputs, magnitude=True)
        worst = 0.0
        for name, tensor in self.results().items():
            expected = np.asarray(truth[name]).reshape(tensor.shape)
            got = tensor.to(torch.float64).cpu().numpy()
            scale = np.abs(np.asarray(sizes.get(name, expected))).max(initial=1e-3)
            error = np.abs(got - expected).max(initial=0) if got.size else 0.0
            bound = (MAP_ERROR if name in MAPS else COMPUTE_ERROR)[self.dtype] * scale
            worst = max(worst, float("inf") if np.isnan(error) else float(error / bound))
        return worst


def cases(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of everything that is checked."""
    layouts, paths = ("NHWC", "NCHW"), ("portable", "cluster")
    kinds = ("channel_first", "parallel", "channel_only", "spatial_only")
    for dtype, layout, gates, path in itertools.product(TYPES, layouts, kinds, paths):
        if path == "cluster" and dtype == "float64":
            continue
        yield (
            "gates",
            {"size": (3, 8, 8, 32), "dtype": dtype, "layout": layout, "gates": gates, "path": path},
        )
    for layout, path, relu, residual, pooling, mlp in itertools.product(
        layouts, paths, ("none", "relu"), (False, True), ("avg+max", "avg", "max"), ("none", "relu")
    ):
        yield "options", {
            "size": (5, 8, 12, 16), "layout": layout, "path": path, "activation": relu,
            "residual": residual, "pooling": pooling, "mlp_activation": mlp, "k": 5,
        }  # fmt: skip
    for layout, dtype in itertools.product(layouts, ("float32", "bfloat16")):
        for size in ((1, 1, 1, 1), (2, 7, 7, 33), (1, 13, 11, 64), (9, 2, 3, 17), (1, 3, 600, 4)):
            yield "sizes", {"size": size, "layout": layout, "dtype": dtype, "path": "portable"}
        yield (
            "misaligned",
            {"size": (2, 8, 8, 32), "layout": layout, "dtype": dtype, "offset": 1, "path": "auto"},
        )
        yield (
            "batch norm",
            {
                "size": (4, 9, 10, 24),
                "layout": layout,
                "dtype": dtype,
                "batch_norm": True,
                "path": "auto",
            },
        )
    if quick:
        return
    for (h, w, c), layout, path in itertools.product(STAGES, layouts, ("portable", "auto")):
        for dtype in ("float32", "bfloat16"):
            yield "stage", {"size": (3, h, w, c), "layout": layout, "dtype": dtype, "path": path}


def check_all(library: Library, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, arguments in cases(quick):
        arguments = dict(arguments)
        size, path = arguments.pop("size"), arguments.pop("path")
        library.set_path(path)
        row = {"check": name, "size": "x".join(map(str, size)), "path": path, **arguments}
        try:
            case = Case(library, *size, **arguments)
            row["error"] = case.check()
            first = {key: value.clone() for key, value in case.results().items()}
            case.forward()
            case.backward()
            row["repeats"] = all(
                torch.equal(value.view(torch.uint8), first[key].view(torch.uint8))
                for key, value in case.results().items()
            )
        except RuntimeError as error:
            # A plane that does not fit the cluster path is no fault where the path was forced.
            if path == "cluster" and "does not fit" in str(error):
                continue
            row |= {"error": float("inf"), "repeats": False, "message": str(error)[:200]}
        row["ok"] = row["error"] <= 1 and row["repeats"]
        rows.append(row)
    library.set_path("auto")
    return rows


def check_streams(library: Library) -> bool:
    """Ours after a long operation on the same stream, inputs written just before, 50 times."""
    good = True
    for path in ("portable", "auto"):
        library.set_path(path)
        case = Case(library, 8, 28, 28, 512)
        case.forward()
        case.backward()
        torch.cuda.synchronize()
        expected = {key: value.clone() for key, value in case.results().items()}
        source, source_dy = case.x.clone(), case.dy.clone()
        stream = torch.cuda.Stream()
        big = torch.randn(4096, 4096, device="cuda")
        torch.cuda.synchronize()
        for _ in range(50):
            with torch.cuda.stream(stream):
                case.x.fill_(float("nan"))
                case.dy.fill_(float("nan"))
                big @ big  # long enough that a kernel on another stream would run first
                case.x.copy_(source)
                case.dy.copy_(source_dy)
                case.forward()
                case.backward()
                got = {key: value.clone() for key, value in case.results().items()}
            stream.synchronize()
            good &= all(
                torch.equal(value.view(torch.uint8), expected[key].view(torch.uint8))
                for key, value in got.items()
            )
    library.set_path("auto")
    return good


def sanitize() -> dict[str, str]:
    """compute-sanitizer over a few small problems of each path."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return {
            "memcheck": "compute-sanitizer not found",
            "racecheck": "compute-sanitizer not found",
        }
    result = {}
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, __file__]
        try:
            done = subprocess.run(
                [*command, "--small-shapes"],
                capture_output=True, text=True, check=False, timeout=PLAN[name],
            )  # fmt: skip
            result[name] = "ok" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]
        except subprocess.TimeoutExpired:
            result[name] = f"no result within {PLAN[name]} seconds"
    return result


def small_shapes(library: Library) -> None:
    """What compute-sanitizer looks at."""
    for path, layout in itertools.product(("portable", "cluster"), ("NHWC", "NCHW")):
        library.set_path(path)
        for dtype in ("float32", "bfloat16"):
            case = Case(
                library, 5, 8, 8, 32, layout=layout, dtype=dtype, activation="relu", residual=True
            )
            case.forward()
            case.backward()
        torch.cuda.synchronize()


# ---- timing --------------------------------------------------------------------------------------


def median_time(run: Callable[[], Any], budget: float = 0.25) -> float:
    """Seconds per call, the median of device events."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    end = time.perf_counter() + budget
    while len(times) < 7 or (time.perf_counter() < end and len(times) < 200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def launches(run: Callable[[], Any]) -> int | None:
    """How many kernels of ours a call starts, as the profiler sees it."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if "cbam_ops" in e.key) or None


def torch_module(
    case: Case,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[torch.Tensor]]:
    """The ten stock lines, channels last as PyTorch would have them, and their weights."""
    w = {
        name: value.to(case.map_type, copy=True).requires_grad_()
        for name, value in case.weights.items()
    }

    def mlp(t: torch.Tensor) -> torch.Tensor:
        return torch.relu(t @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]

    def module(x: torch.Tensor) -> torch.Tensor:  # x [N, C, H, W], channels last in memory
        gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))
        u = x * gate[:, :, None, None]
        planes = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)
        kernel = w["kernel"].permute(2, 0, 1)[None]
        z = torch.nn.functional.conv2d(planes, kernel, w["bias"], padding=case.k // 2)
        return u * torch.sigmoid(z)

    return module, list(w.values())


def jax_module(case: Case) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """XLA's forward and step on the same numbers, or None without JAX."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    if not any(d.platform == "gpu" for d in jax.devices()):
        return None
    kind = jnp.bfloat16 if case.dtype == "bfloat16" else jnp.float32
    w = {name: jnp.asarray(v.cpu().numpy()).astype(kind) for name, v in case.weights.items()}
    x = jnp.asarray(case.x.float().cpu().numpy()).astype(kind)
    dy = jnp.asarray(case.dy.float().cpu().numpy()).astype(kind)

    def module(x: Any, w: dict[str, Any]) -> Any:
        def mlp(t: Any) -> Any:
            return jax.nn.relu(t @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]

        u = x * jax.nn.sigmoid(mlp(x.mean((1, 2))) + mlp(x.max((1, 2))))[:, None, None, :]
        planes = jnp.stack([u.mean(3), u.max(3)], 3)
        z = jax.lax.conv_general_dilated(
            planes,
            w["kernel"][..., None],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return u * jax.nn.sigmoid(z + w["bias"])

    forward = jax.jit(module)

    @jax.jit
    def step(x: Any, w: dict[str, Any], dy: Any) -> Any:
        y, back = jax.vjp(module, x, w)
        return y, back(dy)

    # Wall clock around several calls in flight: JAX has no device events here.
    return (lambda: forward(x, w)), (lambda: step(x, w, dy))


def jax_time(run: Callable[[], Any]) -> float:
    import jax

    jax.block_until_ready(run())
    times = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(5)])
        times.append((time.perf_counter() - start) / 5)
    return statistics.median(times)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether a peer computes the same function; its weights are of the map's type."""
    scale = ours.float().abs().max()
    error = (ours.float() - theirs.float()).abs().max() / scale
    return bool(error < (5e-2 if ours.dtype == torch.bfloat16 else 1e-3))


def time_ours(library: Library, case: Case, note: Callable[..., None], one: bool) -> None:
    """Both paths; the launches too where there is `one` sample."""
    for path in ("portable", "auto"):
        library.set_path(path)
        taken = {
            "forward": library.path(case.op, case.problem),
            "backward": library.path(f"{case.op}_grad", case.gradient_problem()),
        }
        if path == "auto" and set(taken.values()) == {"portable"}:
            continue
        name = gpu_report.OURS if path == "auto" else gpu_report.PORTABLE
        passes = {"forward": case.forward, "backward": case.backward}
        for what, function in passes.items():
            count = {"launches": launches(function)} if one else {}
            note(name, what, median_time(function), path=taken[what], **count)
        both = "+".join(dict.fromkeys(taken.values()))
        note(name, "step", median_time(lambda p=passes: [f() for f in p.values()]), path=both)
    library.set_path("auto")


def time_torch(case: Case, who: str, note: Callable[..., None]) -> None:
    """PyTorch's stock operations, channels last; a step has the weights' gradients too."""
    module, weights = torch_module(case)
    function = torch.compile(module, dynamic=False) if who == "torch.compile" else module
    x = case.x.permute(0, 3, 1, 2).detach().requires_grad_()
    dy = case.dy.permute(0, 3, 1, 2)

    def step() -> None:
        for leaf in (x, *weights):
            leaf.grad = None
        function(x).backward(dy)

    try:
        case.forward()
        with torch.no_grad():
            if not same(case.outputs["y"], function(x).permute(0, 2, 3, 1)):
                raise RuntimeError("it computes something else")
            note(who, "forward", median_time(lambda: function(x)))
        note(who, "step", median_time(step))
    except Exception as error:  # a peer that fails is reported, not fatal
        print(f"{who} {tuple(case.shape)} {case.dtype}: {type(error).__name__}: {error}"[:200])


def time_all(library: Library, seconds: float, batches: Sequence[int]) -> list[gpu_report.Row]:
    """Ours, the copy and eager PyTorch on every shape, then what has to be compiled first."""
    rows: list[gpu_report.Row] = []
    deadline = time.perf_counter() + seconds
    torch.backends.cudnn.benchmark = True
    bases: dict[Any, gpu_report.Row] = {}
    for compiled, shape in itertools.product((False, True), shapes(batches)):
        if time.perf_counter() > deadline:
            print("time is up: the remaining shapes and peers were not timed")
            break
        batch, dtype, (h, w, c) = shape
        case = Case(library, batch, h, w, c, dtype=dtype, ties=False)
        if not compiled:
            target = torch.empty_like(case.x)
            copy = median_time(lambda t=target, s=case.x: t.copy_(s))
            del target
            bases[shape] = {
                "batch": batch,
                "dtype": dtype,
                "map": f"{h}x{w}x{c}",
                "copy_us": copy * 1e6,
                "map_bytes": case.x.numel() * case.x.element_size(),
                "l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size,
            }
        base = bases[shape]

        def note(
            who: str, what: str, value: float, base: gpu_report.Row = base, **more: Any
        ) -> None:
            rows.append({**base, "who": who, "what": what, "us": value * 1e6, **more})

        if not compiled:
            time_ours(library, case, note, one=batch == 1)
            time_torch(case, "torch eager", note)
        else:
            time_torch(case, "torch.compile", note)
            jax_runs = jax_module(case) if time.perf_counter() < deadline else None
            for what, run in zip(("forward", "step"), jax_runs or (), strict=False):
                note("JAX", what, jax_time(run))
        del case
        torch.cuda.empty_cache()
    return rows


# ---- TensorFlow, in processes of its own ---------------------------------------------------------

_WITHOUT_PREALLOCATION = {**os.environ, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def tensorflow_tests() -> str:
    """`pytest -m gpu`: "ok", why it did not run, or what failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        str(ROOT / "tests" / "test_gpu.py"),
    ]
    limit = PLAN["TensorFlow: tests"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit,
            env=_WITHOUT_PREALLOCATION, cwd=ROOT / "tests",
        )  # fmt: skip
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


def tensorflow_timing(
    folder: Path, shapes: Sequence[tuple[int, str, tuple[int, int, int]]], seconds: float
) -> tuple[list[gpu_report.Row], str]:
    """Rows of TensorFlow's graph and XLA and of the op, and a word on how it went."""
    output = folder / "tensorflow.csv"
    cases = [f"{b},{h},{w},{c},{dtype}" for b, dtype, (h, w, c) in shapes]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_tensorflow.py")]
    # It begins nothing new in the last third: XLA may still be compiling then.
    command += ["--output", str(output), "--seconds", str(seconds * 2 / 3), "--cases", *cases]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds,
            env=_WITHOUT_PREALLOCATION,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [], "no result in time"
    if done.returncode != 0 or not output.exists():
        lines = done.stderr.strip().splitlines()
        return [], f"not timed ({lines[-1] if lines else 'no message'})"
    return gpu_report.read(output), "timed"


def with_copies(
    rows: Sequence[gpu_report.Row], timed: Sequence[gpu_report.Row]
) -> list[gpu_report.Row]:
    """TensorFlow's rows with what the other rows of the same case know of copy and sizes."""
    known = {(r["batch"], r["dtype"], r["map"]): r for r in timed}
    names = ("copy_us", "map_bytes", "l2_bytes")
    found = []
    for row in rows:
        other = known.get((row["batch"], row["dtype"], row["map"]))
        if other is not None:
            found.append({**row, **{name: other[name] for name in names}})
    return found


# ---- the command ---------------------------------------------------------------------------------


def shapes(batches: Sequence[int]) -> list[tuple[int, str, tuple[int, int, int]]]:
    """What is timed, the most wanted first: the time may be up before the end."""
    return [(b, d, s) for b in batches for d in ("float32", "bfloat16") for s in STAGES]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument("--quick", action="store_true", help="fewer shapes, batch 32 only")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--plan", action="store_true", help="print how long each part may take")
    parser.add_argument("--small-shapes", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    plan = QUICK_PLAN if arguments.quick else PLAN
    if arguments.plan:
        for name, seconds in plan.items():
            print(f"{seconds:4} s  {name}")
        print(f"{sum(plan.values()):4} s  in all, at most")
        return 0
    if torch is None or not torch.cuda.is_available():
        sys.exit("gpu_check needs PyTorch with CUDA and an NVIDIA GPU that it can use.")
    if arguments.small_shapes:
        small_shapes(Library())
        return 0
    start = time.perf_counter()
    failed = False

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    arguments.output.mkdir(parents=True, exist_ok=True)
    timing: list[gpu_report.Row] = []
    network: list[gpu_report.Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = Library()
        say(f"on {torch.cuda.get_device_name()}")
        checks = check_all(library, arguments.quick)
        gpu_report.write(arguments.output / "checks.csv", checks)
        bad = [row for row in checks if not row["ok"]]
        say(f"correctness: {len(checks)} checks, {len(bad)} wrong")
        for row in bad[:20]:
            print("   ", row)
        streams = check_streams(library)
        say(f"stream order: {'ok' if streams else 'WRONG'}")
        tests = tensorflow_tests()
        say(f"TensorFlow: {tests}")
        failed = bool(bad) or not streams or tests.startswith("FAILED")
        if not arguments.no_timing:
            batches = (32,) if arguments.quick else (32, 256, 1)
            timing = time_all(library, plan["timing"], batches)
            say("timed")
            rows, word = tensorflow_timing(folder, shapes(batches), plan["TensorFlow: timing"])
            timing += with_copies(rows, timing)
            say(f"TensorFlow: {word}")
            gpu_report.write(arguments.output / "timing.csv", timing)
            if plan["network"]:
                network = gpu_network.time_network(library, plan["network"])
                gpu_report.write(arguments.output / "network.csv", network)
                say("ResNet-50 timed")
        if not arguments.no_sanitizer:
            for tool, text in sanitize().items():
                say(f"{tool}: {text}")
                failed |= text != "ok" and "not found" not in text and "no result" not in text
    if timing:
        print(gpu_report.table(timing))
        print("\n".join(gpu_report.verdict(timing)))
        print(gpu_report.network_table(network))
        try:
            device = torch.cuda.get_device_name()
            gpu_report.draw(timing, arguments.output / "timing.png", device)
        except ImportError:
            say("no picture: matplotlib is not installed")
    say("done" if not failed else "done: FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
