"""Fused CBAM attention for TensorFlow and Keras.

The import loads TensorFlow, Keras and the native ops, and registers the ops' gradients and the
layers: SavedModels and ``.keras`` files load after it. It never fails. Native ops that do not load
are reported by the first call that would use them; where TensorFlow or Keras does not load, the
names that need it raise ``ImportError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _loader, testing
from ._cli.arguments import start_up
from ._dialects import dialects
from .options import NativeUnavailableError, build_info, set_implementation, use_implementation

__version__ = "0.1.0"

__all__ = [
    "CBAM",
    "ChannelAttention",
    "NativeUnavailableError",
    "SpatialAttention",
    "__version__",
    "add_attention",
    "build_info",
    "cbam",
    "cbam_with_batch_norm",
    "channel_attention",
    "channel_pool",
    "dialects",
    "export",
    "exporting",
    "from_torch",
    "fuse",
    "fusing",
    "gates",
    "inserting",
    "layers",
    "models",
    "ops",
    "reference",
    "set_implementation",
    "spatial_attention",
    "spatial_attention_with_batch_norm",
    "spatial_pool",
    "testing",
    "to_torch",
    "use_implementation",
]

try:
    with start_up():
        from . import _flops, _gradients, ops, reference  # noqa: F401
        from .ops import (
            cbam,
            cbam_with_batch_norm,
            channel_attention,
            channel_pool,
            spatial_attention,
            spatial_attention_with_batch_norm,
            spatial_pool,
        )

        _loader.load_ops()
        # Last, since Keras may be set to another backend than TensorFlow.
        from . import exporting, fusing, inserting, layers, models
        from ._torch_weights import from_torch, to_torch
        from .exporting import export
        from .fusing import fuse
        from .inserting import add_attention
        from .inspecting import gates
        from .layers import CBAM, ChannelAttention, SpatialAttention
except Exception as error:  # what a broken installation raises is of any type
    _error: Exception | None = error
else:
    _error = None


if not TYPE_CHECKING:  # type checkers would take it for a module that has every name

    def __getattr__(name: str) -> Any:
        if name in __all__:
            text = f"cbam_ops.{name} cannot be used: {_error}. {_loader.backend_fix(_error)}"
            raise ImportError(text.rstrip()) from _error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
