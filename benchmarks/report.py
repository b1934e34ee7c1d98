"""Tables and pictures of the figures, from a CSV alone, the rows where we lose included."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import results
from cases import NETWORKS, OURS_XLA

from cbam_ops._bench import OURS, RESNET50
from cbam_ops._console import CommandError, require, say

CSV = Path(__file__).parent / "results" / "results.csv"
# Where a table goes in a file, by its name in TABLES.
BEGIN, END = "<!-- benchmarks: {} -->", "<!-- benchmarks: end -->"

# Baselines as the tables show them: the faster of what one user could choose between.
BASELINES: dict[str, list[str]] = {
    "TF graph": ["tf-graph", "tf-graph-transposed"],
    "XLA": ["xla", "xla-transposed"],
    "Keras layers": ["keras"],
    "PyTorch": ["torch-eager-channels-last", "torch-eager-contiguous"],
    "torch.compile": ["torch-compile-channels-last", "torch-compile-contiguous"],
    "JAX": ["jax"],
}
_CASE = ["machine", "op", "n", "h", "w", "c", "dtype", "layout", "threads", "mode"]
_DASH = "–"
# What a row's op begins with, if it is no network.
OPS = "cbam"
# What must move, in copies of the map (a copy: one read, one write).
IDEAL = {"forward": 1.0, "backward": 1.5, "step": 2.5}


# --- figures --------------------------------------------------------------------------------------


def ours(rows: pd.DataFrame) -> pd.DataFrame:
    """Our rows, each with its speed against each baseline: how many times faster it is."""
    modules = rows[rows["op"].str.startswith(OPS)]
    times = modules.pivot_table("median_s", _CASE, "provider", sort=False)
    found = modules[modules["provider"] == OURS].set_index(_CASE)
    for title, providers in BASELINES.items():
        fastest = times.reindex(columns=providers).min(axis=1)
        found[title] = fastest.reindex(found.index) / found["median_s"]
    return found.reset_index()


def losses(found: pd.DataFrame) -> pd.DataFrame:
    """Every comparison of ours that a baseline wins, in `baseline` and `speed`; the worst first."""
    each = found.melt(
        [*_CASE, "median_s"], list(BASELINES), var_name="baseline", value_name="speed"
    )
    return each[each["speed"] < 1].sort_values("speed", kind="stable")


def comparisons(found: pd.DataFrame) -> int:
    """How many speeds there are in rows of ours."""
    return int(found[list(BASELINES)].notna().to_numpy().sum())


def stages(found: pd.DataFrame) -> pd.DataFrame:
    """Those of the rows that are stages of ResNet-50 as most users call them, all threads."""
    sizes = pd.MultiIndex.from_frame(found[["h", "w", "c"]])
    mine = found[(found["op"] == "cbam") & sizes.isin(RESNET50)]
    mine = mine[(mine["dtype"] == "float32") & (mine["layout"] == "NHWC")]
    if mine.empty:
        return mine
    # The first batch of the file; with all threads, since the fewest rows have another number.
    threads = statistics.mode(found["threads"])
    return mine[(mine["n"] == mine["n"].iloc[0]) & (mine["threads"] == threads)]


# --- cells ----------------------------------------------------------------------------------------


def _size(row: pd.Series) -> str:
    return "×".join(str(row[name]) for name in "nhwc")


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _speed(value: float) -> str:
    shown = f"{value:.1f}×" if value < 9.95 else f"{value:.0f}×"
    return f"**{value:.2f}×**" if value < 1 else shown


def _range(values: pd.Series, show: Callable[[float], str]) -> str:
    values = values.dropna()
    if values.empty:
        return _DASH
    least, most = show(values.min()), show(values.max())
    return least if len(values) == 1 else f"{least} … {most}"


def _column(values: pd.Series, show: Callable[[Any], str] | str) -> list[str]:
    """The cells of a column; `show` is a function or a format."""
    function = show.format if isinstance(show, str) else show
    return [_DASH if pd.isna(value) else function(value) for value in values]


def _markdown(columns: dict[str, Sequence[str]], left: int) -> str:
    """A table of cells, the first `left` columns aligned left."""
    align = ["left" if i < left else "right" for i in range(len(columns))]
    return pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True, colalign=align)


def _present(found: pd.DataFrame) -> list[str]:
    return [title for title in BASELINES if found[title].notna().any()]


def _sizes(found: pd.DataFrame) -> list[str]:
    return [_size(row) for _, row in found.iterrows()]


# --- tables ---------------------------------------------------------------------------------------


def _stage_columns(found: pd.DataFrame) -> dict[str, Sequence[str]]:
    return {
        "map": _sizes(found),
        "pass": list(found["mode"]),
        "cbam_ops": _column(found["median_s"], _time),
        **{f"against {title}": _column(found[title], _speed) for title in _present(found)},
    }


def short_table(rows: pd.DataFrame) -> str:
    """The stages of ResNet-50, forward and step, and how often a baseline wins anywhere."""
    found = ours(rows)
    shown = stages(found)
    table = _markdown(_stage_columns(shown[shown["mode"] != "backward"]), 2)
    won = comparisons(found) - len(losses(found))
    return f"{table}\n\ncbam_ops is the faster one in {won} of {comparisons(found)} comparisons."


def _stage_table(found: pd.DataFrame) -> str:
    columns = _stage_columns(found)
    columns["in copies of the map"] = _column(found["copies"], "{:.1f}")
    columns["of copy bandwidth"] = _column(found["percent_of_copy_bandwidth"], "{:.0f} %")
    columns["largest error"] = _column(found["error"], "{:.0e}")
    columns["extra memory"] = _column(found["extra_percent_of_x"], "{:.1f} %")
    return _markdown(columns, 2)


def _summary_table(found: pd.DataFrame) -> str:
    """One line per group, type, layout and mode of these rows: the least and greatest speed."""
    names = ["group", "op", "n", "dtype", "layout", "threads", "mode"]
    lines = []
    for kind, group in found.groupby(names, sort=False):
        name, op, n, dtype, layout, threads, mode = kind
        line = {"call sites": name if op == "cbam" else f"{name} ({op})", "type": dtype,
                "layout": layout, "pass": mode, "batch": str(n), "threads": str(threads),
                "rows": str(len(group))}  # fmt: skip
        line |= {f"against {title}": _range(group[title], _speed) for title in _present(found)}
        line["of copy bandwidth"] = _range(group["percent_of_copy_bandwidth"], "{:.0f} %".format)
        most = group["extra_percent_of_x"].max()
        line["extra memory, at most"] = _DASH if pd.isna(most) else f"{most:.1f} %"
        lines.append(line)
    table = pd.DataFrame(lines)
    return _markdown({column: list(table[column]) for column in table}, 4)


def _network_table(rows: pd.DataFrame) -> str:
    networks = rows[~rows["op"].str.startswith(OPS)]
    if networks.empty:
        return ""
    index = ["op", "h", "n", "mode"]
    values = ["median_s", "module_percent_of_time", "extra_bytes"]
    wide = networks.pivot_table(values, index, "provider", sort=False).reindex(
        columns=pd.MultiIndex.from_product([values, NETWORKS])
    )
    times, percents, memory = (wide[value] for value in values)
    heads = ["plain", "with stock CBAM", "with cbam_ops"]
    heads += [f"XLA: {head}" for head in heads]
    columns: dict[str, Sequence[str]] = {
        "network": [
            f"{op.replace('resnet', 'ResNet-').replace('mobilenet', 'MobileNet')} at {h} px"
            for op, h in wide.index.droplevel([2, 3])
        ],
        "pass": list(wide.index.get_level_values("mode")),
        "batch": [str(n) for n in wide.index.get_level_values("n")],
    }
    for head, name in zip(heads, NETWORKS, strict=True):
        columns[head] = _column(times[name], _time)
    for head, name in (("stock CBAM", "stock"), ("cbam_ops", OURS)):
        columns[f"{head} takes"] = _column(percents[name], "{:.1f} %")
    for head, name in (("stock", "stock"), ("cbam_ops", OURS)):
        columns[f"memory: {head}"] = _column(memory[name] / 2**20, "{:.0f} MB")
    return _markdown(columns, 2)


def _xla_table(rows: pd.DataFrame) -> str:
    """Ours inside XLA beside XLA's own compilation of the reference, where both were measured."""
    times = rows.pivot_table("median_s", _CASE, "provider", sort=False)
    times = times.reindex(columns=[OURS, OURS_XLA, "xla"]).reset_index()
    both = times[times["op"].str.startswith(OPS)].dropna(subset=[OURS_XLA, "xla"])
    if both.empty:
        return ""
    columns: dict[str, Sequence[str]] = {"map": _sizes(both), "pass": list(both["mode"])}
    titles = {OURS: "cbam_ops", OURS_XLA: "cbam_ops inside XLA", "xla": "XLA"}
    columns |= {title: _column(both[name], _time) for name, title in titles.items()}
    return _markdown({**columns, "speed": _column(both["xla"] / both[OURS_XLA], _speed)}, 2)


