"""A GPU proves itself before it is used: the check, its record, and what follows from them.

The GPU is pretended (pretended_gpu.py): the kernels' sources run on the CPU, behind the functions
of `_core.cuda`, in processes of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pretended_gpu
import pytest
import tensorflow as tf
from cuda_on_cpu import COMPILER
from programs import HANGS

import cbam_ops
from cbam_ops import __main__ as command
from cbam_ops import _call, _core, _gpu, _gpu_check, _loader, testing
from cbam_ops._cli import check, gpu_kernels, info
from cbam_ops._gpu_check import Gpu, Outcome

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler on PATH"),
    pytest.mark.usefixtures("fresh_options"),
]


class Machine:
    """A machine with a pretended GPU, as a process that has not used it yet sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._monkeypatch = monkeypatch
        self.cache, self.log = folder / "cache", folder / "log"
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))
        monkeypatch.delenv(_gpu_check.ENVIRONMENT_VARIABLE, raising=False)
        self.plug_in()

    def plug_in(self, fault: str = "") -> None:
        """Another GPU of the same kind, in a new process."""
        cuda = pretended_gpu.Cuda(fault)
        self.gpu = Gpu(*cuda.devices()[0])
        details = {
            "device_name": self.gpu.name,
            "compute_capability": divmod(self.gpu.capability, 10),
        }
        devices = {
            "list_logical_devices": tf.config.LogicalDevice("/device:GPU:0", "GPU"),
            "get_visible_devices": tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU"),
        }
        for name, device in devices.items():
            self._monkeypatch.setattr(tf.config, name, lambda kind=None, one=device: [one])
        self._monkeypatch.setattr(
            tf.config.experimental, "get_device_details", lambda device: details
        )
        self._monkeypatch.setattr(_core, "cuda", cuda)
        self._monkeypatch.setattr(_gpu_check, "_COMMAND", pretended_gpu.command(fault, self.log))
        self._monkeypatch.setattr(_gpu_check, "_decision", None)

    def is_native(self, device: str = "GPU") -> bool:
        """Whether the native op is in the graph of a call there."""
        with tf.Graph().as_default() as graph, tf.device(device):
            cbam_ops.channel_pool(tf.ones((1, 2, 2, 4)))
        return "CbamOps>ChannelPool" in {operation.type for operation in graph.get_operations()}

    def checks(self) -> int:
        """How many checks there were."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def records(self) -> list[Path]:
        return sorted(self.cache.rglob("*.json"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    _gpu.why_not_under_tensorflow.cache_clear()
    yield Machine(monkeypatch, tmp_path)
    _gpu.why_not_under_tensorflow.cache_clear()


def test_a_good_gpu_is_used_silently_and_checked_once(machine):
    """A warning would be an error here. Later processes find the record."""
    for _ in range(2):
        machine.plug_in()
        assert machine.is_native() and machine.is_native()
        assert machine.checks() == 1 and len(machine.records()) == 1
    (path,) = machine.records()
    record = json.loads(path.read_text())
    build = _loader.build_record()["libraries"][_loader.CORE_LIBRARY]
    assert record["key"]["build"] == build and record["key"]["name"] == machine.gpu.name
    assert record["verdict"] == "passed" and record["detail"] == "All 8 cases pass."


def test_a_decision_costs_a_call_nothing(machine, monkeypatch):
    """Fails where calls after the first one ask for the place, which is an op."""
    assert machine.is_native()
    monkeypatch.setattr(tf, "zeros", None)
    assert _call.cause_of_the_place() is None


def test_ops_on_the_cpu_ask_for_no_check(machine):
    assert machine.is_native("CPU")
    assert machine.checks() == 0


FAILURES = {
    "wrong": r"spatial_attention\S+: dx: 1 of 910 values are too far off; at .* instead of ",
    "stray": r"spatial_attention\S+: spatial_attention_grad: the kernels wrote where they must not",
    "error": r"spatial_attention\S+: an illegal memory access was encountered \(launch\)",
    "crash": r"spatial_attention\S+: the process was ended by SIGABRT",
    "hang": r"spatial_attention\S+: nothing came for a while",
}


@pytest.mark.parametrize("fault", FAILURES)
def test_a_bad_gpu_gets_the_reference_and_one_warning(machine, monkeypatch, fault):
    """Whatever a kernel does, it does in another process, and the case has a name."""
    if fault == "hang":
        monkeypatch.setattr(_gpu_check, "_CASE_SECONDS", 5.0)
    machine.plug_in(fault)
    with pytest.warns(RuntimeWarning, match=FAILURES[fault]) as warned:
        assert not machine.is_native()
    assert not machine.is_native()  # without a second warning, which would be an error
    (warning,) = warned
    for words in (str(machine.gpu), "report", "cbam-ops info", "CBAM_OPS_GPU_CHECK=skip"):
        assert words in str(warning.message)
    with cbam_ops.use_implementation("native"):
        with pytest.raises(cbam_ops.NativeUnavailableError, match=FAILURES[fault]):
            machine.is_native()
        assert machine.is_native("CPU")
    assert machine.checks() == 1
    assert _gpu_check.recorded(machine.gpu).verdict == "failed"


def test_what_cannot_be_checked_is_said_and_the_variable_decides(machine, monkeypatch):
    """auto: native, with a warning; require: the reference. No record keeps a later process off."""
    machine.plug_in("no memory")
    with pytest.warns(RuntimeWarning, match="less than 64 MiB of free memory.*GPU_CHECK=skip"):
        assert machine.is_native()
    assert machine.is_native()
    monkeypatch.setenv(_gpu_check.ENVIRONMENT_VARIABLE, "require")
    machine.plug_in("no memory")
    with pytest.warns(RuntimeWarning, match="reference.*less than 64 MiB"):
        assert not machine.is_native()
    assert machine.checks() == 2 and not machine.records()
    machine.plug_in()
    assert machine.is_native()


def test_skip_checks_nothing(machine, monkeypatch):
    machine.plug_in("wrong")
    monkeypatch.setenv(_gpu_check.ENVIRONMENT_VARIABLE, "skip")
    assert machine.is_native()
    assert machine.checks() == 0


def test_an_unknown_word_is_an_error(machine, monkeypatch, capsys):
    monkeypatch.setenv(_gpu_check.ENVIRONMENT_VARIABLE, "never")
    with pytest.raises(ValueError, match="CBAM_OPS_GPU_CHECK must be one of .*'never'"):
        machine.is_native()
    assert command.main(["info"]) == 2
    assert "CBAM_OPS_GPU_CHECK must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["driver", "build"])
def test_a_record_of_another_driver_or_build_says_nothing(machine, monkeypatch, part):
    assert machine.is_native()
    if part == "driver":
        monkeypatch.setattr(pretended_gpu.Cuda, "driver_version", lambda self: 13010)
    else:
        record = _loader.build_record()
        record["libraries"][_loader.CORE_LIBRARY] = "of another build"
        monkeypatch.setattr(_loader, "build_record", lambda: record)
    machine.plug_in()
    assert machine.is_native()
    assert machine.checks() == len(machine.records()) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"key": 1}', "\xff"], ids=repr)
def test_a_record_that_cannot_be_read_says_nothing(machine, text):
    path = _gpu_check._path(machine.gpu)
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="latin-1")
    assert machine.is_native()
    assert machine.checks() == 1 and _gpu_check.recorded(machine.gpu).verdict == "passed"


def test_a_cache_folder_that_cannot_be_written_is_said(machine):
    """The check counts all the same, for this process. A file in its place keeps even root out."""
    machine.cache.write_text("")
    for processes in (1, 2):
        machine.plug_in()
        _gpu_check.options._warned.clear()
        with pytest.warns(RuntimeWarning, match="no record of it can be kept: .*XDG_CACHE_HOME"):
            assert machine.is_native()
        assert machine.checks() == processes


def test_without_a_home_folder_nothing_is_made_in_the_current_one(machine, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_gpu_check, "_folder", lambda: Path("~", ".cache"))
    with pytest.warns(RuntimeWarning, match="this user has no home folder"):
        assert machine.is_native()
    assert not Path("~").exists()


def test_eight_processes_that_start_at_once_make_one_check(machine):
    """Seven wait for the record of the first."""
    program = [*pretended_gpu.command("", machine.log), "ask"]
    started = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    said = [json.loads(process.communicate(timeout=HANGS)[0]) for process in started]
    assert [outcome["verdict"] for outcome in said] == ["passed"] * 8
    assert machine.checks() == 1


JUDGED: dict[str, tuple[str, int | None, str, str, str]] = {
    "killed for memory": ("case:", -signal.SIGKILL, "", "not run", "ended by SIGKILL"),
    "an own error": ("case:", 2, "cbam-ops check: why", "not run", "why"),
    "an end too early": ("case: ok", 0, "", "failed", "case: ok the process ended with code 0"),
    "an end too late": ("All 8 cases pass.", None, "", "failed", "nothing came"),
    "passed": ("case: ok\nAll 8 cases pass.", 0, "noise", "passed", "All 8 cases pass."),
}


@pytest.mark.parametrize("how", JUDGED)
def test_how_a_check_ended(how):
    """Nothing passes but what says so at its end, and nobody else's deed is the kernels' fault."""
    output, code, complaint, verdict, detail = JUDGED[how]
    judged = _gpu_check._judge(f"{gpu_kernels.STARTED} on X\n{output}", code, complaint)
    assert judged[0] == verdict and detail in judged[1]
    assert _gpu_check._judge("", code, complaint)[0] == "not run"


def test_a_program_that_is_no_python_proves_nothing(machine, monkeypatch):
    """Where Python is embedded, sys.executable may be anything."""
    for program in ("/bin/true", "/none"):
        monkeypatch.setattr(_gpu_check, "_COMMAND", (program,))
        assert _gpu_check.outcome_of(machine.gpu).verdict == "not run"


def test_a_device_that_does_not_answer_proves_nothing(machine, monkeypatch):
    """Fails where what CUDA says of a broken device ends the user's call, or `cbam-ops info`."""

    def devices(self):
        raise RuntimeError("system not yet initialized (device query)")

    monkeypatch.setattr(pretended_gpu.Cuda, "devices", devices, raising=False)
    assert _gpu_check.report() == {}
    with pytest.warns(RuntimeWarning, match="CUDA finds no"):
        assert machine.is_native()


