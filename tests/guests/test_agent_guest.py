# SPDX-License-Identifier: Apache-2.0
"""The agent in a real guest, asked by the host over a virtio-serial port.

What the guest's map claims is checked from outside: QEMU is stopped, and each mapped page of the
guest's memory is compared with its block of the volume, of which the guest alone knows the
partition table, the logical volumes and the file system.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from nova_dmigrate.buffermap import BufferMap, MapLimits
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.client import AgentClient
from tests import base
from tests.lab import database_guest, database_image, processes, relays
from tests.lab.database_guest import SERIAL, DatabaseGuest, DatabaseSpec
from tests.lab.relays import PATIENCE, RelayPair, SavedMap, wait_until

SETTINGS = (
    "SELECT @@innodb_max_dirty_pages_pct, @@innodb_max_dirty_pages_pct_lwm,"
    " @@innodb_io_capacity, @@innodb_io_capacity_max"
)
# Rows that the guest's server changes in a second. Each dirties some three of its 3000 frames, here
# and there, so these are 0.1 and 0.5 % of the pool; a busy host may take seconds to stop the guest.
LIGHT, HEAVIER = 1, 5


class DatabaseGuestTestCase(base.TestCase):
    """Tests of one class share a guest. A migration takes it to another QEMU for good."""

    LAYOUT: ClassVar[dict[str, Any]]
    directory: ClassVar[Path]
    _guest: ClassVar[DatabaseGuest | None]
    _class: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        reason = database_image.unavailable()
        if reason is not None:
            raise cls.skipException(reason)
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
        wait_until(lambda: int(self.guest.sql("SELECT done FROM pace")) > 2, "the server works")
        yield
        self.guest.sql("SET GLOBAL event_scheduler = OFF")

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
        built = client.fetch_map(limits)
        self.assertEqual([SERIAL], [volume.volume_id for volume in built.volumes])
        return built

    def map_and_compare(self, client: AgentClient, least: float = 0.3) -> float:
        """Share of the pages of a new map that equal their blocks a moment later.

        :param least: share of the pool's pages that the map must have; dirty ones are left out.
        """
        built = self.fetch_map(client)
        self.guest.stop()
        share = self.guest.equal_share(built)
        self.guest.cont()
        held = 4 * self.status("Innodb_buffer_pool_pages_data")
        self.assertGreater(built.page_count, least * held)
        return share


class LayoutTests(DatabaseGuestTestCase):
    """What holds on every layout."""

    def test_the_agent_describes_its_guest_over_the_port(self) -> None:
        client = self.agent()
        self.assertEqual(messages.VERSION, client.ping().version)
        description = client.describe()
        (server,) = description.servers
        self.assertEqual("mariadb", server.flavour)
        self.assertGreater(server.filled_share, 0.4)
        self.assertNotIn("problem", [finding.severity for finding in description.findings])
        self.assertTrue(client.health().servers[0].healthy)

    def test_mapped_pages_equal_the_volume_without_a_flush(self) -> None:
        with self.work(HEAVIER):
            self.assertGreaterEqual(self.map_and_compare(self.agent()), 0.95)

    def test_after_a_preparation_they_do_nearly_all_and_settings_are_restored(self) -> None:
        client = self.agent()
        before = self.guest.sql(SETTINGS)
        with self.work(LIGHT):
            state = self.prepare(client)
            self.assertTrue(state.reached, state)
            self.assertNotEqual(before, self.guest.sql(SETTINGS))
            self.assertGreaterEqual(self.map_and_compare(client, least=0.7), 0.99)
            self.assertEqual("idle", client.restore(state.lease_id).state)
        self.assertEqual(before, self.guest.sql(SETTINGS))

    def test_the_guest_migrates_by_its_map_and_its_tables_are_sound(self) -> None:
        client = self.agent()
        incarnation = client.ping().incarnation
        with self.work(LIGHT):
            state = self.prepare(client)
            built = self.fetch_map(client)
            self.migrate(built)
            self.assertEqual(self.checks(), ["OK", "OK"])
        # It is the same agent, which now answers from the other host.
        client = self.agent()
        self.assertEqual(incarnation, client.ping().incarnation)
        self.assertEqual("idle", client.restore(state.lease_id).state)
        self.assertGreaterEqual(self.map_and_compare(client), 0.95)

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


class TestPartition(LayoutTests):
    """ext4 on a partition, the pool in ordinary pages."""

    LAYOUT: ClassVar[dict[str, Any]] = {"layout": "partition"}


class TestLogicalVolume(LayoutTests):
    """XFS on a logical volume of two pieces in wrong order, the pool in huge pages."""

    LAYOUT: ClassVar[dict[str, Any]] = {"layout": "lvm", "hugepages": 40}

    def test_the_pool_is_in_huge_pages(self) -> None:
        self.assertEqual("1", self.guest.sql("SELECT @@large_pages").strip())
        free = self.guest.run("sed -n 's/HugePages_Free: *//p' /proc/meminfo")
        self.assertLess(int(free), 20)

    def test_the_logical_volume_has_two_pieces(self) -> None:
        table = self.guest.run("dmsetup table lab-data")
        self.assertEqual(2, table.count(" linear "), table)


# Tests are those of the layouts
del LayoutTests
