# SPDX-License-Identifier: Apache-2.0
"""The buffer map of real servers on block devices of this machine.

The machine plays the guest: its page frame numbers are the guest pages, a loop device the volume.
What a map claims is checked by reading both sides, the server's memory and the device.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.agent import (
    database,
    filesystem,
    ledger,
    mapper,
    options,
    preparation,
    processes,
    storage,
    tablespaces,
)
from nova_dmigrate.buffermap import BufferMap, MapLimits
from nova_dmigrate.rpc import messages
from tests import base
from tests.lab import chroots, databases, loop, mysql56
from tests.lab import processes as lab_processes

VOLUME = "0ab1c2d3-volume"
DIGITS = "(" + " UNION ALL ".join(f"SELECT {n} AS d" for n in range(10)) + ")"
# 3000 of them
ROWS = (
    "SELECT REPEAT(SHA2(CONCAT(a.d, b.d, c.d, e.d), 256), 20)"
    f" FROM {DIGITS} a, {DIGITS} b, {DIGITS} c, {DIGITS} e WHERE e.d < 3"
)


def build_map(
    server: processes.ServerProcess, settings: options.MapOptions | None = None
) -> tuple[BufferMap, mapper.MapSummary]:
    made = mapper.ServerMap(server, settings)
    return BufferMap.join(made), made.summary


class DatabaseTestCase(base.TestCase):
    """Tests that share one server."""

    KIND: ClassVar[str] = "ext4"
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    server: ClassVar[databases.Server]
    volume: ClassVar[loop.LoopVolume]
    _stack: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(databases.available())
        with contextlib.ExitStack() as stack:
            cls.server, cls.volume = stack.enter_context(cls.running())
            cls.fill()
            cls._stack = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls._stack.close()
        super().tearDownClass()

    @classmethod
    def running(cls) -> AbstractContextManager[tuple[databases.Server, loop.LoopVolume]]:
        return databases.mariadb(kind=cls.KIND, options=cls.OPTIONS)

    @classmethod
    def fill(cls) -> None:
        raise NotImplementedError

    def find(self) -> processes.ServerProcess:
        (found,) = processes.find_servers(processes.Selector(pid=self.server.pid))
        return found

    def build(self, **settings: Any) -> tuple[BufferMap, mapper.MapSummary]:
        names = {self.volume.name: VOLUME}
        return build_map(self.find(), options.MapOptions(volume_names=names, **settings))

    def equal_share(self, built: BufferMap) -> float:
        (mapped,) = built.volumes
        self.assertEqual(VOLUME, mapped.volume_id)
        return databases.equal_share(self.server.pid, self.volume, *mapped.pages())

    def blocks(self, built: BufferMap) -> NDArray[np.int64]:
        return np.unique(built.volumes[0].pages()[1]).astype(np.int64)

    def file_blocks(self, name: str) -> NDArray[np.int64]:
        return self.volume.file_blocks(self.server.datadir / name)

    def codes(self, summary: mapper.MapSummary) -> list[str]:
        return [finding.code for finding in summary.findings]


class AnyServer(DatabaseTestCase):
    """A server as its distribution has it, on ext4, with all kinds of tables."""

    # What a preparation comes to, as a share of the pages in memory
    DIRTY_SHARE: ClassVar[float] = 0.01

    @classmethod
    def fill(cls) -> None:
        cls.server.fill(tables=3, rows=80000)
        cls.server.sql("CREATE DATABASE special")
        for reason, attributes in {"plain": "", **cls.server.SPECIAL}.items():
            name = reason.replace("-", "_")
            cls.server.sql(
                f"CREATE TABLE {name} (id INT AUTO_INCREMENT PRIMARY KEY, t TEXT) {attributes};"
                f"INSERT INTO {name} (t) {ROWS}",
                "special",
            )
        cls.server.flush()

    @contextlib.contextmanager
    def load(self, *options: str) -> Iterator[None]:
        with self.server.load("--tables=3", "--table-size=80000", "--threads=1", *options):
            time.sleep(2)
            yield

    def test_after_a_flush_nearly_all_of_the_pool_is_mapped_and_equal(self) -> None:
        self.server.flush()
        built, summary = self.build()
        self.assertGreaterEqual(self.equal_share(built), 0.99)
        # What the server itself says that it holds of tablespaces that can be mapped. The dump of
        # its pool would do too, but does not tell free frames from used ones.
        held = self.server.sql(
            "SELECT COUNT(DISTINCT space, page_number)"
            " FROM information_schema.innodb_buffer_page p"
            f" JOIN information_schema.{self.server.TABLESPACES} t USING (space)"
            " WHERE t.name LIKE 'sbtest/%' OR t.name = 'special/plain'"
        )
        blocks = self.blocks(built)
        ours = np.concatenate(
            [self.file_blocks(f"sbtest/sbtest{n}.ibd") for n in (1, 2, 3)]
            + [self.file_blocks("special/plain.ibd")]
        )
        self.assertGreaterEqual(np.isin(blocks, ours).sum(), 0.97 * 4 * int(held))
        self.assertLessEqual(summary.dirty_frames, 0.05 * summary.candidate_frames)
        # The heap's small numbers and pointers are not taken for pages.
        self.assertLess(summary.excluded.get("unknown-tablespace", 0), 40)

    def test_mapped_pages_equal_the_volume_under_load_without_a_flush(self) -> None:
        shares, pages = [], []
        with self.load():
            for _ in range(3):
                # Without pauses: on a busy machine it would be seconds old when it is made.
                built, summary = self.build(time_limit=0.0)
                shares.append(self.equal_share(built))
                pages.append(built.page_count)
                self.assertEqual(built.page_count, summary.mapped_pages)
        self.assertGreaterEqual(min(shares), 0.95, f"{shares} of {pages} pages")
        self.assertGreater(min(pages), 1000)

    def test_dirty_frames_are_left_out_unless_they_are_asked_for(self) -> None:
        with self.load():
            pass
        # An idle server would write what is dirty, within a second or two
        os.kill(self.server.pid, signal.SIGSTOP)
        self.addCleanup(os.kill, self.server.pid, signal.SIGCONT)
        few, summary = self.build()
        share = self.equal_share(few)
        many, _ = self.build(include_dirty=True)
        self.assertGreater(summary.dirty_frames, 100)
        self.assertEqual(4 * summary.dirty_frames, summary.excluded["dirty"])
        self.assertGreaterEqual(many.page_count, few.page_count + summary.dirty_frames)
        # Were MySQL's own notes of what is dirty ignored, some of its dirty frames would be in it
        self.assertGreaterEqual(share, 0.98)
        self.assertLess(self.equal_share(many), share - 0.03)

    def test_after_the_preparation_mapped_pages_equal_the_volume_under_a_light_load(self) -> None:
        uids = processes.user_ids(["mysql"])
        login = database.Login(str(self.server.socket), "root", uids=uids)
        prepared = preparation.Preparation(
            ledger.LedgerFile(self.make_directory() / "preparation.json"),
            lambda: [login],
            lambda socket: login,
            database.connect,
        )
        with self.load("--rate=2"):
            state = prepared.prepare(
                messages.PrepareArguments(seconds=5, dirty_share=self.DIRTY_SHARE)
            )
            self.addCleanup(prepared.restore)
            while not state.reached:
                time.sleep(0.1)
                state = prepared.renew(state.lease_id, 60)
            built, _ = self.build()
            share = self.equal_share(built)
        # The load changes some while the map is made, the more the longer a busy machine needs
        self.assertGreaterEqual(share, 0.97, f"of {built.page_count} pages")
        self.assertGreater(built.page_count, 1000)
        self.assertEqual("idle", prepared.restore(state.lease_id).state)

    def test_tables_that_differ_on_the_volume_are_left_out_with_their_reasons(self) -> None:
        names = {reason: reason.replace("-", "_") for reason in self.server.SPECIAL}
        for name in ("plain", *names.values()):
            self.server.sql(f"SELECT COUNT(t) FROM {name}", "special")
        self.server.flush()
        built, summary = self.build()
        blocks = self.blocks(built)
        self.assertTrue(np.isin(self.file_blocks("special/plain.ibd"), blocks).any())
        self.assertGreaterEqual(self.equal_share(built), 0.999)
        for reason, name in names.items():
            held = self.file_blocks(f"special/{name}.ibd")
            if reason in self.server.PLAIN_FIRST_PAGE:
                held = held[summary.page_size // loop.BLOCK :]
            within = np.isin(blocks, held)
            self.assertEqual(0, np.count_nonzero(within), reason)
            self.assertGreater(summary.excluded[reason], 400, reason)

    @contextlib.contextmanager
    def temporary_table(self) -> Iterator[None]:
        """A session with a temporary table, which it fills before the context begins."""
        ready = self.make_directory() / "ready"
        os.mkfifo(ready)
        with self.server.session() as session:
            session.write("USE special; CREATE TEMPORARY TABLE gone (t TEXT) ENGINE=InnoDB;\n")
            session.write(f"INSERT INTO gone {ROWS};\n\\! echo filled >{ready}\n")
            session.flush()
            self.assertEqual("filled\n", ready.read_text())
            yield

    def test_a_device_that_is_no_disk_is_mapped_only_when_it_is_named(self) -> None:
        built, summary = build_map(self.find())
        self.assertEqual((), built.volumes)
        self.assertIn("unsupported-device", self.codes(summary))
        self.assertIn("nothing-mapped", self.codes(summary))
        self.assertGreater(summary.excluded["unsupported-device"], 1000)

    def test_o_direct_is_recognised(self) -> None:
        unreadable: list[str] = []
        spaces = tablespaces.discover(self.find(), lambda path, _: unreadable.append(path))
        self.assertEqual([], unreadable)
        opened = [space for space in spaces if space.direct is not None]
        self.assertGreater(len(opened), 5)
        self.assertTrue(all(space.direct for space in opened))
        self.assertEqual([], self.codes(self.build()[1]))

    def test_the_server_is_found_by_each_thing_that_names_it(self) -> None:
        server = self.find()
        self.assertEqual(str(self.server.seen_datadir), server.datadir)
        self.assertEqual(str(self.server.seen_socket), server.socket)
        for selector in (
            processes.Selector(),
            processes.Selector(datadir=f"{self.server.seen_datadir}/"),
            processes.Selector(socket=str(self.server.socket)),
        ):
            self.assertIn(server, processes.find_servers(selector))
        for selector in (
            processes.Selector(pid=os.getpid()),
            processes.Selector(datadir="/nowhere"),
            processes.Selector(pid=self.server.pid, socket="/nowhere"),
        ):
            self.assertRaises(exception.ServerNotFound, processes.find_servers, selector)

    def test_the_map_survives_its_way_as_chunks(self) -> None:
        built, _ = self.build()
        again = BufferMap.from_chunks(built.to_chunks(), MapLimits())
        for ours, theirs in zip(built.volumes, again.volumes, strict=True):
            self.assertTrue(all(map(np.array_equal, ours.pages(), theirs.pages())))


class LaterServer(AnyServer):
    """One whose temporary tables are not logged."""

    def test_temporary_tables_are_left_out(self) -> None:
        before = self.build()[1].excluded.get("temporary", 0)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.temporary_table())
            built, summary = self.build()
            blocks = np.concatenate([self.file_blocks(name) for name in self.temporary_files()])
        self.assertGreater(summary.excluded["temporary"], before + 400)
        self.assertGreater(self.equal_share(built), 0.99)
        self.assertEqual(0, np.count_nonzero(np.isin(self.blocks(built), blocks)))

    def temporary_files(self) -> list[str]:
        datadir = Path(f"/proc/{self.volume.holder_pid}/root{self.server.datadir}")
        files = [*datadir.glob("ibtmp*"), *datadir.glob("*/*.ibt")]
        return [str(path.relative_to(datadir)) for path in files]


class TestMariaDB(LaterServer):
    """This machine's."""


