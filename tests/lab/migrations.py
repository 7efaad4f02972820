# SPDX-License-Identifier: Apache-2.0
"""Test cases whose tests migrate one booted guest again and again through relays."""

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.buffermap import PAGE_SIZE, VolumeExtents
from nova_dmigrate.volumes import VolumeSpec
from tests import base
from tests.lab import relays
from tests.lab.guest import Guest, GuestError, GuestSpec
from tests.lab.hosts import Host
from tests.lab.image import create_disk
from tests.lab.memory import differing_pages
from tests.lab.processes import workspace
from tests.lab.qmp import QMPClosed
from tests.lab.relays import PATIENCE, RelayPair, Report, SavedMap, wait_until
from tests.lab.tap import StreamTap, stream_mismatches

#: MiB of the guest's data disk: enough for all frames of the guest.
DISK_MB = 112


@dataclasses.dataclass
class Migration:
    """One migration that is about to begin: both QEMUs and the relays between them are ready."""

    source: Guest
    destination: Guest
    pair: RelayPair
    tap: StreamTap | None

    def begin(self, downtime_ms: int = 1, capabilities: Iterable[str] = ()) -> None:
        """Let the source QEMU migrate; ``finish`` or what a test does then is up to the caller."""
        relays.prepare(self.source, downtime_ms, capabilities)
        self.source.migrate(self.tap.path if self.tap else self.pair.outgoing)

    def finish(self, downtime_ms: int = 2000) -> Report:
        """Orchestrate the rest of it; returns query-migrate of its end."""
        return relays.finish(self.source, self.pair, downtime_ms)

    def run(self, downtime_ms: int = 2000, capabilities: Iterable[str] = ()) -> Report:
        """``begin`` and ``finish``."""
        self.begin(capabilities=capabilities)
        return self.finish(downtime_ms)

    def progress(self) -> Report:
        """The source relay's progress.

        :raises AssertionError: it has ended.
        """
        progress = self.pair.source.progress()
        if progress is None:
            raise AssertionError(
                f"the source relay has ended: {self.source.migration()}\n{self.pair.last_words()}"
            )
        return progress

    def wait_progress(self, what: str, **at_least: int | str) -> Report:
        """Wait until the source relay's figures are at least (texts: equal to) those given."""

        def reached() -> Report | None:
            progress = self.progress()
            for name, value in at_least.items():
                if isinstance(value, str):
                    if progress[name] != value:
                        return None
                elif progress[name] < value:
                    return None
            return progress

        result: Report = wait_until(reached, f"{what}: {at_least}")
        return result


