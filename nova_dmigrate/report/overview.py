# SPDX-License-Identifier: Apache-2.0
"""All runs at a glance: bars, a row for each run, below the name of its scenario and shape."""

import dataclasses
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nova_dmigrate.report import palette
from nova_dmigrate.report.runs import DMIGRATE, Group, Run

_GB = 1e9
#: Room beyond the longest bar, as a share of it, for the numbers at its end.
_ROOM = 0.3


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str
    run: Run
    place: float


def figure(groups: Sequence[Group]) -> Figure | None:
    """Total time, downtime, bytes by path and throughput during the migration.

    None if no run tells any of them.
    """
    rows, heads, place = [], [], 0.0
    for group in groups:
        heads.append((group.title, place))
        place += 1.0
        for name, run in zip(group.names(), group.runs, strict=True):
            rows.append(_Row(name, run, place))
            place += 1.0
        place += 0.3
    panels = [(title, draw) for title, draw in _PANELS if _has(title, rows)]
    if not panels:
        return None
    size = (max(7.0, 1.4 + 3.1 * len(panels)), 1.5 + 0.27 * place)
    made = Figure(figsize=size, layout="constrained")
    grid = made.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, draw) in zip(grid, panels, strict=True):
        draw(axes, rows)
        axes.set_title(title)
        axes.set_xlim(left=0, right=axes.dataLim.x1 * (1 + _ROOM) or 1)
        axes.grid(axis="y", visible=False)
        axes.patch.set_visible(False)  # it would cover the names of scenarios
    first = grid[0]
    first.set_yticks([row.place for row in rows], [_label(row) for row in rows])
    first.tick_params(axis="y", length=0)
    first.set_ylim(place - 0.3, -0.8)
    for title, head in heads:
        text = first.text(0, head + 0.1, f" {title}", va="center", fontweight="bold")
        # It runs across all panels, which are empty there, and must not widen the first one
        text.set_in_layout(False)
    made.legend(handles=_legend(rows), loc="outside lower center", ncols=5)
    return made


def _label(row: _Row) -> str:
    return row.name if row.run["completed"] else f"{row.name} †"


def _has(title: str, rows: Sequence[_Row]) -> bool:
    keys = _KEYS[title]
    return any(row.run[key] is not None for row in rows for key in keys)


def _bars(axes: Axes, rows: Sequence[_Row], key: str, form: str) -> None:
    for row in rows:
        value = row.run[key]
        if value is None:
            continue
        colour = palette.DMIGRATE if row.run["mode"] == DMIGRATE else palette.OTHERS
        hatch = None if row.run["completed"] else "////"
        axes.barh(row.place, value, height=0.74, color=colour, hatch=hatch, edgecolor="white")
        _tell(axes, row, value, format(value, form))


def _tell(axes: Axes, row: _Row, at: float, text: str) -> None:
    axes.annotate(text, (at, row.place), (3, 0), textcoords="offset points", va="center")


def _draw_time(axes: Axes, rows: Sequence[_Row]) -> None:
    _bars(axes, rows, "total_s", ".1f")
    for row in rows:
        if row.run["ideal_s"] is not None:
            axes.plot(row.run["ideal_s"], row.place, marker="D", color="black", markersize=4)
    axes.set_xlabel("s")


def _draw_downtime(axes: Axes, rows: Sequence[_Row]) -> None:
    _bars(axes, rows, "downtime_ms", ".0f")
    axes.set_xlabel("ms")


def _draw_bytes(axes: Axes, rows: Sequence[_Row]) -> None:
    for row in rows:
        network = (row.run["wire_bytes"] or 0) / _GB
        volume = (row.run["volume_bytes"] or 0) / _GB
        axes.barh(row.place, network, height=0.74, color=palette.NETWORK)
        axes.barh(row.place, volume, left=network, height=0.74, color=palette.VOLUME)
        if network or volume:
            text = f"{network:.2f}" + (f" + {volume:.2f}" if volume else "")
            _tell(axes, row, network + volume, text)
    axes.set_xlabel("GB")


def _draw_throughput(axes: Axes, rows: Sequence[_Row]) -> None:
    _bars(axes, rows, "tps_during", ".0f")
    for row in rows:
        if row.run["tps_before"] is not None:
            axes.plot(row.run["tps_before"], row.place, marker="|", color="black", markersize=11)
    axes.set_xlabel("transactions/s")


_PANELS = (
    ("total time", _draw_time),
    ("downtime", _draw_downtime),
    ("bytes by path", _draw_bytes),
    ("throughput during it", _draw_throughput),
)
_KEYS = {
    "total time": ("total_s",),
    "downtime": ("downtime_ms",),
    "bytes by path": ("wire_bytes", "volume_bytes"),
    "throughput during it": ("tps_during",),
}


def _legend(rows: Sequence[_Row]) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Patch(color=palette.NETWORK, label="network"),
        Patch(color=palette.VOLUME, label="volume"),
    ]
    for key, marker, label in (
        ("ideal_s", "D", "T*: without compression, at best"),
        ("tps_before", "|", "throughput before"),
    ):
        if any(row.run[key] is not None for row in rows):
            handles.append(
                Line2D([], [], color="black", marker=marker, linestyle="none", label=label)
            )
    if not all(row.run["completed"] for row in rows):
        handles.append(Patch(facecolor=palette.OTHERS, hatch="////", label="† not completed"))
    return handles
