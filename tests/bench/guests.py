# SPDX-License-Identifier: Apache-2.0
"""Migrations of one real guest over a shaped link, directly and through relays, and what they took.

The bench plays the orchestration: through relays QEMU may pause the guest for 1 ms at most until
every reference is resolved, then for 300 ms; a direct migration has 300 ms from the start.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab import relays
from tests.lab.beats import HeartbeatRecorder
from tests.lab.guest import Guest, GuestError, GuestSpec
from tests.lab.hosts import HostPair
from tests.lab.image import create_disk

DOWNTIME_MS = 300
_PORT = 4444
_TIMEOUT = 300.0
#: Bytes of an Ethernet frame, and of TCP's payload in it.
_FRAME, _SEGMENT = 1514, 1448
#: Seconds of heartbeats before and after, so that a gap at either end is seen.
_MARGIN = 0.5


@dataclass(frozen=True)
class Outcome:
    """One migration: seconds until QEMU says completed, largest gap between heartbeats, bytes that
    the source host sent over the link, and the relays' summaries.
    """

    seconds: float
    downtime_ms: float
    link_bytes: int
    source: dict[str, Any] = field(default_factory=dict)
    destination: dict[str, Any] = field(default_factory=dict)


class Lab:
    """A booted guest on one of two hosts; it migrates again and again. A context manager."""

    def __init__(
        self, directory: Path, *, ram_mb: int, fill_mb: int, mapped: int, disk_mb: int
    ) -> None:
        disk = create_disk(directory / "disk.raw", disk_mb)
        self.spec = GuestSpec(disk=disk, ram_mb=ram_mb, fill_mb=fill_mb, mapped=mapped)
        self._directory = directory
        self._pair = HostPair()
        self._number = 0
        try:
            self._source = Guest.start_source(self.spec, host=self._pair.a, timeout=300)
            self.saved = relays.save_map(self._source, directory / "map")
            self._source.command("beat on")
        except BaseException:
            self._pair.close()
            raise

    def __enter__(self) -> "Lab":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._source.close()
        self._pair.close()

    def dirty(self, share: int, mb_per_s: float) -> None:
        """Let the guest rewrite a share (percent) of its frames at a rate."""
        self._source.command(f"dirty {share} {mb_per_s}")

    def shape(self, network: float) -> None:
        """Bytes a second that TCP can carry: the link gets more by what its headers take."""
        self._pair.shape(network * _FRAME / _SEGMENT)

    def direct(self) -> Outcome:
        """Migrate as stock QEMU does, over TCP."""
        with self._destination() as destination:
            uri = destination.listen(f"tcp:{self._pair.b.address}:{_PORT}")

            def migrate() -> dict[str, Any]:
                relays.prepare(self._source, DOWNTIME_MS)
                self._source.migrate(uri)
                return self._source.wait_migration(_TIMEOUT)

            return self._measured(destination, migrate)

    def relayed(self, *, use_map: bool = True, **options: object) -> Outcome:
        """Migrate through two relays; options as of ``relays.RelayPair``."""
        self._number += 1
        with self._destination() as destination:
            incoming = destination.directory / "incoming.sock"
            destination.listen(incoming)
            with relays.RelayPair(
                self._directory / f"run-{self._number}",
                incoming,
                volumes={relays.VOLUME: self.spec.disk} if use_map else None,
                saved=self.saved if use_map else None,
                hosts=(self._pair.a, self._pair.b),
                **options,
            ) as pair:

                def migrate() -> dict[str, Any]:
                    return relays.migrate_through_relays(self._source, pair, DOWNTIME_MS, _TIMEOUT)

                outcome = self._measured(destination, migrate)
                pair.wait()
                return Outcome(
                    outcome.seconds,
                    outcome.downtime_ms,
                    outcome.link_bytes,
                    pair.source.summary(),
                    pair.destination.summary(),
                )

    def _destination(self) -> Guest:
        destination = Guest.start_destination(self.spec, host=self._pair.b)
        # While a migration comes in, "cont" lets the guest run as soon as it is there.
        destination.cont()
        return destination

    def _measured(self, destination: Guest, migrate: Any) -> Outcome:
        with HeartbeatRecorder(self._source, destination) as beats:
            time.sleep(_MARGIN)
            begin = time.monotonic()
            sent = self._pair.counters()[0]
            state = migrate()
            if state["status"] != "completed":
                raise GuestError(f"the migration ended as {state}")
            destination.wait_incoming()
            time.sleep(_MARGIN)
            gap = beats.largest_gap(since=begin)
            sent = self._pair.counters()[0] - sent
        destination.kill()
        self._source.cont()
        return Outcome(state["total-time"] / 1000, gap * 1000, sent)