class TestMariaDB105(LaterServer):
    """Debian 11's, in a chroot."""

    @classmethod
    def running(cls) -> AbstractContextManager[tuple[databases.Server, loop.LoopVolume]]:
        return databases.running(chroots.MariaDB105)


class TestMariaDB11(LaterServer):
    """Debian 13's, in a chroot."""

    @classmethod
    def running(cls) -> AbstractContextManager[tuple[databases.Server, loop.LoopVolume]]:
        return databases.running(chroots.MariaDB11)


class TestMySQL9(LaterServer):
    """Debian sid's, in a chroot."""

    @classmethod
    def running(cls) -> AbstractContextManager[tuple[databases.Server, loop.LoopVolume]]:
        return databases.running(chroots.MySQL9)


class TestMySQL56(AnyServer):
    """Oracle's, the oldest that is supported."""

    # While it has work to do it writes nothing when less than 1 % of all frames are dirty, free
    # ones included, which here are half of them.
    DIRTY_SHARE = 0.02

    @classmethod
    def running(cls) -> AbstractContextManager[tuple[databases.Server, loop.LoopVolume]]:
        base.require(mysql56.available())
        return databases.running(mysql56.MySQL56)

    def test_temporary_tables_are_mapped_as_all_others(self) -> None:
        with self.temporary_table():
            self.server.flush()
            built, _ = self.build()
            share = self.equal_share(built)
            datadir = Path(f"/proc/{self.volume.holder_pid}/root{self.server.datadir}")
            (file,) = datadir.glob("#sql*.ibd")
            mapped = np.isin(self.file_blocks(file.name), self.blocks(built))
        self.assertGreater(np.count_nonzero(mapped), 400)
        self.assertGreaterEqual(share, 0.99)


