# SPDX-License-Identifier: Apache-2.0
"""The results for the eye."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.bench.table import grid

Row = Mapping[str, Any]

_MIB = 1 << 20

_MAPS = (
    ("pool_gib", "pool GiB"),
    ("layout", "memory"),
    ("pages", "pages"),
    ("build", "search CPU s"),
    ("assemble", "assemble s"),
    ("build_s", "built s"),
    ("wire", "wire MB"),
    ("page_wire", "B/page"),
    ("fetch", "fetch s"),
    ("agent", "agent MB"),
    ("host", "host MB"),
    ("peak", "peak B/page"),
    ("refused", "refused"),
)
_ALONE = (
    ("pool_gib", "pool GiB"),
    ("layout", "memory"),
    ("load_s", "load s"),
    ("serialise_s", "serialise s"),
    ("place_s", "place s"),
    ("lookups", "lookups/s"),
    ("source", "source MB"),
    ("source_page", "B/page"),
    ("resolved", "resolved/s"),
    ("destination", "destination MB"),
    ("destination_page", "B/page"),
    ("refused", "refused"),
)
_RELAYS = (
    ("pool_gib", "pool GiB"),
    ("layout", "memory"),
    ("load_s", "load s"),
    ("hand_over_s", "hand over s"),
    ("source", "source MB"),
    ("source_page", "B/page"),
    ("destination", "destination MB"),
    ("destination_page", "B/page"),
    ("refused", "refused"),
)
_MESSAGES = (
    ("request", "request"),
    ("bytes_in", "bytes in"),
    ("bytes_out", "bytes out"),
    ("ms", "ms"),
    ("broker_cpu_ms", "broker CPU ms"),
)
_EVACUATIONS = (
    ("evacuation", "evacuation"),
    ("seconds", "all s"),
    ("guest_s", "median s"),
    ("slowest_guest_s", "slowest s"),
    ("volume_share", "from volumes"),
    ("storage", "storage GB/s"),
    ("broker", "broker MB/s"),
    ("maps", "of maps"),
    ("messages_peak", "messages/s"),
    ("fetches_peak", "maps at once"),
    ("jain_in_host", "Jain in host"),
    ("jain_of_hosts", "of hosts"),
    ("ordinary", "ordinary"),
)


def render(results: Mapping[str, Any]) -> str:
    """A table for each part that the results have."""
    return "\n\n".join(_tables(results))


def _tables(results: Mapping[str, Any]) -> Iterator[str]:
    if "maps" in results:
        yield _titled("Maps: made and fetched", map(_made, results["maps"]), _MAPS)
        rows = [row for row in results["maps"] if "refused" not in row]
        yield _titled("Maps: held and looked up", map(_alone, rows), _ALONE)
        yield _titled("Maps: handed over by the relays", map(_relayed, rows), _RELAYS)
    if "messages" in results:
        rows = [{"request": name, **row} for name, row in results["messages"].items()]
        yield _titled("Requests at the broker, with their answers", map(_short, rows), _MESSAGES)
    if "evacuations" in results:
        rows = [_evacuated(row) for row in results["evacuations"]]
        yield _titled("Evacuations (simulated)", rows, _EVACUATIONS)


def _titled(title: str, rows: Any, columns: Sequence[tuple[str, str]]) -> str:
    return f"{title}\n{grid(rows, columns)}"


def _made(row: Row) -> Row:
    if "refused" in row:
        return row
    agent, host = row["agent"], row["host"]
    pages = host["pages"]
    return _short(
        {
            "pool_gib": f"{row['pool_gib']:g}",
            "layout": row["layout"],
            "pages": pages,
            "build": agent["search_cpu_s"],
            "assemble": agent["assemble_s"],
            "build_s": host["build_s"],
            "wire": agent["wire_bytes"] / 1e6,
            "page_wire": agent["wire_bytes"] / pages,
            "fetch": host["fetch_s"],
            "agent": agent["peak_mb"],
            "host": host["peak_mb"],
            "peak": _page_bytes(host["peak_mb"] - host["program_mb"], pages),
        }
    )


def _alone(row: Row) -> Row:
    pages = row["host"]["pages"]
    found: dict[str, Any] = {"pool_gib": f"{row['pool_gib']:g}", "layout": row["layout"]}
    source, destination = row["source"], row["destination"]
    refused = [each["refused"] for each in (source, destination) if "refused" in each]
    found["refused"] = "; ".join(refused)
    if "refused" not in source:
        found |= {key: source[key] for key in ("load_s", "serialise_s", "place_s")}
        found["lookups"] = source["lookups_per_s"]
    if "refused" not in destination:
        found["resolved"] = destination["resolved_per_s"]
    for role in ("source", "destination"):
        if "refused" not in row[role]:
            found[role] = row[role]["peak_mb"]
            found[f"{role}_page"] = _page_bytes(found[role] - row[role]["program_mb"], pages)
    return _short(found)


def _relayed(row: Row) -> Row:
    pages, relays = row["host"]["pages"], row["relays"]
    found: dict[str, Any] = {"pool_gib": f"{row['pool_gib']:g}", "layout": row["layout"]}
    if "refused" in relays:
        found["refused"] = relays["refused"]
    else:
        found |= {"load_s": relays["load_s"], "hand_over_s": relays["hand_over_s"]}
        for role in ("source", "destination"):
            found[role] = relays[f"{role}_peak_mb"]
            found[f"{role}_page"] = _page_bytes(found[role] - row["host"]["program_mb"], pages)
    return _short(found)


def _page_bytes(megabytes: float, pages: int) -> float:
    return megabytes * 1e6 / pages


def _evacuated(row: Row) -> Row:
    return _short(
        {
            **row,
            "storage": row["storage_peak"] / 1e9,
            "broker": row["broker_peak"] / 1e6,
            "maps": row["broker_map_share"],
            "ordinary": ", ".join(f"{count} {why}" for why, count in row["fallbacks"].items()),
        }
    )


def _short(row: Row) -> Row:
    """Three digits say as much as there is to say."""
    return {
        key: float(f"{value:.3g}") if isinstance(value, float) else value
        for key, value in row.items()
    }
