"""`cbam-ops check`: the fused ops against the float64 reference, on this machine.

The cases, the truth and the tolerance are those of :mod:`cbam_ops.testing`.
"""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING

from cbam_ops._console import import_tensorflow, say

if TYPE_CHECKING:
    from cbam_ops.testing import Case, Finding


def cases(quick: bool = False) -> list[Case]:
    """Every option in every type and layout, sizes and contents that hurt; `quick`: a fifth."""
    from cbam_ops.testing import FILLS, LARGE, OPTIONS, SIZES, Case

    found = [
        case.replace(dtype=dtype, data_format=data_format)
        for case in OPTIONS
        for dtype in ("float32", "float16", "bfloat16", "float64")
        for data_format in ("NHWC", "NCHW")
    ]
    found += [case.replace(data_format=name) for case in SIZES for name in ("NHWC", "NCHW")]
    found += [Case(size=(2, 14, 14, 64), kernel_size=7, fill=fill) for fill in FILLS]
    found += [Case(size=(0, 5, 7, 13)), *LARGE]
    # A step of five takes the eight types and layouts in turn, and each option at least once.
    return found[::5] if quick else found


def examine(case: Case) -> list[Finding]:
    """Compares every output and gradient; the nearest to (or farthest over) its limit first."""
    import cbam_ops

    with cbam_ops.use_implementation("native"):
        return sorted(case.examine(cbam_ops), key=lambda finding: -finding.strain)


def _gpus_pass(quick: bool) -> bool:
    """Compares the CUDA kernels with the CPU's on each kind of GPU, and records how that went.

    Before TensorFlow begins to use a GPU, so that it need not be shared.
    """
    from cbam_ops import _gpu_check

    passed = True
    for gpu in _gpu_check.found():
        outcome = _gpu_check.check(gpu, quick=quick)
        say(f"CUDA kernels on {gpu}, {outcome.verdict}: {outcome.detail}")
        if outcome.unkept:
            say(f"There is no record of it: {outcome.unkept}.")
        passed &= outcome.verdict != "failed"
    return passed


_ROW = "  {:<33} {:<12} {:<9} {:<6} {:<32} {:<13} {:>8} {:>8} {:>8}  {}"


def run(quick: bool = False) -> int:
    """Prints the table; exit code 0 if every case passes, 1 if any fails or nothing fused runs."""
    import_tensorflow()
    import cbam_ops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        info = cbam_ops.build_info()
    if not info["native"]:
        say("The fused ops do not run here, so there is nothing to check.")
        say(f"Why: {info['native_off_because']}")
        return 1
    if not _gpus_pass(quick):
        return 1
    chosen = cases(quick)
    instructions = (info.get("instruction_set") or {}).get("active")
    say(
        f"cbam_ops {info['version']}, TensorFlow {info['tensorflow']}, instruction set "
        f"{instructions}: {len(chosen)} cases, fused against the reference in float64"
    )
    say("Per case the value (output or gradient, `d...`) nearest to its limit. Errors are relative")
    say("to the largest magnitude; allowed is 2 x the error of stock TensorFlow + a floor. Of four")
    say("draws, each is the largest.")
    say()
    head = "function|N x H x W x C|type|layout|options|worst value|fused|stock|allowed|".split("|")
    say(_ROW.format(*head).rstrip())
    started = time.perf_counter()
    faults: list[str] = []
    values = 0
    for case in chosen:
        size, words = "x".join(map(str, case.size)), " ".join(case.words()) or "-"
        place = (case.function, size, case.dtype, case.data_format, words)
        try:
            found = examine(case)
        except Exception as error:
            text = " ".join(str(error).split())
            faults.append(f"{' '.join(place)}: {type(error).__name__}: {text[:300]}")
            say(_ROW.format(*place, "-", "-", "-", "-", "FAILED (error)"))
            continue
        values += len(found)
        wrong = [f"{' '.join(place)}: {finding.fault}" for finding in found if finding.fault]
        faults += wrong
        worst = found[0]
        scale = worst.scale or 1.0
        numbers = [f"{v / scale:.1e}" for v in (worst.error, worst.stock, worst.allowed)]
        say(_ROW.format(*place, worst.name, *numbers, "FAILED" if wrong else "ok"))
    say()
    seconds = time.perf_counter() - started
    if faults:
        say(f"FAILED: {len(faults)} of the values, in {len(chosen)} cases ({seconds:.0f} s):")
        for fault in faults:
            say(f"  {fault}")
        return 1
    say(f"All {len(chosen)} cases pass: {values} outputs and gradients ({seconds:.0f} s).")
    return 0
