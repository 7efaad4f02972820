# SPDX-License-Identifier: Apache-2.0
"""The results for the eye."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

#: Sections of bench.json, and which of their keys stand in the table under which heading.
_TABLES: Sequence[tuple[str, str, Sequence[tuple[str, str]]]] = (
    (
        "relay",
        "Relay pair (GB of guest memory; CPU of both relays; socat alike, with or without TLS)",
        (
            ("kind", "pages"),
            ("tls", "TLS"),
            ("gb_per_s", "GB/s"),
            ("ratio_to_socat", "of socat"),
            ("cpu_s_per_gb", "CPU s/GB"),
            ("source_cpu_s_per_gb", "source"),
            ("destination_cpu_s_per_gb", "destination"),
            ("referenced_share", "by reference"),
        ),
    ),
    (
        "socat",
        "socat pair",
        (("kind", "pages"), ("tls", "TLS"), ("gb_per_s", "GB/s"), ("cpu_s_per_gb", "CPU s/GB")),
    ),
    (
        "efficiency",
        "Efficiency: ideal by measured time on a shaped link; stock: the same guest without relays",
        (
            ("network_mb_s", "network MB/s"),
            ("volume_mb_s", "volume MB/s"),
            ("mapped_share", "mapped"),
            ("stock_s", "stock s"),
            ("ideal_s", "ideal s"),
            ("measured_s", "measured s"),
            ("efficiency", "efficiency"),
            ("downtime_ms", "downtime ms"),
            ("stock_downtime_ms", "stock ms"),
        ),
    ),
    (
        "agent",
        "Agent: buffer maps of a native MariaDB, by size of its pool",
        (
            ("pool_gib", "pool GiB"),
            ("map_s", "map s"),
            ("map_s_per_gib", "s/GiB"),
            ("cpu_s_per_gib", "CPU s/GiB"),
            ("ready_s", "with chunks s"),
            ("peak_rss_mb", "peak RSS MB"),
            ("mapped_pages", "mapped pages"),
            ("wire_bytes_per_page", "wire B/page"),
            ("tps", "tps"),
            ("tps_change", "tps change"),
        ),
    ),
    (
        "evacuation",
        "A database that died under load and was started again: until 90 % is back",
        (
            ("mode", "pool filled by"),
            ("first_10_s", "throughput of 10 s"),
            ("first_30_s", "of 30 s"),
            ("seconds", "throughput s"),
            ("throughput_of_cold", "of cold"),
            ("pool_seconds", "pool s"),
            ("pool_of_cold", "of cold"),
        ),
    ),
)
_PAIRS = (
    ("source", "Source relay, in process, one core"),
    ("ordinary", "Ordinary guest: empty map, 1 Gbit/s"),
)


def render(results: Mapping[str, Any]) -> str:
    """A table for each section that the results have."""
    parts = []
    for name, title, columns in _TABLES:
        if results.get(name):
            parts.append(f"{title}\n{grid(results[name], columns)}")
    for name, title in _PAIRS:
        if results.get(name):
            lines = [f"  {key.replace('_', ' ')}: {_text(v)}" for key, v in results[name].items()]
            parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def grid(rows: Iterable[Row], columns: Sequence[tuple[str, str]]) -> str:
    """A table of the rows; ``columns``: keys and headings."""
    cells = [[heading for _, heading in columns]]
    cells += [[_text(row.get(key, "")) for key, _ in columns] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