# Only their subclasses say which server.
del AnyServer, LaterServer


class TestOldFashioned(DatabaseTestCase):
    """XFS, small pages, an older checksum, buffered files, a system tablespace of two files."""

    KIND = "xfs"
    OPTIONS = (
        "innodb-page-size=4k",
        "innodb-checksum-algorithm=crc32",
        "innodb-flush-method=fsync",
        "innodb-data-file-path=ibdata1:12M;ibdata2:12M:autoextend",
        "innodb-file-per-table=OFF",
        "innodb-undo-tablespaces=2",
    )

    @classmethod
    def fill(cls) -> None:
        cls.server.fill(tables=1, rows=120000)
        cls.server.flush()

    def test_the_pages_of_both_files_are_mapped_and_equal(self) -> None:
        built, summary = self.build()
        self.assertEqual(4096, summary.page_size)
        self.assertGreaterEqual(self.equal_share(built), 0.99)
        blocks = self.blocks(built)
        for name in ("ibdata1", "ibdata2", "undo001"):
            mapped = np.isin(self.file_blocks(name), blocks)
            self.assertGreater(np.count_nonzero(mapped), 50, name)

    def test_files_that_are_not_opened_with_o_direct_are_a_finding(self) -> None:
        self.assertIn("not-o-direct", self.codes(self.build()[1]))

    def test_a_server_that_was_killed_is_gone_and_one_that_came_back_is_found(self) -> None:
        server = self.find()
        self.server.kill()
        self.assertFalse(server.running)
        self.assertRaises(exception.AgentError, build_map, server)
        self.server.start()
        self.server.sql("SELECT COUNT(c), COUNT(k) FROM sbtest1", "sbtest")
        built, _ = self.build()
        self.assertGreaterEqual(self.equal_share(built), 0.95)
        self.assertGreater(built.page_count, 1000)


