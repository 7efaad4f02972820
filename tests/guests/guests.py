# SPDX-License-Identifier: Apache-2.0
"""What tests with a whole database guest have in common."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from testtools.content import text_content

from nova_dmigrate.buffermap import BufferMap, MapLimits
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.client import AgentClient
from tests import base
from tests.fetched_map import fetch_map
from tests.lab import database_guest, database_image, processes, relays
from tests.lab.database_guest import SERIAL, DatabaseGuest, DatabaseSpec
from tests.lab.relays import PATIENCE, RelayPair, SavedMap, wait_until

# Rows that the guest's server changes in a second. Each dirties some three of its 3000 frames.
LIGHT, HEAVIER = 1, 5
_SETTINGS = (
    "SELECT @@innodb_max_dirty_pages_pct, @@innodb_max_dirty_pages_pct_lwm,"
    " @@innodb_io_capacity, @@innodb_io_capacity_max"
)


class DatabaseGuestTestCase(base.TestCase):
    """Tests of one class share a guest. A migration takes it to another QEMU for good."""

    LAYOUT: ClassVar[dict[str, Any]]
    directory: ClassVar[Path]
    _guest: ClassVar[DatabaseGuest | None]
    _class: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(database_image.unavailable())
        cls._guest = None
        cls._class = contextlib.ExitStack()
        try:
            cls.directory = cls._class.enter_context(processes.workspace())
            cls.boot()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        cls.replace_guest(None)
        cls._class.close()
        super().tearDownClass()

    @classmethod
    def boot(cls) -> DatabaseGuest:
        """The running guest; a new one, with a new volume, if there is none."""
        if cls._guest is None:
            disk = database_guest.create_volume(cls.directory / "volume.raw")
            cls._guest = DatabaseGuest.boot(DatabaseSpec(disk=disk, **cls.LAYOUT))
        return cls._guest

    @classmethod
    def replace_guest(cls, guest: DatabaseGuest | None) -> None:
        """The guest has moved, or is no good any more."""
        if cls._guest is not None:
            cls._guest.close()
        cls._guest = guest

    def setUp(self) -> None:
        super().setUp()
        self.guest = self.boot()
        # What a failed test leaves behind is not the next one's trouble.
        self.addOnException(lambda _: type(self).replace_guest(None))

    def agent(self) -> AgentClient:
        client = self.guest.agent()
        self.addCleanup(client.close)
        return client

    @contextlib.contextmanager
    def work(self, changes: int) -> Iterator[None]:
        """The guest's server changes so many rows a second; it has begun to."""
        self.guest.sql(
            f"UPDATE pace SET changes = {changes}, done = 0; SET GLOBAL event_scheduler = ON"
        )
        wait_until(lambda: self.rounds() > 2, "the server works")
        yield
        self.guest.sql("SET GLOBAL event_scheduler = OFF")

    def rounds(self) -> int:
        """How often the server has done its work of a second."""
        return int(self.guest.sql("SELECT done FROM pace"))

    def settings(self) -> str:
        """What a preparation changes."""
        return self.guest.sql(_SETTINGS)

    def status(self, name: str) -> int:
        return int(self.guest.sql(f"SHOW GLOBAL STATUS LIKE '{name}'").split()[1])

    def prepare(self, client: AgentClient) -> messages.LeaseState:
        """Have dirty pages written; the state when that is over."""
        begun = client.prepare(dirty_share=0.01, seconds=60, lease_seconds=300)

        def over() -> messages.LeaseState | None:
            state = client.renew(begun.lease_id, 300)
            time.sleep(0.2)
            return None if state.state == "flushing" else state

        state: messages.LeaseState = wait_until(over, "dirty pages are written")
        return state

    def fetch_map(self, client: AgentClient) -> BufferMap:
        limits = MapLimits(max_guest_page=self.guest.spec.ram_bytes // 4096 - 1)
        built = fetch_map(client, limits)
        self.assertEqual([SERIAL], [volume.volume_id for volume in built.volumes])
        return built

    def map_and_compare(self, client: AgentClient, least: float = 0.3) -> float:
        """Share of the pages of a new map that equal their blocks a moment later.

        Those that the server has changed since the map was asked for do not count: how many they
        are is a matter of how long the map takes, and how long QEMU takes to stop the guest.

        :param least: share of the pool's pages that the map must have; dirty ones are left out.
        """
        began = self.rounds()
        before = self.guest.ram.copy()
        built = self.fetch_map(client)
        self.guest.stop()
        (volume,) = built.volumes
        guest, _ = volume.pages()
        still = database_guest.same_pages(before, guest, self.guest.ram, guest)
        equal = self.guest.equal_pages(built, self.guest.ram)
        self.guest.cont()
        held = 4 * self.status("Innodb_buffer_pool_pages_data")
        share = float(equal[still].mean())
        found = (
            f"{built.page_count} pages mapped of {held}, equal {equal.mean():.4f},"
            f" unchanged {still.mean():.4f}, of those equal {share:.4f};"
            f" {self.rounds() - began} rounds of work meanwhile"
        )
        self.addDetail("shares", text_content(found))
        self.assertGreater(built.page_count, least * held, found)
        self.assertGreater(still.mean(), 0.5, found)
        return share

    def migrate(self, built: BufferMap) -> None:
        """Move the guest through two relays with its map; ``self.guest`` is then the other QEMU."""
        saved = SavedMap(self.directory / "map", self.directory / "layout")
        built.save(saved.buffer_map)
        relays.save_layout(self.guest, saved.memory_layout)
        with contextlib.ExitStack() as stack:
            destination = DatabaseGuest.start_destination(self.guest.spec)
            stack.callback(destination.close)
            incoming = destination.directory / "incoming"
            destination.listen(incoming)
            volumes = {SERIAL: self.guest.spec.disk}
            with RelayPair(
                self.directory / "relays", incoming, volumes=volumes, saved=saved
            ) as pair:
                state = relays.migrate_through_relays(self.guest, pair, downtime_ms=2000)
                self.assertEqual("completed", state["status"], f"{state}\n{pair.last_words()}")
                self.assertEqual((0, 0), pair.wait(), pair.last_words())
            destination.wait_incoming(PATIENCE)
            stack.pop_all()
        self.replace_guest(destination)
        self.guest = destination
        destination.cont()
        summary = pair.source.summary()
        self.assertEqual("delivered", summary["state"])
        self.assertIsNone(summary["pass_through"])
        referenced = summary["referenced_pages"]
        self.assertGreater(referenced, 0.9 * built.page_count)
        self.assertLess(sum(summary["misses"].values()), 0.05 * referenced, summary["misses"])
        self.assertGreater(summary["volume_bytes"], 0.5 * referenced * 4096)

    def checks(self) -> list[str]:
        """The verdicts on the tables, whose pages the server reads from where it has them."""
        lines = self.guest.sql("CHECK TABLE t1, t2 EXTENDED", timeout=240).splitlines()
        return [line.split("\t")[-1] for line in lines]


def read_pages(path: Path) -> NDArray[np.uint8]:
    """Memory that a monitor has saved, (pages, 4096)."""
    return np.fromfile(path, np.uint8).reshape(-1, database_guest.PAGE_SIZE)
