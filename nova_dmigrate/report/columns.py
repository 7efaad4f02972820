# SPDX-License-Identifier: Apache-2.0
"""The columns of a comparison, the same in a terminal and in HTML."""

import dataclasses
from collections.abc import Callable, Sequence

from nova_dmigrate.report.runs import Run, fell_back

#: What stands where nothing was measured.
NOTHING = "-"
_MB = 1e6


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    :ivar head: the lines above it, the unit last if it has one.
    :ivar meaning: a sentence.
    :ivar text: the cell of a run; `NOTHING` where it has none.
    """

    head: tuple[str, ...]
    meaning: str
    text: Callable[[Run], str]


def _number(key: str, form: str, scale: float = 1) -> Callable[[Run], str]:
    def text(run: Run) -> str:
        value = run[key]
        return NOTHING if value is None else format(value / scale, form)

    return text


def _flag(key: str) -> Callable[[Run], str]:
    words = {True: "ok", False: "FAILED", None: NOTHING}
    return lambda run: words[run[key]]


def _note(run: Run) -> str:
    notes = ["" if run["completed"] else "not completed", fell_back(run)]
    return ", ".join(filter(None, notes)) or NOTHING


_ALL = (
    Column(("total", "time", "s"), "From the request to the end.", _number("total_s", ".1f")),
    Column(
        ("downtime", "ms"),
        "For so long no client was served, or, where that was not measured, the guest stood still.",
        _number("downtime_ms", ".0f"),
    ),
    Column(
        ("network", "MB"),
        "Carried by the migration network.",
        _number("wire_bytes", ".0f", _MB),
    ),
    Column(
        ("volume", "MB"),
        "Read from volumes by the destination, instead.",
        _number("volume_bytes", ".0f", _MB),
    ),
    Column(
        ("misses",),
        "References that did not match, so that their pages had to be sent.",
        _number("misses", ".0f"),
    ),
    Column(
        ("before", "tps"),
        "Transactions a second before the migration.",
        _number("tps_before", ".0f"),
    ),
    Column(("during", "tps"), "The same during the migration.", _number("tps_during", ".0f")),
    Column(("after", "tps"), "The same after the switchover.", _number("tps_after", ".0f")),
    Column(
        ("90 %", "again", "s"),
        "From the switchover until 90 % of the throughput before it is back.",
        _number("recover_90_s", ".1f"),
    ),
    Column(
        ("T*/T",),
        "Efficiency: the time that network and volume need for the bytes as they are in the guest,"
        " divided by the total time. With compression it may exceed 1.",
        _number("efficiency", ".2f"),
    ),
    Column(
        ("speed-up",),
        "Total time of pre-copy divided by that of this run.",
        _number("speedup_vs_precopy", ".2f"),
    ),
    Column(
        ("lost", "commits"),
        "Commits that a client was told of and that the database does not have.",
        _number("lost_commits", ".0f"),
    ),
    Column(("check",), "CHECK TABLE EXTENDED and the rows' checksums.", _flag("check_ok")),
    Column(("note",), "Whether it was not completed, and why volumes were not used.", _note),
)


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """The columns for which at least one of the checked runs has something."""
    return [each for each in _ALL if any(each.text(run) != NOTHING for run in runs)]
