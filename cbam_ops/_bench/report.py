"""Tables and pictures of the figures, from the CSV alone, the rows where we lose included."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cbam_ops._bench import results
from cbam_ops._bench.cases import NETWORKS, OURS, OURS_XLA, RESNET50
from cbam_ops._bench.results import Row
from cbam_ops._console import CommandError, require, say, table

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

# Peers as the tables show them: the faster of what one user could choose between.
PEERS: dict[str, tuple[str, ...]] = {
    "TF graph": ("tf-graph", "tf-graph-transposed"),
    "XLA": ("xla", "xla-transposed"),
    "Keras layers": ("keras",),
    "PyTorch": ("torch-eager-channels-last", "torch-eager-contiguous"),
    "torch.compile": ("torch-compile-channels-last", "torch-compile-contiguous"),
}
_CASE = ("machine", "op", "n", "h", "w", "c", "dtype", "layout", "threads")
_DASH = "–"


class Figures:
    """The rows of one machine, by case and mode."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.groups: dict[tuple[Any, ...], dict[str, Row]] = {}
        self.networks: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in rows:
            place = self.networks if row["op"].startswith("resnet") else self.groups
            key = (*(row[name] for name in _CASE), row["mode"])
            place.setdefault(key, {})[row["provider"]] = row

    def ours(self, **wanted: Any) -> list[Row]:
        """Our rows with these values in these columns, in the order of the file."""
        return [
            group[OURS]
            for group in self.groups.values()
            if OURS in group and all(group[OURS][name] == value for name, value in wanted.items())
        ]

    def peers(self, row: Row) -> dict[str, Row]:
        """The rows that one of ours is compared with, the fastest of each kind of peer."""
        group = self.groups[(*(row[name] for name in _CASE), row["mode"])]
        found = {}
        for peer, providers in PEERS.items():
            candidates = [group[name] for name in providers if name in group]
            if candidates:
                found[peer] = min(candidates, key=lambda candidate: candidate["median_s"])
        return found

    def speeds(self, row: Row) -> dict[str, float]:
        """How many times faster ours is than each kind of peer."""
        return {
            peer: other["median_s"] / row["median_s"] for peer, other in self.peers(row).items()
        }

    def losses(self) -> list[tuple[Row, str, float]]:
        """Every row of ours that a peer beats: the row, the peer, how fast ours is beside it."""
        return sorted(
            (
                (row, peer, speed)
                for row in self.ours()
                for peer, speed in self.speeds(row).items()
                if speed < 1
            ),
            key=lambda loss: loss[2],
        )


# --- cells ----------------------------------------------------------------------------------------


def _size(row: Row) -> str:
    return "×".join(str(row[name]) for name in "nhwc")


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s"


def _number(value: float | None, text: str = "{:.1f}") -> str:
    return _DASH if value is None else text.format(value)


def _speed(value: float | None) -> str:
    if value is None:
        return _DASH
    shown = f"{value:.1f}×" if value < 9.95 else f"{value:.0f}×"
    return f"**{value:.2f}×**" if value < 1 else shown


def _markdown(rows: Sequence[Sequence[str]], align: str) -> str:
    rules = [{"<": ":--", ">": "--:"}[side] for side in align]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rules, *rows[1:]])


# --- tables ---------------------------------------------------------------------------------------


def _stage_table(figures: Figures, rows: Sequence[Row]) -> str:
    """One line per row of ours: its time, what of the bandwidth it uses, and its peers."""
    peers = [peer for peer in PEERS if any(peer in figures.peers(row) for row in rows)]
    head = [
        "map", "pass", "cbam_ops", "in copies of the map", "of copy bandwidth",
        *(f"against {peer}" for peer in peers), "largest error", "extra memory",
    ]  # fmt: skip
    body = []
    for row in rows:
        speeds = figures.speeds(row)
        body.append(
            [
                _size(row),
                row["mode"],
                _time(row["median_s"]),
                _number(row["copies"]),
                _number(row["percent_of_copy_bandwidth"], "{:.0f} %"),
                *(_speed(speeds.get(peer)) for peer in peers),
                _number(row["error"], "{:.0e}"),
                _number(row["extra_percent_of_x"], "{:.1f} %"),
            ]
        )
    return _markdown([head, *body], "<<" + ">" * (len(head) - 2))


