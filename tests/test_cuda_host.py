"""The host code of the CUDA kernels and the PTX, as nvcc makes them, without a GPU.

The host code runs over a recorder in the place of the CUDA runtime (csrc/testing/cuda_recorder.cc).
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_resources
import pytest
from cuda_on_cpu import COMPILER, CSRC, load_module

from cbam_ops import _core

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(cuda_resources.nvcc() is None, reason="no nvcc on PATH and no CUDACXX"),
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler on PATH"),
]

WRAPPED = re.findall(r"__wrap_(\w+)", (CSRC / "testing" / "cuda_recorder.cc").read_text())


def nvcc(*arguments: str | Path) -> None:
    command = [cuda_resources.nvcc() or "nvcc", "-std=c++17", f"-I{CSRC}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module of kernels for float32 maps, with a recorder for a GPU."""
    import pybind11

    folder = tmp_path_factory.mktemp("recorder")
    units = [CSRC / "core/cuda/kernels.cu", CSRC / "core/cuda/float32.cu"]
    units += [CSRC / f"ops/{name}.cc" for name in ("dimensions", "options")]
    units += [CSRC / "testing/cuda_recorder.cc"]
    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    options = ["-O1", "-arch=sm_80", "-DCBAM_OPS_CUDA_FLOAT32_ONLY=1", "-Xcompiler=-fPIC"]
    options += [f"-isystem={path}" for path in includes]

    def compile_one(unit: Path) -> Path:
        to = folder / f"{unit.stem}.o"
        nvcc(*options, "-c", unit, "-o", to)
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, units))
    library = folder / "cuda_recorder.so"
    wraps = [f"-Xlinker=--wrap={name}" for name in sorted(set(WRAPPED))]
    nvcc("-shared", *objects, *wraps, "-o", library)
    return load_module("cuda_recorder", library)


@pytest.fixture
def quiet(recorder: ModuleType) -> ModuleType:
    """The recorder on a device that has been asked what it is, and has made room for blocks."""
    recorder.set_devices(0, 0)
    recorder.fail("")
    call(recorder, "cbam")
    call(recorder, "cbam_grad")
    recorder.take_records()
    return recorder


def call(recorder: ModuleType, op: str, **arguments: Any) -> None:
    """Runs an op; no address is ever looked at."""
    signature = _core.signatures()[op]
    rows = signature["inputs"] + signature["outputs"]
    names = [row["name"] for row in rows if row["count"] is None and not row.get("optional")]
    arguments = dict.fromkeys(names, 1 << 20) | {"shape": (64, 28, 28, 512)} | arguments
    getattr(recorder, op)(workspace=1 << 21, **arguments)


@pytest.mark.parametrize("op", list(_core.signatures()))
def test_a_call_is_one_memset_and_one_launch(quiet: ModuleType, op: str) -> None:
    """Two nodes in a graph; nothing is asked of the device again, no attribute of a kernel is set
    again, none is launched to see whether it works."""
    call(quiet, op)
    memset, launch = quiet.take_records().split(" ")
    assert memset.startswith("memset:")
    name, blocks, threads, shared = launch.split(":")
    blocks_at_once = 3 if op.endswith("_grad") else 4
    assert (name, int(blocks), int(threads)) == ("launch", blocks_at_once * 132, 160)
    assert int(shared) <= 21 * 1024  # three blocks in the 64 KB of the smallest multiprocessors


def test_an_empty_batch_launches_nothing(quiet: ModuleType) -> None:
    """Weights' gradients are zeroed, no more."""
    call(quiet, "cbam", shape=(0, 28, 28, 512))
    assert quiet.take_records() == ""
    call(quiet, "cbam_grad", shape=(0, 28, 28, 512))
    assert set(re.sub(r":\d+", "", quiet.take_records()).split(" ")) == {"memset"}


def test_threads_do_not_disturb_each_other(quiet: ModuleType) -> None:
    """TensorFlow launches the ops of one GPU from several threads. Fails: a setting of a kernel
    that one of them makes reaches the launch of another."""

    def run(side: int) -> None:
        for _ in range(200):
            call(quiet, "cbam_grad", shape=(8, side, side, 256), dtype="float32")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, (56, 28, 14, 7)))
    words = re.sub(r":[\d:]+", "", quiet.take_records()).split(" ")
    assert words.count("launch") == words.count("memset") == 800 == len(words) / 2


