"""The kernels as nvcc translates them, executed without a GPU and held against the definition.

tests/ptx_machine.py runs the PTX of the build's own host code. What the emulation of the sources
(test_cuda_source.py) cannot see is seen here: inline assembly, what nvcc makes of the sources, and,
in the machine's terms, every access outside of an argument, every read of what was never written
and every two accesses that nothing orders. Needs nvcc; no GPU.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import ptx_counts
import pytest
from cuda_on_cpu import COMPILER, KernelError, Kernels, changed_sources
from kernel_calls import DTYPES, LAYOUTS, MODULES, Problem, check
from ptx_counts import KEYS
from ptx_machine import PtxKernels, nvcc

from cbam_ops import testing
from cbam_ops.testing import Case, assert_same_bits

pytestmark = [
    pytest.mark.long,  # nvcc takes most of a minute
    pytest.mark.skipif(not COMPILER or nvcc() is None, reason="no C++ compiler, or no nvcc"),
]

ALL_MODULES = {
    **MODULES,
    "batch_norm": Case("cbam_with_batch_norm"),
    "channel_pool": Case("channel_pool"),
    "spatial_pool": Case("spatial_pool"),
}


@pytest.fixture(scope="session")
def compiled() -> PtxKernels:
    return PtxKernels()


@pytest.fixture(scope="session")
def oldest() -> PtxKernels:
    return PtxKernels(capability=75)


@pytest.fixture(params=[0, 1], ids=["one at a time", "interleaved"])
def kernels(compiled: PtxKernels, request: pytest.FixtureRequest) -> PtxKernels:
    compiled.configure(seed=request.param)
    return compiled


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", ALL_MODULES)
def test_every_module(kernels: PtxKernels, module: str, dtype: str, layout: str) -> None:
    """Fails where nvcc's translation of a type, layout or order is another function."""
    case = ALL_MODULES[module].replace(size=(3, 4, 6, 16), dtype=dtype, data_format=layout)
    check(case.replace(fill="steps"), kernels)


