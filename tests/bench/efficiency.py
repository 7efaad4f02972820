# SPDX-License-Identifier: Apache-2.0
"""Part ``efficiency``: how near a migration through relays comes to the best possible time."""

import sys
from pathlib import Path
from typing import Any

from tests.bench.guests import Lab, Outcome

PAGE = 4096
_MIB = 1 << 20
#: The guest rewrites one percent of its filled memory, 1 MB/s: idle but alive.
_DIRTY = (1, 1.0)


def bytes_by_need(source: dict[str, Any]) -> tuple[int, int]:
    """(R, P) of a source relay's summary, as they turned out in that run.

    R: pages that only the network could bring. All that went raw, once for each time that QEMU sent
    them, without the mapped ones that went raw for want of room in the window; and the mapped ones
    that the volume did not hold any more.

    P: pages that the volume could bring: referenced and found, or mapped and without room.
    """
    full = source["window_full_pages"]
    changed = source["misses"].get("changed", 0)
    network = source["raw_pages"] - full + changed
    volume = source["referenced_pages"] - changed + full
    return network * PAGE, volume * PAGE


def ideal_seconds(source: dict[str, Any], network: float, volume: float) -> float:
    """T*: the network busy all the time, and so is the volume unless the network alone decides."""
    only_network, either = bytes_by_need(source)
    return max(only_network / network, (only_network + either) / (network + volume))


def row(shape: tuple[int, int], stock: Outcome, relayed: Outcome) -> dict[str, Any]:
    """One row ``efficiency`` of bench.json."""
    network, volume = shape[0] * 1e6, shape[1] * 1e6
    source, destination = relayed.source, relayed.destination
    only_network, either = bytes_by_need(source)
    ideal = ideal_seconds(source, network, volume)
    return {
        "network_mb_s": shape[0],
        "volume_mb_s": shape[1],
        "mapped_share": round(either / (only_network + either), 3),
        "stock_s": round(stock.seconds, 3),
        "ideal_s": round(ideal, 3),
        "measured_s": round(relayed.seconds, 3),
        "efficiency": round(ideal / relayed.seconds, 3),
        "downtime_ms": round(relayed.downtime_ms, 1),
        "stock_downtime_ms": round(stock.downtime_ms, 1),
        "network_mb": round(only_network / 1e6, 1),
        "mapped_mb": round(either / 1e6, 1),
        "link_mb": round(relayed.link_bytes / 1e6, 1),
        "stock_link_mb": round(stock.link_bytes / 1e6, 1),
        "volume_read_mb": round(destination["volume_bytes"] / 1e6, 1),
        "referenced_pages": source["referenced_pages"],
        "window_full_pages": source["window_full_pages"],
        "copies_unasked": source["copies_unasked"],
        "misses": source["misses"],
        "resent_pages": source["resent_pages"],
        "peak_window_pages": source["peak_window_pages"],
        "passes": source["passes"],
        "seconds": source["seconds"],
        "destination_seconds": destination["seconds"],
    }


def measure(directory: Path, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows ``efficiency``: at each shape the same guest, first directly, then through relays."""
    rows = []
    with Lab(directory, ram_mb=1536, fill_mb=1300, mapped=60, disk_mb=1024) as lab:
        lab.dirty(*_DIRTY)
        # The first migration of a guest takes QEMU longer to begin; it is nobody's.
        lab.direct()
        for shape in shapes:
            lab.shape(shape[0] * 1e6)
            stock = lab.direct()
            relayed = lab.relayed(volume__bandwidth=shape[1] * 1e6 / _MIB)
            rows.append(row(shape, stock, relayed))
            print(f"{shape}: efficiency {rows[-1]['efficiency']}", file=sys.stderr, flush=True)
    return rows