def _summary_table(figures: Figures, ours: Iterable[Row]) -> str:
    """One line per group, type, layout and mode of these rows: the least and greatest speed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in ours:
        name = row["group"] + ("" if row["op"] == "cbam" else f" ({row['op']})")
        kind = (name, row["n"], row["dtype"], row["layout"], row["threads"], row["mode"])
        groups.setdefault(kind, []).append(row)
    head = [
        "call sites", "batch", "type", "layout", "threads", "pass", "rows",
        *(f"against {peer}" for peer in PEERS), "of copy bandwidth", "extra memory, at most",
    ]  # fmt: skip
    body = []
    for kind, rows in groups.items():
        cells = [str(value) for value in kind]
        cells.append(str(len(rows)))
        for peer in PEERS:
            speeds = [s[peer] for s in map(figures.speeds, rows) if peer in s]
            cells.append(
                _DASH
                if not speeds
                else _speed(speeds[0])
                if len(speeds) == 1
                else f"{_speed(min(speeds))} … {_speed(max(speeds))}"
            )
        percents = [row["percent_of_copy_bandwidth"] for row in rows]
        cells.append(
            f"{min(percents):.0f} … {max(percents):.0f} %"
            if len(percents) > 1
            else f"{percents[0]:.0f} %"
        )
        memory = [r["extra_percent_of_x"] for r in rows if r["extra_percent_of_x"] is not None]
        cells.append(f"{max(memory):.1f} %" if memory else _DASH)
        body.append(cells)
    return _markdown([head, *body], "<><<><" + ">" * (len(head) - 6))


def _network_table(figures: Figures) -> str:
    head = ["network", "batch", "pass", "plain", "with stock CBAM", "with cbam_ops",
            "XLA: plain", "XLA: with stock CBAM", "XLA: with cbam_ops", "stock CBAM takes",
            "cbam_ops takes", "memory: stock", "memory: cbam_ops"]  # fmt: skip
    body = []
    for group in figures.networks.values():
        any_row = next(iter(group.values()))
        stock, ours = group.get("stock"), group.get(OURS)

        def cell(row: Row | None, column: str, show: Callable[[Any], str]) -> str:
            return _DASH if row is None or row[column] is None else show(row[column])

        percent, size = "{:.1f} %".format, lambda value: f"{value / 2**20:.0f} MB"
        body.append(
            [
                f"ResNet-{any_row['op'].removeprefix('resnet')} at {any_row['h']} px",
                str(any_row["n"]),
                any_row["mode"],
                *(cell(group.get(name), "median_s", _time) for name in NETWORKS),
                cell(stock, "module_percent_of_time", percent),
                cell(ours, "module_percent_of_time", percent),
                cell(stock, "extra_bytes", size),
                cell(ours, "extra_bytes", size),
            ]
        )
    return _markdown([head, *body], "<><" + ">" * (len(head) - 3))


def _xla_table(figures: Figures) -> str:
    """Ours inside XLA beside XLA's own compilation of the reference, where both were measured."""
    head = ["map", "pass", "cbam_ops", "cbam_ops inside XLA", "XLA", "speed"]
    body = []
    for group in figures.groups.values():
        if OURS_XLA in group and "xla" in group:
            inside, stock = group[OURS_XLA], group["xla"]
            body.append(
                [
                    _size(inside), inside["mode"],
                    _time(group[OURS]["median_s"]) if OURS in group else _DASH,
                    _time(inside["median_s"]), _time(stock["median_s"]),
                    _speed(stock["median_s"] / inside["median_s"]),
                ]
            )  # fmt: skip
    return _markdown([head, *body], "<<" + ">" * (len(head) - 2)) if body else ""