# --- the commands ---------------------------------------------------------------------------------


def test_info_shows_the_record(machine, capsys):
    label = f"check on {machine.gpu}"
    for expected in ("none yet", "passed, 20"):
        info.run(as_json=False)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if label in line)
        assert expected in line
        assert machine.is_native()
    assert cbam_ops.build_info()["gpu"]["checks"][str(machine.gpu)].endswith("All 8 cases pass.")


def test_check_makes_a_new_record(machine, capsys):
    """Fails where a record of a fault is there for ever, or an old one hides a new fault."""
    outcomes = []
    for fault in ("wrong", "", "wrong"):
        machine.plug_in(fault)
        code = check.run(quick=True) if fault else 0 if check._gpus_pass(quick=True) else 1
        outcomes.append((code, _gpu_check.recorded(machine.gpu).verdict))
    assert outcomes == [(1, "failed"), (0, "passed"), (1, "failed")]
    assert "passed: All 8 cases pass." in capsys.readouterr().out


@pytest.mark.skipif(_gpu.why_not() is None, reason="this machine has a GPU")
def test_the_real_command_ends_where_there_is_no_gpu(tmp_path):
    """Fails where the child cannot start without TensorFlow, or imports from the current folder."""
    program = [*_gpu_check._COMMAND, "check", "--gpu-kernels", "--quick"]
    (tmp_path / "numpy.py").write_text("raise SystemExit('another one')")
    environment = {**os.environ, "PYTHONSAFEPATH": ""}  # as for a user
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.strip() == f"cbam-ops check: {_gpu.why_not()}"


