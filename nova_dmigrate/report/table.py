# SPDX-License-Identifier: Apache-2.0
"""The comparison as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from nova_dmigrate.report.columns import columns_of
from nova_dmigrate.report.runs import checked, grouped

_GAP = "  "


def format_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Runs as a table of text, a block for each scenario and shape, without a last line break.

    :raises ReportError: a run is none.
    """
    valid = checked(runs)
    columns = columns_of(valid)
    height = max((len(column.head) for column in columns), default=1)
    head = [
        ["mode" if line == height - 1 else ""]
        + [_from_below(column.head, line, height) for column in columns]
        for line in range(height)
    ]
    groups = grouped(valid)
    bodies = [
        [
            [name, *(column.text(run) for column in columns)]
            for name, run in zip(group.names(), group.runs, strict=True)
        ]
        for group in groups
    ]
    rows = [*head, *(row for body in bodies for row in body)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rule = "-" * (sum(widths) + len(_GAP) * (len(widths) - 1))
    lines = [_line(row, widths) for row in head]
    for group, body in zip(groups, bodies, strict=True):
        lines += [rule, group.title, *(_line(row, widths) for row in body)]
    return "\n".join(lines)


def _from_below(words: Sequence[str], line: int, height: int) -> str:
    place = line - (height - len(words))
    return words[place] if place >= 0 else ""


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if number else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return _GAP.join([first, *others]).rstrip()