def _scaling_text(figures: Figures) -> str | None:
    """How much faster more threads are than one, where both were measured."""
    found = []
    for row in figures.ours(threads=1):
        same = {name: row[name] for name in _CASE if name not in ("machine", "threads")}
        for other in figures.ours(**same, mode=row["mode"]):
            if other["threads"] > 1:
                speed = row["median_s"] / other["median_s"]
                found.append(
                    f"{_size(row)} {row['mode']} {_speed(speed)} with {other['threads']} threads"
                )
    return f"Against one thread: {', '.join(found)}." if found else None


def _losses_text(figures: Figures) -> str:
    losses = figures.losses()
    count = sum(len(figures.speeds(row)) for row in figures.ours())
    if not losses:
        return f"In all {count} comparisons cbam_ops is the faster one."
    head = ["map", "type", "layout", "threads", "pass", "peer", "cbam_ops", "the peer", "speed"]
    body = [
        [
            f"{_size(row)}" + ("" if row["op"] == "cbam" else f" ({row['op']})"),
            row["dtype"], row["layout"], str(row["threads"]), row["mode"], peer,
            _time(row["median_s"]), _time(row["median_s"] * speed), _speed(speed),
        ]
        for row, peer, speed in losses
    ]  # fmt: skip
    return f"In {len(losses)} of {count} comparisons cbam_ops is the slower one:\n\n" + _markdown(
        [head, *body], "<<<><<>>>"
    )


def _origin(rows: Sequence[Row]) -> str:
    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row[name] is not None))

    threads = max(row["threads"] for row in rows)
    return (
        f"{each('processor')}, {threads} threads, instruction set {each('instruction_set')}; "
        f"{each('versions')}; commit {each('commit')}, {each('date')}."
    )


def readme_table(rows: Sequence[Row]) -> str:
    """The README's text: the stages of ResNet-50, the networks, and every row where we lose."""
    figures = Figures(rows)
    # With all threads: the fewest rows have another number.
    threads = statistics.mode(row["threads"] for row in rows)
    stages = [
        row
        for row in figures.ours(op="cbam", n=16, dtype="float32", layout="NHWC", threads=threads)
        if (row["h"], row["w"], row["c"]) in RESNET50
    ]
    parts = []
    if stages:
        parts += [
            "The four stages of ResNet-50 at batch 16, float32, NHWC. A copy is the framework's "
            "own copy of one map into a fresh output, measured in the same run; the arithmetic "
            "needs 1 copy forward and 2.5 per step. Extra memory is the peak of a step beyond "
            "`x`, `y`, `dy`, `dx` and the weights' gradients, relative to `x`.",
            _stage_table(figures, stages),
        ]
    inside_xla = _xla_table(figures)
    if inside_xla:
        parts += ["Inside XLA, against XLA's own compilation of the reference.", inside_xla]
    others = [row for row in figures.ours(op="cbam", n=16, group="resnet50") if row not in stages]
    if others:
        parts += [
            "The same stages in the other types and layouts, from the least to the greatest speed. "
            "In NCHW the peers are the faster of NCHW and a graph transposed to NHWC.",
            _summary_table(figures, others),
        ]
    scaling = _scaling_text(figures)
    parts += [scaling] if scaling else []
    if figures.networks:
        parts += [
            "Whole networks. What the modules take is the time by which a network with them is "
            "slower than the plain one, measured in turns.",
            _network_table(figures),
        ]
    parts += [_losses_text(figures), _origin(rows)]
    return "\n\n".join(parts)