class TestStorage(base.TestCase):
    """Bytes of files are found on the device, below a partition and real file systems."""

    def setUp(self) -> None:
        super().setUp()
        base.require(databases.available())

    def check(self, volume: loop.LoopVolume) -> None:
        """A file with all that a file can have: holes, room that was never written, extents."""
        path = volume.mountpoint / "file"
        outside = Path(f"/proc/{volume.holder_pid}/root{path}")
        content = np.random.default_rng(5).integers(0, 256, 3 << 20, np.uint8)
        with open(outside, "w+b", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, 1 << 20)
            file.truncate(64 << 20)
            written = [at << 16 for at in (0, 3, 4, 40, 41, 42, 90, 500, 1023)]
            for at in written:
                file.seek(at)
                file.write(content[at % (2 << 20) :][: 1 << 16])
            os.fsync(file.fileno())
            mounts = filesystem.read_mounts(volume.holder_pid)
            device = os.fstat(file.fileno()).st_dev
            filesystem.check_mount(str(path), mounts.get(device))
            stack = storage.DeviceStack({volume.name: VOLUME})
            extents = filesystem.file_extents(file.fileno(), str(path))
            placed = storage.place(extents, stack.segments(device))
            found = {}
            for part in placed:
                self.assertEqual(VOLUME, part.volume_id)
                for logical, offset, length in zip(
                    part.logical.tolist(), part.offset.tolist(), part.length.tolist(), strict=True
                ):
                    for step in range(0, length, 4096):
                        found[logical + step] = (offset + step) // 4096
            self.assertEqual(
                {at + n for at in written for n in range(0, 1 << 16, 4096)}, set(found)
            )
            blocks = volume.read_blocks(np.array(list(found.values()), np.uint32))
            for at, block in zip(found, blocks, strict=True):
                self.assertEqual(os.pread(file.fileno(), 4096, at), block.tobytes())

    def test_files_on_a_whole_device(self) -> None:
        for kind in ("ext4", "xfs"):
            with self.subTest(kind), lab_processes.workspace() as directory:
                with loop.LoopVolume(directory, 400, kind) as volume:
                    self.check(volume)

    def test_files_on_a_partition(self) -> None:
        with lab_processes.workspace() as directory:
            with loop.LoopVolume(directory, 400, partitioned=True) as volume:
                self.check(volume)
