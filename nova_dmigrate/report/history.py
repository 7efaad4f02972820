# SPDX-License-Identifier: Apache-2.0
"""Reports of migrations that have been: what their summaries tell."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nova_dmigrate.migration.summary import COMPLETED, DMIGRATE, MigrationSummary, Row
from nova_dmigrate.report import runs
from nova_dmigrate.report.html import Section
from nova_dmigrate.report.write import write_html

#: The phase at the end of which both relays run.
_STARTING = "starting relays"


def write_history_report(summaries: Sequence[MigrationSummary], path: Path) -> None:
    """Write one HTML file about migrations that have been.

    :raises ReportError: matplotlib is missing, or the file cannot be written.
    """
    domains = ", ".join(dict.fromkeys(each.domain for each in summaries))
    write_html(
        [run_of(each) for each in summaries],
        {},
        path,
        f"Live migration of {domains}",
        [section_of(each) for each in summaries],
    )


def run_of(summary: MigrationSummary) -> runs.Run:
    """The run that a summary tells of. What was not measured is left out."""
    relayed = summary.mode == DMIGRATE
    return {
        "scenario": summary.domain,
        "mode": runs.DMIGRATE if relayed else "ordinary",
        "completed": summary.state == COMPLETED,
        "fallback_reason": summary.fallback_reason,
        "total_s": summary.total_s,
        "downtime_ms": summary.downtime_ms,
        "guest_bytes": summary.guest_bytes,
        "wire_bytes": summary.wire_bytes,
        "volume_bytes": summary.volume_bytes if relayed else None,
        "pages_referenced": summary.pages_referenced if relayed else None,
        "misses": summary.misses if relayed else None,
        "series": _series(summary),
    }


def section_of(summary: MigrationSummary) -> Section:
    """What a summary has to tell in words."""
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.phases.items())
    return Section(
        f"Migration {summary.id}",
        (
            summary.sentence(),
            f"Started {summary.started}",
            *([f"Phases: {phases}"] if phases else []),
            *(f"{each.severity.value}: {each.message} [{each.code}]" for each in summary.findings),
        ),
    )


def _series(summary: MigrationSummary) -> dict[str, Any]:
    relayed = summary.mode == DMIGRATE
    rows = summary.series.get("source" if relayed else "libvirt") or ()
    begin = _began(summary, rows) if relayed else 0.0
    series: dict[str, Any] = {
        "network": list(_points(rows, "wire_bytes", begin)),
        "volume": list(_points(rows, "volume_bytes", begin)),
    }
    series |= _database_series(summary.series.get("database") or ())
    # libvirt is asked too seldom to tell when the last byte came
    end = _last_growth(series["network"]) if relayed else None
    if end is not None and summary.state == COMPLETED and summary.downtime_ms is not None:
        # The end of QEMU's stream is sent while the guest stands still; nothing comes after it
        series["downtime"] = [end - summary.downtime_ms / 1000, end]
    return series


def _database_series(rows: Sequence[Row]) -> dict[str, Any]:
    """The rates of what an agent has counted, and how quickly the database has answered.

    Without one COMMIT there is no rate of transactions: each statement is one.
    """
    made = {
        "tps": list(_rates(_points(rows, "commits", 0))),
        "qps": list(_rates(_points(rows, "queries", 0))),
        "latency_ms": list(_points(rows, "latency_ms", 0)),
    }
    if not any(rate for _, rate in made["tps"]):
        del made["tps"]
    return {name: points for name, points in made.items() if points}


def _rates(points: Iterable[Sequence[float]]) -> Iterable[list[float]]:
    """Growth a second, in the middle of each two moments."""
    for (begin, before), (end, after) in itertools.pairwise(points):
        if begin < end and before <= after:
            yield [(begin + end) / 2, (after - before) / (end - begin)]


def _began(summary: MigrationSummary, rows: Sequence[Row]) -> float:
    """Seconds from the request to the source relay's first moment, from which its rows count.

    At the latest when it was known to run, and so that libvirt was done only after its last byte.
    """
    last = _last_growth(list(_points(rows, "wire_bytes", 0)))
    seconds = summary.total_s - (last or 0.0)
    if _STARTING in summary.phases:
        names = list(summary.phases)
        before = names[: names.index(_STARTING) + 1]
        seconds = min(seconds, sum(summary.phases[name] for name in before))
    return max(0.0, seconds)


def _points(rows: Iterable[Row], key: str, begin: float) -> Iterable[list[float]]:
    for row in rows:
        moment, value = row.get("t"), row.get(key)
        if isinstance(moment, int | float) and isinstance(value, int | float):
            yield [begin + moment, value]


def _last_growth(points: Sequence[Sequence[float]]) -> float | None:
    last = None
    for before, after in zip(points, points[1:], strict=False):
        if after[1] > before[1]:
            last = after[0]
    return last