def full_table(rows: Sequence[Row]) -> str:
    """All figures in Markdown, machine by machine."""
    parts = ["# Benchmark results", "Made by `benchmarks/report.py` from the CSV beside it."]
    for name in dict.fromkeys(row["machine"] for row in rows):
        own = [row for row in rows if row["machine"] == name]
        figures = Figures(own)
        parts += [f"## {name}", _origin(own)]
        if figures.groups:
            parts += [
                "Speed of cbam_ops against its peers, from the least to the greatest of the rows; "
                "**bold** where cbam_ops is the slower one.",
                _summary_table(figures, figures.ours()),
            ]
        inside_xla = _xla_table(figures)
        parts += ["### Inside XLA", inside_xla] if inside_xla else []
        if figures.networks:
            parts += ["### Networks", _network_table(figures)]
        scaling = _scaling_text(figures)
        parts += [scaling] if scaling else []
        parts += ["### Where cbam_ops is the slower one", _losses_text(figures)]
        head = [
            "map", "op", "type", "layout", "threads", "pass", "provider", "median", "20 %", "80 %",
            "runs", "GB/s", "copies", "of copy bandwidth", "cbam_ops is", "error", "extra memory",
        ]  # fmt: skip
        body = [
            [
                _size(row), row["op"], row["dtype"], row["layout"], str(row["threads"]),
                row["mode"], row["provider"], _time(row["median_s"]), _time(row["q20_s"]),
                _time(row["q80_s"]), str(row["runs"]), _number(row["gb_per_s"]),
                _number(row["copies"], "{:.2f}"),
                _number(row["percent_of_copy_bandwidth"], "{:.0f} %"),
                _DASH if row["provider"] == OURS else _speed(row["ours_is_faster"]),
                _number(row["error"], "{:.1e}"), _number(row["extra_percent_of_x"], "{:.1f} %"),
            ]
            for row in own
        ]  # fmt: skip
        parts += ["### All rows", _markdown([head, *body], "<<<<><<" + ">" * 10)]
    return "\n\n".join(parts) + "\n"


def console_table(rows: Sequence[Row]) -> str:
    """Aligned columns for the terminal: ours, and how much faster it is than each peer."""
    figures = Figures(rows)
    parts = []
    if figures.groups:
        ours = figures.ours()
        peers = [peer for peer in PEERS if any(peer in figures.peers(row) for row in ours)]
        head = ["N x H x W x C", "type", "layout", "threads", "pass", "cbam_ops", "copies",
                "% of copy", *(f"vs {peer}" for peer in peers), "error", "memory"]  # fmt: skip
        body = []
        for row in ours:
            speeds = figures.speeds(row)
            size = "x".join(str(row[name]) for name in "nhwc")
            body.append(
                [
                    size + ("" if row["op"] == "cbam" else f" {row['op'].removeprefix('cbam')}"),
                    row["dtype"], row["layout"], str(row["threads"]), row["mode"],
                    _time(row["median_s"]).replace("µ", "u"),
                    _number(row["copies"]).replace(_DASH, "-"),
                    _number(row["percent_of_copy_bandwidth"], "{:.0f} %").replace(_DASH, "-"),
                    *(f"{speeds[peer]:.1f}x" if peer in speeds else "-" for peer in peers),
                    _number(row["error"], "{:.0e}").replace(_DASH, "-"),
                    _number(row["extra_percent_of_x"], "{:.1f} %").replace(_DASH, "-"),
                ]
            )  # fmt: skip
        parts.append(table([head, *body], "<<<><" + ">" * (len(head) - 5)))
    if figures.networks:
        head = ["network", "batch", "pass", "provider", "time", "CBAMs take"]
        body = [
            [
                row["op"], str(row["n"]), row["mode"], row["provider"], _time(row["median_s"]),
                _number(row["module_percent_of_time"], "{:.1f} %").replace(_DASH, "-"),
            ]
            for group in figures.networks.values()
            for row in group.values()
        ]  # fmt: skip
        parts.append(table([head, *body], "<><<>>"))
    return "\n\n".join(parts) if parts else "No figures."


