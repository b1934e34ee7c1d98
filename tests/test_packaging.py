"""The package as a user gets it, and a build that explains itself.

The builds here compile for the baseline instruction set only and without CUDA, which saves time and
shows that such a build works. The installed package that all tests use is the other example: with
every instruction set, and with CUDA where there is an nvcc (test_gpu_build.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import cbam_ops

ROOT = Path(__file__).resolve().parent.parent
BASELINE_ONLY = "cmake.define.CBAM_OPS_INSTRUCTION_SETS="
NO_CUDA = "cmake.define.CBAM_OPS_CUDA=OFF"
NO_CUDA_OPTION = "-DCBAM_OPS_CUDA=OFF"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def succeed(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def backend(tree: Path, call: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls a function of the build backend as a frontend does, in the source tree."""
    code = f"""
    import sys
    sys.path.insert(0, "build_backend")
    import cbam_ops_build as backend
    print("answer:", {call})
    """
    return run(sys.executable, "-c", textwrap.dedent(code), cwd=tree, **environment)


# --- sdist, wheel, fresh environment --------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    done = backend(ROOT, f"backend.build_sdist({str(folder)!r})")
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that a file missing there shows."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        # The first releases of Python 3.10 and 3.11 have no filters.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder / "source", **safe)
    (tree,) = (folder / "source").iterdir()
    succeed(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"),
        *("-C", BASELINE_ONLY, "-C", NO_CUDA, "-w", folder, tree),
        cwd=folder,
    )
    (path,) = folder.glob("*.whl")
    return path


def environment_with(wheel: Path, folder: Path) -> Path:
    """The python of a new environment: the wheel, and this environment's other packages."""
    folder = folder / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    others.add(str(Path(importlib.util.find_spec("tensorflow").origin).parent.parent))
    (packages / "others.pth").write_text("\n".join(sorted(others)) + "\n")
    succeed(
        *(sys.executable, "-m", "pip", "--python", python),
        *("install", "--no-deps", "--no-index", "--force-reinstall", "--ignore-installed", wheel),
        cwd=folder,
    )
    return python


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel, tmp_path_factory.mktemp("fresh"))


