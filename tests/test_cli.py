"""The command `cbam-ops`: what a user sees, the exit codes, and that `check` can fail."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
from programs import HANGS

from cbam_ops import __main__ as command
from cbam_ops import __version__, _loader, options, testing
from cbam_ops import _console as console
from cbam_ops._cli import check, demo
from cbam_ops._loader import tensorflow_requirement

# Hides modules from a program: the argument list's first entry names them.
_WITHOUT = """
import sys
HIDDEN = sys.argv.pop(1).split(",")
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
sys.argv[0] = "cbam-ops"
from cbam_ops.__main__ import main
sys.exit(main())
"""


def _environment() -> dict[str, str]:
    """That of a user: nothing set that the tests set for themselves."""
    leave_out = ("TF_CPP_MIN_LOG_LEVEL", "CBAM_OPS_IMPLEMENTATION", "PYTHONUNBUFFERED")
    return {key: value for key, value in os.environ.items() if key not in leave_out}


def _run(*arguments: str, cwd: Path, program: tuple[str, ...] = ("-m", "cbam_ops")):
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def _here(capsys, *arguments: str) -> subprocess.CompletedProcess:
    """As `_run`, in this process: without what TensorFlow's import takes and writes."""
    code = command.main(arguments)
    shown = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, code, shown.out, shown.err)


