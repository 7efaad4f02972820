# SPDX-License-Identifier: Apache-2.0
"""What the runs say about DMigrate, in sentences: what it gains, and where it does not win."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nova_dmigrate.report.runs import DMIGRATE, PRE_COPY, Group, Run, checked, fell_back, grouped

GAINS, LOSSES = "What DMigrate gains", "Where DMigrate does not win"
#: Within this share two times or throughputs count as equal: runs differ by as much on their own.
_EQUAL = 0.02
#: A downtime is as good as pre-copy's up to 10 % and 50 ms more: one dirty page more or less.
_DOWNTIME_SHARE, _DOWNTIME_MS = 0.10, 50.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sentences, each about one scenario and shape."""

    gains: tuple[str, ...]
    losses: tuple[str, ...]


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare DMigrate with the other modes of the same scenario and shape.

    :param runs: checked ones.
    """
    gains: list[str] = []
    losses: list[str] = []
    for group in grouped(runs):
        run = group.of_mode(DMIGRATE)
        if run is None:
            continue
        others = [other for other in group.runs if other["mode"] != DMIGRATE]
        gains += [f"{group.title}: {text}" for text in _gains(run, others)]
        losses += [f"{group.title}: {text}" for text in _losses(run, group, others)]
    return Comparison(tuple(gains), tuple(losses))


def format_comparison(runs: Sequence[Mapping[str, Any]]) -> str:
    """The same as text, without a last line break; empty if there is nothing to compare.

    :raises ReportError: a run is none.
    """
    said = compare(checked(runs))
    lines: list[str] = []
    for title, sentences in ((GAINS, said.gains), (LOSSES, said.losses)):
        if sentences:
            lines += [f"{title}:", *(f"  {sentence}" for sentence in sentences)]
    return "\n".join(lines)


def _gains(run: Run, others: Sequence[Run]) -> list[str]:
    if not run["completed"] or run["fallback_reason"] is not None:
        return []
    gains = []
    quicker = [other for other in others if _more(other, run, "total_s")]
    if quicker:
        times = ", ".join(
            f"{other['total_s'] / run['total_s']:.2f} times as quick as {other['mode']}"
            for other in quicker
        )
        gains.append(f"{run['total_s']:.1f} s, {times}")
    failed = [other["mode"] for other in others if not other["completed"]]
    if failed:
        gains.append(f"completed, where {' and '.join(failed)} did not")
    return gains


def _losses(run: Run, group: Group, others: Sequence[Run]) -> list[str]:
    losses = []
    if run["lost_commits"]:
        losses.append(f"{run['lost_commits']:.0f} acknowledged commits were lost")
    if run["check_ok"] is False:
        losses.append("the database's check failed")
    if not run["completed"]:
        done = [other["mode"] for other in others if other["completed"]]
        losses.append(f"not completed, where {' and '.join(done)} did" if done else "not completed")
        return losses
    if run["fallback_reason"] is not None:
        losses.append(f"it went {fell_back(run)}")
    for other in others:
        if not other["completed"] or not _known(other, run, "total_s"):
            continue
        ratio = run["total_s"] / other["total_s"]
        if ratio > 1 + _EQUAL:
            losses.append(f"takes {ratio:.2f} times as long as {other['mode']}")
        elif ratio >= 1 - _EQUAL:
            losses.append(f"no quicker than {other['mode']}")
    stock = group.of_mode(PRE_COPY)
    if stock is not None and stock["completed"] and _known(stock, run, "downtime_ms"):
        allowed = stock["downtime_ms"] * (1 + _DOWNTIME_SHARE) + _DOWNTIME_MS
        if run["downtime_ms"] > allowed:
            losses.append(
                f"downtime of {run['downtime_ms']:.0f} ms, pre-copy {stock['downtime_ms']:.0f} ms"
            )
    for key, when in (("tps_during", "during"), ("tps_after", "after")):
        losses += [
            f"{run[key]:.0f} transactions a second {when} the migration,"
            f" {other['mode']} {other[key]:.0f}"
            for other in others
            if _more(other, run, key)
        ]
    return losses


def _known(one: Run, other: Run, key: str) -> bool:
    return bool(one[key]) and bool(other[key])


def _more(one: Run, other: Run, key: str) -> bool:
    """Whether a completed run has clearly more of something than another one."""
    if not one["completed"] or not _known(one, other, key):
        return False
    return bool(one[key] > other[key] * (1 + _EQUAL))