def test_the_sdist_holds_the_sources_and_no_builds(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in (
        *("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".ci/run"),
        *("build_backend/find_tensorflow.py", "cbam_ops/__init__.py", "cbam_ops/py.typed"),
        *("csrc/core/contract.h", "csrc/core/cpu/level.cc", "csrc/cmake/exports_none.map"),
        *("csrc/core/cuda/kernels.cu", "csrc/core/cuda/kernel.cuh", "csrc/tf/gpu_kernels.cc"),
        *("csrc/python/bindings.cc", "build_backend/find_cuda.py", "tests/conftest.py"),
    ):
        assert name in names
    assert not [n for n in names if n.startswith("build/") or n.endswith((".so", ".o", ".pyc"))]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the sources are no clone")
@pytest.mark.parametrize("name", ["build/", "dist/", ".venv/", "uv.lock"])
def test_what_an_install_leaves_in_a_clone_is_no_source(name):
    """Fails where a commit or an sdist would take it along."""
    succeed("git", "check-ignore", name, cwd=ROOT)


@pytest.mark.long
def test_the_wheel_holds_the_package_and_its_compiled_parts(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        (entry_points,) = (n for n in names if n.endswith(".dist-info/entry_points.txt"))
        requirements = [
            line.removeprefix("Requires-Dist: ")
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist: ") and "extra ==" not in line
        ]
        assert "cbam-ops = cbam_ops.__main__:main" in archive.read(entry_points).decode()
        record = json.loads(archive.read("cbam_ops/_build_record.json"))
    libraries = {f"cbam_ops/libcbam_ops_{name}.so" for name in ("core", "tf", "xla")}
    assert libraries <= set(names)
    assert "cbam_ops/py.typed" in names
    assert [n for n in names if n.startswith("cbam_ops/_core.") and n.endswith(".so")]
    top = {name.split("/")[0] for name in names}
    assert top == {"cbam_ops", metadata.split("/")[0]}, "nothing outside the package"
    minor = record["tensorflow"]["version"].rsplit(".", 1)[0]
    assert sorted(text.split(">")[0] for text in requirements) == [
        "filelock",
        "numpy",
        "platformdirs",
        f"tensorflow=={minor}.*",
    ]
    assert list(record["cpu"]["levels"]) == ["baseline"]
    assert record["cuda"] == {
        "enabled": False,
        "why_not": "switched off (CBAM_OPS_CUDA=OFF)",
    }


@pytest.mark.long
def test_the_wheel_runs_an_op_in_a_fresh_environment(fresh, tmp_path):
    code = """
    import sys, numpy as np, tensorflow as tf
    import cbam_ops
    assert sys.prefix in cbam_ops.__file__, cbam_ops.__file__
    rng = np.random.default_rng(0)
    x, w0, b0, w1, b1, kernel = (
        tf.constant(rng.standard_normal(shape), tf.float64)
        for shape in [(2, 5, 4, 8), (8, 2), (2,), (2, 8), (8,), (3, 3, 2, 1)]
    )
    with cbam_ops.use_implementation("native"):
        ours = cbam_ops.cbam(x, w0, b0, w1, b1, kernel)
    stock = cbam_ops.reference.cbam(x, w0, b0, w1, b1, kernel)
    print(float(tf.reduce_max(tf.abs(ours - stock))) <= 1e-12)
    info = cbam_ops.build_info()
    print(info["instruction_set"]["available"])
    print(info["gpu"]["why_not"])
    """
    out = succeed(fresh, "-W", "error", "-c", textwrap.dedent(code), cwd=tmp_path)
    assert out.splitlines()[-3:] == [
        "True",
        "['baseline']",
        "This build has no CUDA kernels: switched off (CBAM_OPS_CUDA=OFF).",
    ]


@pytest.mark.long
def test_the_wheel_brings_the_command(fresh, tmp_path):
    script = fresh.parent / "cbam-ops"
    assert "baseline" in succeed(script, "info", cwd=tmp_path)
    assert succeed(script, "info", "--help", cwd=tmp_path) == succeed(
        fresh, "-m", "cbam_ops", "info", "--help", cwd=tmp_path
    )


# --- which TensorFlow the build takes -------------------------------------------------------------


@pytest.fixture
def finder() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "find_tensorflow", ROOT / "build_backend" / "find_tensorflow.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_tensorflow(folder: Path, version: str, name: str = "tensorflow") -> Path:
    (folder / "tensorflow").mkdir(parents=True)
    (folder / "tensorflow" / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    info = folder / f"tensorflow-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def built_metadata(folder: Path, call: str, **environment: str) -> dict[str, list[str]]:
    """The fields of the metadata that `call` of the backend writes into `folder`."""
    done = backend(ROOT, call, **environment)
    assert done.returncode == 0, done.stderr
    (path,) = folder.rglob("METADATA")
    fields: dict[str, list[str]] = {}
    for line in path.read_text().partition("\n\n")[0].splitlines():
        key, _, value = line.partition(": ")
        fields.setdefault(key, []).append(value)
    return fields


def test_the_tensorflow_of_this_environment_is_found(finder):
    import tensorflow as tf

    found = finder.find_tensorflow()
    assert found.version == tf.__version__
    assert found.directory == Path(tf.__file__).parent


def test_build_isolation_does_not_hide_it(finder, monkeypatch):
    """pip hides the target environment from sys.path while it builds."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = finder.find_tensorflow()
    assert found is not None and (found.directory / "include").is_dir()


def test_without_tensorflow_it_becomes_a_requirement_of_the_build(finder, monkeypatch, tmp_path):
    (tmp_path / "tensorflow").mkdir()  # what a removal may leave behind
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finder, "_search_path", lambda: [str(tmp_path)])
    assert finder.find_tensorflow() is None
    monkeypatch.setitem(sys.modules, "find_tensorflow", finder)
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    monkeypatch.chdir(ROOT)
    import cbam_ops_build

    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        assert str(finder.requirement()) in getattr(cbam_ops_build, hook)()
    assert not [r for r in cbam_ops_build.get_requires_for_build_sdist() if "tensorflow" in r]
    del sys.modules["cbam_ops_build"]


def test_another_release_stops_the_build_with_a_sentence(finder, tmp_path):
    fake = fake_tensorflow(tmp_path / "fake", "2.17.1")
    for call in (
        "backend.get_requires_for_build_wheel()",
        "backend.get_requires_for_build_editable()",
        f"backend.build_wheel({str(tmp_path)!r})",
    ):
        done = backend(ROOT, call, PYTHONPATH=str(fake))
        assert done.returncode == 1
        assert "answer" not in done.stdout
        assert done.stderr.strip() == (
            f"cbam_ops needs {finder.requirement()}, but this environment has TensorFlow 2.17.1 "
            f"({fake / 'tensorflow'}): run pip install '{finder.requirement()}', or use another "
            "environment."
        )


@pytest.mark.parametrize("version", ["2.18.0", "2.19.1", "2.20.0", "2.21.3"])
def test_any_release_in_the_range_will_do(tmp_path, version):
    fake = fake_tensorflow(tmp_path, version)
    done = backend(ROOT, "backend.get_requires_for_build_wheel()", PYTHONPATH=str(fake))
    assert done.returncode == 0 and "tensorflow" not in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.parametrize("name", ["tensorflow", "tensorflow-cpu"])
def test_what_is_built_for_a_release_requires_it(tmp_path, kind, name):
    """Fails where pip would put it beside a TensorFlow in which it does not load."""
    fake = fake_tensorflow(tmp_path / "fake", "2.19.1", name)
    fields = built_metadata(
        tmp_path / "out",
        f"backend.prepare_metadata_for_build_{kind}({str(tmp_path / 'out')!r})",
        PYTHONPATH=str(fake),
        CBAM_OPS_LOCAL_VERSION="tf2.19",
    )
    assert f"{name}==2.19.*" in fields["Requires-Dist"]
    assert not [text for text in fields["Requires-Dist"] if text.startswith("tensorflow>")]
    assert fields["Version"] == [f"{cbam_ops.__version__}+tf2.19"]
    assert fields["Requires-Python"] == ["<3.14,>=3.10"]


# --- a machine that cannot compile ----------------------------------------------------------------


def test_without_a_compiler_the_build_ends_before_any_download(tmp_path):
    for call in (
        "backend.get_requires_for_build_wheel()",
        "backend.get_requires_for_build_editable()",
        f"backend.build_wheel({str(tmp_path)!r})",
    ):
        done = backend(ROOT, call, PATH=str(tmp_path), CXX="")
        assert done.returncode == 1 and "answer" not in done.stdout
        (line,) = done.stderr.strip().splitlines()
        for text in ("apt-get install g++", "CXX", "CBAM_OPS_NATIVE=OFF"):
            assert text in line


def compiler(path: Path, macro: str) -> str:
    executable(path).write_text(f"#!/bin/sh\necho '#define {macro}'\n")
    return str(path)


@pytest.mark.parametrize(
    ("macro", "found"),
    [("__GNUC__ 8", "g++ 8"), ("__clang_major__ 9", "clang++ 9"), ("_MSC_VER 1940", "neither")],
)
def test_a_compiler_that_will_not_do_is_named(tmp_path, macro, found):
    cxx = compiler(tmp_path / "cxx", macro)
    done = backend(ROOT, "backend.get_requires_for_build_wheel()", CXX=cxx)
    assert done.returncode == 1
    assert f"needs g++ 9 or clang++ 10 or later, but `{cxx}` is {found}: " in done.stderr


def test_another_compiler_takes_the_place_of_the_one_that_python_was_built_with(tmp_path):
    compiler(tmp_path / "clang++", "__clang_major__ 14")
    call = "(backend.find_compiler.prepare(None), __import__('os').environ['CXX'])"
    done = backend(ROOT, call, PATH=str(tmp_path), CXX="")
    assert "answer: (None, 'clang++')" in done.stdout, done.stderr
    done = backend(ROOT, call, CXX=str(tmp_path / "none"))
    assert f"There is no C++ compiler `{tmp_path / 'none'}`" in done.stderr


@pytest.mark.parametrize(
    ("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")]
)
def test_another_platform_is_named(system, machine):
    call = (
        f"[setattr(backend.find_compiler.platform, 'system', lambda: {system!r}),"
        f"setattr(backend.find_compiler.platform, 'machine', lambda: {machine!r}),"
        "backend.get_requires_for_build_wheel()]"
    )
    done = backend(ROOT, call)
    assert done.returncode == 1
    assert f"Linux on x86_64 or aarch64, but this is {system} on {machine}." in done.stderr
    assert "CBAM_OPS_NATIVE=OFF" in done.stderr


def test_without_the_build_tools_one_sentence_says_which(tmp_path):
    """What `pip install --no-build-isolation` meets in a new environment."""
    code = "import sys; sys.path.insert(0, 'build_backend'); import cbam_ops_build"
    done = run(sys.executable, "-I", "-S", "-c", code, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "To build cbam_ops without build isolation, install the build tools first: "
        "pip install scikit-build-core pybind11 packaging cmake ninja"
    )


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a machine without a compiler makes."""
    folder = tmp_path_factory.mktemp("pure")
    done = backend(
        ROOT,
        f"(backend.get_requires_for_build_wheel(), backend.build_wheel({str(folder)!r}))",
        CBAM_OPS_NATIVE="off",
        PATH=str(folder),
        CXX="",
    )
    assert "answer: ([]," in done.stdout, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_a_build_without_compiled_ops_is_one_for_every_platform(pure):
    assert pure.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".json"))]
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        assert "Requires-Dist: tensorflow<2.22,>=2.18" in archive.read(metadata).decode()


def test_an_installation_without_compiled_ops_says_so(pure, tmp_path):
    """Fails where it is taken for a damaged one."""
    python = environment_with(pure, tmp_path)
    code = """
    import warnings, numpy as np
    import cbam_ops
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mean, _ = cbam_ops.channel_pool(np.ones((1, 2, 2, 4), np.float32))
    assert mean.numpy().tolist() == [[1.0] * 4]
    (text,) = [str(w.message) for w in caught if "cbam_ops" in str(w.message)]
    print(text)
    print(cbam_ops.build_info()["native_off_because"])
    """
    for line in succeed(python, "-c", textwrap.dedent(code), cwd=tmp_path).splitlines()[-2:]:
        assert "This is an installation without compiled ops (CBAM_OPS_NATIVE=OFF)." in line
        assert line.count("pip install") == 1


PIP = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "out"]
UV = ["-m", "uv", "--quiet", "--offline", "build", "--no-build-isolation", "--wheel", "-o", "out"]


