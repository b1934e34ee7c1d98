"""A build with CUDA, on a machine that may have no GPU: it loads, it works, it says what it is.

The package that is tested is built with CUDA wherever there was an nvcc. Without one the tests of
this file that need such a build are skipped.
"""

from __future__ import annotations

import json

import pytest
import tensorflow as tf

import cbam_ops
from cbam_ops import _gpu, _loader
from cbam_ops._cli import info

OPS = [
    name + suffix
    for name in ("Cbam", "ChannelAttention", "SpatialAttention", "ChannelPool", "SpatialPool")
    for suffix in ("", "Grad")
]


@pytest.fixture(autouse=True)
def fresh_answers():
    _gpu.why_not_under_tensorflow.cache_clear()
    yield
    _gpu.why_not_under_tensorflow.cache_clear()


@pytest.fixture
def cuda():
    """`_core.cuda` of a build with CUDA."""
    from cbam_ops import _core

    if not _core.cuda.built:
        record = _loader.build_record()["cuda"]
        pytest.skip(f"the installed package was built without CUDA: {record['why_not']}")
    return _core.cuda


@pytest.fixture
def no_driver(cuda) -> None:
    if cuda.driver_version() != 0:
        pytest.skip("this machine has an NVIDIA driver")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_kernel_for_gpus_beside_the_one_for_cpus(op, cuda):
    """Fails where an op would leave the GPU for the CPU, with copies either way."""
    from tensorflow.python.framework import kernels

    assert not isinstance(_loader.load_ops(), _loader.Cause)
    found = kernels.get_registered_kernels_for_op(f"CbamOps>{op}").kernel
    assert {kernel.device_type for kernel in found} >= {"CPU", "GPU"}
    assert not any(kernel.host_memory_arg for kernel in found), "all tensors are in GPU memory"
    assert not any(kernel.constraint for kernel in found), "all types of the op"


def test_the_cpu_ops_work_beside_gpu_code(cuda):
    x = tf.random.stateless_normal((2, 5, 6, 16), (1, 2))
    with cbam_ops.use_implementation("native"), tf.device("CPU"):
        mean, maximum = cbam_ops.channel_pool(x)
    assert mean.device.endswith("CPU:0")
    assert tf.reduce_all(maximum == tf.reduce_max(x, (1, 2)))


def test_the_build_says_what_it_is(cuda):
    record = _loader.build_record()["cuda"]
    report = cbam_ops.build_info()["gpu"]
    json.dumps(report)
    assert report["built"] is True
    assert record["architectures"].split() == report["architectures"] == cuda.architectures.split()
    assert record["version"].startswith(report["cuda"] + ".")


@pytest.mark.usefixtures("no_driver")
def test_without_a_driver_the_reason_is_one_sentence(cuda, capsys):
    assert cuda.device_capability() == 0
    assert cuda.why_not() == cuda.why_not(90) == "There is no NVIDIA driver."
    assert _gpu.why_not() == "There is no NVIDIA driver."
    assert cbam_ops.build_info()["gpu"]["driver_cuda"] is None
    info.run(as_json=False)
    text = capsys.readouterr().out
    assert "There is no NVIDIA driver." in text and "no driver" in text


@pytest.mark.usefixtures("no_driver")
def test_a_kernel_without_a_driver_is_an_error_that_says_so(cuda):
    with pytest.raises(RuntimeError, match="no NVIDIA driver, or it is older than the CUDA"):
        cuda.channel_pool(16, mean=16, maximum=16, shape=[1, 2, 2, 4])


# --- what the decision makes of the answers -------------------------------------------------------


class Answers:
    """Stands in for `_core.cuda` of some build on some machine."""

    built = True

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons
        self.asked: list[int] = []

    def why_not(self, capability: int) -> str:
        self.asked.append(capability)
        return self.reasons.get(capability, "")


@pytest.fixture
def machine(monkeypatch):
    """Pretends GPUs of the given compute capabilities, with the given reasons against them."""
    from cbam_ops import _core

    def pretend(capabilities: list[tuple[int, int]], reasons: dict[int, str]) -> Answers:
        devices = [
            tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU")
            for i in range(len(capabilities))
        ]
        details = {
            device.name: {"device_name": f"GPU no. {i}", "compute_capability": capability}
            for i, (device, capability) in enumerate(zip(devices, capabilities, strict=True))
        }
        answers = Answers(reasons)
        monkeypatch.setattr(_core, "cuda", answers)
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: devices)
        monkeypatch.setattr(
            tf.config.experimental, "get_device_details", lambda device: details[device.name]
        )
        return answers

    return pretend


def test_every_gpu_that_tensorflow_uses_is_asked_about_once(machine):
    answers = machine([(9, 0), (8, 6)], {})
    assert _gpu.why_not_under_tensorflow() is None
    assert _gpu.why_not_under_tensorflow() is None
    assert answers.asked == [90, 86]


def test_one_gpu_that_cannot_is_named_with_the_reason(machine):
    machine([(9, 0), (6, 1)], {61: "It is too old."})
    assert _gpu.why_not_under_tensorflow() == "GPU no. 1: It is too old."


def test_a_build_without_cuda_says_why(machine, monkeypatch):
    answers = machine([(9, 0)], {})
    answers.built = False
    monkeypatch.setattr(_loader, "build_record", lambda: {"cuda": {"why_not": "no nvcc"}})
    reason = "This build has no CUDA kernels: no nvcc."
    assert _gpu.why_not_under_tensorflow() == f"GPU no. 0: {reason}"
    assert _gpu.report() == {"built": False, "why_not": reason}


@pytest.mark.usefixtures("fresh_options")
def test_the_reason_reaches_the_user(machine, monkeypatch):
    """auto: the reference and one warning; native: an error; under tf.device("CPU"): native."""
    machine([(6, 1)], {61: "The driver is too old."})
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: [gpu])

    def ops(device: str) -> set[str]:
        with tf.Graph().as_default() as graph, tf.device(device):
            cbam_ops.channel_pool(tf.ones((1, 2, 2, 4)))
        return {operation.type for operation in graph.get_operations()}

    with pytest.warns(RuntimeWarning, match="GPU no. 0: The driver is too old"):
        assert "CbamOps>ChannelPool" not in ops("GPU")
    assert "CbamOps>ChannelPool" not in ops("GPU")  # and no second warning, which is an error here
    assert "CbamOps>ChannelPool" in ops("CPU")
    with cbam_ops.use_implementation("native"):
        with pytest.raises(cbam_ops.NativeUnavailableError, match="The driver is too old"):
            ops("GPU")
