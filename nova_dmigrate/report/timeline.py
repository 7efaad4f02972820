# SPDX-License-Identifier: Apache-2.0
"""What happened when: the runs of one group side by side, on the same axes.

From above: throughput by path, the database's throughput (transactions, statements), its latency.
The migration is shaded, its downtime marked.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from nova_dmigrate.report import palette
from nova_dmigrate.report.runs import SERIES, Run

_MB = 1e6
#: Steps in which rates are taken: fine enough for a downtime, coarse enough not to be noise.
_MIN_STEP, _STEPS = 0.25, 240
#: Inches of an entry of the legend.
_LEGEND_WIDTH = 1.7
TITLES = {
    "paths": "throughput by path",
    "tps": "database throughput",
    "qps": "database queries",
    "latency_ms": "database latency",
}
_UNITS = {"paths": "MB/s", "tps": "transactions/s", "qps": "queries/s", "latency_ms": "ms"}

Floats = NDArray[np.float64]


def has_series(run: Run) -> bool:
    """Whether there is anything to draw of a run."""
    return any(run["series"].get(name) for name in SERIES)


def rows_of(runs: Sequence[Run]) -> list[str]:
    """The rows of panels for which there is something, keys of `TITLES`."""

    def any_has(*names: str) -> bool:
        return any(run["series"].get(name) for run in runs for name in names)

    rows = ["paths"] if any_has("network", "volume") else []
    return rows + [name for name in ("tps", "qps", "latency_ms") if any_has(name)]


def figure(title: str, names: Sequence[str], runs: Sequence[Run]) -> Figure:
    """One column for each run, called by ``names``.

    :param runs: checked ones that have series.
    """
    rows = rows_of(runs)
    width = max(7.0, 1.2 + 3.6 * len(runs))
    made = Figure(figsize=(width, 1.3 + 2.1 * len(rows)), layout="constrained")
    made.suptitle(title, fontsize=11)
    grid = made.subplots(len(rows), len(runs), sharex=True, sharey="row", squeeze=False)
    for column, (name, run) in enumerate(zip(names, runs, strict=True)):
        for row, kind in enumerate(rows):
            axes = grid[row][column]
            _draw(axes, kind, run)
            _mark(axes, run, label=row == 0)
            if row == 0:
                axes.set_title(name)
            if column == 0:
                axes.set_ylabel(f"{TITLES[kind]}\n{_UNITS[kind]}")
        grid[-1][column].set_xlabel("seconds since the migration began")
    handles = _legend(rows, runs)
    if handles:
        lines = math.ceil(len(handles) * _LEGEND_WIDTH / width)
        ncols = math.ceil(len(handles) / lines)
        made.legend(handles=handles, loc="outside lower center", ncols=ncols)
    return made


def rate(points: Sequence[Sequence[float]], edges: Floats) -> Floats:
    """Bytes a second between edges, of cumulative bytes; zero outside of what was recorded."""
    table = np.array(sorted(map(tuple, points)), dtype=np.float64).reshape(-1, 2)
    if len(table) < 2:
        return np.zeros(len(edges) - 1)
    made: Floats = np.diff(np.interp(edges, table[:, 0], table[:, 1])) / np.diff(edges)
    return made


def _draw(axes: Axes, kind: str, run: Run) -> None:
    if kind == "paths":
        _draw_paths(axes, run)
        return
    points = run["series"].get(kind)
    if points:
        colour = palette.LATENCY if kind == "latency_ms" else palette.THROUGHPUT
        axes.plot(*zip(*sorted(map(tuple, points)), strict=True), color=colour)
    if kind != "latency_ms":
        axes.set_ylim(bottom=0)
        if kind == "tps" and run["tps_before"]:
            axes.axhline(0.9 * run["tps_before"], color="black", linestyle="-.", linewidth=1)
    elif points and min(value for _, value in points) > 0:
        # From milliseconds to seconds of a stall: linear, only the stall would be seen
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _draw_paths(axes: Axes, run: Run) -> None:
    network, volume = (run["series"].get(name) or [] for name in ("network", "volume"))
    moments = [moment for points in (network, volume) for moment, _ in points]
    if not moments:
        return
    begin, end = min(moments), max(moments)
    if begin == end:
        return
    steps = max(1, min(_STEPS, round((end - begin) / _MIN_STEP)))
    edges = np.linspace(begin, end, steps + 1)
    rates = [rate(points, edges) / _MB for points in (network, volume)]
    # Each rate holds from its edge to the next one
    rates = [np.append(each, each[-1]) for each in rates]
    axes.stackplot(edges, *rates, colors=(palette.NETWORK, palette.VOLUME), step="post")
    limit = run["network_mb_s"]
    if limit is not None:
        axes.axhline(limit, color="black", linestyle="--", linewidth=1)
        if run["volume_mb_s"] is not None:
            axes.axhline(limit + run["volume_mb_s"], color="black", linestyle=":", linewidth=1)


def _mark(axes: Axes, run: Run, label: bool) -> None:
    if run["total_s"]:
        colour, alpha = palette.MIGRATION, palette.MIGRATION_ALPHA
        axes.axvspan(0, run["total_s"], color=colour, alpha=alpha, linewidth=0, zorder=0)
    downtime = run["series"].get("downtime")
    if downtime is None:
        return
    begin, end = downtime
    # A line at its begin, because some milliseconds of many seconds are less than a pixel
    axes.axvspan(begin, end, facecolor=palette.DOWNTIME, alpha=0.35, hatch="////", linewidth=0)
    axes.axvline(begin, color=palette.DOWNTIME, linewidth=1.4)
    if label:
        early = begin < (run["total_s"] or 0) / 2  # there is no room to its left
        axes.annotate(
            f"down {1000 * (end - begin):.0f} ms",
            xy=(end if early else begin, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3 if early else -3, -2),
            textcoords="offset points",
            ha="left" if early else "right",
            va="top",
            color="#8F3F00",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
        )


def _legend(rows: Sequence[str], runs: Sequence[Run]) -> list[Any]:
    handles: list[Any] = []
    if "paths" in rows:
        handles.append(Patch(color=palette.NETWORK, label="network"))
        handles.append(Patch(color=palette.VOLUME, label="volume"))
        if any(run["network_mb_s"] is not None for run in runs):
            handles.append(_dashes("--", "limit of the network"))
            if any(run["volume_mb_s"] is not None for run in runs):
                handles.append(_dashes(":", "limit of both"))
    if "tps" in rows and any(run["tps_before"] for run in runs):
        handles.append(_dashes("-.", "90 % of the throughput before"))
    if any(run["total_s"] for run in runs):
        colour, alpha = palette.MIGRATION, palette.MIGRATION_ALPHA
        handles.append(Patch(facecolor=colour, alpha=alpha * 2, label="migration"))
    if any(run["series"].get("downtime") is not None for run in runs):
        handles.append(Patch(facecolor=palette.DOWNTIME, alpha=0.6, hatch="////", label="downtime"))
    return handles


def _dashes(style: Literal["--", ":", "-."], label: str) -> Line2D:
    return Line2D([], [], color="black", linestyle=style, linewidth=1, label=label)
