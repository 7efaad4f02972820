# SPDX-License-Identifier: Apache-2.0
"""The plots of a report, as PNG. Needs matplotlib, but neither a display nor pyplot's state."""

import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from nova_dmigrate.report import overview, palette, timeline
from nova_dmigrate.report.picture import Picture
from nova_dmigrate.report.runs import Group, Run, grouped

#: Columns of a timeline; more would be too narrow to read.
_COLUMNS = 5
_OVERVIEW = (
    "Bars of each run's total time, downtime, bytes by path and throughput during the migration."
    " The table has the same numbers."
)


def draw(runs: Sequence[Run]) -> tuple[Picture, ...]:
    """An overview of checked runs, and a timeline for each group that has series."""
    pictures: list[Picture] = []
    groups = grouped(runs)
    with matplotlib.rc_context(palette.STYLE):
        bars = overview.figure(groups)
        if bars is not None:
            pictures.append(Picture("overview", "At a glance", _OVERVIEW, render(bars)))
        for number, group in enumerate(groups, start=1):
            pictures += _timelines(number, group)
    return tuple(pictures)


def render(figure: Figure) -> bytes:
    """A figure as PNG, without the version of matplotlib: equal ones shall be equal."""
    made = io.BytesIO()
    figure.savefig(made, format="png", metadata={"Software": None})
    return made.getvalue()


def _timelines(number: int, group: Group) -> list[Picture]:
    drawn = [
        (name, run)
        for name, run in zip(group.names(), group.runs, strict=True)
        if timeline.has_series(run)
    ]
    pictures = []
    for first in range(0, len(drawn), _COLUMNS):
        part = drawn[first : first + _COLUMNS]
        names, runs = [name for name, _ in part], [run for _, run in part]
        more = [str(first + 1)] if first else []
        what = ", ".join(timeline.TITLES[row] for row in timeline.rows_of(runs))
        pictures.append(
            Picture(
                "-".join(["timeline", f"{number:02}", _slug(runs[0]["scenario"]), *more]),
                group.title,
                f"Over time, for {', '.join(names)}: {what}. The downtime is marked.",
                render(timeline.figure(group.title, names, runs)),
            )
        )
    return pictures


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