def test_a_device_is_asked_once(recorder: ModuleType) -> None:
    """Each of them."""
    for device in (5, 6):
        recorder.set_devices(device, device)
        call(recorder, "cbam")
        assert recorder.take_records().count("query") == 3 + 1  # for each kernel one more
        call(recorder, "channel_attention")
        assert "query" not in recorder.take_records()


@pytest.mark.parametrize(("op", "blocks"), [("cbam", 4), ("cbam_grad", 3)])
def test_shared_memory_is_asked_for(recorder: ModuleType, op: str, blocks: int) -> None:
    """Fails: the driver may give it to the cache, and fewer blocks run at once than shall. Of each
    device once, in front of the first launch; where it fails that is launched all the same."""
    carveout = 9  # cudaFuncAttributePreferredSharedMemoryCarveout
    for device, failing in ((7, ""), (8, "attribute")):
        recorder.set_devices(device, device)
        recorder.fail(failing)
        call(recorder, op)
        first = recorder.take_records().split(" ")
        (attribute,) = (record for record in first if record.startswith("attribute"))
        assert first[-2:] == [attribute, first[-1]] and first[-1].startswith("launch")
        _, name, percent = map(int, attribute.replace("attribute", "0").split(":"))
        shared = int(first[-1].split(":")[-1]) + 1024  # with the driver's own
        assert name == carveout
        assert percent * 228 * 1024 / 100 >= blocks * shared > (percent - 1) * 228 * 1024 / 100
        call(recorder, op)
        assert "attribute" not in recorder.take_records()
    recorder.fail("")


def test_kernels_are_loaded_before_a_first_launch(quiet: ModuleType) -> None:
    """All that a type may launch, so that a stream that is being recorded finds them."""
    assert quiet.load_float32() and quiet.loaded() == 2
    for data_format in ("NHWC", "NCHW"):
        for width in (28, 7):  # vectors, and rows that are no whole ones
            for op in ("cbam", "cbam_grad"):
                size = (64, width, width, 512) if data_format == "NHWC" else (64, 512, width, width)
                call(quiet, op, shape=size, data_format=data_format)
                call(quiet, op, shape=size, data_format=data_format, x=(1 << 20) + 4)
    assert quiet.launched_but_not_loaded() == 0


def test_a_stream_of_another_device(quiet: ModuleType) -> None:
    """Its device is current for as long as the call takes, and not longer."""
    assert quiet.stream_device(1 << 20) == (0, 0)
    quiet.set_devices(0, 3)
    assert quiet.stream_device(1 << 20) == (3, 0)
    assert quiet.take_records() == "device:3 device:0"


@pytest.mark.parametrize("failing", ["memset", "launch", "load"])
def test_failures_are_reported(quiet: ModuleType, failing: str) -> None:
    """By name, and nothing is launched over counters that are not 0."""
    quiet.fail(failing)
    if failing == "load":
        assert not quiet.load_float32()
        return
    with pytest.raises(RuntimeError, match=failing):
        call(quiet, "cbam")
    assert ("launch" in quiet.take_records()) == (failing == "launch")


@pytest.mark.parametrize("architecture", ["75", "80"])
def test_ptx(architecture: str, tmp_path: Path) -> None:
    """Every kernel has a body, and calls no function; what blocks wait for they wait for with
    acquire and count with release; nothing is read through the cache for constant data, which does
    not see what the same launch writes; nothing is used that later machines than the smallest have.
    """
    nvcc("-ptx", f"-arch=compute_{architecture}", CSRC / "core/cuda/bfloat16.cu", "-o",
         tmp_path / "bfloat16.ptx")  # fmt: skip
    text = (tmp_path / "bfloat16.ptx").read_text()
    bodies = re.split(r"^\.(?:visible|weak) \.entry", text, flags=re.MULTILINE)[1:]
    assert len(bodies) == 2
    for body in bodies:
        assert body.count("\n") > 1000
        assert "ld.acquire.gpu.global.u32" in body and "red.release.gpu.global.add.u32" in body
    assert not re.search(r"^\s*\.(\w+ \.)?func\b", text, re.MULTILINE)
    assert not re.search(r"ld\.global(\.\w+)*\.nc\b", text)
    assert not re.search(r"cluster|mbarrier|cp\.async|griddepcontrol|red\.async", text)


def test_no_source_asks_for_more_than_80() -> None:
    """Fails: a body that is empty below some architecture, which a build of older PTX would run."""
    for path in (CSRC / "core" / "cuda").iterdir():
        wanted = re.findall(r"__CUDA_ARCH__ >= (\d+)", path.read_text())
        assert all(int(number) <= 800 for number in wanted), path