def _scaling_text(found: pd.DataFrame) -> str:
    """How much faster more threads are than one, where both were measured."""
    names = [name for name in _CASE if name != "threads"]
    pairs = found[found["threads"] == 1].merge(found[found["threads"] > 1], on=names)
    texts = [
        f"{_size(row)} {row['mode']} {_speed(row['median_s_x'] / row['median_s_y'])} with "
        f"{row['threads_y']} threads"
        for _, row in pairs.iterrows()
    ]
    return f"Against one thread: {', '.join(texts)}." if texts else ""


def _losses_text(found: pd.DataFrame) -> str:
    lost, count = losses(found), comparisons(found)
    if lost.empty:
        return f"In all {count} comparisons cbam_ops is the faster one."
    names = ["dtype", "layout", "mode", "baseline", "threads"]
    columns: dict[str, Sequence[str]] = {"map": _sizes(lost), "op": list(lost["op"])}
    columns |= {name: [str(value) for value in lost[name]] for name in names}
    columns["cbam_ops"] = _column(lost["median_s"], _time)
    columns["the baseline"] = _column(lost["median_s"] * lost["speed"], _time)
    columns["speed"] = _column(lost["speed"], _speed)
    return f"In {len(lost)} of {count} comparisons cbam_ops is the slower one:\n\n" + _markdown(
        columns, 6
    )