@pytest.mark.parametrize(
    ("command", "source"),
    [
        (PIP, "folder"),
        (PIP, "sdist"),
        (PIP, "git"),
        (["-m", "build", "--no-isolation", "--wheel", "--outdir", "out"], "folder"),
        (UV, "folder"),
        (UV, "sdist"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_every_way_to_a_wheel(command, source, sdist, tmp_path):
    """Without what compiles, which is one for all of them. The tools come with `.ci/run`."""
    if importlib.util.find_spec(command[1]) is None:
        pytest.skip(f"{command[1]} is not installed")
    if source == "git" and not (ROOT / ".git").exists():
        pytest.skip("the sources are no clone")
    sources = {"folder": ROOT, "sdist": sdist, "git": f"git+file://{ROOT}"}
    succeed(
        *(sys.executable, *command, sources[source]), cwd=tmp_path, CBAM_OPS_NATIVE="OFF", CXX="no"
    )
    assert [path.suffix for path in (tmp_path / "out").iterdir()].count(".whl") == 1


def test_a_mistyped_switch_is_an_error():
    done = backend(ROOT, "backend.get_requires_for_build_wheel()", CBAM_OPS_NATIVE="no")
    assert done.stderr.strip() == "CBAM_OPS_NATIVE must be ON or OFF, got 'no'."


# --- CUDA=AUTO|ON|OFF -----------------------------------------------------------------------------


@pytest.fixture
def cuda_finder(monkeypatch, tmp_path) -> ModuleType:
    """The finder on a machine without nvcc, driver and wheels."""
    spec = importlib.util.spec_from_file_location(
        "find_cuda", ROOT / "build_backend" / "find_cuda.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", module.ENVIRONMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_SIGNS_OF_A_DRIVER", (str(tmp_path / "driver"),))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return module


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


ON = {"cmake.define.CBAM_OPS_CUDA": "ON"}
OFF = {"cmake.define.CBAM_OPS_CUDA": "OFF"}


def test_the_wheels_of_nvcc_are_asked_for_where_cuda_is(cuda_finder, monkeypatch):
    assert cuda_finder.requirements(None) == []
    assert cuda_finder.requirements({}) == []
    assert cuda_finder.requirements(ON) == cuda_finder.WHEELS
    assert [text.split(">")[0] for text in cuda_finder.WHEELS] == [
        "nvidia-cuda-nvcc",
        "nvidia-cuda-cccl",
    ]
    monkeypatch.setenv("CBAM_OPS_CUDA", "on")
    assert cuda_finder.requirements(None) == cuda_finder.WHEELS
    assert cuda_finder.requirements(OFF) == [], "the setting is nearer than the environment"


def test_the_wheels_of_nvcc_are_asked_for_where_a_driver_is(cuda_finder, tmp_path):
    (tmp_path / "driver").touch()
    assert cuda_finder.requirements(None) == cuda_finder.WHEELS
    assert cuda_finder.requirements(OFF) == []


@pytest.mark.parametrize("how", ["PATH", "CUDACXX"])
def test_the_machine_s_nvcc_needs_no_wheels(cuda_finder, monkeypatch, tmp_path, how):
    nvcc = executable(tmp_path / "nvcc") if how == "PATH" else executable(tmp_path / "a" / "nvcc")
    if how == "CUDACXX":
        monkeypatch.setenv("CUDACXX", str(nvcc))
    (tmp_path / "driver").touch()
    executable(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc")
    assert cuda_finder.requirements(ON) == []
    assert cuda_finder.cmake_settings(ON) == ON, "CMake finds it"


def test_an_nvcc_that_is_too_old_is_named(cuda_finder, monkeypatch, tmp_path):
    nvcc = executable(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    for release, right in (("11.8", False), ("12.0", True), ("13.5", True)):
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V'\n")
        if right:
            assert cuda_finder.requirements(None) == []
            continue
        with pytest.raises(SystemExit, match=f"nvcc 12.0 or later, but {nvcc} is 11.8: "):
            cuda_finder.requirements(None)
        assert cuda_finder.requirements(OFF) == []


def test_cmake_is_pointed_at_the_wheels_nvcc(cuda_finder, tmp_path):
    assert cuda_finder.cmake_settings(None) == {"cmake.define.CBAM_OPS_CUDA": "AUTO"}
    nvcc = executable(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc")
    for settings, mode in ((None, "AUTO"), (ON, "ON")):
        assert cuda_finder.cmake_settings(settings) == {
            "cmake.define.CBAM_OPS_CUDA": mode,
            "cmake.define.CMAKE_CUDA_COMPILER": str(nvcc),
            "build-dir": "",
        }
    assert cuda_finder.cmake_settings(OFF) == OFF


def test_the_build_backend_asks_the_finder(tmp_path):
    """Fails where a hook of the backend forgets nvcc."""
    compiler(tmp_path / "c++", "__GNUC__ 12")
    environment = {"CBAM_OPS_CUDA": "ON", "CUDACXX": "", "CXX": "", "PATH": str(tmp_path)}
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        done = backend(ROOT, f"backend.{hook}()", **environment)
        assert "nvidia-cuda-nvcc" in done.stdout, done.stderr
        done = backend(ROOT, f"backend.{hook}({OFF!r})", **environment)
        assert "answer" in done.stdout and "nvidia" not in done.stdout, done.stderr


def configure(build: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    assert cmake, "the test extra brings cmake"
    import pybind11

    return run(
        *(cmake, "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *arguments),
        cwd=build,
        **environment,
    )


def cuda_record(build: Path) -> dict[str, object]:
    return json.loads((build / "_build_record.json").read_text())["cuda"]


def test_a_build_for_this_machine_has_its_best_level_and_the_baseline(tmp_path):
    """Fails where an install takes time for levels that this machine does not use."""
    from cbam_ops import _core

    done = configure(tmp_path, NO_CUDA_OPTION)
    assert done.returncode == 0, done.stderr
    levels = json.loads((tmp_path / "_build_record.json").read_text())["cpu"]["levels"]
    assert set(levels) == {"baseline", _core.available_instruction_sets()[-1]}
    done = configure(tmp_path, NO_CUDA_OPTION, "-DCBAM_OPS_INSTRUCTION_SETS=AVX3")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "must be AUTO, ALL or a list of AVX2 and AVX512, got 'AVX3'" in message


def test_without_nvcc_auto_builds_for_the_cpu_and_says_so(tmp_path):
    done = configure(tmp_path, CUDACXX="/nonexistent/nvcc")
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: none, no nvcc that works was found" in done.stdout
    assert cuda_record(tmp_path) == {
        "enabled": False,
        "why_not": "no nvcc that works was found",
    }


def test_without_nvcc_on_is_an_error_with_the_fix(tmp_path):
    done = configure(tmp_path, "-DCBAM_OPS_CUDA=ON", CUDACXX="/nonexistent/nvcc")
    message = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "CBAM_OPS_CUDA=ON, but no CUDA compiler was found" in message
    assert "Put nvcc on PATH or set CUDACXX" in message


EVERY_GENERATION = "75-real 80-real 90-real 100-real 120-real 80-virtual"


@pytest.mark.parametrize(
    ("gpus", "architectures"),
    [("", EVERY_GENERATION), ("9.0 9.0", "90"), ("8.0 9.0", "80 90"), ("99.0", EVERY_GENERATION)],
)
def test_with_nvcc_auto_builds_for_gpus_and_says_for_which(tmp_path, gpus, architectures):
    """The GPUs that are there alone, if nvcc knows them; else one of every generation and PTX."""
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
        pytest.skip("no nvcc on PATH and no CUDACXX")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo {gpu}\n" for gpu in gpus.split()))
    program.chmod(0o755)
    done = configure(tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    record = cuda_record(tmp_path)
    assert record["enabled"] is True and record["architectures"] == architectures
    listed = architectures.replace(" ", ";")
    assert f"CUDA kernels: {record['version']}, for {listed}" in done.stdout
