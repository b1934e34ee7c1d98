"""What all tests share: which cbam_ops is tested, and the fixtures.

The tests are about the installed package. The repository root also holds a directory `cbam_ops`,
without compiled parts unless the install is an editable one, so the root is kept off the path (a
`python -m pytest` would put it there), and the run stops where the parts are missing all the same.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # the workers share it
os.environ.setdefault("CBAM_OPS_GPU_CHECK", "skip")  # the tests are one
# Programs that the tests start: no current folder on the path, no packages that nobody needs.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent / "lean"), os.environ.get("PYTHONPATH", "")])
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

import pytest  # noqa: E402


def _tested_package() -> str:
    """Where the compiled parts are that the tests use; stops the run if there are none."""
    package = importlib.util.find_spec("cbam_ops")
    core = importlib.util.find_spec("cbam_ops._core") if package else None
    if package is None or core is None or not core.origin:
        where = package.origin if package else "nowhere"
        pytest.exit(
            f"cbam_ops ({where}) has no compiled parts: run pip install '.[test]' first.",
            returncode=4,
        )
    directory = Path(core.origin).parent
    for name in ("libcbam_ops_tf.so", "libcbam_ops_core.so", "_build_record.json"):
        if not (directory / name).is_file():
            pytest.exit(f"{directory} has no {name}: run pip install '.[test]'.", returncode=4)
    return f"cbam_ops: {package.origin}, compiled: {directory}"


def _other_library() -> str:
    """Puts the op library that CBAM_OPS_TEST_LIBRARY names in the place of the installed one.

    For tests that run these tests over other kernels (test_cuda_ops_on_cpu.py).
    """
    library = os.environ.get("CBAM_OPS_TEST_LIBRARY", "")
    if library:
        import tensorflow as tf

        load = tf.load_op_library
        with mock.patch.object(tf, "load_op_library", lambda installed: load(library)):
            import cbam_ops  # noqa: F401
    return library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds", type=float, default=60.0, help="how long the random tests go on (-m fuzz)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_HEADER] = " ".join(filter(None, [_other_library(), _tested_package()]))


def pytest_report_header(config: pytest.Config) -> str:
    return config.stash[_HEADER]


_HEADER = pytest.StashKey[str]()


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    """What a test lets Keras draw is the same in every run, and does not depend on other tests."""
    if keras := sys.modules.get("keras"):
        keras.utils.set_random_seed(0)


@pytest.fixture(params=["native", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the compiled kernels and once with plain TensorFlow."""
    import cbam_ops

    with cbam_ops.use_implementation(request.param):
        yield request.param


@pytest.fixture
def native() -> Iterator[None]:
    """The compiled kernels, or an error."""
    import cbam_ops

    with cbam_ops.use_implementation("native"):
        yield


@pytest.fixture
def native_ops() -> ModuleType:
    """The module of the compiled ops themselves."""
    from cbam_ops import options

    return options.loaded_ops()


@pytest.fixture
def shapes_only() -> Iterator[None]:
    """Networks without values: drawing them takes most of the time of building a network."""
    import keras

    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.backend.clear_session()  # forgets the variables that wait for a value


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> int:
    """How many threads a test gives to the kernels (through `cbam_ops._core`)."""
    return request.param


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set that the machine and the build have."""
    from cbam_ops import _core

    if request.param not in _core.available_instruction_sets():
        pytest.skip(f"this machine or this build has no {request.param}")
    before = _core.instruction_set()
    _core.set_instruction_set(request.param)
    yield request.param
    _core.set_instruction_set(before)


@pytest.fixture(params=["NHWC", "NCHW"])
def data_format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["float32", "float16", "bfloat16", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fresh_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options as in a process that has not used them yet."""
    from cbam_ops import options

    monkeypatch.delenv(options.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(options, "_process", None)
    monkeypatch.setattr(options, "_warned", set())