def _origin(rows: pd.DataFrame) -> str:
    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in rows[name].dropna()))

    return (
        f"{each('processor')}, {rows['threads'].max()} threads, instruction set "
        f"{each('instruction_set')}; {each('versions')}; commit {each('commit')}, {each('date')}."
    )


def details(rows: pd.DataFrame) -> str:
    """The stages of ResNet-50 in every type and layout, the networks, and where we lose."""
    found = ours(rows)
    shown = stages(found)
    batch = None if shown.empty else shown["n"].iloc[0]
    others = found[(found["op"] == "cbam") & (found["group"] == "resnet50") & (found["n"] == batch)]
    others = others.drop(shown.index, errors="ignore")
    parts = {
        f"The four stages of ResNet-50 at batch {batch}, float32, NHWC. A copy is the framework's "
        "own copy of one map into a fresh output, measured in the same run; the arithmetic needs 1 "
        "copy forward and 2.5 per step. Extra memory is the peak of a step beyond `x`, `y`, `dy`, "
        "`dx` and the weights' gradients, relative to `x`.": shown.empty or _stage_table(shown),
        "Inside XLA, against XLA's own compilation of the reference.": _xla_table(rows),
        "The same stages in the other types and layouts, from the least to the greatest speed. In "
        "NCHW the baselines are the faster of NCHW and a graph transposed to NHWC.": others.empty
        or _summary_table(others),
        "Whole networks. The one with cbam_ops is what `cbam_ops.fuse` makes of the one with stock "
        "CBAM. What the modules take is the time by which a network with them is slower than the "
        "plain one, measured in turns.": _network_table(rows),
    }
    texts = [text for head, table in parts.items() if isinstance(table, str) and table
             for text in (head, table)]  # fmt: skip
    return "\n\n".join(
        filter(None, [*texts, _scaling_text(found), _losses_text(found), _origin(rows)])
    )


def full_table(rows: pd.DataFrame) -> str:
    """All figures in Markdown, machine by machine."""
    parts = ["# Benchmark results"]
    for name, own in rows.groupby("machine", sort=False):
        parts += [f"## {name}", details(own)]
        found = ours(own)
        if not found.empty:
            parts += ["### All call sites", _summary_table(found)]
        columns: dict[str, Sequence[str]] = {"map": _sizes(own)}
        columns |= {name: [str(value) for value in own[name]] for name in
                    ("op", "dtype", "layout", "mode", "provider", "threads")}  # fmt: skip
        columns |= {title: _column(own[name], _time) for title, name in
                    (("median", "median_s"), ("20 %", "q20_s"), ("80 %", "q80_s"))}  # fmt: skip
        columns["runs"] = _column(own["runs"], "{}")
        columns["GB/s"] = _column(own["gb_per_s"], "{:.1f}")
        columns["copies"] = _column(own["copies"], "{:.2f}")
        columns["of copy bandwidth"] = _column(own["percent_of_copy_bandwidth"], "{:.0f} %")
        columns["cbam_ops is"] = _column(
            own["ours_is_faster"].where(own["provider"] != OURS), _speed
        )
        columns["error"] = _column(own["error"], "{:.1e}")
        columns["extra memory"] = _column(own["extra_percent_of_x"], "{:.1f} %")
        parts += ["### All rows", _markdown(columns, 6)]
    return "\n\n".join(parts) + "\n"