@pytest.mark.parametrize(
    ("layout", "size", "vector"),
    [
        ("NHWC", (2, 3, 3, 16), 4),
        ("NCHW", (2, 2, 6, 5), 4),
        ("NCHW", (2, 3, 3, 16), 4),
        ("NCHW", (2, 3, 3, 6), 1),
    ],
)
def test_vectors_where_rows_allow(
    compiled: PtxKernels, layout: str, size: tuple[int, ...], vector: int
) -> None:
    """Fails where what lies off a boundary, but is not read in vectors, costs the maps theirs."""
    compiled.configure()
    Problem(Case(size=size, data_format=layout)).both(compiled)
    loads = [row for k in compiled.counts() for row in k["instructions"]
             if row["issued"] and row["family"] == "load global"]  # fmt: skip
    names = ptx_counts.demangle(name for row in loads for name, _, _ in row["lines"] if name)
    widths = re.findall(r"Elements<\S*MapTraits<float, (\d)", " ".join(names.values()))
    assert set(widths) == {str(vector)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_oldest_gpus_compute_the_same_numbers(
    compiled: PtxKernels, oldest: PtxKernels, dtype: str, layout: str
) -> None:
    """Fails where what device.cuh has for them alone, maxima and bfloat16, is something else."""
    case = Case(size=(3, 6, 7, 24), dtype=dtype, data_format=layout)
    x = case.arrays()["x"]
    x[1].flat[50] = np.nan
    problem = Problem(case, x=x)
    expected = problem.both(compiled)
    assert np.isnan(expected["channel_descriptors"]).sum() == 2
    for name, value in problem.both(oldest).items():
        same = np.array_equal(value.astype(float), expected[name].astype(float), equal_nan=True)
        assert same, name


OPTIONS = (
    {"pooling": "avg", "mlp_activation": "none", "activation": "relu"},
    {"pooling": "max", "activation": "none"},
    {"pooling": "avg+max", "activation": "relu", "mlp_activation": "relu"},
    {"pooling": "avg+max", "mlp_merge": "gates"},
    {"pooling": "avg+max", "mlp_merge": "hidden"},
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_options(
    kernels: PtxKernels, options: dict[str, str], residual: bool, dtype: str, layout: str
) -> None:
    case = Case(
        size=(3, 4, 6, 16), kernel_size=5, data_format=layout, fill="steps", dtype=dtype,
        residual=residual, biases=residual, options=testing.options(**options),
    )  # fmt: skip
    check(case, kernels, gate_gradients=residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1), (3, 1, 9, 5), (2, 7, 7, 33), (2, 7, 7, 32), (9, 2, 3, 17), (1, 20, 9, 130),
     (1, 2, 2, 1500), (1, 40, 40, 8), (1, 3, 600, 4), (5, 14, 14, 64)],
    ids=str,
)  # fmt: skip
def test_sizes(
    kernels: PtxKernels, size: tuple[int, int, int, int], dtype: str, layout: str
) -> None:
    """Odd sizes: tails of vectors and tiles, rows shorter than a warp and longer than a tile."""
    check(Case(size=size, dtype=dtype, data_format=layout), kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_size", [1, 3, 9, 41, (41, 3), (1, 9)])
def test_kernel_sizes(kernels: PtxKernels, kernel_size: int | tuple[int, int], layout: str) -> None:
    check(Case(size=(2, 9, 10, 8), kernel_size=kernel_size, data_format=layout), kernels)


@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_misaligned_maps(kernels: PtxKernels, dtype: str, offset: int) -> None:
    """Fails where vectors are read from maps that are not aligned to them."""
    check(Case(size=(2, 4, 6, 16), dtype=dtype), kernels, misalign=offset)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_repeat_whatever_the_schedule(compiled: PtxKernels, layout: str) -> None:
    problem = Problem(Case(size=(5, 6, 7, 24), data_format=layout))
    results = []
    for seed, multiprocessors in ((0, 4), (1, 4), (2, 4), (3, 1)):
        compiled.configure(seed=seed, multiprocessors=multiprocessors)
        results.append(problem.both(compiled))
    for other in results[1:]:
        for name, value in results[0].items():
            assert_same_bits(value, other[name], name)


def test_bits_are_those_of_the_sources(compiled: PtxKernels) -> None:
    """Sums and maxima of the map, and what follows from them without a product that nvcc contracts
    or a function that is its own (exp), are the emulation's to the bit; the gates are not."""
    compiled.configure(seed=0)
    emulation = Kernels()
    for layout in LAYOUTS:
        for module in ("channel_pool", "spatial_pool", "channel_only", "spatial_only"):
            case = ALL_MODULES[module].replace(size=(3, 6, 7, 24), data_format=layout)
            problem = Problem(case)
            theirs, ours = problem.forward(emulation), problem.forward(compiled)
            exact = [name for name in ours if not name.endswith("gate") and name != "y"]
            assert exact
            for name in exact:
                assert_same_bits(ours[name], theirs[name], f"{module} {layout} {name}")


# ---- counts --------------------------------------------------------------------------------------

MAPS = list(itertools.product(ptx_counts.STAGES, ptx_counts.DTYPES, ptx_counts.LAYOUTS))


@pytest.mark.parametrize(("stage", "dtype", "layout"), MAPS)
def test_no_more_to_do_than_the_table_says(
    compiled: PtxKernels, stage: str, dtype: str, layout: str
) -> None:
    """Fails where a change makes a GPU issue more instructions, move more bytes or wait for more
    banks: `python tests/ptx_counts.py --write` if that is meant."""
    rows = ptx_counts.count(compiled, stage, dtype, layout)
    assert not ptx_counts.differences(rows, ptx_counts.read_table())


@pytest.mark.parametrize(("stage", "batch"), [("56x56x256", 4), ("7x7x2048", 64)])
def test_counts_scale_with_the_batch(compiled: PtxKernels, stage: str, batch: int) -> None:
    """Of twice the table's batch each element has no more to do, and what goes over maps has the
    same: the table's counts are those of larger batches too, a little pessimistic. The L2 grows
    with the batch: all of it may be in flight (csrc/core/cuda/NOTES.md)."""
    key = (stage, "float32", "NHWC")
    table = [row for row in ptx_counts.read_table() if tuple(row[k] for k in KEYS[:3]) == key]
    l2 = ptx_counts.L2_BYTES * batch // ptx_counts.STAGES[stage][0]
    rows = ptx_counts.count(compiled, *key, batch, l2=l2)
    assert not ptx_counts.differences([row for row in rows if row["phase"] == "all"], table)
    of_maps = [[r for r in some if r["phase"] in ptx_counts.OVER_MAPS] for some in (rows, table)]
    assert len(of_maps[0]) == 8
    assert not ptx_counts.differences(of_maps[0], of_maps[1])
    assert not ptx_counts.differences(of_maps[1], of_maps[0])


def test_counts_notice_a_bank_conflict(tmp_path: Path) -> None:
    """Rows of inputs without the vectors between them: as right, and slower."""
    fault = ("core/cuda/mlp.cuh", "kInputs<A> + 2 * kBlockSide", "kInputs<A>")
    broken = PtxKernels(changed_sources(tmp_path, fault), only_float32=True)
    rows = ptx_counts.count(broken, "14x14x1024", "float32", "NHWC")
    found = ptx_counts.differences(rows, ptx_counts.read_table())
    assert [text for text in found if "MLP: conflicts" in text], found


# ---- planted faults ------------------------------------------------------------------------------

# In what only nvcc sees, so that nothing else can notice: a pattern of PTX, what takes its place
# (no longer than it), and the message.
FAULTS = {
    "inline assembly: counts without a release": (
        r"red\.release\.gpu", r"red.relaxed.gpu", "a race in the workspace",
    ),
    "inline assembly: waits without an acquire": (
        r"ld\.acquire\.gpu", r"ld.relaxed.gpu", "a race in the workspace",
    ),
    "shuffle: the mask of one thread": (
        r"(shfl\.sync\.bfly\.b32[^;]+), %r\d+;", r"\1, 1;", "own lane is not in the mask",
    ),
    "barrier: missing": (
        r"bar\.sync 1, \d+;", r"", "a race in shared memory|never written",
    ),
    "bound: one vector too far": (
        r"(ld\.global\.cs\.v4\.u32 \{[^}]+\}), \[(%\w+)\];\n\n", r"\1,[\2+16];",
        "outside of all buffers: byte .* of ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    pattern, replacement, message = FAULTS[fault]

    def plant(library: bytes) -> bytes:
        def fault_in(found: re.Match[bytes]) -> bytes:
            return found.expand(replacement.encode()).ljust(len(found[0]))

        changed, count = re.subn(pattern.encode(), fault_in, library)
        assert count > 0 and len(changed) == len(library), "the fault no longer applies: update it"
        return changed

    broken = PtxKernels(change=plant)
    broken.configure(seed=1)
    with pytest.raises(KernelError, match=message):
        Problem(Case(size=(3, 4, 6, 16))).both(broken)