class MigrationTestCase(base.TestCase):
    """Tests of one class share a guest; it is booted anew when a test has killed its QEMU.

    A failed test leaves the guest running, not dirtying its memory.
    """

    guest: ClassVar[dict[str, Any]] = {"ram_mb": 192, "fill_mb": 96, "mapped": 90}

    directory: ClassVar[Path]
    spec: ClassVar[GuestSpec]
    _class: ClassVar[contextlib.ExitStack]
    _source: ClassVar[Guest | None]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls._class = contextlib.ExitStack()
        cls._source = None
        cls.directory = cls._class.enter_context(workspace())
        try:
            disk = create_disk(cls.directory / "disk.raw", DISK_MB)
            cls.spec = GuestSpec(disk=disk, **cls.guest)
            cls.boot()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        if cls._source is not None:
            cls._source.close()
        cls._class.close()
        super().tearDownClass()

    @classmethod
    def boot(cls) -> Guest:
        """The running source guest, a new one where there was none or its QEMU has ended."""
        if cls._source is not None and not cls._source.alive:
            cls._source.close()
            cls._source = None
        if cls._source is None:
            cls._source = Guest.start_source(cls.spec)
        return cls._source

    def setUp(self) -> None:
        super().setUp()
        self.source = self.boot()
        self._test = contextlib.ExitStack()
        self.addCleanup(self._recover)
        self.addCleanup(self._test.close)

    def _recover(self) -> None:
        """Have the guest run again, whatever became of the migration."""
        source = type(self)._source
        if source is None or not source.alive:
            return
        try:
            if source.migration().get("status") not in (None, "completed", "failed", "cancelled"):
                source.qmp("migrate_cancel")
                source.wait_migration(PATIENCE)
            source.cont()
            source.command("dirty 0 0")
        except (GuestError, QMPClosed, OSError):
            source.kill()

    # What a migration consists of

    def copy_of_disk(self) -> Path:
        """A copy of the guest's disk for the destination's relay, which a test may spoil."""
        path = self.directory / "volume.raw"
        shutil.copyfile(self.spec.disk, path)
        self._test.callback(path.unlink, missing_ok=True)
        return path

    def map_of(self, maps: Iterable[VolumeExtents] | None = None) -> SavedMap:
        """The guest's own map, or another one, in files."""
        return relays.save_map(self.source, self.directory / "map", maps)

    @contextlib.contextmanager
    def migration(
        self,
        *,
        saved: SavedMap | None = None,
        volume: Path | VolumeSpec | None = None,
        tap: bool = True,
        hosts: tuple[Host, Host] | None = None,
        capabilities: Iterable[str] = (),
        **options: Any,
    ) -> Iterator[Migration]:
        """Everything that one migration needs, ready to begin; ends all of it but the source.

        :param volume: what the destination reads; the guest's own disk if None.
        :param tap: whether the stream is recorded, for ``assert_delivered``.
        :param capabilities: of the destination QEMU.
        :param options: of RelayPair.
        """
        with contextlib.ExitStack() as stack:
            destination = stack.enter_context(Guest.start_destination(self.spec))
            if capabilities:
                destination.set_capabilities(*capabilities)
            incoming = destination.directory / "incoming"
            destination.listen(incoming)
            options.setdefault("volumes", {relays.VOLUME: volume or self.spec.disk})
            # Always the same directory: what an earlier migration left there must do no harm.
            pair = stack.enter_context(
                RelayPair(self.directory / "relays", incoming, saved=saved, hosts=hosts, **options)
            )
            recorder = (
                stack.enter_context(StreamTap(self.directory, pair.outgoing)) if tap else None
            )
            yield Migration(self.source, destination, pair, recorder)

    @contextlib.contextmanager
    def dirtying(self, share: int, rate: int, mode: str = "full") -> Iterator[None]:
        """The guest changes ``share`` percent of its frames at ``rate`` MB/s."""
        self.source.command(f"dirty {share} {rate} {mode}")
        yield
        # Not in a finally: after a failure `_recover` does it, when the guest runs again.
        self.source.command("dirty 0 0")

    # What must be true

    def assert_from_the_volume(self, summary: Report, pages: int) -> None:
        """So many pages have been references, and each has been read from its volume."""
        self.assertEqual((pages, {}), (summary["referenced_pages"], summary["misses"]))
        # What the source has sent unasked, while QEMU was held back, need not be read
        read = pages - summary["copies_unasked"]
        self.assertGreaterEqual(summary["volume_bytes"], read * PAGE_SIZE)

    def assert_delivered(self, migration: Migration, state: Report) -> Report:
        """The migration is complete, both relays are content, and the destination has, in each
        page, the last version that the source QEMU sent. Then the guest goes on at the source, for
        the next test, and the destination ends.

        :returns: the source relay's summary.
        """
        pair, destination = migration.pair, migration.destination
        self.assertEqual("completed", state["status"], f"{state}\n{pair.last_words()}")
        self.assertEqual((0, 0), pair.wait(), pair.last_words())
        self.assertEqual("paused", destination.wait_incoming(PATIENCE))
        assert migration.tap is not None
        record = migration.tap.finish(PATIENCE)
        self.assertEqual([], stream_mismatches(destination, record).tolist(), "pages differ")
        pair.check_clean()
        summary = pair.source.summary()
        self.assertEqual("delivered", summary["state"])
        self.assertEqual("delivered", pair.destination.summary()["state"])
        destination.kill()
        self.source.cont()
        self.assert_guest_goes_on()
        return summary

    def assert_same_memory(self, migration: Migration) -> None:
        """Both QEMUs have the same in all of their RAM. Only of a guest that was stopped before the
        migration: of a running one, QEMU under TCG may leave pages behind (see tap.py).
        """
        self.assertEqual([], differing_pages(self.source, migration.destination).tolist())

    def assert_guest_goes_on(self) -> None:
        """The guest runs at the source and answers."""
        wait_until(lambda: self.source.status == "running", "the guest runs at the source")
        self.assertEqual("pong", self.source.command("ping", timeout=PATIENCE))

    def assert_next_migration_works(self) -> None:
        """After a fault: the same guest migrates, with the same paths."""
        with self.migration(saved=self.map_of()) as migration:
            self.assert_delivered(migration, migration.run())


def pages_of(guest: Guest, gpa: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Copies of guest pages, uint8 (n, 4096), by address, of a guest with up to 2 GiB."""
    result = np.empty((len(gpa), PAGE_SIZE), np.uint8)
    number = (gpa // np.uint64(PAGE_SIZE)).astype(np.int64)
    first = 0
    for name in guest.spec.block_names:
        block = guest.ram_blocks[name]
        inside = (number >= first) & (number < first + len(block))
        result[inside] = block[number[inside] - first]
        first += len(block)
    return result


def copies(guest: Guest, extents: VolumeExtents) -> NDArray[np.bool_]:
    """Which pages of a map are, at this moment, non-zero copies of their blocks of the disk."""
    disk = np.memmap(guest.spec.disk, np.uint8, "r").reshape(-1, PAGE_SIZE)
    pages = pages_of(guest, extents.guest)
    blocks = disk[(extents.volume_offset // np.uint64(PAGE_SIZE)).astype(np.int64)]
    same: NDArray[np.bool_] = (pages == blocks).all(axis=1) & pages.any(axis=1)
    return same


@contextlib.contextmanager
def rewriting(path: Path, seed: int) -> Iterator[None]:
    """Sectors of a disk change all the time, back and forth: blocks are stale, torn, right."""
    stop = threading.Event()
    random = np.random.default_rng(seed)
    disk = np.memmap(path, np.uint8, "r+").reshape(-1, 512)

    def rewrite() -> None:
        while not stop.is_set():
            disk[random.integers(0, len(disk), 64)] ^= 0x5A
            time.sleep(0.001)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
