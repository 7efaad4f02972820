# SPDX-License-Identifier: Apache-2.0
"""Runs for the tests of reports."""

from typing import Any

MB = 10**6
Run = dict[str, Any]


def make_run(mode: str = "dmigrate", **changes: Any) -> Run:
    """A run in which everything was measured; DMigrate's is the quickest."""
    relayed = mode == "dmigrate"
    run = {
        "scenario": "oltp_read_write",
        "mode": mode,
        "database": "mysql 9.7",
        "network_mb_s": 50,
        "volume_mb_s": 50,
        "pool_share": 0.75,
        "completed": True,
        "fallback_reason": None,
        "total_s": 14.0 if relayed else 28.0,
        "ideal_s": 12.6 if relayed else None,
        "downtime_ms": 180,
        "guest_bytes": 1400 * MB,
        "wire_bytes": 700 * MB if relayed else 1400 * MB,
        "volume_bytes": 650 * MB if relayed else 0,
        "pages_referenced": 160000 if relayed else 0,
        "misses": 321 if relayed else 0,
        "tps_before": 100.0,
        "tps_during": 70.0,
        "tps_after": 101.0,
        "recover_90_s": 0.4,
        "lost_commits": 0,
        "check_ok": True,
    }
    return {**run, **changes}


def make_series(seconds: float = 14.0, network: int = 50 * MB, volume: int = 45 * MB) -> Run:
    """Series of a run: steady rates in bytes a second, a load that goes on before and after."""
    moments = [step / 10 for step in range(round(10 * seconds) + 1)]
    whole = range(-5, round(seconds) + 10)
    return {
        "network": [[moment, network * moment] for moment in moments],
        "volume": [[moment, volume * moment] for moment in moments],
        "tps": [[second, 70 if 0 <= second < seconds else 100] for second in whole],
        "latency_ms": [[second, 180 if second == round(seconds) else 10] for second in whole],
        "downtime": [seconds - 0.2, seconds - 0.02],
    }


def three_runs() -> list[Run]:
    """Pre-copy, post-copy and DMigrate, with series."""
    return [
        make_run("pre-copy", series=make_series(28.0, volume=0)),
        make_run("post-copy", total_s=25.0, tps_during=25.0, series=make_series(25.0, volume=0)),
        make_run(series=make_series()),
    ]
