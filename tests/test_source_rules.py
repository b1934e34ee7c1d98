"""Rules about the source and the binaries that no other test would notice to be broken."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import cbam_ops
from cbam_ops import _loader

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = (".h", ".cc", ".cuh", ".cu")


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(p for p in (CSRC / folder).rglob("*") if p.suffix in SOURCES)


def code_of(path: Path) -> str:
    """The text without comments, with its line breaks."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def places(pattern: str, files: Iterator[Path]) -> list[str]:
    """`file:line: text` of every line of code that matches."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(code_of(path).splitlines(), 1)
        if re.search(pattern, line)
    ]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', code_of(path), re.MULTILINE)


# --- layers: csrc/tf and csrc/python call csrc/ops and csrc/core, which know neither --------------


@pytest.mark.parametrize("folder", ["core", "ops"])
def test_core_and_table_include_no_framework(folder):
    """Both must compile and run without TensorFlow, Eigen, pybind11 and Python."""
    known = ("core/", "cuda/", "sys/", f"{folder}/")
    foreign = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in sources(folder)
        for name in includes(path)
        if ("/" in name and not name.startswith(known)) or name == "Python.h"
        # This one stands in for CUDA where a test runs a kernel on the CPU.
        if name != "testing/cuda_on_cpu.h"
    ]
    assert not foreign


def test_the_glue_does_not_see_cuda_and_the_layers_do_not_see_each_other():
    """nvcc never sees a TensorFlow header, and a TensorFlow source no CUDA header."""
    wrong = [
        f"{path.relative_to(ROOT)} includes {name}"
        for folder, forbidden in (
            ("tf", r"cuda_runtime|cuda_fp16|\.cuh$|^python/"),
            ("python", "^tf/"),
        )
        for path in sources(folder)
        for name in includes(path)
        if re.search(forbidden, name) or (path.suffix == ".cu" and folder == "tf")
    ]
    assert not wrong
    assert not [p for p in sources("tf") if p.suffix in (".cu", ".cuh")]


def test_nothing_prints():
    """A library speaks through errors, warnings and return values."""
    printing = r"\b(printf|fprintf|puts|fputs)\s*\(|std::(cout|cerr|clog)|\bLOG\s*\("
    assert not places(printing, sources("core", "tf", "python"))
    calls = []
    for path in sorted((ROOT / "cbam_ops").rglob("*.py")):
        if "_cli" in path.parts or path.name in ("__main__.py", "_console.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                calls.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not calls


def test_no_floating_point_atomics():
    """A sum in the order of arrival differs from run to run. Tickets and counters are integers."""
    atomics = (
        r"atomicAdd\((?!reinterpret_cast<unsigned)|atomicCAS|\b(red|atom)\.[\w.]*\.b?f\d"
        r"|std::atomic(_ref)?<\s*(float|double|T|U)\b"
        r"|__atomic_\w*add|#\s*pragma\s+omp"
    )
    assert not places(atomics, sources("core"))


def test_no_fast_math_for_the_whole_build():
    """It would break ties between equal maxima, NaN and infinity."""
    for path in [ROOT / "CMakeLists.txt", CSRC / "CMakeLists.txt", *(CSRC / "cmake").iterdir()]:
        code = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"fast[-_]math|-Ofast|funsafe-math", code), path


# --- one source, several instruction sets ---------------------------------------------------------


def level_files() -> Iterator[Path]:
    """level.cc and what it includes, all the way down."""
    waiting, seen = [CSRC / "core/cpu/level.cc"], set()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += [CSRC / name for name in includes(path) if name.startswith("core/")]
            yield path


def test_files_compiled_per_instruction_set_use_no_standard_templates():
    """Their instances would be weak symbols with AVX code that the linker may give to everybody."""
    assert not places(r"\bstd::(?!size_t\b|u?int\d+_t\b|ptrdiff_t\b)", level_files())
    heavy = {"algorithm", "vector", "functional", "string", "memory", "utility", "numeric"}
    assert not [f"{p.name}: {n}" for p in level_files() for n in includes(p) if n in heavy]


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return found


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_objects_of_an_instruction_set_share_no_weak_symbols():
    """A weak symbol outside the level's own namespace may replace the baseline's: SIGILL there."""
    objects = sorted((ROOT / "build").glob("*/csrc/CMakeFiles/level_avx*.dir/**/*.o"))
    if not objects:
        pytest.skip("no build folder: the package was not built in this tree")
    nm = tool("nm")
    shared = []
    for path in objects:
        level = re.search(r"level_(avx\d+)_", str(path))[1]
        for line in output_of(nm, "-C", str(path)).splitlines():
            match = re.match(r"^[0-9a-f]*\s+([WVui])\s+(.*)$", line)
            if match and f"cbam_ops::cpu::{level}::" not in match[2]:
                shared.append(f"{path.parts[-4]}: {match[2]}")
    assert not shared


# --- what was built -------------------------------------------------------------------------------


def libraries() -> list[Path]:
    directory = _loader.compiled_directory()
    assert directory is not None
    found = sorted(directory.glob("*.so"))
    names = {path.name.split(".")[0] for path in found}
    assert names >= {"_core", "libcbam_ops_core", "libcbam_ops_tf", "libcbam_ops_xla"}
    return found


def test_libraries_export_nothing_but_what_is_looked_up_by_name():
    nm = tool("nm")
    for path in libraries():
        symbols = set(output_of(nm, "-D", "--defined-only", "--format=just-symbols", path).split())
        if path.name == _loader.CORE_LIBRARY:
            # Functions of these two namespaces themselves, with arguments of the contract's types.
            foreign = [s for s in symbols if not re.match(r"_ZN8cbam_ops(3cpu|4cuda)\d+\w+E", s)]
            assert not foreign
            assert len([s for s in symbols if "3RunINS_11ForwardArgsE" in s]) == len(
                {"cpu", "cuda"} & built()
            )
        elif path.name.startswith("_core"):
            assert symbols == {"PyInit__core"}
        else:
            assert not symbols, path.name


def built() -> set[str]:
    return {"cpu", "cuda"} if _loader.build_record()["cuda"]["enabled"] else {"cpu"}


def test_the_kernels_are_there_once():
    """Three copies would be three times the GPU code, and three choices of the instruction set."""
    readelf, nm = tool("readelf"), tool("nm")
    for path in libraries():
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of(readelf, "-d", path))
        is_core = path.name == _loader.CORE_LIBRARY
        assert (_loader.CORE_LIBRARY in needed) != is_core, path.name
        undefined = output_of(nm, "-D", "--undefined-only", path)
        assert ("8cbam_ops3cpu" in undefined) != is_core, path.name
        has_gpu_code = ".nv_fatbin" in output_of(readelf, "-SW", path)
        assert has_gpu_code == (is_core and "cuda" in built()), path.name


def test_libraries_look_for_each_other_beside_themselves_and_nowhere_else():
    """Where TensorFlow lay during the build may not exist, or be another's, at run time."""
    readelf = tool("readelf")
    for path in libraries():
        found = re.findall(r"\((RPATH|RUNPATH)\).*\[(.*)\]", output_of(readelf, "-d", path))
        assert found == [("RUNPATH", "$ORIGIN")], path.name


