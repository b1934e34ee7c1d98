"""The CUDA kernels' own sources, executed on the CPU and held against the float64 definition.

csrc/testing/cuda_on_cpu.h runs the .cuh and .cu files one fiber per CUDA thread. What is checked
here is what the kernels compute and how they synchronise; not how fast they are, nor that nvcc
translates them as the C++ compiler does (`benchmarks/gpu_check.py` does that on a GPU).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cuda_resources
import numpy as np
import pytest
from cuda_on_cpu import COMPILER, CSRC, Kernels, build, sanitizer_works
from kernel_calls import Problem, Tensors, check

from cbam_ops import testing
from cbam_ops.testing import Case, assert_same_bits

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler on PATH")

DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("NHWC", "NCHW")
PARALLEL = testing.options(order="parallel")
MODULES = {
    "channel_first": Case(),
    "parallel": Case(options=PARALLEL),
    "channel_only": Case("channel_attention"),
    "spatial_only": Case("spatial_attention"),
}


@pytest.fixture(scope="session")
def emulation() -> Kernels:
    return Kernels()


@pytest.fixture
def kernels(emulation: Kernels) -> Kernels:
    emulation.set_schedule(0)
    emulation.set_path("portable")
    emulation.set_device()
    return emulation


def with_batch_norm(case: Case, batch_norm: bool = True) -> Case:
    return case.replace(function=f"{case.function}_with_batch_norm") if batch_norm else case


def same(one: Tensors, other: Tensors) -> None:
    """Bitwise equality of all tensors."""
    for name, value in one.items():
        assert_same_bits(value, other[name], name)


@pytest.mark.parametrize("path", ["portable", "cluster"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
def test_every_module(kernels: Kernels, module: str, dtype: str, layout: str, path: str) -> None:
    """Fails where a type, layout or order computes another function than the definition."""
    if path == "cluster" and dtype == "float64":
        pytest.skip("float64 has no cluster kernels")
    kernels.set_path(path)
    kernels.set_schedule(1)
    case = MODULES[module].replace(size=(5, 4, 6, 16), dtype=dtype, data_format=layout)
    check(case.replace(fill="steps"), kernels)


OPTIONS = [
    dict(zip(("pooling", "mlp_activation", "activation", "residual", "biases"), row, strict=True))
    for row in (
        ("avg+max", "none", "none", True, True),
        ("avg+max", "relu", "relu", True, False),
        ("avg+max", "relu", "none", False, True),
        ("avg", "none", "relu", False, True),
        ("avg", "relu", "relu", True, True),
        ("max", "none", "none", False, False),
        ("max", "relu", "relu", True, True),
        ("max", "none", "relu", False, True),
    )
]


@pytest.mark.parametrize("kind", ["portable", "cluster", "batch_norm"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_options(kernels: Kernels, options: dict[str, Any], layout: str, kind: str) -> None:
    """Fails where pooling, activations, residual, biases or batch norm are wired wrongly."""
    kernels.set_path("cluster" if kind == "cluster" else "portable")
    kernels.set_schedule(2)
    words = {key: value for key, value in options.items() if isinstance(value, str)}
    case = Case(
        size=(5, 4, 6, 16), kernel_size=5, data_format=layout, fill="steps",
        residual=options["residual"], biases=options["biases"], options=testing.options(**words),
    )  # fmt: skip
    case = with_batch_norm(case, kind == "batch_norm")
    check(case, kernels, gate_gradients=options["biases"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1, 1),
        (3, 1, 9, 5),
        (2, 7, 7, 33),
        (1, 13, 11, 64),
        (9, 2, 3, 17),
        (1, 20, 9, 130),
        (1, 2, 2, 1500),
        (1, 40, 40, 8),
    ],
    ids=str,
)
def test_sizes(kernels: Kernels, size: tuple[int, int, int, int], dtype: str, layout: str) -> None:
    """Odd sizes: tails of vectors, of tiles, of slices, and rows shorter than a warp."""
    kernels.set_schedule(3)
    check(Case(size=size, dtype=dtype, data_format=layout), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 3, 600, 4), (1, 2, 1030, 8), (1, 4, 143, 4)], ids=str)
def test_rows_longer_than_a_tile(
    kernels: Kernels, size: tuple[int, int, int, int], layout: str
) -> None:
    """Planes wider than a tile are cut within rows; a width that is no multiple of a vector too."""
    check(Case(size=size, data_format=layout), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 9, 15, 41])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_kernel_sizes(kernels: Kernels, kernel_size: int, batch_norm: bool, layout: str) -> None:
    """Halos from none to wider than the plane, and a kernel whose window does not fit (41)."""
    case = Case(size=(2, 9, 10, 8), kernel_size=kernel_size, data_format=layout)
    check(with_batch_norm(case, batch_norm), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [1, 7, 300, 700])
@pytest.mark.parametrize("path", ["portable", "cluster"])
def test_hidden_sizes(kernels: Kernels, path: str, hidden: int, layout: str) -> None:
    """More hidden units than a slice of shared memory, and than a block has threads."""
    kernels.set_path(path)
    check(Case(size=(9, 2, 4, 40), hidden=hidden, data_format=layout), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_misaligned(kernels: Kernels, layout: str) -> None:
    """Maps off a 16-byte boundary take the scalar kernels, with the same results."""
    for dtype in ("float32", "float16"):
        case = Case(size=(2, 4, 4, 16), dtype=dtype, data_format=layout, fill="steps")
        check(case, kernels, misalign=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_chunks_of_samples_change_nothing(kernels: Kernels, batch_norm: bool, layout: str) -> None:
    """How many samples are in flight depends on the GPU's L2: results must not."""
    options = testing.options(activation="relu")
    case = Case(size=(7, 4, 4, 8), data_format=layout, residual=True, options=options)
    case = with_batch_norm(case, batch_norm)
    kernels.set_device(l2=1 << 30)
    kernels.take_launched_kernels()
    whole = check(case, kernels)
    whole_launches = len(kernels.take_launched_kernels().split())
    kernels.set_device(l2=3 * 4 * 4 * 8 * 4 * 2)
    parts = check(case, kernels)
    assert len(kernels.take_launched_kernels().split()) > whole_launches
    same(whole, parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [20_000, 30_000, 45_000, 232_448])