# --- what is compared -----------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [True, False])
def test_the_cases_cover_every_op_type_and_layout(quick):
    chosen = gpu_kernels.cases(quick)
    for function in testing.ARGUMENTS:
        combinations = {(c.dtype, c.data_format) for c in chosen if c.function == function}
        assert len(combinations) == len(testing.EPSILON) * 2, function
    assert len(set(map(str, chosen))) == len(chosen)
    largest = max(c.size[0] * c.size[1] * c.size[2] * c.size[3] for c in chosen)
    assert (largest < 2**18) == quick


@pytest.mark.parametrize(
    ("case", "misalign"),
    [(case, 0) for case in gpu_kernels.cases(quick=True)[::9]]
    + [(case, 1) for case in gpu_kernels.MISALIGNED],
    ids=str,
)
def test_right_kernels_pass(case, misalign):
    """Were the comparison or a call's arguments wrong, every good GPU would get the reference."""
    kernels = gpu_kernels.Kernels(pretended_gpu.Cuda(), misalign)
    found = gpu_kernels.examine(case, kernels)
    assert not [finding.fault for finding in found if finding.fault]


def test_an_outcome_is_what_a_record_keeps(machine):
    outcome = Outcome("failed", "a case: a fault", "2026-01-01 00:00")
    _gpu_check._path(machine.gpu).parent.mkdir(parents=True)
    _gpu_check._write(machine.gpu, outcome)
    assert _gpu_check.recorded(machine.gpu) == outcome