def test_the_cuda_runtime_is_inside():
    """A machine has a driver, or not even that; the toolkit is nobody's to install."""
    readelf = tool("readelf")
    for path in libraries():
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of(readelf, "-d", path))
        assert not [name for name in needed if "cuda" in name], path.name


def test_the_kernels_and_the_python_module_do_not_need_tensorflow():
    readelf = tool("readelf")
    for path in libraries():
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of(readelf, "-d", path))
        tensorflow = [name for name in needed if "tensorflow" in name]
        if path.name.startswith("_core") or path.name == _loader.CORE_LIBRARY:
            assert not tensorflow
        elif path.name == _loader.LIBRARY:
            assert tensorflow == ["libtensorflow_framework.so.2"]
        elif path.name == _loader.XLA_LIBRARY:
            assert set(tensorflow) == {"libtensorflow_framework.so.2", "libtensorflow_cc.so.2"}


# --- one place for each fact ----------------------------------------------------------------------


def project_files() -> Iterator[Path]:
    yield from (ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", ".ci/run"))
    for folder in ("build_backend", "cbam_ops", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (*SOURCES, ".py", ".cmake", ".txt", ".toml"):
                yield path


def test_the_version_is_written_in_one_place():
    version = cbam_ops.__version__
    places_of_it = [
        str(path.relative_to(ROOT))
        for path in project_files()
        if re.search(rf"(?<![\w.]){re.escape(version)}(?![\w.])", path.read_text(encoding="utf-8"))
    ]
    assert places_of_it == ["cbam_ops/__init__.py"]
    assert importlib.metadata.version("cbam-ops") == version
    assert _loader.build_record()["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_release_of_tensorflow_is_written_in_one_place():
    places_of_it = [
        str(path.relative_to(ROOT))
        for path in project_files()
        if re.search(r"tensorflow\s*[<>=~]=?\s*\d", path.read_text(encoding="utf-8"))
    ]
    assert places_of_it == ["pyproject.toml"]


# --- the tests themselves -------------------------------------------------------------------------


def parsed_tests() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "tests").glob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_no_test_measures_time():
    """On a loaded machine it would fail without a fault in the code; benchmarks measure."""
    clocks = {"perf_counter", "monotonic", "process_time", "perf_counter_ns", "timeit"}
    found = [
        f"{path.name}:{node.lineno}"
        for path, tree in parsed_tests()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in clocks)
        # How long a program may take is programs.HANGS.
        or (isinstance(node, ast.keyword) and node.arg == "timeout"
            and isinstance(node.value, ast.Constant))
    ]  # fmt: skip
    assert not found


def test_tolerances_are_in_one_file():
    """A tolerance made up on the spot hides an error; cbam_ops/testing.py explains each."""
    found = [
        f"{path.name}:{node.lineno}"
        for path, tree in parsed_tests()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for node in call.keywords
        if node.arg in ("rtol", "atol", "rel", "abs")
        and any(isinstance(n, ast.Constant) and n.value for n in ast.walk(node.value))
    ]
    assert not found