def test_a_sample_over_more_or_fewer_blocks(kernels: Kernels, shared: int, layout: str) -> None:
    """Clusters of several sizes: halos, column sums and gates cross the blocks' borders."""
    kernels.set_path("cluster")
    kernels.set_device(shared=shared)
    case = Case(size=(5, 12, 12, 32), kernel_size=7, hidden=20, data_format=layout)
    check(case, kernels)


def test_the_path_that_is_chosen(kernels: Kernels) -> None:
    """What the plan promises for the sizes of a ResNet-50, and the override."""
    kernels.set_path("auto")
    stages = {(56, 256): True, (28, 512): True, (14, 1024): True, (7, 2048): False}
    for (side, channels), expected in stages.items():
        path = kernels.cbam_path(shape=(32, side, side, channels), hidden=channels // 16)
        assert (path == "cluster") is expected, side
    kernels.set_device(capability=80)
    assert kernels.cbam_path(shape=(1, 8, 8, 8)) == "portable"
    kernels.set_path("cluster")
    with pytest.raises(RuntimeError, match="does not fit"):
        Problem(Case(size=(2, 4, 4, 8))).forward(kernels)


@pytest.mark.parametrize("path", ["portable", "cluster"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_bitwise_in_any_order(kernels: Kernels, layout: str, path: str) -> None:
    """Threads and blocks in another order: the same bits, or something depends on who is first."""
    kernels.set_path(path)
    options = testing.options(activation="relu")
    case = Case(size=(5, 9, 8, 36), data_format=layout, options=options)
    first = check(case, kernels)
    problem = Problem(case)
    for schedule in (1, 2, 3):
        kernels.set_schedule(schedule)
        same(first, problem.both(kernels))


@pytest.mark.parametrize("path", ["portable", "cluster"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", ["channel_first", "parallel"])
def test_nan_and_infinity(kernels: Kernels, module: str, layout: str, path: str) -> None:
    """They reach what they reach in the definition, and nothing else."""
    kernels.set_path(path)
    for fill in testing.NOT_FINITE:
        case = MODULES[module].replace(size=(5, 4, 4, 8), data_format=layout, fill=fill)
        problem = Problem(case)
        outputs = problem.forward(kernels)
        problem.check_forward(outputs)
        # Which of the samples have a NaN gradient; the others must be untouched by it.
        touched, ours = (
            np.isnan(gradients["dx"]).any(axis=(1, 2, 3))
            for gradients in (
                problem.define_backward(outputs, "float64"),
                problem.backward(kernels, outputs),
            )
        )
        assert (touched == ours).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", ["portable", "cluster"])
@pytest.mark.parametrize("fill", ["zeros", "relu", "offset"])
def test_values(kernels: Kernels, fill: str, path: str, layout: str) -> None:
    """Where everything is a maximum (after a ReLU whole maps are) the gradient is split evenly."""
    kernels.set_path(path)
    check(Case(size=(5, 4, 6, 16), data_format=layout, fill=fill), kernels)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(kernels: Kernels, layout: str, batch_norm: bool) -> None:
    """No samples: empty maps, and weights' gradients of zero rather than of nothing."""
    case = with_batch_norm(Case(size=(0, 4, 4, 8), data_format=layout), batch_norm)
    problem = Problem(case)
    for name, value in problem.backward(kernels, problem.forward(kernels)).items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 5, 7, 8), (3, 4, 4, 32), (1, 20, 17, 3)], ids=str)
@pytest.mark.parametrize("function", ["channel_pool", "spatial_pool"])
def test_pools(
    kernels: Kernels, function: str, size: tuple[int, int, int, int], dtype: str, layout: str
) -> None:
    """The pools on their own and their gradients, with ties."""
    check(Case(function, size, fill="steps", dtype=dtype, data_format=layout), kernels)


def test_invalid_problems_are_named(kernels: Kernels) -> None:
    """The contract's own checks come first, and a missing address is not read."""
    problem = {"shape": (1, 2, 2, 4), "hidden": 3}
    for message, call in {
        "kernel_size must be odd": {"kernel_size": 4},
        "hidden must be at least 1": {"hidden": 0},
        r"`x` must have shape \[N, H, W, C\], got \[2, 2\]": {"shape": (2, 2)},
        "`dtype` must be of float32 or .*, got int8": {"dtype": "int8"},
    }.items():
        with pytest.raises(ValueError, match=message):
            kernels.cbam_workspace(**problem | call)
    with pytest.raises(ValueError, match="cbam: `x` must be an address, got none"):
        kernels.module.cbam(**problem)
    with pytest.raises(ValueError, match="`path` must be one of 'auto', 'portable', 'cluster'"):
        kernels.set_path("fast")


def test_sizes_beyond_the_kernels_are_refused(kernels: Kernels) -> None:
    """Fails: an index of 32 bits wraps around."""
    case = Problem(Case(size=(1, 2, 2, 4)))
    arguments = dict.fromkeys(
        ("x", "w0", "w1", "kernel", "y", "channel_gate", "spatial_gate", "channel_descriptors",
         "spatial_descriptors", "batch_statistics"),
        case.inputs["x"].ctypes.data,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="below 2"):
        kernels.module.cbam(shape=(1, 1 << 20, 1 << 20, 4), hidden=3, **arguments)


BUILT = "75-real 80-real 90-real 120-real 121-virtual"


@pytest.mark.parametrize(
    ("driver", "capability", "architectures", "sentence"),
    [
        (13000, 90, BUILT, ""),
        (13050, 86, BUILT, ""),  # 80's machine code
        (13000, 121, BUILT, ""),
        (13000, 130, BUILT, ""),  # 121's PTX
        (13000, 90, "", ""),  # the build did not say
        (13000, 90, "native", ""),
        (13000, 90, "90", ""),
        (13000, 103, "90", ""),  # PTX too
        (13000, 90, "90a-real", ""),
        (13000, 103, "100f-real", ""),
        (0, 90, BUILT, "There is no NVIDIA driver."),
        (
            12040,
            90,
            BUILT,
            "The NVIDIA driver is made for CUDA 12.4, and the kernels were built with CUDA 13.5: "
            "they need a driver for CUDA 13.",
        ),
        (13000, 0, BUILT, "The NVIDIA driver finds no GPU."),
        *(
            (
                13000,
                capability,
                architectures,
                f"The GPU has compute capability {capability // 10}.{capability % 10}, and the "
                f"kernels were built for the architectures {architectures}.",
            )
            for capability, architectures in (
                (61, BUILT),
                (100, BUILT),  # neither 90's code nor 121's PTX
                (80, "86-real 90-real"),
                (103, "90a-real 100a-real"),
                (120, "100f-real 110-real"),
            )
        ),
    ],
)
def test_why_a_build_cannot_run(
    kernels: Kernels, driver: int, capability: int, architectures: str, sentence: str
) -> None:
    assert kernels.explain_machine(driver, 13050, capability, architectures) == sentence


def test_half_conversions_of_the_header(kernels: Kernels) -> None:
    """All float16 numbers, and all roundings between neighbours, as numpy rounds them."""
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    for number, value in zip(bits, values, strict=True):
        if np.isnan(value):
            assert np.isnan(kernels.half_to_float(int(number)))
            continue
        assert kernels.half_to_float(int(number)) == value
        between = np.float32(value * np.float32(1.0003))
        with np.errstate(over="ignore"):
            assert kernels.float_to_half(float(between)) == between.astype(np.float16).view(
                np.uint16
            )


# ---- sanitizers and mutants ----------------------------------------------------------------------

CHECK = CSRC / "testing" / "cuda_on_cpu_check.cc"
FLOAT32 = ("kernels", "float32", "gates_float32")


def _run_check(binary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return subprocess.run(
        [str(binary), *arguments],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer(sanitizer: str) -> None:
    """address: reads and writes beyond shared memory, maps and workspace. thread: missing barriers,
    and blocks or clusters that write what others read."""
    if not sanitizer_works(sanitizer):
        pytest.skip(f"-fsanitize={sanitizer} does not work with {COMPILER} here")
    arguments = ["threads"] if sanitizer == "thread" else []
    done = _run_check(build(sanitizer=sanitizer, only=FLOAT32, main=CHECK), *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


# Faults put into a copy of the sources: file, text, replacement. Each must be noticed by the
# results or by a sanitizer, or the tests above would not notice it either.
MUTANTS = {
    "reduce: barrier before the fold removed": (
        "reduce.cuh",
        "  Barrier();\n  for (int c = ThreadIndex(); c < width;",
        "  for (int c = ThreadIndex(); c < width;",
    ),
    "reduce: one row thread too few": (
        "reduce.cuh",
        "for (int r = 1; r < params.row_threads; ++r)",
        "for (int r = 1; r < params.row_threads - 1; ++r)",
    ),
    "reduce: tail rows counted twice": (
        "reduce.cuh",
        "if (this_row >= end) continue;",
        "",
    ),
    "spatial: halo one column too narrow": (
        "spatial.cuh",
        "tile.column = -radius;",
        "tile.column = -radius + 1;",
    ),
    "spatial: window one row too short": (
        "spatial.cuh",
        "tile.rows = static_cast<int>(last_row - first_row) + 1 + 2 * radius;",
        "tile.rows = static_cast<int>(last_row - first_row) + 2 * radius;",
    ),
    "spatial: kernel not flipped": (
        "spatial.cuh",
        "const A value = last[-(i * tile.columns + j)];",
        "const A value = last[(i - 2) * tile.columns + j - 2];",
    ),
    "mlp: barrier after a slice removed": (
        "gate_mlp.cuh",
        "    }\n    Barrier();\n  }\n  CBAM_UNROLL\n  for (int s = 0; s < kSums; ++s) shared[s",
        "    }\n  }\n  CBAM_UNROLL\n  for (int s = 0; s < kSums; ++s) shared[s",
    ),
    "cluster: waits for no copy": (
        "cluster.cuh",
        "void WaitForStage(int stage) const { WaitForCopies(barriers + stage, 0); }",
        "void WaitForStage(int) const {}",
    ),
    "cluster: barrier before combining removed": (
        "cluster.cuh",
        "      ClusterBarrier();\n      CombineColumns<true>(part, partial, store);",
        "      CombineColumns<true>(part, partial, store);",
    ),
    "cluster: last barrier of the gather removed": (
        "cluster.cuh",
        "    store(i, sum);\n  }\n  ClusterBarrier();",
        "    store(i, sum);\n  }",
    ),
    "cluster: first stage copied twice, last never": (
        "cluster.cuh",
        "const int64_t begin = static_cast<int64_t>(StageRow(stage)) * columns;",
        "const int64_t begin = static_cast<int64_t>(StageRow(stage > 2 ? 0 : stage)) * columns;",
    ),
    "map: ties get the whole gradient": (
        "reduce.cuh",
        "side.max_share = d_max / count;",
        "side.max_share = d_max;",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_mutants_are_caught(mutant: str, tmp_path: Path) -> None:
    """A fault in the sources is noticed by the results, by the scheduler or by ThreadSanitizer."""
    name, text, replacement = MUTANTS[mutant]
    csrc = tmp_path / "csrc"
    for folder in ("core", "testing"):
        shutil.copytree(CSRC / folder, csrc / folder)
    target = csrc / "core" / "cuda" / name
    source = target.read_text()
    assert text in source, "the mutation no longer applies: update it"
    target.write_text(source.replace(text, replacement))
    done = _run_check(build(csrc, only=FLOAT32, main=CHECK), "quick")
    if done.returncode == 0 and sanitizer_works("thread"):
        done = _run_check(build(csrc, sanitizer="thread", only=FLOAT32, main=CHECK), "threads")
    assert done.returncode != 0, "nobody noticed"


# ---- nvcc ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_resources_and_warnings() -> None:
    """No kernel spills, none uses many more registers than the committed table says, and nvcc has
    nothing to warn of. One architecture here (`python tests/cuda_resources.py` takes all)."""
    if cuda_resources.nvcc() is None:
        pytest.skip("no nvcc on PATH and no CUDACXX")
    units = ("kernels", "float32", "bfloat16", "gates_float32")
    report = cuda_resources.compile_report(["90"], units)
    assert len(report) > 60
    assert not cuda_resources.differences(report, cuda_resources.read_table())


def test_committed_table_has_no_spills() -> None:
    """For all architectures that are built by default."""
    table = cuda_resources.read_table()
    assert {str(row["architecture"]) for row in table} == set(cuda_resources.ARCHITECTURES)
    assert not cuda_resources.differences(table, table)
