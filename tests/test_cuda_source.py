"""The CUDA kernels' own sources, executed on the CPU and held against the float64 definition.

csrc/testing/cuda_on_cpu.h runs the .cuh and .cu files one fiber per CUDA thread. What is checked
here is what the kernels compute and how they synchronise; not how fast they are, nor that nvcc
translates them as the C++ compiler does (`benchmarks/gpu_check.py` does that on a GPU).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_resources
import numpy as np
import pytest
from cuda_on_cpu import COMPILER, CSRC, Kernels, build, changed_sources, sanitizer_works
from kernel_calls import DTYPES, LAYOUTS, MLPS, MODULES, Problem, Tensors, check, check_infinity
from programs import HANGS

from cbam_ops import _core, testing
from cbam_ops.testing import Case, assert_same_bits

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler on PATH")


@pytest.fixture(scope="session")
def emulation() -> Kernels:
    return Kernels()


@pytest.fixture
def kernels(emulation: Kernels) -> Kernels:
    emulation.set_schedule(0)
    emulation.set_device()
    return emulation


def with_batch_norm(case: Case, batch_norm: bool = True) -> Case:
    return case.replace(function=f"{case.function}_with_batch_norm") if batch_norm else case


def same(one: Tensors, other: Tensors) -> None:
    """Bitwise equality of all tensors."""
    for name, value in one.items():
        assert_same_bits(value, other[name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
def test_every_module(kernels: Kernels, module: str, dtype: str, layout: str) -> None:
    """Fails where a type, layout or order computes another function than the definition."""
    kernels.set_schedule(1)
    case = MODULES[module].replace(size=(5, 4, 6, 16), dtype=dtype, data_format=layout)
    check(case.replace(fill="steps"), kernels)


OPTIONS = [
    {**mlp, "activation": activation, "residual": residual, "biases": biases}
    for mlp, (activation, residual, biases) in zip(
        MLPS,
        itertools.cycle(itertools.product(("none", "relu"), (True, False), (True, False))),
        strict=False,
    )
]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_options(kernels: Kernels, options: dict[str, Any], layout: str, batch_norm: bool) -> None:
    """Fails where pooling, activations, residual, biases or batch norm are wired wrongly."""
    kernels.set_schedule(2)
    words = {key: value for key, value in options.items() if isinstance(value, str)}
    case = Case(
        size=(5, 4, 6, 16), kernel_size=5, data_format=layout, fill="steps",
        residual=options["residual"], biases=options["biases"], options=testing.options(**words),
    )  # fmt: skip
    case = with_batch_norm(case, batch_norm)
    check(case, kernels, gate_gradients=options["biases"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1, 1),
        (3, 1, 9, 5),
        (2, 7, 7, 33),
        (2, 7, 7, 32),
        (3, 5, 5, 20),
        (2, 3, 6, 12),
        (1, 1, 3, 8),
        (2, 14, 14, 6),
        (1, 13, 11, 64),
        (9, 2, 3, 17),
        (1, 20, 9, 130),
        (1, 2, 2, 1500),
        (1, 40, 40, 8),
    ],
    ids=str,
)
def test_sizes(kernels: Kernels, size: tuple[int, int, int, int], dtype: str, layout: str) -> None:
    """Odd sizes: tails of vectors, of tiles, of slices, rows shorter than a warp, and channels that
    are not of whole vectors or begin within sectors."""
    kernels.set_schedule(3)
    check(Case(size=size, dtype=dtype, data_format=layout), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [
        ((2, 3, 5, 7, 8), 3),
        ((1, 4, 9, 10, 4), (5, 1, 7)),
        ((2, 1, 4, 5, 3), (3, 3, 1)),
        ((1, 3, 9, 20, 4), 7),  # whose window fits for a smaller patch
        ((1, 4, 3, 5, 4), 11),  # for none
    ],
    ids=str,
)
def test_volumes(
    kernels: Kernels,
    size: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    batch_norm: bool,
    layout: str,
) -> None:
    """Fails where a window's slices, or what lies beside the border of one, are mixed up."""
    case = Case(size=size, kernel_size=kernel_size, data_format=layout)
    check(with_batch_norm(case, batch_norm), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size", [(1, 3, 600, 4), (1, 2, 1030, 8), (1, 4, 143, 4), (1, 3, 345, 8)], ids=str
)
def test_rows_longer_than_a_tile(
    kernels: Kernels, size: tuple[int, int, int, int], layout: str
) -> None:
    """Planes wider than a tile are cut within rows; a width that is no multiple of a vector too."""
    check(Case(size=size, data_format=layout), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 9, 15, 41, (1, 9), (41, 3), (61, 31)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_kernel_sizes(
    kernels: Kernels, kernel_size: int | tuple[int, int], batch_norm: bool, layout: str
) -> None:
    """Halos from none to wider than the plane, and kernels whose windows do not fit (41)."""
    case = Case(size=(2, 9, 10, 8), kernel_size=kernel_size, data_format=layout)
    check(with_batch_norm(case, batch_norm), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [1, 7, 300, 700])
def test_hidden_sizes(kernels: Kernels, hidden: int, layout: str) -> None:
    """More hidden units than a slice of shared memory, and than a block has threads."""
    check(Case(size=(9, 2, 4, 40), hidden=hidden, data_format=layout), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_misaligned(kernels: Kernels, layout: str) -> None:
    """Maps off a 16-byte boundary take the scalar kernels, with the same results."""
    for dtype in ("float32", "float16"):
        case = Case(size=(2, 4, 4, 16), dtype=dtype, data_format=layout, fill="steps")
        check(case, kernels, misalign=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_any_number_of_blocks(kernels: Kernels, batch_norm: bool, layout: str) -> None:
    """However many blocks there are and run at once, in whatever order they and their threads run:
    no deadlock and the same bits. One at a time is the worst case: it can wait for nobody."""
    options = testing.options(activation="relu")
    case = Case(size=(7, 9, 8, 36), data_format=layout, residual=True, options=options)
    case = with_batch_norm(case, batch_norm)
    problem = Problem(case)
    first = problem.check(kernels)
    for multiprocessors, resident_blocks in ((1, 1), (2, 3), (66, 1), (66, 132)):
        kernels.set_device(multiprocessors=multiprocessors, resident_blocks=resident_blocks)
        for schedule in range(2 if resident_blocks == 132 else 4):
            kernels.set_schedule(schedule)
            same(first, problem.both(kernels))


def test_one_kernel_a_call(kernels: Kernels) -> None:
    """Fails: a phase became a launch of its own."""
    problem = Problem(with_batch_norm(Case(size=(5, 9, 8, 36))))
    kernels.take_launched_kernels()
    problem.both(kernels)
    assert kernels.take_launched_kernels().split() == ["Kernel"] * 2


def orders(kernels: Kernels) -> Iterator[tuple[list[Any], list[tuple[int, int, int]]]]:
    """Lists of items of many problems, for many numbers of blocks."""
    rng = np.random.default_rng(3)
    draw = functools.partial(rng.choice, size=None)
    for trial in range(300):
        op = str(draw([op for op in _core.signatures() if "attention" in op or "cbam" in op
                       or "pool" in op]))  # fmt: skip
        n, h, w, c = (int(draw(sizes)) for sizes in (
            (1, 2, 7, 33), (1, 3, 7, 14, 40), (1, 5, 7, 14, 300), (1, 3, 32, 200, 1300),
        ))  # fmt: skip
        data_format = str(draw(LAYOUTS))
        size = (n, h, w, c) if data_format == "NHWC" else (n, c, h, w)
        arguments = {"shape": size, "data_format": data_format, "dtype": str(draw(DTYPES))}
        arguments["blocks"] = int(draw([1, 3, 132, 264]))
        names = {row["name"] for row in _core.signatures()[op]["attributes"]}
        if "spatial" not in op and "pool" not in op:
            arguments["hidden"] = int(draw([1, 20, 130]))
        if "order" in names:
            arguments["order"] = str(draw(["channel_first", "parallel"]))
        if "mlp_activation" in names:
            arguments["mlp_activation"] = str(draw(["none", "relu"]))
            arguments["mlp_merge"] = str(draw(["logits", "hidden", "gates"]))
        if "gamma" in {row["name"] for row in _core.signatures()[op]["inputs"]} and trial % 2:
            arguments["gamma"] = 256
        yield getattr(kernels, f"{op}_order")(**arguments)


def test_items_depend_on_smaller_tickets(kernels: Kernels) -> None:
    """What makes a deadlock impossible: every item is there once, and all that it waits for has a
    smaller ticket."""
    for stages, items in orders(kernels):
        tickets: dict[tuple[int, int], list[int]] = {}
        for ticket, (stage, group, index) in enumerate(items):
            of_group = tickets.setdefault((stage, group), [])
            assert index == len(of_group)
            of_group.append(ticket)
        expected = {(s, g): count for s, (count, groups, *_) in enumerate(stages)
                    for g in range(groups)}  # fmt: skip
        assert {key: len(value) for key, value in tickets.items()} == expected
        for s, (_, groups, after, after_all) in enumerate(stages):
            assert (after | after_all) >> s == 0
            for other in range(s):
                for group in range(groups):
                    before = [group] if after >> other & 1 else []
                    before = range(stages[other][1]) if after_all >> other & 1 else before
                    for one in before:
                        assert tickets[other, one][-1] < tickets[s, group][0]


def test_the_pipeline_is_deep_enough_and_no_deeper(kernels: Kernels) -> None:
    """In the middle of a large call an item's predecessors are 32 tickets back for each block that
    runs, to two steps: with one, a GPU waits (NOTES.md)."""
    blocks, middle = 264, 200  # a step in which all stages have items
    stages, items = kernels.cbam_order(shape=(512, 56, 56, 256), hidden=16, blocks=blocks)
    tickets: dict[tuple[int, int], list[int]] = {}
    for ticket, (stage, group, _) in enumerate(items):
        tickets.setdefault((stage, group), []).append(ticket)
    step = sum(items for items, *_ in stages)
    for s, (_, _, after, _) in enumerate(stages):
        before = [tickets[other, middle][-1] for other in range(s) if after >> other & 1]
        if before:
            distance = tickets[s, middle][0] - max(before)
            assert abs(distance - 32 * blocks) <= 2 * step < blocks * 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", ["channel_first", "parallel"])
def test_nan_and_infinity(kernels: Kernels, module: str, layout: str) -> None:
    """They reach what they reach in the definition, and nothing else."""
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


@pytest.mark.parametrize("infinity", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("mlp", MLPS, ids=lambda mlp: "-".join(mlp.values()))
def test_infinity_in_the_mlp(kernels: Kernels, mlp: dict[str, str], infinity: float) -> None:
    """Fails where a hidden unit that one branch switches off hides 0 times infinity, a NaN."""
    check_infinity(kernels, mlp, infinity)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fill", ["zeros", "relu", "offset"])
def test_values(kernels: Kernels, fill: str, layout: str) -> None:
    """Where everything is a maximum (after a ReLU whole maps are) the gradient is split evenly."""
    check(Case(size=(5, 4, 6, 16), data_format=layout, fill=fill), kernels)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(0, 4, 4, 8), (0, 3, 4, 4, 8)], ids=str)
def test_empty_batch(
    kernels: Kernels, size: tuple[int, ...], layout: str, batch_norm: bool
) -> None:
    """No samples: empty maps, and weights' gradients of zero rather than of nothing."""
    case = with_batch_norm(Case(size=size, data_format=layout), batch_norm)
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
        "kernel_depth, kernel_height and kernel_width must be odd": {"kernel_size": (3, 4)},
        "hidden must be at least 1": {"hidden": 0},
        r"`x` must have shape \[N, H, W, C\] or \[N, D, H, W, C\], got \[2, 2\]": {"shape": (2, 2)},
        "`dtype` must be of float32 or .*, got int8": {"dtype": "int8"},
    }.items():
        with pytest.raises(ValueError, match=message):
            kernels.cbam_workspace(**problem | call)
    with pytest.raises(ValueError, match="cbam: `x` must be an address, got none"):
        kernels.module.cbam(**problem)


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
FLOAT32 = ("kernels", "float32")


def _run_check(
    binary: Path, *arguments: str, limit: int = HANGS, **environment: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **environment,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return subprocess.run(
        [str(binary), *arguments],
        capture_output=True, text=True, check=False, timeout=limit, env=environment,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer(sanitizer: str) -> None:
    """address: reads and writes beyond shared memory, maps and workspace. thread: missing barriers,
    and blocks that read or write what others write, without waiting."""
    if not sanitizer_works(sanitizer):
        pytest.skip(f"-fsanitize={sanitizer} does not work with {COMPILER} here")
    calls = {"address": "100", "thread": "40"}[sanitizer]
    done = _run_check(build(sanitizer=sanitizer, only=FLOAT32, main=CHECK), calls)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


# Faults put into a copy of the sources: file, text, and what it is with FAULT, which is whether the
# fault is the one that a process is to have. Each must be noticed by the results or by a sanitizer,
# or the tests above would not notice it either.
MUTANTS = {
    "columns: barrier before the fold removed": (
        "maps.cuh",
        "  Barrier();\n  if constexpr (M::kFolded) {\n    // What a tile has",
        "  if (!FAULT) Barrier();\n  if constexpr (M::kFolded) {\n    // What a tile has",
    ),
    "columns: one warp too few": (
        "maps.cuh",
        "for (int w = 1; w < kWarps; ++w)",
        "for (int w = 1; w < kWarps - FAULT; ++w)",
    ),
    "columns: tail rows counted twice": (
        "maps.cuh",
        "if (row + k * row_threads >= tile.end_row) continue;",
        "if (!FAULT && row + k * row_threads >= tile.end_row) continue;",
    ),
    "columns: the next channel's share is the last one's": (
        "maps.cuh",
        "return Select(i < left, state[0], state[1]);",
        "return Select(i < left + FAULT * M::V, state[0], state[1]);",
    ),
    "rows: elements of another channel": (
        "maps.cuh",
        "column - begin_column + i >= size",
        "column - begin_column + i >= size + FAULT * V",
    ),
    "rows: a lane too few": (
        "maps.cuh",
        "for (int mask = lanes / 2; mask > 0; mask /= 2)",
        "for (int mask = lanes / 2; mask > FAULT; mask /= 2)",
    ),
    "window: halo one column too narrow": (
        "convolution.cuh",
        "const uint32_t column = patch.column + c - call.kernel_width / 2;",
        "const uint32_t column = patch.column + c - call.kernel_width / 2 + FAULT;",
    ),
    "window: one row too short": (
        "convolution.cuh",
        "const int rows = call.kernel_depth * windows.rows;",
        "const int rows = call.kernel_depth * windows.rows - FAULT;",
    ),
    "window: used before it is filled": (
        "convolution.cuh",
        "FillDescriptors(call, n, patch, windows);\n  Barrier();\n",
        "FillDescriptors(call, n, patch, windows);\n  if (!FAULT) Barrier();\n",
    ),
    "convolution: kernel not flipped": (
        "convolution.cuh",
        "const A value = last[-j];",
        "const A value = last[FAULT ? j - width + 1 : -j];",
    ),
    "mlp: barrier after a slice removed": (
        "mlp.cuh",
        "    Barrier();\n  }\n  // One more than there are threads",
        "    if (!FAULT) Barrier();\n  }\n  // One more than there are threads",
    ),
    "map: ties get the whole gradient": (
        "sides.cuh",
        "side.share + d_max / count;",
        "side.share + (FAULT ? d_max : d_max / count);",
    ),
    # The protocol between blocks: each wait, each release, each barrier that they rely on.
    "tickets: nobody waits": (
        "kernel.cuh",
        "    WaitAcquire(address, wanted);",
        "    if (!FAULT) WaitAcquire(address, wanted);",
    ),
    "tickets: the own last item is not waited for": (
        "kernel.cuh",
        "      if (WaitUnless(address, wanted, &control->finished, fetched)) return;",
        "      if (FAULT) return;\n"
        "      if (WaitUnless(address, wanted, &control->finished, fetched)) return;",
    ),
    "tickets: counted before it is finished": (
        "kernel.cuh",
        "      if (WaitUnless(address, wanted, &control->finished, fetched)) return;",
        "      if (!FAULT && WaitUnless(address, wanted, &control->finished, fetched)) return;",
    ),
    "tickets: finished before all threads are": (
        "kernel.cuh",
        "      Barrier();\n      if (ThreadIndex() == 0) Publish",
        "      if (!FAULT) Barrier();\n      if (ThreadIndex() == 0) Publish",
    ),
    "tickets: the next item is not waited for": (
        "kernel.cuh",
        "      BlockBarrier();  // the last item is finished, the next one known\n",
        "      if (!FAULT || fetched == 0) BlockBarrier();\n",
    ),
    "tickets: what an item is after is forgotten": (
        "kernel.cuh",
        "if (stage.after >> s & 1) wait",
        "if ((stage.after >> s & 1) && !(FAULT && s == next.stage - 1)) wait",
    ),
    "tickets: what a stage is after is forgotten": (
        "kernel.cuh",
        "if (stage.after_all >> s & 1) wait",
        "if (!FAULT && (stage.after_all >> s & 1)) wait",
    ),
    "tickets: what others wait for is not waited for": (
        "schedule.h",
        "before |= before_[d];",
        "before |= before_[d] | (FAULT ? uint32_t{1} << d : 0);",
    ),
}

TASKS = re.findall(r"^  (k\w+),", (CSRC / "core/cuda/schedule.h").read_text(), re.MULTILINE)
# What these are after is all that they are: nothing in the call comes before.
FIRST = ("kChannelPool", "kSpatialGrad", "kPoolMaxima")
# A task does not wait for what it is after.
FORGOTTEN = {
    f"forgotten: {task}": (
        "schedule.h",
        "    const int s = schedule_.stage_count++;\n",
        f"    if (FAULT && task == Task::{task}) after = after_all = 0;\n"
        "    const int s = schedule_.stage_count++;\n",
    )
    for task in TASKS
    if task not in FIRST
}
FAULTS = MUTANTS | FORGOTTEN


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The check of a tree with all faults, which has the one that CBAM_OPS_FAULT says; plain, and
    under ThreadSanitizer."""
    # Read once, where all of the sources see it.
    read = 'inline const int cbam_fault = std::atoi(std::getenv("CBAM_OPS_FAULT"));'
    csrc = changed_sources(
        tmp_path_factory.mktemp("faulty"),
        (
            "core/contract.h",
            "#include <cstdint>",
            f"#include <cstdint>\n#include <cstdlib>\n{read}",
        ),
        *(
            (f"core/cuda/{name}", text, replacement.replace("FAULT", f"(cbam_fault == {number})"))
            for number, (name, text, replacement) in enumerate(FAULTS.values(), 1)
        ),
    )
    sanitizers = ["", *(["thread"] if sanitizer_works("thread") else [])]
    return [build(csrc, sanitizer=s, only=FLOAT32, main=CHECK) for s in sanitizers]


def noticed(faulty: Sequence[Path], fault: int, limit: int = 180) -> bool:
    """Whether a fault is noticed: in the results, by the scheduler or by ThreadSanitizer."""
    plain, *sanitized = faulty
    runs = [(plain, "200", "1"), *((s, "25", "1") for s in sanitized), (plain, "1000", "201")]
    for binary, calls, first in runs:  # few faults need the last
        try:
            done = _run_check(binary, calls, first, "1", limit=limit, CBAM_OPS_FAULT=str(fault))
            if done.returncode != 0:
                return True
        except subprocess.TimeoutExpired:  # a fault may make a loop endless
            return True
        limit = HANGS
    return False


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name: str, faulty: list[Path]) -> None:
    """Fails: nobody would notice a barrier, a wait or a bound that is wrong or missing."""
    assert noticed(faulty, list(FAULTS).index(name) + 1), "nobody noticed"


@pytest.mark.long
def test_without_a_fault_nothing_is_noticed(faulty: list[Path]) -> None:
    """Else the test above could not fail."""
    assert not noticed(faulty, 0, limit=HANGS)


# ---- nvcc ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_resources_and_warnings() -> None:
    """No kernel spills more or uses many more registers than the committed table says, and nvcc has
    nothing to warn of. One architecture here (`python tests/cuda_resources.py` takes all)."""
    if cuda_resources.nvcc() is None:
        pytest.skip("no nvcc on PATH and no CUDACXX")
    report = cuda_resources.compile_report(["90"], ("kernels", "float32", "bfloat16"))
    assert len(report) == 4
    assert not cuda_resources.differences(report, cuda_resources.read_table())


def test_committed_table() -> None:
    """All architectures that are built by default, without a spill."""
    table = cuda_resources.read_table()
    assert {str(row["architecture"]) for row in table} == set(cuda_resources.ARCHITECTURES)
    for row in table:
        assert row["spills"] == 0, row