def _assert_one_sentence(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds the words."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, f"more than one sentence:\n{result.stderr}"
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


# --- demo ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("demo")
    output = folder / "new" / "folder"
    return _run("demo", "--quick", "--output", str(output), cwd=folder), output


def test_demo_succeeds_quietly(quick_demo):
    """Fails when the demo breaks, or lets start-up messages or a progress bar into a log."""
    result, _ = quick_demo
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert "\r" not in result.stdout and "\b" not in result.stdout
    assert "FAILED" not in result.stdout
    assert "native kernels" in result.stdout.splitlines()[0]


def test_demo_learns_and_says_so(quick_demo):
    """Fails when a quick run learns nothing, or the printed accuracy cannot be read."""
    text = quick_demo[0].stdout
    accuracy = float(re.search(r"test accuracy: ([\d.]+)%", text)[1])
    assert 80 < accuracy <= 100  # ten digits: chance is 10 %
    assert len(re.findall(r"val_accuracy: [\d.]+", text)) == 3  # a line per epoch
    assert "450 held out" in text


def test_demo_compares_fused_with_reference(quick_demo):
    """Fails when fused and reference differ, or the fused ops keep maps for the gradient."""
    text = quick_demo[0].stdout
    errors = [
        float(e) for e in re.findall(r"largest error of (?:the output|a gradient) +(\S+)", text)
    ]
    assert len(errors) == 6
    assert max(errors) < 1e-3
    times = re.findall(r"time per training step +([\d.]+) ms +([\d.]+) ms +([\d.]+)", text)
    assert len(times) == 3 and all(float(value) > 0 for row in times for value in row)
    memory = re.findall(r"memory kept for the gradient +([\d.]+) MiB +([\d.]+) MiB", text)
    assert len(memory) == 3
    network, _, module = ([float(value) for value in row] for row in memory)
    assert network[0] < network[1]
    assert module[0] < 0.1 * module[1]


def test_demo_saves_a_model_that_predicts_the_same(quick_demo):
    """Fails when the saved network cannot be loaded, or predicts something else."""
    result, output = quick_demo
    difference = float(re.search(r"largest difference of its predictions (\S+)", result.stdout)[1])
    assert difference <= 1e-6
    for name in (demo.MODEL_FILE, demo.PHOTOGRAPHS_FILE):
        assert (output / name).stat().st_size > 100_000
        assert keras.models.load_model(output / name).compiled


def test_demo_draws_a_picture(quick_demo):
    """Fails when the picture is missing, blank, or has lost its photographs or its heat maps."""
    from PIL import Image

    with Image.open(quick_demo[1] / demo.PICTURE_FILE) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert height > 800 and width > 800
    assert (pixels[0, 0] == 255).all()
    assert 0.1 < np.mean(pixels.min(axis=2) == 255) < 0.9  # white paper, with things on it
    photograph = pixels[height // 8 : height // 4, : width // 4]
    heat = pixels[height // 8 : height // 4, width // 3 : width // 2]
    assert len(np.unique(photograph.reshape(-1, 3), axis=0)) > 1000
    assert len(np.unique(heat.reshape(-1, 3), axis=0)) > 1000
    colourful = np.max(heat, axis=2) - np.min(heat, axis=2)
    assert np.mean(colourful > 30) > 0.5


def test_demo_fails_on_missed_promises():
    """Fails when the full demo could end with exit code 0 though it missed what it promises."""
    assert demo.verdict(0.97, 1e-6, 0.0) == []
    assert demo.verdict(None, 1e-6, 0.0) == []  # --quick
    assert "below 97%" in demo.verdict(0.9689, 1e-6, 0.0)[0]
    nan = float("nan")
    assert len(demo.verdict(0.5, 1.0, 1.0)) == 3
    assert len(demo.verdict(nan, nan, nan)) == 3


def test_demo_in_an_unwritable_folder(tmp_path, capsys):
    """Fails when a folder that cannot be made or written to gives more than one sentence."""
    file = tmp_path / "file"
    file.write_text("not a folder")
    for output in (file, file / "inside", Path("/proc/cbam_demo")):
        result = _here(capsys, "demo", "--output", str(output))
        _assert_one_sentence(result, "cbam-ops demo:", f"{output}", "--output DIR")


@pytest.mark.parametrize(
    ("hidden", "distributions"),
    [("sklearn", "scikit-learn"), ("matplotlib,PIL", "matplotlib pillow")],
)
def test_demo_without_an_optional_package(monkeypatch, tmp_path, capsys, hidden, distributions):
    """Fails when a missing package is not named together with the command that installs it."""
    for module in hidden.split(","):
        monkeypatch.setitem(sys.modules, module, None)
    result = _here(capsys, "demo", "--output", str(tmp_path))
    _assert_one_sentence(result, "the demo needs", f"pip install {distributions}")


def test_demo_is_interrupted_cleanly(tmp_path):
    """Fails when Ctrl-C shows a traceback or another exit code than the shell's 130."""
    # Where the tests run in the background, SIGINT is ignored and a child inherits that.
    program = (
        "import runpy, signal, sys; sys.argv[0] = 'cbam-ops'; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('cbam_ops', run_name='__main__')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, "demo", "--output", str(tmp_path)],
        cwd=tmp_path,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("1. Train"):
                break
        time.sleep(2)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=HANGS)
    finally:
        child.kill()
    assert child.returncode == 130
    assert errors.strip() == "cbam-ops demo: interrupted"


# As the installed script: the package is imported before the command runs, with TensorFlow's place
# taken by a program.
_STARTED = """
import importlib.abc, importlib.machinery, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow":
            return importlib.machinery.ModuleSpec(name, self)
    def exec_module(self, module):
        {tensorflow}
sys.meta_path.insert(0, Finder())
sys.argv = ["cbam-ops", *{arguments}]
from cbam_ops.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), (["fuse", "--help"], 0), (["nonsense"], 2), ([], 2)],
)
def test_arguments_that_end_the_command_need_no_tensorflow(tmp_path, arguments, code):
    """Fails when the answer takes the seconds of TensorFlow's import."""
    program = _STARTED.format(tensorflow="print('IMPORTED')", arguments=arguments)
    result = _run(cwd=tmp_path, program=("-c", program))
    assert (result.returncode, "IMPORTED" in result.stdout) == (code, False)
    assert "usage: cbam-ops" in result.stdout + result.stderr or arguments == ["--version"]


@pytest.mark.parametrize("becomes", ["KeyboardInterrupt", "ImportError"])
def test_an_interrupt_while_tensorflow_is_imported_is_a_sentence(tmp_path, becomes):
    """Fails when Ctrl-C in the command's first seconds shows a traceback."""
    tensorflow = f"""
        try: signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt: raise {becomes}
    """
    program = _STARTED.format(tensorflow=tensorflow, arguments=["check"])
    result = _run(cwd=tmp_path, program=("-c", program))
    assert (result.returncode, result.stderr) == (130, "\ncbam-ops: interrupted\n")


@pytest.fixture
def ctrl_c(monkeypatch) -> Iterator[None]:
    """SIGINT as in a program in the foreground; what a command changes for it is undone."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_that_becomes_another_error_is_one(monkeypatch, capsys):
    """TensorFlow, interrupted while it traces or compiles, raises an error of its own."""

    def run(quick: bool) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("something failed in a callback") from None
        return 0

    monkeypatch.setattr(check, "run", run)
    result = _here(capsys, "check")
    assert (result.returncode, result.stderr) == (130, "\ncbam-ops check: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_path_that_the_output_cannot_spell(monkeypatch):
    """Fails when a command ends as a bug after its work, since a path has letters beyond ASCII."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(check, "run", lambda quick: console.say("m\xf6del \udcff"))
    command.main(["check"])
    assert shown.buffer.getvalue() == b"m\\xf6del \\udcff\n"


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_hides_what_it_left_half_done(monkeypatch, capsys):
    """TensorFlow's generators, torn down while it traces, fail once more when they are deleted."""

    class HalfDone:
        def __del__(self):
            raise RuntimeError("shown as 'Exception ignored in'")

    def run(quick: bool) -> int:
        half_done = HalfDone()
        signal.raise_signal(signal.SIGINT)
        return id(half_done)

    monkeypatch.setattr(check, "run", run)
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    result = _here(capsys, "check")
    assert (result.returncode, result.stderr) == (130, "\ncbam-ops check: interrupted\n")
    assert not ignored


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_that_is_lost_comes_again(monkeypatch, capsys):
    """Fails when a command goes on after a Ctrl-C that came where errors are swallowed."""

    def run(quick: bool) -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(console, "_AGAIN_SECONDS", 0.1)
    alarm = signal.getsignal(signal.SIGALRM)
    result = _here(capsys, "check")
    assert (result.returncode, result.stderr) == (130, "\ncbam-ops check: interrupted\n")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is alarm


@pytest.fixture
def nothing_fused(monkeypatch):
    """An installation whose compiled ops do not load."""
    cause = _loader.Cause("not_built", "They are not built.", "Build them.")
    monkeypatch.setattr(_loader, "load_ops", lambda: cause)


def test_demo_needs_the_fused_ops(nothing_fused, tmp_path, capsys):
    """Fails when the demo calls a run of the reference a success of the fused ops."""
    assert command.main(["demo", "--output", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert "They are not built. Build them." in line and "--allow-reference" in line
    assert shown.out == ""


@pytest.mark.parametrize("asked_by", ["--allow-reference", "CBAM_OPS_IMPLEMENTATION"])
def test_demo_with_the_reference(
    nothing_fused, fresh_options, monkeypatch, tmp_path, capsys, asked_by
):
    """Fails when the reference cannot be asked for, or is called fused without a word."""
    ran = []

    def _run(*arguments) -> list[str]:
        ran.append(options.implementation())
        return []

    monkeypatch.setattr(demo, "_run", _run)
    flags = [asked_by]
    if asked_by == "CBAM_OPS_IMPLEMENTATION":
        monkeypatch.setenv(asked_by, "reference")
        flags = []
    assert command.main(["demo", "--output", str(tmp_path), *flags]) == 0
    assert ran == ["reference"]
    assert "do not run here" in capsys.readouterr().out


def test_progress_bar_on_a_terminal_only(monkeypatch):
    """Fails when a person at a terminal sees no progress bar, or a log is full of it."""
    for terminal, verbose in ((True, 1), (False, 2)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert demo._verbose() == verbose


def test_full_disk_leaves_no_cut_file(tmp_path):
    """Fails when a model or a picture that could not be written whole takes the place of one."""
    import keras

    path = tmp_path / "model.keras"
    path.write_text("the model of an earlier run")
    model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(200)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(console.CommandError, match=re.escape(f"cannot write {path}: ")):
            demo._save_and_reload(model, path, np.zeros((1, 200), "float32"))
        with (
            pytest.raises(console.CommandError),
            console.written(tmp_path / "demo.png") as part,
        ):
            part.write_bytes(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "the model of an earlier run"
    assert list(tmp_path.iterdir()) == [path]


def test_memory_is_counted_right():
    """Fails when the demo's memory column does not count what the gradient keeps."""
    import tensorflow as tf

    import cbam_ops
    from cbam_ops._cli.compare import Traced

    x = tf.random.normal((2, 8, 8, 16))
    map_bytes = 2 * 8 * 8 * 16 * 4
    once = Traced(lambda x: tf.exp(x), watch=True)  # keeps its result
    once(x)
    assert once.kept_bytes(x) == map_bytes
    twice = Traced(lambda x: tf.reduce_sum(tf.reshape(tf.exp(tf.tanh(x)), (-1,))), watch=True)
    twice(x)
    assert twice.kept_bytes(x) == 2 * map_bytes
    none = Traced(lambda x: 2 * x, watch=True)
    none(x)
    assert none.kept_bytes(x) == 0

    weights = [tf.random.normal(s) for s in ((16, 2), (2,), (2, 16), (16,), (7, 7, 2, 1), (1,))]
    with cbam_ops.use_implementation("reference"):
        reference = Traced(cbam_ops.cbam, watch=True)
        reference(x, *weights)
        assert reference.kept_bytes(x, *weights) >= map_bytes
    with cbam_ops.use_implementation("native"):
        fused = Traced(cbam_ops.cbam, watch=True)
        fused(x, *weights)
        assert fused.kept_bytes(x, *weights) < map_bytes / 2


# --- info ----------------------------------------------------------------------------------------


def test_info_is_a_table(tmp_path):
    """Fails when the report for bug reports misses what a maintainer asks for first."""
    result = _run("info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", result.stdout, re.MULTILINE))
    assert rows["version"] == __version__
    assert rows["native kernels"] == "on"
    for label in (
        "implementation",
        "instruction set in use",
        "TensorFlow",
        "Keras",
        "numpy",
        "Python",
        "operating system",
        "processor",
        "devices",
        "compiler version",
        "cuda enabled",
    ):
        assert rows[label] not in ("", "-"), f"{label} is missing"
    if rows["cuda enabled"] == "no":
        assert len(rows["cuda why not"]) > 10


def test_info_as_json(capsys):
    """Fails when a program can no longer read the report."""
    result = _here(capsys, "info", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["version"] == __version__
    assert report["native"] is True and report["native_off_because"] is None
    assert report["instruction_set"]["active"] in report["instruction_set"]["available"]
    assert report["processor"]["cores"] >= 1
    assert report["build"]


def test_info_without_tensorflow(tmp_path):
    """Fails when the report does not come out of a broken installation, or hides the reason."""
    result = _run("info", cwd=tmp_path, program=("-c", _WITHOUT, "tensorflow"))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert re.search(r"native kernels +off", result.stdout)
    assert f"pip install '{tensorflow_requirement()}'" in result.stdout


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'jax'", name="jax"), ValueError("no backend foo")],
)
def test_another_backend_of_keras_that_does_not_load(monkeypatch, error):
    """Fails when a user is told to install JAX, or that this is a bug, where TensorFlow is."""

    def load(name):
        raise error

    monkeypatch.setenv("KERAS_BACKEND", "foo")
    monkeypatch.setattr(console.importlib, "import_module", load)
    with pytest.raises(console.CommandError, match=f"{error}. .* set KERAS_BACKEND=tensorflow"):
        console.import_tensorflow()


# --- check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--quick"], pytest.param([], marks=pytest.mark.long)], ids=["quick", "all"]
)
def test_check_passes(capsys, arguments):
    """Fails when the fused ops err more than twice what stock TensorFlow errs."""
    result = _here(capsys, "check", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert re.search(r"All \d\d+ cases pass: \d+ outputs and gradients", result.stdout)
    for word in ("float16", "bfloat16", "float64", "NCHW", "cbam_with_batch_norm", "spatial_pool"):
        assert word in result.stdout, f"no case with {word}"


def test_check_quick_still_covers_every_type_and_layout():
    """Fails when the quick check leaves out a type, a layout or a function."""
    quick = check.cases(quick=True)
    assert len(quick) < len(check.cases()) / 2
    assert {case.dtype for case in quick} == {"float32", "float16", "bfloat16", "float64"}
    assert {case.data_format for case in quick} == {"NHWC", "NCHW"}
    assert {case.function for case in quick} == set(testing.OUTPUTS)


def _break(kind, original):
    """The op with one thing wrong with it."""
    import tensorflow as tf

    def broken(x, *args, **kwargs):
        y, *gates = original(x, *args, **kwargs)
        if kind == "value":
            y = y * 1.0001
        elif kind == "one value":
            flat = tf.reshape(y, [-1])
            y = tf.reshape(tf.concat([flat[:-1], flat[-1:] + 0.01], 0), tf.shape(y))
        elif kind == "gradient":
            y = y + 0.001 * (x - tf.stop_gradient(x))
        elif kind == "nan":
            y = tf.where(y == tf.reduce_max(y), tf.constant(float("nan"), y.dtype), y)
        elif kind == "shape":
            y = y[:, :-1]
        elif kind == "raises":
            raise RuntimeError("the kernel is broken")
        return (y, *gates)

    return broken


@pytest.mark.parametrize("kind", ["value", "one value", "gradient", "nan", "shape", "raises"])
def test_check_fails_on_a_broken_kernel(monkeypatch, capsys, kind):
    """Fails when `check` would pass kernels that compute something else."""
    import cbam_ops

    case = testing.Case(size=(2, 6, 6, 16))
    monkeypatch.setattr(check, "cases", lambda quick: [case])
    assert command.main(["check"]) == 0, capsys.readouterr().out
    monkeypatch.setattr(cbam_ops, "cbam", _break(kind, cbam_ops.cbam))
    assert command.main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_check_of_all_cases_fails_on_a_broken_kernel(monkeypatch, capsys):
    """Fails when the real list of cases would not notice a broken kernel."""
    import cbam_ops

    monkeypatch.setattr(cbam_ops, "cbam", _break("value", cbam_ops.cbam))
    assert command.main(["check", "--quick"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_check_where_nothing_fused_runs(monkeypatch, capsys):
    """Fails when `check` calls an installation without its kernels good."""
    import cbam_ops

    off = {**cbam_ops.build_info(), "native": False, "native_off_because": "It is not built."}
    monkeypatch.setattr(cbam_ops, "build_info", lambda: off)
    assert command.main(["check"]) == 1
    assert "It is not built." in capsys.readouterr().out


def test_check_without_tensorflow(tmp_path):
    """Fails when a missing TensorFlow is not one sentence."""
    result = _run("check", cwd=tmp_path, program=("-c", _WITHOUT, "tensorflow,keras"))
    _assert_one_sentence(result, "cbam-ops check:", f"pip install '{tensorflow_requirement()}'")


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "'frobnicate'"),
        (["demo", "--epochs", "0"], "at least 1"),
        (["demo", "--epochs", "many"], "'many'"),
        (["demo", "--seed", "-1"], "--seed"),
        (["info", "--xml"], "--xml"),
    ],
)
def test_wrong_arguments(capsys, arguments, words):
    """Fails when a mistyped command does anything but explain itself with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["demo", "--help"], ["info", "--help"], ["check", "--help"]]
)
def test_help(capsys, arguments):
    """Fails when help is missing or not an answer."""
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 150


def test_version(capsys):
    """Fails when the command tells another version than the package."""
    with pytest.raises(SystemExit):
        command.main(["--version"])
    assert capsys.readouterr().out.strip() == f"cbam-ops {__version__}"


def test_console_command_is_the_same_program():
    """Fails when `cbam-ops` and `python -m cbam_ops` go apart."""
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="cbam-ops")
    assert entry.value == "cbam_ops.__main__:main"


def test_unexpected_error_is_no_traceback(monkeypatch, capsys):
    """Fails when a bug shows a traceback without being asked for one."""

    def fail(**arguments: object) -> int:
        raise ZeroDivisionError("oops")

    from cbam_ops._cli import info

    monkeypatch.setattr(info, "run", fail)
    assert command.main(["info"]) == 2
    text = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in text and "Traceback" not in text
    with pytest.raises(ZeroDivisionError):
        command.main(["--traceback", "info"])


def test_interrupt_gives_130(monkeypatch, capsys):
    """Fails when Ctrl-C in any command is not the exit code that shells expect."""
    from cbam_ops._cli import info

    def interrupt(**arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert command.main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("CBAM_OPS_IMPLEMENTATION", "natve", '"native"'),
        ("CBAM_OPS_INSTRUCTION_SET", "avx9", '"baseline"'),
    ],
)
def test_mistyped_environment_variable(fresh_options, monkeypatch, capsys, variable, value, words):
    """Fails when a mistyped value is called a bug, or nobody says what may stand there."""
    monkeypatch.setenv(variable, value)
    for name in ("info", "check", "demo", "bench"):
        assert command.main([name]) == 2
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert all(text in line for text in (f"cbam-ops {name}:", variable, value, words))
        assert shown.out == ""


def _shell(command_line: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f'"{sys.executable}" {command_line}'],
        cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=HANGS,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (">&-", "standard output is closed"),
        (">/dev/full", "No space left on device"),
        # Nobody reads when the command writes.
        ("| true; exit ${PIPESTATUS[0]}", "Broken pipe"),
    ],
)
def test_output_that_cannot_be_written(tmp_path, target, words):
    """Fails when an output that nobody takes shows a traceback, or passes for a success."""
    program = tmp_path / "program.py"
    program.write_text(_WITHOUT)  # without TensorFlow it starts at once
    result = _shell(f"{program} tensorflow info {target}", tmp_path)
    _assert_one_sentence(result, "cbam-ops", words)


def test_closed_input_and_error_output(tmp_path):
    """Fails when the report needs an input, or somewhere to complain to."""
    result = _shell("-m cbam_ops info <&- 2>&-", tmp_path)
    assert result.returncode == 0
    assert "native kernels" in result.stdout


def test_table_aligns(capsys):
    """Fails when columns no longer line up, or cells are cut or taken for markup."""
    console.print_table([["a", "number"], ["[long] name" * 12, "1"], ["x"]], "<>")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines[0]) == len(lines[2]) and lines[2].strip().startswith("[long] name[long]")
    assert lines[2].endswith("1") and lines[3].strip() == "x"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[Errno 21] at most 10\nmore", "[Errno 21] at most 10"),
        (
            "Exception encountered when calling CBAM.call().\n\n\x1b[1m`x` has 10\x1b[0m",
            "`x` has 10",
        ),
        (
            "Graph execution error:\n\nDetected at node a defined at (most recent call last):\n"
            '  File "a.py", line 1, in <module>\n    f(x)\n\nDetected at node b defined at (most '
            "recent call last):\n<stack traces unavailable>\n2 values, but 3 asked for\n\t [[b]]",
            "2 values, but 3 asked for",
        ),
        ("", "ValueError"),
    ],
)
def test_first_line_of_an_error(text, line):
    """Fails when it says where, not what, or loses its brackets with Keras's bold letters."""
    assert console.first_line(ValueError(text)) == line
