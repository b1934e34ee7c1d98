"""What this build can do on NVIDIA GPUs, and why not where it cannot.

The compiled module answers: it asks the driver, and makes no context on any device.
"""

from __future__ import annotations

import functools
from typing import Any

from . import _loader


def why_not(capability: int = 0) -> str | None:
    """Why the CUDA kernels cannot run, as one sentence; None where they can.

    Args:
      capability: the compute capability of the device in question, as 10 * major + minor; 0 asks
        about the current device.
    """
    try:
        _core = _loader.load_core()
    except ImportError as error:
        return f"The compiled module does not load: {error}."
    if not _core.cuda.built:
        reason = (
            _loader.build_record().get("cuda", {}).get("why_not", "the build record is missing")
        )
        return f"This build has no CUDA kernels: {reason}."
    return _core.cuda.why_not(capability) or None


@functools.cache  # neither driver nor devices change in a process
def why_not_under_tensorflow() -> str | None:
    """Why the kernels cannot run on the GPUs that TensorFlow uses, None where they can on all."""
    import tensorflow as tf

    for device in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        major, minor = details.get("compute_capability", (0, 0))
        reason = why_not(10 * major + minor)
        if reason is not None:
            return f"{details.get('device_name', device.name)}: {reason}"
    return None


def _release(version: int) -> str | None:
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def report() -> dict[str, Any]:
    """For `build_info()`: plain values."""
    try:
        _core = _loader.load_core()
    except ImportError:
        return {"built": False, "why_not": why_not()}
    cuda = _core.cuda
    if not cuda.built:
        return {"built": False, "why_not": why_not()}
    from . import _gpu_check

    return {
        "built": True,
        "cuda": _release(cuda.build_version),
        "architectures": cuda.architectures.split(),
        "driver_cuda": _release(cuda.driver_version()),
        "why_not": why_not(),
        "checks": _gpu_check.report(),
    }
