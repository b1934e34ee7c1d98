"""Fused CBAM attention for TensorFlow and Keras.

The names below load what they need when they are first used: importing the package itself does no
work and cannot fail, with or without TensorFlow and with or without the compiled parts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _keras_registration

if TYPE_CHECKING:
    from . import layers, models, ops, reference, testing
    from .layers import CBAM, ChannelAttention, SpatialAttention
    from .ops import (
        cbam,
        cbam_with_batch_norm,
        channel_attention,
        channel_pool,
        spatial_attention,
        spatial_attention_with_batch_norm,
        spatial_pool,
    )
    from .options import NativeUnavailableError, build_info, set_implementation, use_implementation

__version__ = "0.1.0"

__all__ = [
    "CBAM",
    "ChannelAttention",
    "NativeUnavailableError",
    "SpatialAttention",
    "__version__",
    "build_info",
    "cbam",
    "cbam_with_batch_norm",
    "channel_attention",
    "channel_pool",
    "layers",
    "models",
    "ops",
    "reference",
    "set_implementation",
    "spatial_attention",
    "spatial_attention_with_batch_norm",
    "spatial_pool",
    "testing",
    "use_implementation",
]

_SUBMODULES = ("layers", "models", "ops", "reference", "testing")

_HOME = {
    "CBAM": "layers",
    "ChannelAttention": "layers",
    "SpatialAttention": "layers",
    "cbam": "ops",
    "cbam_with_batch_norm": "ops",
    "channel_attention": "ops",
    "channel_pool": "ops",
    "spatial_attention": "ops",
    "spatial_attention_with_batch_norm": "ops",
    "spatial_pool": "ops",
    "NativeUnavailableError": "options",
    "build_info": "options",
    "set_implementation": "options",
    "use_implementation": "options",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_keras_registration.install()
