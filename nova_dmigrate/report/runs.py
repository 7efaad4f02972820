# SPDX-License-Identifier: Apache-2.0
"""A run: what one migration cost, with the keys that ``report.json`` has for it.

A run may have ``series`` as well, which are plotted and not kept in ``report.json``. All times are
seconds since the migration began (before it they are negative):

``network``, ``volume``
    ``[[t, bytes], ...]``, bytes that each of the two has carried until then.
``tps``
    ``[[t, transactions a second], ...]``
``qps``
    ``[[t, statements a second], ...]``
``latency_ms``
    ``[[t, milliseconds], ...]``
``downtime``
    ``[begin, end]`` of the time for which no client was served.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nova_dmigrate import exception

Run = dict[str, Any]

DMIGRATE, PRE_COPY = "dmigrate", "pre-copy"
#: The modes in the order of reports; ``ordinary`` is one of which only that is known.
MODES = (PRE_COPY, "auto-converge", "post-copy", "multifd-zstd", "ordinary", DMIGRATE)
#: Series of pairs; ``downtime`` is the only other one.
SERIES = ("network", "volume", "tps", "qps", "latency_ms")

_TEXT, _FLAG, _NUMBER = "a text", "true or false", "a number"
#: What ``report.json`` says of a run, in its order. This is stable.
_FIELDS = {
    "scenario": _TEXT,
    "mode": _TEXT,
    "database": _TEXT,
    "network_mb_s": _NUMBER,
    "volume_mb_s": _NUMBER,
    "pool_share": _NUMBER,
    "completed": _FLAG,
    "fallback_reason": _TEXT,
    "total_s": _NUMBER,
    "ideal_s": _NUMBER,
    "efficiency": _NUMBER,
    "speedup_vs_precopy": _NUMBER,
    "downtime_ms": _NUMBER,
    "guest_bytes": _NUMBER,
    "wire_bytes": _NUMBER,
    "volume_bytes": _NUMBER,
    "pages_referenced": _NUMBER,
    "misses": _NUMBER,
    "tps_before": _NUMBER,
    "tps_during": _NUMBER,
    "tps_after": _NUMBER,
    "recover_90_s": _NUMBER,
    "lost_commits": _NUMBER,
    "check_ok": _FLAG,
}
_REQUIRED = ("scenario", "mode", "completed")
_SHAPE = ("scenario", "database", "network_mb_s", "volume_mb_s", "pool_share")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their mode alone, in the order of `MODES`."""

    title: str
    runs: tuple[Run, ...]

    def of_mode(self, mode: str) -> Run | None:
        """The first run of that mode; None if there is none."""
        return next((run for run in self.runs if run["mode"] == mode), None)

    def names(self) -> list[str]:
        """What to call each run: its mode, numbered where that comes several times."""
        modes = [run["mode"] for run in self.runs]
        return [
            f"{mode} ({modes[: place + 1].count(mode)})" if modes.count(mode) > 1 else mode
            for place, mode in enumerate(modes)
        ]


def checked(runs: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs with every key of ``report.json`` in its order, None for what was not measured.

    ``efficiency`` and ``speedup_vs_precopy`` are reckoned where they are not given and can be.

    :raises ReportError: a key is not known, is missing, or has a value of another kind.
    """
    made = [_check(number, run) for number, run in enumerate(runs, start=1)]
    for group in grouped(made):
        stock = group.of_mode(PRE_COPY)
        for run in group.runs:
            if run["efficiency"] is None:
                run["efficiency"] = _ratio(run, run["ideal_s"], run["total_s"])
            if run["speedup_vs_precopy"] is None and stock is not None and stock["completed"]:
                run["speedup_vs_precopy"] = _ratio(run, stock["total_s"], run["total_s"])
    return made


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Checked runs by scenario and shape, each in the order in which it first comes."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in _SHAPE), []).append(run)
    return [
        Group(_title(members[0]), tuple(sorted(members, key=lambda run: MODES.index(run["mode"]))))
        for members in groups.values()
    ]


def fell_back(run: Run) -> str:
    """Why the volumes were not used, through the relays or without them; empty if they were."""
    if run["fallback_reason"] is None:
        return ""
    # Of several guests that are one run, some may have used theirs
    how = "partly without volumes" if run.get("pages_referenced") else "without volumes"
    return f"{how}: {run['fallback_reason']}"


def without_series(run: Run) -> Run:
    """What ``report.json`` has of a checked run."""
    return {name: run[name] for name in _FIELDS}


def _title(run: Run) -> str:
    parts = [run["scenario"]]
    if run["database"]:
        parts.append(run["database"])
    for name in ("network", "volume"):
        if run[f"{name}_mb_s"] is not None:
            parts.append(f"{name} {run[f'{name}_mb_s']:g} MB/s")
    if run["pool_share"] is not None:
        parts.append(f"pool {100 * run['pool_share']:.0f} % of RAM")
    return ", ".join(parts)


def _ratio(run: Run, dividend: float | None, divisor: float | None) -> float | None:
    if not run["completed"] or dividend is None or not divisor:
        return None
    return round(dividend / divisor, 4)


def _check(number: int, run: Mapping[str, Any]) -> Run:
    unknown = set(run) - set(_FIELDS) - {"series"}
    if unknown:
        raise _error(number, f"{', '.join(sorted(map(str, unknown)))}: no such key")
    for name in _REQUIRED:
        if run.get(name) is None:
            raise _error(number, f"{name} is missing")
    for name, kind in _FIELDS.items():
        if not _is_a(kind, run.get(name)):
            raise _error(number, f"{name} is {run[name]!r:.60}, not {kind}")
    if run["mode"] not in MODES:
        raise _error(number, f"mode is {run['mode']!r:.60}, not one of {', '.join(MODES)}")
    series = run.get("series") or {}
    _check_series(number, series)
    return {**{name: run.get(name) for name in _FIELDS}, "series": series}


def _is_a(kind: str, value: object) -> bool:
    if value is None:
        return True
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _FLAG:
        return isinstance(value, bool)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_series(number: int, series: object) -> None:
    if not isinstance(series, Mapping):
        raise _error(number, "series is no object")
    for name, points in series.items():
        if name == "downtime":
            fits = points is None or _is_pair(points)
        elif name in SERIES:
            fits = isinstance(points, Sequence) and all(map(_is_pair, points))
        else:
            raise _error(number, f"series {name}: no such series")
        if not fits:
            raise _error(number, f"series {name} does not consist of pairs of numbers")


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(each is not None and _is_a(_NUMBER, each) for each in value)
    )


def _error(number: int, reason: str) -> exception.ReportError:
    return exception.ReportError(reason=f"run {number}: {reason}")
