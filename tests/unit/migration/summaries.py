# SPDX-License-Identifier: Apache-2.0
"""Summaries as migrations leave them, for tests."""

import dataclasses
from typing import Any

from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.migration.summary import MigrationSummary, Row

MIB = 1 << 20

RELAYED = MigrationSummary(
    id="20261125-170301-abcdef",
    instance="5b1a4e0e-6c53-4d7c-9f3e-3c1f4f0d9a11",
    domain="db1",
    source="compute1",
    destination="compute2",
    mode="dmigrate",
    state="completed",
    started="2026-11-25T17:03:01+00:00",
    total_s=14.52,
    downtime_ms=87,
    guest_bytes=2048 * MIB,
    wire_bytes=620 * MIB,
    saved_bytes=310 * MIB,
    volume_bytes=930 * MIB,
    pages_referenced=238080,
    misses=1204,
    mapped_pages=240000,
    phases={"prepare": 2.1, "map": 1.4, "bulk": 9.8, "switchover": 0.2},
    findings=(Finding("cached-disk", Severity.NOTE, "vdb is cached by the host"),),
    libvirt={"memory_dirty_rate": 1200},
)
ORDINARY = dataclasses.replace(
    RELAYED,
    id="20261125-180000-000001",
    mode="ordinary",
    fallback_reason="agent-unreachable",
    fallback_message="the agent of db1 does not answer",
    wire_bytes=2100 * MIB,
    volume_bytes=0,
    pages_referenced=0,
    misses=0,
)


def series(seconds: int = 10, network: int = 50 * MIB, volume: int = 90 * MIB) -> list[Row]:
    """Ten rows a second of a source relay: cumulative bytes at a steady pace, in bytes a second."""
    rows: list[Row] = []
    for step in range(1, 10 * seconds + 1):
        moment = step / 10
        row: dict[str, Any] = {"t": moment, "guest_bytes": round(2 * network * moment)}
        row["wire_bytes"] = round(network * moment)
        row["volume_bytes"] = round(volume * moment)
        rows.append(row)
    return rows
