"""What is timed: call sites of real networks, and shapes unfriendly to vectors and tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

# Providers, by the names in `providers.PROVIDERS`.
OURS = "ours"
OURS_XLA = "ours-xla"  # the same kernels, in a program that XLA compiles
STOCK = ("tf-graph", "xla")
TRANSPOSED = ("tf-graph-transposed", "xla-transposed")
KERAS = ("keras",)
TORCH_EAGER = ("torch-eager-channels-last", "torch-eager-contiguous")
TORCH_COMPILE = ("torch-compile-channels-last", "torch-compile-contiguous")
TORCH = (*TORCH_EAGER, *TORCH_COMPILE)

# Whole networks: the last three compiled by XLA.
NETWORKS = ("plain", "stock", OURS, "plain-xla", "stock-xla", OURS_XLA)

MODES = ("forward", "backward", "step")
# Forward: x is read and y written. Backward: x and dy are read, dx is written. A step is both.
_MAPS_MOVED = {"forward": 2, "backward": 3, "step": 5}
# With the residual and the ReLU inside: the residual is read too; y is read again to see where the
# ReLU let pass, and the residual's gradient is written.
_MAPS_MOVED_BLOCK = {"forward": 3, "backward": 5, "step": 8}
_ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

KERNEL_SIZE = 7
RATIO = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the module on a map of `n` x `h` x `w` x `c`, and who computes it.

    `op` is "cbam", or "cbam+add+relu": the end of a residual block, `relu(cbam(x) + residual)`.
    `threads` is how many the frameworks get; 0 stands for all that there are.
    """

    group: str
    n: int
    h: int
    w: int
    c: int
    dtype: str = "float32"
    layout: str = "NHWC"
    op: str = "cbam"
    threads: int = 0
    modes: tuple[str, ...] = MODES
    providers: tuple[str, ...] = (OURS, *STOCK)

    @property
    def name(self) -> str:
        """Names the case in filters and in the progress bar."""
        words = [self.group, f"{self.n}x{self.h}x{self.w}x{self.c}", self.dtype, self.layout]
        words += [self.op] * (self.op != "cbam") + [f"{self.threads}threads"] * bool(self.threads)
        return "/".join(words)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the map in the case's layout."""
        if self.layout == "NHWC":
            return self.n, self.h, self.w, self.c
        return self.n, self.c, self.h, self.w

    @property
    def hidden(self) -> int:
        """Hidden units of the MLP: C / 16, at least 1."""
        return max(1, self.c // RATIO)

    @property
    def map_bytes(self) -> int:
        """Bytes of one map."""
        return self.n * self.h * self.w * self.c * _ITEM_SIZE[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, which are float32 for every type of map."""
        count = 2 * self.c * self.hidden + self.hidden + self.c + 2 * KERNEL_SIZE**2 + 1
        return 4 * count

    def bytes_moved(self, mode: str) -> int:
        """Bytes that the arithmetic must move to or from memory, all else being kept in caches.

        Each map once per direction (see design: limits), the weights once per pass and their
        gradients once.
        """
        maps = _MAPS_MOVED_BLOCK if self.op == "cbam+add+relu" else _MAPS_MOVED
        passes = {"forward": 1, "backward": 2, "step": 3}[mode]
        return maps[mode] * self.map_bytes + passes * self.weight_bytes

    def operations(self, mode: str) -> int:
        """Floating-point operations, comparisons included, of the arithmetic as it is written.

        Per value of the map: forward 7 (sum, maximum; product, sum, maximum; two products),
        backward 14 (see the equations of the backward pass). The MLP runs on two descriptors, the
        convolution on two planes; each costs twice as much backward.
        """
        values = self.n * self.h * self.w * self.c
        mlp = 2 * self.n * 2 * 2 * self.c * self.hidden
        convolution = self.n * self.h * self.w * 2 * 2 * KERNEL_SIZE**2
        forward = 7 * values + mlp + convolution
        backward = 14 * values + 2 * mlp + 2 * convolution
        if self.op == "cbam+add+relu":  # the addition and the ReLU; the ReLU's mask
            forward += 2 * values
            backward += values
        return {"forward": forward, "backward": backward, "step": forward + backward}[mode]


@dataclasses.dataclass(frozen=True)
class NetworkCase:
    """A residual network at 224 px: plain, with stock CBAM, with the fused CBAM (`NETWORKS`)."""

    group: str
    depth: int
    n: int
    mode: str  # "inference" or "training"
    size: int = 224
    threads: int = 0
    providers: tuple[str, ...] = NETWORKS[:3]

    @property
    def name(self) -> str:
        """Names the case in filters and in the progress bar."""
        return f"{self.group}/resnet{self.depth}/{self.n}x{self.size}x{self.size}x3/{self.mode}"


RESNET50 = ((56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048))
RESNET18 = ((56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512))
MOBILENET = ((112, 112, 64), (56, 56, 128), (28, 28, 256), (14, 14, 512), (7, 7, 1024))
UNFRIENDLY = ((28, 28, 3), (28, 28, 33), (14, 14, 257), (5, 5, 64), (1, 1, 512))


def all_cases() -> list[Case | NetworkCase]:
    """The full suite, the most telling first: a run that is out of time leaves out the end."""
    found: list[Case | NetworkCase] = []

    def add(
        group: str,
        batch: int,
        sizes: Iterable[tuple[int, int, int]],
        *,
        dtypes: Sequence[str] = ("float32",),
        layouts: Sequence[str] = ("NHWC",),
        providers: Sequence[str] = STOCK,
        modes: Sequence[str] = MODES,
        op: str = "cbam",
        threads: int = 0,
    ) -> None:
        for dtype in dtypes:
            for layout in layouts:
                for h, w, c in sizes:
                    others = list(providers)
                    if layout == "NCHW" and "tf-graph" in others:
                        others += TRANSPOSED
                    found.append(
                        Case(
                            group, batch, h, w, c, dtype, layout, op, threads, tuple(modes),
                            (OURS, *others),
                        )
                    )  # fmt: skip

    halves = ("bfloat16", "float16")
    add("resnet50", 16, RESNET50, providers=(OURS_XLA, *STOCK, *KERAS, *TORCH))
    found.append(NetworkCase("network", 50, 8, "inference"))
    found.append(NetworkCase("network", 50, 8, "training", providers=NETWORKS))
    # No Keras: on CPUs TensorFlow has no gradient of a convolution in NCHW.
    add("resnet50", 16, RESNET50, layouts=("NCHW",), providers=(*STOCK, *TORCH))
    add("resnet50", 16, RESNET50, dtypes=halves, providers=(*STOCK, *KERAS))
    add("resnet50", 1, RESNET50, providers=(*STOCK, *TORCH_EAGER))
    add("threads", 1, RESNET50[:1], providers=(), threads=1)
    add("threads", 1, RESNET50[:1], providers=(), threads=2)
    add("block", 16, RESNET50, op="cbam+add+relu", providers=(*STOCK, *KERAS))
    add("segmentation", 1, [(512, 512, 64)], layouts=("NHWC", "NCHW"), modes=("forward", "step"))
    for batch in (1, 16, 64):
        add("14x14x768", batch, [(14, 14, 768)], modes=("forward", "step"))
    add("unfriendly", 16, UNFRIENDLY, layouts=("NHWC", "NCHW"), modes=("forward", "step"))
    add("resnet50", 64, RESNET50, modes=("forward", "step"))
    add("resnet18", 16, RESNET18, modes=("forward", "step"))
    add("mobilenet", 16, MOBILENET, modes=("forward", "step"))
    add(
        "resnet50", 16, RESNET50, dtypes=halves, layouts=("NCHW",), modes=("forward", "step"),
    )  # fmt: skip
    add(
        "unfriendly", 16, UNFRIENDLY, dtypes=halves, layouts=("NHWC", "NCHW"),
        modes=("forward", "step"), providers=("tf-graph",),
    )  # fmt: skip
    add("resnet18", 1, RESNET18, modes=("forward", "step"))
    add("mobilenet", 1, MOBILENET, modes=("forward", "step"))
    add(
        "resnet50", 16, RESNET50[:1], dtypes=halves, providers=TORCH[::2],
        modes=("forward", "step"),
    )  # fmt: skip
    return _merge(found)


def _merge(cases: Iterable[Case | NetworkCase]) -> list[Case | NetworkCase]:
    """Joins cases of one name into one with the providers of all."""
    merged: dict[str, Case | NetworkCase] = {}
    for case in cases:
        known = merged.get(case.name)
        if known is not None:
            providers = tuple(dict.fromkeys((*known.providers, *case.providers)))
            case = dataclasses.replace(known, providers=providers)
        merged[case.name] = case
    return list(merged.values())


def quick_cases() -> list[Case | NetworkCase]:
    """Two minutes' worth: the stages of ResNet-50 at batch 16, and each other kind once."""
    modes = ("forward", "step")
    stages = [
        Case("resnet50", 16, *size, modes=modes, providers=(OURS, *STOCK)) for size in RESNET50
    ]
    others = [
        Case("resnet50", 16, *RESNET50[2], layout="NCHW", modes=modes,
             providers=(OURS, *STOCK, *TRANSPOSED)),
        Case("resnet50", 16, *RESNET50[2], dtype="bfloat16", modes=modes),
        Case("resnet50", 16, *RESNET50[2], dtype="float16", modes=modes),
        Case("resnet50", 1, *RESNET50[0], modes=modes),
        Case("unfriendly", 16, *UNFRIENDLY[1], modes=modes),
    ]  # fmt: skip
    return [*stages, *others]


def tiny_cases() -> list[Case | NetworkCase]:
    """For the tests: every kind of case, small enough to be free; their times mean nothing."""
    everyone = (OURS, OURS_XLA, *STOCK, *KERAS, *TORCH_EAGER)
    return [
        Case("tiny", 2, 6, 5, 32, providers=everyone),
        Case(
            "tiny", 2, 6, 5, 32, layout="NCHW",
            providers=(OURS, *STOCK, *TRANSPOSED, *TORCH_EAGER),
        ),
        Case("tiny", 2, 5, 4, 17, dtype="bfloat16", providers=everyone),
        Case("tiny", 3, 4, 4, 33, dtype="float16", layout="NCHW", modes=("step",)),
        Case("tiny", 2, 6, 5, 32, op="cbam+add+relu", providers=everyone),
    ]  # fmt: skip


def select(
    cases: Sequence[Case | NetworkCase], patterns: Sequence[str], providers: Sequence[str]
) -> list[Case | NetworkCase]:
    """The cases whose names contain one of `patterns`, computed by `providers` only.

    A pattern may also be several texts joined by "+", all of which the name must contain:
    "resnet50/16x+bfloat16". Without patterns all cases, without providers all of each case; the
    fused op always stays in, since all others are compared with it.
    """

    def wanted(name: str) -> bool:
        return not patterns or any(
            all(part in name for part in pattern.split("+")) for pattern in patterns
        )

    chosen = [case for case in cases if wanted(case.name)]
    if providers:
        chosen = [
            dataclasses.replace(
                case,
                providers=tuple(p for p in case.providers if p in providers or p == OURS),
            )
            for case in chosen
        ]
    return chosen
