"""What is timed: call sites of real networks, and shapes unfriendly to vectors and tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from cbam_ops._bench import KERNEL_SIZE, OURS, RESNET50, Case, Row

# Providers, by the names in `baselines.PROVIDERS`.
OURS_XLA = "ours-xla"  # the same kernels, in a program that XLA compiles
STOCK = ("tf-graph", "xla")
TRANSPOSED = ("tf-graph-transposed", "xla-transposed")
TORCH_EAGER = ("torch-eager-channels-last", "torch-eager-contiguous")
TORCH_COMPILE = ("torch-compile-channels-last", "torch-compile-contiguous")
TORCH = (*TORCH_EAGER, *TORCH_COMPILE)

# Whole networks: the last three compiled by XLA.
NETWORKS = ("plain", "stock", OURS, "plain-xla", "stock-xla", OURS_XLA)

RESNET18 = ((56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512))
MOBILENET = ((112, 112, 64), (56, 56, 128), (28, 28, 256), (14, 14, 512), (7, 7, 1024))
SERIES, VOLUME = (5000, 1, 64), (32 * 64, 64, 32)
UNFRIENDLY = ((28, 28, 3), (28, 28, 33), (14, 14, 257), (5, 5, 64), (1, 1, 512))


@dataclasses.dataclass(frozen=True)
class NetworkCase:
    """A network at 224 px: plain, with stock CBAM, and that one fused (`NETWORKS`)."""

    group: str
    network: str  # of `network.ARCHITECTURES`
    n: int
    mode: str  # "inference" or "training"
    size: int = 224
    threads: int = 0
    providers: tuple[str, ...] = NETWORKS[:3]

    @property
    def name(self) -> str:
        """Names the case in filters and in the progress bar."""
        return f"{self.group}/{self.network}/{self.n}x{self.size}x{self.size}x3/{self.mode}"

    @property
    def modes(self) -> tuple[str, ...]:
        return (self.mode,)

    @property
    def columns(self) -> Row:
        """The columns of a row that say what the case is."""
        return {
            "op": self.network, "n": self.n, "h": self.size, "w": self.size, "c": 3,
            "dtype": "float32", "layout": "NHWC", "threads": self.threads, "group": self.group,
        }  # fmt: skip


AnyCase = Case | NetworkCase


def operations(case: Case, mode: str) -> int:
    """Floating-point operations, comparisons included, of the arithmetic as it is written.

    Per value of the map: forward 7 (sum, maximum; product, sum, maximum; two products), backward 14
    (see the equations of the backward pass). The MLP runs on two descriptors, the convolution on
    two spatial descriptors; each costs twice as much backward.
    """
    values = case.n * case.h * case.w * case.c
    mlp = 2 * case.n * 2 * 2 * case.c * case.hidden
    convolution = case.n * case.h * case.w * 2 * 2 * KERNEL_SIZE ** len(case.sides)
    forward = 7 * values + mlp + convolution
    backward = 14 * values + 2 * mlp + 2 * convolution
    if case.has_residual:  # the addition and the ReLU; the ReLU's mask
        forward += 2 * values
        backward += values
    return {"forward": forward, "backward": backward, "step": forward + backward}[mode]


def all_cases() -> list[AnyCase]:
    """The full suite, the most telling first: a run that is out of time leaves out the end."""
    found: list[AnyCase] = []

    def add(
        group: str,
        batch: int,
        sizes: Iterable[tuple[int, int, int]],
        *,
        dtypes: Sequence[str] = ("float32",),
        layouts: Sequence[str] = ("NHWC",),
        baselines: Sequence[str] = STOCK,
        modes: Sequence[str] = ("forward", "backward", "step"),
        op: str = "cbam",
        threads: int = 0,
    ) -> None:
        for dtype in dtypes:
            for layout in layouts:
                transposed = TRANSPOSED if layout == "NCHW" and "tf-graph" in baselines else ()
                providers = (OURS, *baselines, *transposed)
                found.extend(
                    Case(group, batch, *size, dtype, layout, op, threads, tuple(modes), providers)
                    for size in sizes
                )

    halves, both, brief = ("bfloat16", "float16"), ("NHWC", "NCHW"), ("forward", "step")
    add("resnet50", 16, RESNET50, baselines=(OURS_XLA, *STOCK, "keras", *TORCH))
    found.append(NetworkCase("network", "resnet50", 8, "training", providers=NETWORKS))
    for network in ("resnet50", "mobilenet"):
        found.extend(NetworkCase("network", network, n, "inference") for n in (8, 1))
    # No Keras: on CPUs TensorFlow has no gradient of a convolution in NCHW.
    add("resnet50", 16, RESNET50, layouts=("NCHW",), baselines=(*STOCK, *TORCH))
    add("resnet50", 16, RESNET50, dtypes=halves, baselines=(*STOCK, "keras"))
    add("resnet50", 1, RESNET50, baselines=(*STOCK, *TORCH_EAGER))
    add("threads", 1, RESNET50[:1], baselines=(), threads=1)
    add("threads", 1, RESNET50[:1], baselines=(), threads=2)
    add("block", 16, RESNET50, op="cbam+add+relu", baselines=(*STOCK, "keras"))
    add("series", 16, [SERIES], op="cbam-1d")
    add("volume", 2, [VOLUME], op="cbam-3d")
    add("segmentation", 1, [(512, 512, 64)], layouts=both, modes=brief)
    for batch in (1, 16, 64):
        add("14x14x768", batch, [(14, 14, 768)], modes=brief)
    add("unfriendly", 16, UNFRIENDLY, layouts=both, modes=brief)
    add("resnet50", 64, RESNET50, modes=brief)
    add("resnet18", 16, RESNET18, modes=brief)
    add("mobilenet", 16, MOBILENET, modes=brief)
    add("resnet50", 16, RESNET50, dtypes=halves, layouts=("NCHW",), modes=brief)
    add("unfriendly", 16, UNFRIENDLY, dtypes=halves, layouts=both, modes=brief,
        baselines=("tf-graph",))  # fmt: skip
    add("resnet18", 1, RESNET18, modes=brief)
    add("mobilenet", 1, MOBILENET, modes=brief)
    add("resnet50", 16, RESNET50[:1], dtypes=halves, baselines=TORCH[::2], modes=brief)
    return _merge(found)


def _merge(cases: Iterable[AnyCase]) -> list[AnyCase]:
    """Joins cases of one name into one with the providers of all."""
    merged: dict[str, AnyCase] = {}
    for case in cases:
        known = merged.get(case.name, case)
        providers = tuple(dict.fromkeys((*known.providers, *case.providers)))
        merged[case.name] = dataclasses.replace(known, providers=providers)
    return list(merged.values())


def gpu_cases(batches: Sequence[int]) -> list[Case]:
    """The stages of ResNet-50 on a GPU, the most wanted first."""
    return [
        Case("resnet50", batch, *size, dtype=dtype)
        for batch in batches
        for dtype in ("float32", "bfloat16")
        for size in RESNET50
    ]


def tiny_cases() -> list[AnyCase]:
    """For the tests: every kind of case, small enough to be free; their times mean nothing."""
    everyone = (OURS, OURS_XLA, *STOCK, "keras", *TORCH_EAGER)
    nchw = (OURS, *STOCK, *TRANSPOSED, *TORCH_EAGER)
    return [
        Case("tiny", 2, 6, 5, 32, providers=everyone),
        Case("tiny", 2, 6, 5, 32, layout="NCHW", providers=nchw),
        Case("tiny", 2, 5, 4, 17, dtype="bfloat16", providers=everyone),
        Case("tiny", 3, 4, 4, 33, dtype="float16", layout="NCHW", modes=("step",)),
        Case("tiny", 2, 6, 5, 32, op="cbam+add+relu", providers=everyone),
        Case("tiny", 2, 9, 1, 32, op="cbam-1d"),
        Case("tiny", 2, 3 * 4, 4, 32, op="cbam-3d"),
    ]


def select(
    cases: Sequence[AnyCase], patterns: Sequence[str], providers: Sequence[str]
) -> list[AnyCase]:
    """The cases whose names contain one of `patterns`, computed by `providers` only.

    A pattern may also be several texts joined by "+", all of which the name must contain:
    "resnet50/16x+bfloat16". Without patterns all cases, without providers all of each case; the
    fused op always stays in, since all others are compared with it.
    """
    chosen = [
        case
        for case in cases
        if not patterns
        or any(all(part in case.name for part in pattern.split("+")) for pattern in patterns)
    ]
    if not providers:
        return chosen
    kept = {OURS, *providers}
    return [
        dataclasses.replace(case, providers=tuple(p for p in case.providers if p in kept))
        for case in chosen
    ]