def _simple(table: pd.DataFrame) -> str:
    filled = table.astype("object").where(table.notna(), None)
    return filled.to_markdown(index=False, tablefmt="simple", missingval="-")


def console_table(rows: pd.DataFrame) -> str:
    """For the terminal: ours, and how much faster it is than each baseline; then the networks."""
    found = ours(rows)
    tables = []
    if not found.empty:
        table = pd.DataFrame(
            {
                "map": found[list("nhwc")].astype("str").agg("x".join, axis=1),
                **{name: found[name] for name in ("op", "dtype", "layout", "threads", "mode")},
                "cbam_ops, us": (1e6 * found["median_s"]).round(1),
                "copies": found["copies"].round(2),
                "% of copy": found["percent_of_copy_bandwidth"].round(),
                **{f"vs {title}": found[title].round(2) for title in _present(found)},
                "error": _column(found["error"], "{:.0e}"),
                "memory, % of x": found["extra_percent_of_x"].round(1),
            }
        )
        tables.append(_simple(table))
    networks = rows[~rows["op"].str.startswith(OPS)]
    if len(networks):
        names = ["op", "n", "mode", "provider", "median_s", "module_percent_of_time"]
        tables.append(_simple(networks[names]))
    return "\n\n".join(tables)


TABLES: dict[str, Callable[[pd.DataFrame], str]] = {"short": short_table, "details": details}


def update(text: str, rows: pd.DataFrame) -> str:
    """`text` with every table between its markers made anew.

    Raises:
      CommandError: there are no markers.
    """
    names = "|".join(TABLES)
    pattern = f"(?s)({BEGIN.format(f'({names})')})\n.*?({END})"
    made, count = re.subn(pattern, lambda m: f"{m[1]}\n{TABLES[m[2]](rows)}\n{m[3]}", text)
    if not count:
        raise CommandError(f"there must be a line like {BEGIN.format('short')} and a line {END}")
    return made


# --- pictures -------------------------------------------------------------------------------------

_COLORS = {
    "cbam_ops": "#1b7837",
    "TF graph": "#f28e2b",
    "XLA": "#e15759",
    "Keras layers": "#b07aa1",
    "PyTorch": "#4e79a7",
    "torch.compile": "#76b7b2",
    "JAX": "#9467bd",
}


def draw_baselines(rows: pd.DataFrame, path: Path) -> None:
    """Bars: everybody's time in copies of the map, forward and step, by stage."""
    from matplotlib.figure import Figure

    found = ours(rows)
    shown = stages(found)
    shown = found[found["op"] == "cbam"] if shown.empty else shown
    modes = [mode for mode in ("forward", "step") if mode in set(shown["mode"])]
    figure = Figure(figsize=(11, 4.2 * max(1, len(modes))), dpi=110, layout="constrained")
    axes = figure.subplots(max(1, len(modes)), 1, squeeze=False)[:, 0]
    names = _present(shown)
    width = 0.8 / (1 + len(names))
    for axis, mode in zip(axes, modes, strict=False):
        chosen = shown[shown["mode"] == mode]
        for i, name in enumerate(["cbam_ops", *names]):
            copies = chosen["copies"] * (1.0 if name == "cbam_ops" else chosen[name])
            places = [j + (i - len(names) / 2) * width for j in range(len(chosen))]
            bars = axis.bar(places, copies, 0.92 * width, color=_COLORS[name], label=name)
            labels = ["" if pd.isna(c) else f"{c:.1f}" if c < 9.95 else f"{c:.0f}" for c in copies]
            axis.bar_label(bars, labels, padding=2, fontsize=7)
        axis.axhline(IDEAL[mode], color="black", lw=0.8, ls="--")
        axis.set_yscale("log")
        axis.set_xticks(range(len(chosen)), _sizes(chosen))
        axis.set_ylabel("copies of the map (log)")
        title = {"forward": "Forward", "step": "Training step (forward and backward)"}[mode]
        axis.set_title(
            f"{title}; dashed: what the arithmetic must move, {IDEAL[mode]:g}",
            loc="left", fontsize=11,
        )  # fmt: skip
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(fontsize=8, ncols=1 + len(names), loc="upper left")
        axis.set_ylim(0.5, axis.get_ylim()[1] * 2.2)
    figure.suptitle("Time of one CBAM in copies of its map (lower is better)", fontsize=10)
    figure.savefig(path)


