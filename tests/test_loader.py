"""Importing never fails; loading explains every failure and its fix."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
from programs import HANGS, run_python

import cbam_ops
from cbam_ops import _loader

LIBRARIES = [_loader.LIBRARY, _loader.CORE_LIBRARY]
OPS = [
    "Cbam",
    "CbamGrad",
    "ChannelAttention",
    "ChannelAttentionGrad",
    "ChannelPool",
    "ChannelPoolGrad",
    "SpatialAttention",
    "SpatialAttentionGrad",
    "SpatialPool",
    "SpatialPoolGrad",
]


def elf_with(library: Path, old: bytes, new: bytes) -> bytes:
    content = library.read_bytes()
    assert old in content and len(old) == len(new)
    return content.replace(old, new)


@pytest.fixture
def installed() -> Path:
    directory = _loader.compiled_directory()
    assert directory is not None
    return directory


@pytest.fixture
def copy(tmp_path: Path, installed: Path) -> Path:
    """A directory with copies of the libraries and the build record, to damage."""
    for name in (*LIBRARIES, _loader.BUILD_RECORD):
        shutil.copy(installed / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("record", "origin"),
    [
        (None, "cbam-ops"),
        ({"url": "file:///home/ada/my%20clone", "dir_info": {}}, "'/home/ada/my clone'"),
        ({"url": "https://host/cbam_ops.whl", "archive_info": {}}, "https://host/cbam_ops.whl"),
        ({"url": "https://host/c.git", "vcs_info": {"vcs": "git"}}, "git+https://host/c.git"),
    ],
)
def test_the_command_that_installs_again_names_where_it_came_from(monkeypatch, record, origin):
    """Fails when a user of a clone or a wheel is sent to an index that has no such package."""

    class Installed:
        def read_text(self, name):
            return json.dumps(record) if record and name == "direct_url.json" else None

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    command = _loader._rebuild_command(Path("/site-packages/cbam_ops"))
    assert command == f"pip install --force-reinstall --no-deps {origin}"


# --- import ---------------------------------------------------------------------------------------


def test_import_leaves_tensorflow_to_be_set_up(tmp_path):
    """Fails where the import makes devices or threads, whose settings a program makes after it."""
    out = run_python(
        """
        import cbam_ops
        import tensorflow as tf
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.set_visible_devices([], "GPU")
        cpu, = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        cbam_ops.channel_pool(tf.ones((1, 1, 1, 1)))
        print(len(tf.config.list_logical_devices()))
        """,
        cwd=tmp_path,
    )
    assert out == ["2"]


@pytest.mark.parametrize(
    ("without", "usable"),
    [
        ("sys.modules['tensorflow'] = sys.modules['keras'] = None", "build_info"),
        ("os.environ['KERAS_BACKEND'] = 'numpy'", "cbam"),
    ],
    ids=["no TensorFlow", "another Keras backend"],
)
def test_import_works_without(without, usable, tmp_path):
    """A program that never uses the layers, or only wants a report, must not fail for them."""
    out = run_python(
        f"""
        import os, sys
        {without}  # importing a module that is None raises ImportError
        import cbam_ops
        print(cbam_ops.build_info()["native_off_because"])
        assert callable(cbam_ops.{usable})
        for name in ("CBAM", "models"):
            try:
                getattr(cbam_ops, name)
            except ImportError as error:
                print(error)
        """,
        cwd=tmp_path,
    )
    report, *errors = out
    if usable == "build_info":
        assert "TensorFlow cannot be imported" in report and "pip install 'tensorflow" in report
    else:
        assert report == "None"
    assert usable == "cbam" or "tensorflow" in errors[0]
    # Keras's backend of numpy needs JAX, which the programs of tests lack.
    for name, error in zip(("CBAM", "models"), errors, strict=True):
        assert error.startswith(f"cbam_ops.{name} cannot be used: "), error
        assert ("KERAS_BACKEND=tensorflow" in error) == (usable == "cbam")


def test_every_public_name_resolves():
    missing = [name for name in cbam_ops.__all__ if getattr(cbam_ops, name, None) is None]
    assert not missing
    assert dir(cbam_ops) == sorted(cbam_ops.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'cbamm'"):
        _ = cbam_ops.cbamm


def test_the_public_lists_agree():
    """Fails where a function is public in one place only."""
    functions = set(cbam_ops.reference.__all__)
    assert set(cbam_ops.ops.__all__) == functions | {"load_library"}
    of_models = {"add_attention", "export", "from_torch", "fuse", "gates", "to_torch"}
    assert functions == {
        name for name in cbam_ops.__all__ if inspect.isfunction(getattr(cbam_ops, name))
    } - {"build_info", "set_implementation", *of_models}
    assert {name for name in cbam_ops.__all__ if hasattr(cbam_ops.layers, name)} >= {
        *cbam_ops.layers.__all__
    }


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import keras

    path = tmp_path_factory.mktemp("saved") / "model.keras"
    keras.Sequential([keras.Input((6, 5, 16)), cbam_ops.CBAM(ratio=4, kernel_size=3)]).save(path)
    return path


@pytest.mark.parametrize(
    "imports", ["import cbam_ops; import keras", "import keras; import cbam_ops"]
)
def test_a_saved_model_loads_in_a_fresh_process(imports, saved_model, tmp_path):
    """Keras finds a layer only if its module was imported: `import cbam_ops` must see to that."""
    out = run_python(
        f"""
        import sys
        {imports}
        model = keras.models.load_model(sys.argv[1])
        print(type(model.layers[-1]).__name__)
        """,
        str(saved_model),
        cwd=tmp_path,
    )
    assert out[-1] == "CBAM"


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_the_library_brings_the_op(name):
    ops = _loader.load_ops()
    assert not isinstance(ops, _loader.Cause), str(ops)
    assert callable(getattr(ops, f"CbamOps_{name}"))


def test_the_library_is_loaded_once_for_all_threads(monkeypatch):
    calls = []
    monkeypatch.setattr(_loader, "_loaded", None)
    monkeypatch.setattr(_loader, "load_from", lambda directory: calls.append(directory) or "ops")
    monkeypatch.setattr(_loader, "load_xla_from", lambda directory: None)
    start = threading.Barrier(8, timeout=HANGS)

    def load() -> None:
        start.wait()
        assert _loader.load_ops() == "ops"

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def expect_cause(loaded: object, kind: str, *texts: str) -> None:
    assert isinstance(loaded, _loader.Cause), f"expected a cause, got {loaded}"
    assert loaded.kind == kind, str(loaded)
    assert loaded.fix.count("pip install") == 1, "one command mends it"
    for text in texts:
        assert text in str(loaded)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_explained(copy, name):
    (copy / name).unlink()
    expect_cause(_loader.load_from(copy), "not_built", str(copy / name))


def test_another_tensorflow_is_explained_before_anything_is_loaded(copy, monkeypatch):
    import tensorflow as tf

    record = json.loads((copy / _loader.BUILD_RECORD).read_text())
    record["tensorflow"]["version"] = "2.17.1"
    (copy / _loader.BUILD_RECORD).write_text(json.dumps(record))
    monkeypatch.setattr(tf, "load_op_library", lambda path: pytest.fail("loaded it"))
    expect_cause(
        _loader.load_from(copy),
        "other_tensorflow",
        "built for TensorFlow 2.17 (2.17.1)",
        f"TensorFlow {tf.__version__} is installed",
        "pip install 'tensorflow==2.17.*'",
    )


def test_another_patch_release_is_none_of_our_business(copy):
    import tensorflow as tf

    minor = tf.__version__.rsplit(".", 1)[0]
    assert _loader.find_cause(copy, f"{minor}.7") is None


def spoil(library: Path, how: str) -> None:
    """Damages a library; the first three leave its length as it was."""
    content = bytearray(library.read_bytes())
    middle = len(content) // 2
    if how == "one bit":
        content[middle] ^= 1
    elif how == "a block of zeros":
        content[middle : middle + 512] = bytes(512)
    elif how == "the header":
        content[16:64] = bytes(48)
    elif how == "another valid library":
        content = bytearray(Path(sys.modules["_ctypes"].__file__).read_bytes())
    elif how == "text":
        content = bytearray(b"Not found\n" * 100)
    else:
        del content[int(how) :]
    library.write_bytes(content)


DAMAGES = ["one bit", "a block of zeros", "the header", "another valid library", "text"]
DAMAGES += ["0", "10", "5000"]


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_library_is_explained_and_not_loaded(copy, how, name, monkeypatch):
    """Loading one ends the process, or works and computes something else."""
    import tensorflow as tf

    spoil(copy / name, how)
    monkeypatch.setattr(tf, "load_op_library", lambda path: pytest.fail("loaded it"))
    expect_cause(_loader.load_from(copy), "corrupt", str(copy / name), "not the file that was")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_library_for_xla_is_explained_and_not_loaded(copy, how, installed, monkeypatch):
    import tensorflow as tf

    library = copy / _loader.XLA_LIBRARY
    if not (installed / library.name).is_file():
        pytest.skip("this TensorFlow lacks the headers of XLA's custom calls")
    shutil.copy(installed / library.name, library)
    spoil(library, how)
    monkeypatch.setattr(tf, "load_library", lambda path: pytest.fail("loaded it"))
    expect_cause(_loader.load_xla_from(copy), "corrupt", str(library), "not the file that was")


@pytest.mark.parametrize("name", ["_core", _loader.CORE_LIBRARY])
def test_a_damaged_module_of_numpy_kernels_is_not_loaded(copy, installed, name, monkeypatch):
    for path in installed.glob("_core.*.so"):
        shutil.copy(path, copy)
    spoil(next(copy.glob(f"{name}*")), "one bit")
    monkeypatch.setattr(_loader, "compiled_directory", lambda: copy)
    monkeypatch.delitem(sys.modules, "cbam_ops._core", raising=False)
    with pytest.raises(ImportError, match=f"{name}.* is not the file that was built"):
        _loader.load_core()


def test_a_library_that_does_not_load_is_explained_in_the_loader_s_words(copy):
    library = copy / _loader.LIBRARY
    library.write_bytes(
        elf_with(library, b"libtensorflow_framework.so.2\0", b"libtensorflow_framework.so.9\0")
    )
    record = json.loads((copy / _loader.BUILD_RECORD).read_text())
    record["libraries"][library.name] = hashlib.sha256(library.read_bytes()).hexdigest()
    (copy / _loader.BUILD_RECORD).write_text(json.dumps(record))
    expect_cause(_loader.load_from(copy), "load_failed", "libtensorflow_framework.so.9")


BROKEN_RECORDS = {
    "missing": None,
    "empty": "",
    "cut off": "{",
    "another type": "[]",
    "nested too deep": "[" * 100_000,
    "no text": b"\xff\xfe",
    "a text for a table": {"tensorflow": "2.21.0"},
    "a number for a version": {"tensorflow": {"version": 2.21}},
    "no checksums": {"libraries": None},
}


@pytest.mark.parametrize("content", BROKEN_RECORDS.values(), ids=BROKEN_RECORDS.keys())
def test_a_missing_or_broken_build_record_is_explained(copy, content, monkeypatch):
    """Without it nobody knows what the libraries are."""
    path = copy / _loader.BUILD_RECORD
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    expect_cause(_loader.load_from(copy), "corrupt", str(path))
    monkeypatch.setattr(_loader, "compiled_directory", lambda: copy)
    assert _loader.build_record() == {}


def test_a_program_without_the_core_library_runs_the_reference_and_says_why(tmp_path, installed):
    """Fails where the module of numpy kernels, which needs the library too, breaks the report."""
    package = tmp_path / "cbam_ops"
    shutil.copytree(Path(cbam_ops.__file__).parent, package)
    for path in installed.glob("*.so"):
        shutil.copy(path, package)
    shutil.copy(installed / _loader.BUILD_RECORD, package)
    (package / _loader.CORE_LIBRARY).unlink()
    out = run_python(
        """
        import sys, warnings
        # An editable install would answer first.
        sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
        import numpy as np
        import cbam_ops
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mean, _ = cbam_ops.channel_pool(np.ones((1, 2, 2, 4), np.float32))
        assert mean.numpy().tolist() == [[1.0] * 4]
        print([str(w.message) for w in caught if "cbam_ops" in str(w.message)])
        info = cbam_ops.build_info()
        print(info["native_off_because"], info["instruction_set"]["error"], info["gpu"]["why_not"])
        """,
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    warning, report = out[-2:]
    assert str(package / _loader.CORE_LIBRARY) in warning and "pip install" in warning
    assert str(package / _loader.CORE_LIBRARY) in report
    assert report.count(f"{_loader.CORE_LIBRARY}: cannot open shared object file") == 2


def test_running_from_the_source_tree_is_explained(tmp_path):
    """The flat layout's trap: in the repository root Python imports a package without its parts."""
    package = Path(cbam_ops.__file__).parent
    tree = tmp_path / "tree"
    shutil.copytree(package, tree / "cbam_ops", ignore=shutil.ignore_patterns("*.so", "*.json"))
    (tree / "CMakeLists.txt").touch()
    (tree / "csrc").mkdir()
    out = run_python(
        """
        import sys, warnings
        # An editable install would answer first.
        sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
        import numpy as np
        import cbam_ops
        x = np.ones((1, 2, 2, 4), np.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mean, _ = cbam_ops.channel_pool(x)
            cbam_ops.channel_pool(x)
        ours = [str(w.message) for w in caught if "cbam_ops" in str(w.message)]
        assert mean.numpy().tolist() == [[1.0] * 4]
        assert len(ours) == 1, ours
        print(ours[0])
        try:
            with cbam_ops.use_implementation("native"):
                cbam_ops.channel_pool(x)
        except RuntimeError as error:
            print(error)
        """,
        cwd=tmp_path,
        PYTHONPATH=str(tree),
    )
    warning, error = out[-2:]
    for text in (warning, error):
        assert str(tree / "cbam_ops") in text
        assert f"pip install -e {tree}" in text
