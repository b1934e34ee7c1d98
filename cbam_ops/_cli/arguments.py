"""The arguments of `cbam-ops`: its commands, options and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from cbam_ops._console import interruptible, is_command, quiet_start_up

_DESCRIPTION = "Fused CBAM attention for TensorFlow and Keras."
_EPILOG = """\
exit codes:
  0  success
  1  the command ran, and its answer is no: accuracy missed, a check failed, nothing to fuse,
     an export that computes something else
  2  the command could not run: wrong arguments, a missing package, fused ops that do not run,
     an output that cannot be written
  130  interrupted (Ctrl-C)
"""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in 0 ... 2^32 - 1, got {value}")
    return value


# What argparse calls the types in its error messages.
_positive.__name__ = "whole number"
_seed.__name__ = "whole number"


def parser() -> argparse.ArgumentParser:
    """Reads the arguments of the command."""
    from cbam_ops import __version__

    program = argparse.ArgumentParser(
        prog="cbam-ops",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    program.add_argument("--version", action="version", version=f"cbam-ops {__version__}")
    program.add_argument(
        "--traceback", action="store_true", help="show Python's traceback of an unexpected error"
    )
    commands = program.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train a small CBAM network on real images and compare it with stock TensorFlow",
        description=(
            "Trains a small residual network with CBAM in every block on scikit-learn's "
            "handwritten digits, compares the fused ops with the same module in stock TensorFlow "
            "on the trained weights (largest difference, time per training step, memory kept for "
            "the gradient), saves and reloads the model, and draws a picture of what the "
            "spatial gates look at. Takes under three minutes on two cores. Exit code 1 if the "
            "test accuracy is below 97 %."
        ),
    )
    demo.add_argument(
        "--quick",
        action="store_true",
        help="fewer epochs, under 30 seconds; no accuracy is asked for",
    )
    demo.add_argument(
        "--epochs",
        type=_positive,
        default=None,
        metavar="N",
        help="passes over the training images (default: 10, with --quick 3)",
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="random seed (default: %(default)s)"
    )
    demo.add_argument(
        "--allow-reference",
        action="store_true",
        help="where the fused ops do not run, run the reference in their place",
    )

    info = commands.add_parser(
        "info",
        help="versions, devices, instruction set and why native is off: for bug reports",
        description="Prints what this installation is. Paste it into a bug report.",
    )
    info.add_argument(
        "--json", dest="as_json", action="store_true", help="print one JSON object instead"
    )
    info.add_argument(
        "--ops-library",
        action="store_true",
        help="print the path of the library with the fused ops instead, for tf.load_op_library",
    )

    check = commands.add_parser(
        "check",
        help="compare the fused ops with the float64 reference on this machine",
        description=(
            "Runs the fused ops, forward and every gradient, over a spread of shapes, types, "
            "layouts and options, and compares them with the reference in float64. A value may err "
            "at most twice what stock TensorFlow errs at the same type, plus a small floor. On a "
            "GPU machine the CUDA kernels are compared with the CPU's first, and the record of it "
            "is made anew. Exit code 1 if any case fails."
        ),
    )
    check.add_argument("--quick", action="store_true", help="a fifth of the cases")
    check.add_argument(
        "--gpu-kernels",
        dest="device",
        type=int,
        nargs="?",
        const=0,
        default=None,
        metavar="DEVICE",
        help="instead compare the CUDA kernels with the CPU's on this GPU (default: %(const)s), "
        "without TensorFlow's GPU, a line per case; leaves no record",
    )

    bench = commands.add_parser(
        "bench",
        help="two minutes of the benchmark suite on this machine",
        description=(
            "Times the fused ops beside stock TensorFlow, with and without XLA, on a selection of "
            "cases; every result is checked before it is timed. Takes about two minutes."
        ),
    )
    bench.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="CSV",
        help="also write the figures into this file (default: print them only)",
    )
    bench.add_argument(
        "--allow-reference",
        action="store_true",
        help="time the rest, with exit code 0, where the fused ops do not run",
    )

    fuse = commands.add_parser(
        "fuse",
        help="replace hand-written attention in a Keras model's file by fused layers",
        description=(
            "Loads a Keras model, replaces every CBAM, channel gate, spatial gate and squeeze and "
            "excitation in it by a fused layer with the same weights, and saves it. Each "
            "replacement is proved on random maps and weights; the rest stays, and the table says "
            "why. The optimizer starts afresh. Exit code 1, and no file, if nothing is replaced."
        ),
    )
    fuse.add_argument("model", type=Path, metavar="MODEL.keras", help="the model")
    fuse.add_argument("output", type=Path, metavar="OUT.keras", help="the new model's file")

    explain = commands.add_parser(
        "explain",
        help="draw what a model's attention makes of photographs",
        description=(
            "Runs a Keras model with layers of cbam_ops on images (PNG, JPEG, ..., of any size) "
            "and draws a picture of each: the image, Grad-CAM of what the model says, the spatial "
            "gates of every layer over the image, the channel gates as a chart. An image is scaled "
            "and cropped to what the model takes."
        ),
    )
    explain.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="the images")
    explain.add_argument(
        "--model", type=Path, required=True, metavar="MODEL.keras", help="the model"
    )
    explain.add_argument(
        "--pixels",
        choices=("torch", "caffe", "tf", "unit", "raw"),
        help="how the model takes pixels: torch, caffe and tf as in keras.applications, unit is 0 "
        "to 1, raw 0 to 255 (default: raw if the model scales them itself, else torch, or unit for "
        "images in grey)",
    )

    export = commands.add_parser(
        "export",
        help="write a model for TensorFlow, LiteRT or ONNX Runtime without cbam_ops",
        description=(
            "Loads a Keras model, or a SavedModel whose fused ops it rewrites into stock ones, and "
            "writes it for inference elsewhere. The result is run in a process without cbam_ops "
            "and compared with the model. Exit code 1 if it does not run or computes something "
            "else; it is then left beside OUT."
        ),
    )
    export.add_argument(
        "model", type=Path, metavar="MODEL", help="a .keras file or the folder of a SavedModel"
    )
    export.add_argument(
        "output", type=Path, metavar="OUT", help="a folder, a .tflite or an .onnx file"
    )
    export.add_argument(
        "--format",
        default="tf_saved_model",
        metavar="FORMAT",
        help="tf_saved_model (stock ops; the default), tf_saved_model_native (fused ops), litert "
        "or onnx",
    )
    export.add_argument(
        "--optimizations",
        metavar="WORD",
        help="with litert: dynamic_range, float16 or int8 (default: none)",
    )
    export.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="inputs like the model's: a .npy file, or .npz by their names; int8 is calibrated on "
        "them, and the first are compared (default: random ones are)",
    )
    export.add_argument(
        "--signature", metavar="NAME", help="of a SavedModel (default: serving_default)"
    )
    export.add_argument(
        "--opset",
        dest="opset_version",
        type=_positive,
        metavar="N",
        help="with onnx: the version of its ops (default: the converter's)",
    )
    export.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not run and compare it"
    )
    export.add_argument("--overwrite", action="store_true", help="replace what is at OUT")

    for command, made in ((demo, "the model and the picture"), (explain, "the pictures")):
        command.add_argument(
            "--output",
            type=Path,
            default=Path(f"cbam_ops_{command.prog.split()[-1]}"),
            metavar="DIR",
            help=f"folder for {made}, made if it is not there (default: %(default)s)",
        )
    for command in (fuse, explain, export):
        command.add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="import a module of yours that has the model's layers; may be given again",
        )
        command.add_argument(
            "--trust", action="store_true", help="run the Python code in the file's Lambda layers"
        )
    return program


@contextlib.contextmanager
def start_up() -> Iterator[None]:
    """Imports TensorFlow as the command wants it, if this process is the command.

    Python imports the package before it runs the command. Arguments that end it (--help, or wrong
    ones) need no TensorFlow, its messages are kept back, and Ctrl-C ends in a sentence.

    Raises:
      ImportError: the arguments end the command.
    """
    if not is_command():
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            parser().parse_args()
    except SystemExit:
        raise ImportError("the arguments end the command") from None
    try:
        with interruptible(), quiet_start_up():
            yield
    except KeyboardInterrupt:
        print("\ncbam-ops: interrupted", file=sys.stderr)
        sys.exit(130)