def draw_roofline(rows: pd.DataFrame, path: Path) -> None:
    """Operations per second against operations per byte, under the bandwidth of a copy."""
    from matplotlib.figure import Figure

    found = ours(rows)
    chosen = found[(found["op"] == "cbam") & (found["layout"] == "NHWC")]
    chosen = chosen[chosen["mode"] != "step"].dropna(subset=["operations", "copy_s"])
    intensity = (chosen["operations"] / chosen["bytes"]).astype("float")
    speed = chosen["operations"] / chosen["median_s"] / 1e9
    stock = speed / chosen[["TF graph", "XLA"]].min(axis=1)
    item = chosen["dtype"].map(lambda dtype: 4 if dtype == "float32" else 2)
    bandwidth = 2 * chosen[list("nhwc")].prod(axis=1) * item / chosen["copy_s"] / 1e9
    figure = Figure(figsize=(8.4, 6.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    markers = {"forward": "o", "backward": "s"}
    colors = {"float32": "#1b7837", "bfloat16": "#7570b3", "float16": "#d95f02"}
    for (mode, dtype), rows_of in chosen.groupby(["mode", "dtype"], sort=False):
        at, color = rows_of.index, colors.get(dtype, "grey")
        axis.plot(intensity[at], speed[at], markers[mode], color=color, ms=5, alpha=0.85)
        axis.plot(
            intensity[at], stock[at], markers[mode], mec=color, mfc="none", ms=5, alpha=0.6
        )  # fmt: skip
    if len(chosen):
        ends = [intensity.min() * 0.8, intensity.max() * 1.25]
        for quantile, style, what in ((0.5, "-", "median"), (0.9, ":", "the fastest tenth")):
            value = float(bandwidth.astype("float").quantile(quantile, interpolation="higher"))
            axis.plot(
                ends, [end * value for end in ends], style, color="black", lw=1,
                label=f"a copy of the map at {value:.1f} GB/s ({what} of the rows)",
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


def one_machine(rows: pd.DataFrame, name: str | None = None) -> pd.DataFrame:
    """The rows of the machine called `name`, or of the one with most rows."""
    if rows.empty:
        raise CommandError("the CSV has no rows; run benchmarks/run.py first")
    own = rows[rows["machine"] == (name or statistics.mode(rows["machine"]))]
    if own.empty:
        known = ", ".join(repr(machine) for machine in rows["machine"].unique())
        raise CommandError(f"no machine {name!r} in the CSV; there are {known}")
    return own


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Makes tables and pictures of a CSV of the benchmarks. Prints the details of "
        "one machine where nothing else is asked for.",
        epilog="Exit codes: 0 success; 2 a file that cannot be read or written.",
    )
    add = parser.add_argument
    add("csv", type=Path, nargs="?", default=CSV, metavar="CSV", help="default: %(default)s")
    add("--all", action="store_true", help="print all rows of all machines")
    add("--update", type=Path, nargs="+", default=[], metavar="FILE",
        help=f"make the tables anew that are between lines {BEGIN.format('short')!r} (or "
        f"'details') and {END!r} of these files")  # fmt: skip
    add("--pictures", type=Path, metavar="DIR", help="write baselines.png and roofline.png there")
    add("--machine", metavar="NAME", help="default: the one with most rows")
    arguments = parser.parse_args(argv)
    try:
        rows = results.load(arguments.csv)
        own = one_machine(rows, arguments.machine)
        for path in arguments.update:
            path.write_text(update(path.read_text(encoding="utf-8"), own), encoding="utf-8")
        if arguments.pictures:
            require(["matplotlib"], "the report's pictures")
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            draw_baselines(own, arguments.pictures / "baselines.png")
            draw_roofline(own, arguments.pictures / "roofline.png")
    except CommandError as error:
        sys.stderr.write(f"report: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"report: {error}\n")
        return 2
    if arguments.all:
        say(full_table(rows))
    elif not arguments.update and not arguments.pictures:
        say(details(own))
    return 0


if __name__ == "__main__":
    sys.exit(main())