def put_between_markers(text: str, content: str) -> str:
    """`text` with what is between its markers replaced.

    Raises:
      CommandError: a marker is missing, or they are in the wrong order.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise CommandError(f"there must be a line {BEGIN!r} and after it a line {END!r}")
    return f"{text[: begin + len(BEGIN)]}\n{content}\n{text[end:]}"


# --- pictures -------------------------------------------------------------------------------------

_COLORS = {
    "cbam_ops": "#1b7837",
    "TF graph": "#f28e2b",
    "XLA": "#e15759",
    "Keras layers": "#b07aa1",
    "PyTorch": "#4e79a7",
    "torch.compile": "#76b7b2",
}


def draw_peers(rows: Sequence[Row], path: Path) -> None:
    """Bars: the time of each peer in copies of the map, forward and step, by stage."""
    from matplotlib.figure import Figure

    figures = Figures(rows)
    ours = [
        row
        for row in figures.ours(op="cbam", n=16, dtype="float32", layout="NHWC")
        if (row["h"], row["w"], row["c"]) in RESNET50
    ] or figures.ours(op="cbam")
    modes = [mode for mode in ("forward", "step") if any(row["mode"] == mode for row in ours)]
    figure = Figure(figsize=(11, 4.2 * max(1, len(modes))), dpi=110, layout="constrained")
    axes = figure.subplots(max(1, len(modes)), 1, squeeze=False)[:, 0]
    names = ["cbam_ops", *PEERS]
    for axis, mode in zip(axes, modes, strict=False):
        chosen = [row for row in ours if row["mode"] == mode]
        present = [
            name
            for name in names
            if name == "cbam_ops" or any(name in figures.peers(row) for row in chosen)
        ]
        width = 0.8 / len(present)
        for i, name in enumerate(present):
            for j, row in enumerate(chosen):
                other = row if name == "cbam_ops" else figures.peers(row).get(name)
                if other is None:
                    continue
                copies = other["median_s"] / row["copy_s"]
                place = j + (i - (len(present) - 1) / 2) * width
                low = (other["median_s"] - other["q20_s"]) / row["copy_s"]
                high = (other["q80_s"] - other["median_s"]) / row["copy_s"]
                axis.bar(
                    place, copies, 0.92 * width, color=_COLORS[name],
                    label=name if j == 0 else None,
                    yerr=[[max(low, 0)], [max(high, 0)]], error_kw={"lw": 0.8},
                )  # fmt: skip
                axis.annotate(
                    f"{copies:.1f}" if copies < 9.95 else f"{copies:.0f}",
                    (place, copies), ha="center", va="bottom", fontsize=7,
                    xytext=(0, 2), textcoords="offset points",
                )  # fmt: skip
        limit = {"forward": 1.0, "step": 2.5}[mode]
        axis.axhline(limit, color="black", lw=0.8, ls="--")
        axis.set_yscale("log")
        axis.set_xticks(range(len(chosen)), [_size(row) for row in chosen])
        axis.set_ylabel("copies of the map (log)")
        axis.set_title(
            {"forward": "Forward", "step": "Training step (forward and backward)"}[mode]
            + f"; dashed: what the arithmetic must move, {limit:g}",
            loc="left", fontsize=11,
        )  # fmt: skip
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(fontsize=8, ncols=len(present), loc="upper left")
        axis.set_ylim(0.5, axis.get_ylim()[1] * 2.2)
    figure.suptitle(
        "Time of one CBAM in copies of its map (lower is better; whiskers: 20 % and 80 %)",
        fontsize=10,
    )
    figure.savefig(path)


def draw_roofline(rows: Sequence[Row], path: Path) -> None:
    """Operations per second against operations per byte, under the bandwidth of a copy."""
    from matplotlib.figure import Figure

    figures = Figures(rows)
    figure = Figure(figsize=(8.4, 6.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    chosen = [row for row in figures.ours(op="cbam", layout="NHWC") if row["mode"] != "step"]
    markers = {"forward": "o", "backward": "s"}
    colors = {"float32": "#1b7837", "bfloat16": "#7570b3", "float16": "#d95f02"}
    bandwidths, intensities = [], []
    for row in chosen:
        intensity = row["operations"] / row["bytes"]
        intensities.append(intensity)
        map_bytes = row["n"] * row["h"] * row["w"] * row["c"]
        map_bytes *= 4 if row["dtype"] == "float32" else 2
        bandwidths.append(2 * map_bytes / row["copy_s"] / 1e9)
        peers = figures.peers(row)
        stock = [peers[p]["median_s"] for p in ("TF graph", "XLA") if p in peers]
        y = row["operations"] / row["median_s"] / 1e9
        color = colors.get(row["dtype"], "grey")
        axis.plot(intensity, y, markers[row["mode"]], color=color, ms=5, alpha=0.85)
        if stock:
            axis.plot(
                intensity, row["operations"] / min(stock) / 1e9, markers[row["mode"]],
                mec=color, mfc="none", ms=5, alpha=0.6,
            )  # fmt: skip
    if chosen:
        low, high = min(intensities) * 0.8, max(intensities) * 1.25
        for quantile, style in ((0.5, "-"), (0.9, ":")):
            place = min(len(bandwidths) - 1, int(quantile * len(bandwidths)))
            bandwidth = sorted(bandwidths)[place]
            axis.plot(
                [low, high], [low * bandwidth, high * bandwidth], style, color="black", lw=1,
                label=f"a copy of the map at {bandwidth:.1f} GB/s "
                f"({'median' if quantile == 0.5 else 'the fastest tenth'} of the rows)",
            )  # fmt: skip
    for mode, marker in markers.items():
        axis.plot([], [], marker, color="grey", label=mode)
    for dtype, color in colors.items():
        axis.plot([], [], "o", color=color, label=dtype)
    axis.plot([], [], "o", mec="grey", mfc="none", label="the faster of TF graph and XLA")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that must move")
    axis.set_ylabel("10⁹ operations per second")
    axis.set_title("Roofline, NHWC: filled cbam_ops, open stock TensorFlow", fontsize=11)
    axis.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path)


# --- the command ----------------------------------------------------------------------------------


def _one_machine(rows: Sequence[Row], name: str | None) -> list[Row]:
    """The rows of the machine called `name`, or of the one with most rows."""
    if not rows:
        raise CommandError("the CSV has no rows; run benchmarks/run.py first")
    name = name or statistics.mode(row["machine"] for row in rows)
    own = [row for row in rows if row["machine"] == name]
    if not own:
        known = ", ".join(dict.fromkeys(repr(row["machine"]) for row in rows))
        raise CommandError(f"no machine {name!r} in the CSV; there are {known}")
    return own


def main(argv: Sequence[str] | None = None, default_csv: Path = Path("results.csv")) -> int:
    """`benchmarks/report.py`; returns the exit code.

    Args:
      argv: the arguments; None takes them from `sys.argv`.
      default_csv: the CSV where none is named.
    """
    parser = argparse.ArgumentParser(
        description="Makes the README's table, a table of all figures and the pictures from the "
        "CSV alone.",
        epilog="Exit codes: 0 success; 2 a file that cannot be read or written.",
    )
    parser.add_argument("csv", type=Path, nargs="?", default=default_csv, metavar="CSV")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE",
        help=f"put the table between the lines {BEGIN!r} and {END!r} of this file",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="write table.md, peers.png and roofline.png there",
    )  # fmt: skip
    parser.add_argument("--machine", metavar="NAME", help="default: the one with most rows")
    arguments = parser.parse_args(argv)
    try:
        rows = results.load(arguments.csv)
        own = _one_machine(rows, arguments.machine)
        text = readme_table(own)
        if arguments.output:
            require(["matplotlib"], "the report's pictures")
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / "table.md").write_text(full_table(rows), encoding="utf-8")
            draw_peers(own, arguments.output / "peers.png")
            draw_roofline(own, arguments.output / "roofline.png")
        if arguments.readme:
            old = arguments.readme.read_text(encoding="utf-8")
            arguments.readme.write_text(put_between_markers(old, text), encoding="utf-8")
    except CommandError as error:
        sys.stderr.write(f"report: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"report: {error}\n")
        return 2
    if not arguments.readme and not arguments.output:
        say(text)
    return 0
