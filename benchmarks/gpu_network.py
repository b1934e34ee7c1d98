"""CBAM's share of a training step of ResNet-50 on a GPU, in PyTorch.

The network is the usual one (He et al., 2016; bottlenecks, channels last, batch norm), with CBAM at
the end of each residual branch as in the paper, or without. CBAM is ours, stock PyTorch or
torch.compile of that. Used by gpu_check.py.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import device
from baselines import cuda_seconds, torch_cbam

from cbam_ops._bench import WEIGHTS, Row, host_seconds

try:
    import torch
    from torch import nn
except ImportError:  # gpu_check says so
    torch = None

BLOCKS = (3, 4, 6, 3) if device.DEVICE == "cuda" else (1, 1, 1, 1)
KINDS = ("plain", "ours", "torch-eager", "torch-compile")


def modules() -> dict[str, Any]:
    """The classes, which cannot be defined before PyTorch is there: `Network` makes one network."""

    kernels, memory = device.kernels(), device.TorchMemory()

    def call(name: str, x: torch.Tensor, w0: torch.Tensor, **tensors: torch.Tensor) -> None:
        """Enqueues an op; x is channels last."""
        n, c, h, w = x.shape
        arguments = {
            "shape": (n, h, w, c), "dtype": str(x.dtype).removeprefix("torch."),
            "hidden": w0.shape[1], "kernel_size": 7,
            **{key: tensor.data_ptr() for key, tensor in (tensors | {"x": x, "w0": w0}).items()},
        }  # fmt: skip
        size = getattr(kernels, f"{name}_workspace")(**arguments)
        workspace = torch.empty((size + 256,), dtype=torch.uint8, device=device.DEVICE)
        start = workspace.data_ptr()
        arguments["workspace"] = start + -start % 256
        getattr(kernels, name)(**arguments, stream=memory.stream())

    class Fused(torch.autograd.Function):
        """The kernels under autograd; weights are float32."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            n, c, h, w = x.shape
            made = functools.partial(torch.empty, dtype=torch.float32, device=device.DEVICE)
            saved = {
                "channel_descriptors": made((2, n, c)),
                "channel_gate": made((n, c)),
                "spatial_descriptors": made((n, 2, h, w)),
                "spatial_gate": made((n, h, w)),
            }
            y = torch.empty_like(x)
            call("cbam", x, y=y, **dict(zip(WEIGHTS, weights, strict=True)), **saved)
            ctx.names = list(saved)
            ctx.save_for_backward(x, *weights, *saved.values())
            return y

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, *rest = ctx.saved_tensors
            weights = dict(zip(WEIGHTS, rest, strict=False))
            saved = dict(zip(ctx.names, rest[len(weights) :], strict=True))
            dy = dy.contiguous(memory_format=torch.channels_last)
            gradients = {f"d{name}": torch.empty_like(weight) for name, weight in weights.items()}
            dx = torch.empty_like(x)
            call("cbam_grad", x, dy=dy, dx=dx, **weights, **saved, **gradients)
            return dx, *gradients.values()

    def stock(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        *mlp, kernel, bias = (w.to(x.dtype) for w in weights)
        w0, b0, w1, b1 = mlp
        return torch_cbam(x, w0, b0, w1, b1, kernel.permute(3, 2, 0, 1), bias)

    class Cbam(nn.Module):
        def __init__(self, channels: int, kind: str) -> None:
            super().__init__()
            hidden = channels // 16
            shapes = [(channels, hidden), (hidden,), (hidden, channels), (channels,), (7, 7, 2, 1)]
            scales = [channels**-0.5, 0.0, hidden**-0.5, 0.0, 1 / 7]
            self.weights = nn.ParameterList(
                [nn.Parameter(torch.randn(s) * k) for s, k in zip(shapes, scales, strict=True)]
                + [nn.Parameter(torch.zeros(1))]
            )
            calls = {"ours": Fused.apply, "torch-eager": stock}
            self.call = calls.get(kind) or torch.compile(stock, dynamic=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.call(x, *self.weights)

    class Bottleneck(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int, kind: str) -> None:
            super().__init__()
            outputs = 4 * width
            self.branch = nn.Sequential(
                nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
                *([] if kind == "plain" else [Cbam(outputs, kind)]),
            )  # fmt: skip
            self.shortcut: nn.Module = nn.Identity()
            if stride != 1 or inputs != outputs:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.branch(x) + self.shortcut(x))

    class Network(nn.Sequential):
        def __init__(self, kind: str) -> None:
            layers: list[nn.Module] = [
                nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                nn.MaxPool2d(3, 2, 1),
            ]  # fmt: skip
            inputs = 64
            for stage, count in enumerate(BLOCKS):
                width = 64 << stage
                for block in range(count):
                    stride = 2 if block == 0 and stage > 0 else 1
                    layers.append(Bottleneck(inputs, width, stride, kind))
                    inputs = 4 * width
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
            super().__init__(*layers)

    return {"Network": Network, "Cbam": Cbam}


def time_network(seconds: float, batch: int = 32, side: int = 224, repeats: int = 13) -> list[Row]:
    """Milliseconds of a training step, by type and kind of CBAM, until the time is up."""
    end = time.perf_counter() + seconds
    rows: list[Row] = []
    network = modules()["Network"]
    images = torch.randn(batch, 3, side, side, device=device.DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device.DEVICE)
    for dtype in ("float32", "bfloat16"):
        for kind in KINDS if device.DEVICE == "cuda" else KINDS[:-1]:  # it compiles for minutes
            if time.perf_counter() > end:
                return rows
            torch.manual_seed(0)
            model = network(kind).to(device.DEVICE, memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)

            def step(model: Any = model, optimizer: Any = optimizer, dtype: str = dtype) -> None:
                optimizer.zero_grad()
                half = dtype == "bfloat16"
                with torch.autocast(device.DEVICE, torch.bfloat16, enabled=half):
                    loss = nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()

            timer = cuda_seconds if device.DEVICE == "cuda" else host_seconds
            times = [timer(step) for _ in range(repeats)][repeats // 4 :]
            ms = 1e3 * statistics.median(times)
            rows.append({"n": batch, "dtype": dtype, "provider": kind, "ms": ms})
            del model, optimizer, step
            torch.cuda.empty_cache()
    return rows
