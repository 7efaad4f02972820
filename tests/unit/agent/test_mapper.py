# SPDX-License-Identifier: Apache-2.0

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np

from nova_dmigrate import exception, findings
from nova_dmigrate.agent import (
    bands,
    filesystem,
    mapper,
    memory,
    options,
    processes,
    storage,
    tablespaces,
)
from nova_dmigrate.buffermap import BufferMap
from tests import base
from tests.unit.agent import innodb

ROOT = Path(__file__).parents[3]
PAGE = 16384
DEVICE = os.makedev(253, 16)
VOLUME_SIZE = 1 << 30
FILE_AT = 100 << 20  # where file n begins on the volume: (n + 1) times this

# A buffer pool of 64 GiB, whose frames this makes up as they are asked for, is mapped in a process
# that has imported all that the serving agent imports. Printed is the peak of resident memory in
# KiB; that of getrusage() would be at least the one of this process. Then the map that was kept is
# read as a host does.
HUGE_POOL = """
import base64, collections, pathlib, re, sys, time, types
import numpy as np
from nova_dmigrate.cmd import agent
from nova_dmigrate.rpc import broker, channel
from nova_dmigrate.agent import assembly, cancellation, location, maps, memory, options, pacing
from nova_dmigrate.agent import pages, scan, storage
from nova_dmigrate.buffermap import BufferMap, MapLimits

FRAMES, START, PAGE = 64 << 16, 0x7f0000000000, 16384

class Memory:
    def mappings(self, min_bytes):
        return [memory.Mapping(START, START + FRAMES * PAGE)]
    def guest_pages(self, address, count):
        number = (address - START) // 4096 + np.arange(count, dtype=np.int64)
        # An odd factor makes another order of them: no two neighbours stay such.
        return number * 2654435761 % (4 * FRAMES) if sys.argv[1] == "scattered" else number
    def read_pieces(self, starts, lengths):
        if lengths.size and lengths[0] == 4096:  # no descriptors there
            return np.zeros(int(lengths.sum()), np.uint8), True
        frame = np.unique((starts + np.uint64(8) - np.uint64(START)) // np.uint64(PAGE))
        frame = frame[: int(lengths.sum()) // 46]
        content = np.zeros((frame.size, 46), np.uint8)
        records = content.reshape(-1).view(pages._RECORD)
        number = frame * np.uint64(40503) % np.uint64(FRAMES)
        records["space"], records["page"], records["type"] = 7, number, 17855
        records["lsn"] = records["trailer"] = number + 1000
        return content.reshape(-1), True

class ServerMap:
    summary = types.SimpleNamespace(findings=())
    def __iter__(self):
        one = lambda n: np.array([n], np.uint64)
        placed = storage.Placed("volume", 1 << 42, one(0), one(1 << 30), one(FRAMES * PAGE))
        table = location.PlaceTable([location.File(7, 0, FRAMES, False, None, (placed,))])
        wanted = cancellation.Cancellation()
        pace = pacing.Pace(1, 0, wanted)
        found = scan.Scan(table, PAGE, options.MapOptions(), pace, wanted).run(Memory())
        return assembly.assemble(found, location.BlockTable(table, PAGE), collections.Counter())

store = maps.MapStore(lambda: maps.GuestMap([ServerMap()]), pathlib.Path(sys.argv[2]))
state = store.begin(1 << 18)
while state.state == "building":
    time.sleep(0.1)
    state = store.state(state.map_id)
assert state.state == "ready", state
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

chunks = (base64.b64decode(store.chunk(state.map_id, n).data) for n in range(state.chunks))
(volume,) = BufferMap.from_chunks(chunks, MapLimits()).volumes
assert volume.page_count == state.pages == 4 * FRAMES, volume.page_count
assert volume.nbytes == int(sys.argv[3]), volume.nbytes
guest, block = volume.pages()
frame = np.arange(FRAMES, dtype=np.uint64)
mapped = Memory().guest_pages(START, 4 * FRAMES)[::4]
assert guest[0] == 0 and guest[-1] == 4 * FRAMES - 1
assert (block[mapped] == (1 << 18) + 4 * (frame * np.uint64(40503) % np.uint64(FRAMES))).all()
"""


class MapperTest(base.TestCase):
    """A server made of given tablespaces and given frames."""

    def setUp(self):
        super().setUp()
        self.spaces = []
        self.extents = {}
        self.segments = {DEVICE: (storage.Segment(0, VOLUME_SIZE, "vol", VOLUME_SIZE, 0),)}
        self.kind = "ext4"
        self.at_read = None

    def space(self, space_id, pages, *extents, excluded=None, direct=True, **others):
        """A tablespace; extents are (first page, first byte on the device, pages)."""
        number = len(self.spaces)
        path = f"/db/{space_id}.ibd"
        if path in self.extents:
            path = f"/copy/{space_id}.ibd"
        if not extents:
            extents = [(0, (number + 1) * FILE_AT, pages)]
        columns = np.array(extents, np.uint64).reshape(-1, 3).T * np.array(
            [[PAGE], [1], [PAGE]], np.uint64
        )
        self.extents[path] = filesystem.Extents(*columns)
        fields = {"first_page": 0, "page_size": PAGE, "full_crc32": False, **others}
        self.spaces.append(
            tablespaces.Tablespace(
                path=path,
                location="/dev/null",
                device=DEVICE,
                inode=number,
                space_id=space_id,
                pages=pages,
                excluded=excluded,
                direct=direct,
                **fields,
            )
        )
        return (number + 1) * FILE_AT

    def build(self, frames, guest=None, **settings):
        fake = innodb.FakeMemory(frames, guest=guest)
        if self.at_read is not None:
            real = fake.guest_pages

            def guest_pages(address, count):
                self.at_read()
                return real(address, count)

            fake.guest_pages = guest_pages
        server = processes.ServerProcess(
            os.getpid(), processes.read_start_time(os.getpid()), "", "/", "/", None, 0
        )
        process = mock.MagicMock()
        process.__enter__.return_value = fake

        def segments(stack, device):
            if device in self.segments:
                return self.segments[device]
            raise exception.StorageError(path="md0", reason="it is a RAID", code="raid")

        replaced = {
            (tablespaces, "discover"): lambda server, unreadable: self.spaces,
            (filesystem, "read_mounts"): lambda pid: {
                DEVICE: filesystem.Mount(self.kind, frozenset())
            },
            (filesystem, "file_extents"): lambda descriptor, path: self.extents[path],
            (storage.DeviceStack, "segments"): segments,
            (memory, "ProcessMemory"): lambda pid: process,
            (os, "fdatasync"): lambda descriptor: self.synced.append(descriptor),
        }
        self.synced = []
        with contextlib.ExitStack() as stack:
            for (owner, name), new in replaced.items():
                stack.enter_context(mock.patch.object(owner, name, new))
            self.made = mapper.ServerMap(server, options.MapOptions(**settings))
            return BufferMap.join(self.watched(self.made)), self.made.summary

    def watched(self, parts):
        return parts

    def pages(self, built):
        return {
            guest: (each.volume_id, block)
            for each in built.volumes
            for guest, block in zip(*(column.tolist() for column in each.pages()))
        }

    def blocks(self, at, frame):
        """What four guest pages from 1000 + 4 * frame on are mapped to: bytes ``at`` on."""
        return {1000 + 4 * frame + part: ("vol", at // 4096 + part) for part in range(4)}

    def codes(self, summary):
        return {finding.code for finding in summary.findings}

    def test_clean_frames_are_mapped_to_where_their_pages_lie(self):
        five = self.space(5, 100)
        six = self.space(6, 100, full_crc32=True)
        built, summary = self.build(
            [
                innodb.page(5, 7),
                b"\x11" * PAGE,
                innodb.page(6, 99, full_crc32=True),
                None,
                innodb.page(5, 100),  # behind the end of its file
                innodb.page(5, 0, lsn=0),
                innodb.page(9, 0),
            ]
        )
        self.assertEqual(
            self.blocks(five + 7 * PAGE, 0) | self.blocks(six + 99 * PAGE, 2), self.pages(built)
        )
        self.assertEqual(
            (6, 2, 8), (summary.pool_frames, summary.candidate_frames, summary.mapped_pages)
        )
        self.assertEqual({"unknown-tablespace": 8}, summary.excluded)
        self.assertEqual((), summary.findings)

    def test_guest_pages_need_not_be_in_a_row(self):
        at = self.space(5, 10)
        built, _ = self.build([innodb.page(5, 3)], guest=[9, 2, 70000, 5])
        expected = {
            page: ("vol", (at + 3 * PAGE) // 4096 + n) for n, page in enumerate([9, 2, 70000, 5])
        }
        self.assertEqual(expected, self.pages(built))

    def test_changed_frames_are_left_out_or_in_as_was_asked(self):
        at = self.space(5, 10)
        frames = [innodb.page(5, 1, dirty=True)]
        built, summary = self.build(frames)
        self.assertEqual((), built.volumes)
        self.assertEqual((1, {"dirty": 4}), (summary.dirty_frames, summary.excluded))
        built, summary = self.build(frames, include_dirty=True)
        self.assertEqual(self.blocks(at + PAGE, 0), self.pages(built))
        self.assertEqual((1, {}), (summary.dirty_frames, summary.excluded))

    def test_of_two_frames_of_a_page_the_newer_is_mapped_and_equal_ones_both(self):
        at = self.space(5, 10)
        built, summary = self.build(
            [
                innodb.page(5, 1, lsn=2000),
                innodb.page(5, 1, lsn=1000),
                innodb.page(5, 2, lsn=500),
                innodb.page(5, 2, lsn=500),
            ]
        )
        self.assertEqual(
            self.blocks(at + PAGE, 0)
            | self.blocks(at + 2 * PAGE, 2)
            | self.blocks(at + 2 * PAGE, 3),
            self.pages(built),
        )
        self.assertEqual({"duplicate": 4}, summary.excluded)

    def test_excluded_tablespaces_are_counted_by_reason(self):
        self.space(5, 10, excluded="encrypted")
        self.space(6, 10, excluded="temporary")
        built, summary = self.build(
            [innodb.page(5, 1), innodb.page(5, 2, dirty=True), innodb.page(6, 1, lsn=0)]
        )
        self.assertEqual(0, built.page_count)
        self.assertEqual({"encrypted": 8, "temporary": 4}, summary.excluded)

    def test_holes_inside_of_pages_are_page_compression_and_others_are_not_written(self):
        at = self.space(5, 10)
        self.extents["/db/5.ibd"] = filesystem.Extents(
            np.array([0, PAGE], np.uint64),
            np.array([at, at + PAGE], np.uint64),
            np.array([PAGE, 4096], np.uint64),
        )
        built, summary = self.build([innodb.page(5, number) for number in range(3)])
        self.assertEqual(self.blocks(at, 0), self.pages(built))
        self.assertEqual({"page-compressed": 4, "not-written": 4}, summary.excluded)

    def test_pages_may_be_split_between_extents_and_volumes(self):
        self.space(5, 10)
        block = 4096
        self.extents["/db/5.ibd"] = filesystem.Extents(
            np.array([0, 3 * block], np.uint64),
            np.array([10 * block, 50 * block], np.uint64),
            np.array([3 * block, block], np.uint64),
        )
        self.segments[DEVICE] = (
            storage.Segment(0, 11 * block, "one", VOLUME_SIZE, 0),
            storage.Segment(11 * block, 1000 * block, "two", VOLUME_SIZE, 7 * block),
        )
        built, _ = self.build([innodb.page(5, 0)])
        self.assertEqual(
            {1000: ("one", 10), 1001: ("two", 7), 1002: ("two", 8), 1003: ("two", 46)},
            self.pages(built),
        )

    def test_a_device_that_cannot_be_mapped_is_a_finding_and_a_reason(self):
        self.space(5, 10)
        self.space(6, 10)
        self.segments.clear()
        built, summary = self.build([innodb.page(5, 1), innodb.page(6, 1)])
        self.assertEqual(0, built.page_count)
        self.assertEqual({"raid": 8}, summary.excluded)
        self.assertEqual({"raid", "nothing-mapped"}, self.codes(summary))
        (raid,) = (each for each in summary.findings if each.code == "raid")
        self.assertEqual(findings.Severity.PROBLEM, raid.severity)
        self.assertIn("/db/5.ibd and 1 more", raid.message)

    def test_a_file_system_that_cannot_be_mapped_is_a_finding_and_a_reason(self):
        self.space(5, 10)
        self.kind = "btrfs"
        _, summary = self.build([innodb.page(5, 1)])
        self.assertEqual({"unsupported-filesystem": 4}, summary.excluded)

    def test_a_file_that_is_not_aligned_on_the_volume_is_a_finding_and_a_reason(self):
        self.space(5, 10, (0, FILE_AT + 1024, 10))
        _, summary = self.build([innodb.page(5, 1)])
        self.assertEqual({"unaligned": 4}, summary.excluded)
        self.assertEqual({"unaligned", "nothing-mapped"}, self.codes(summary))

    def test_files_that_are_not_direct_are_written_back_first(self):
        self.space(5, 10, direct=False)
        built, summary = self.build([innodb.page(5, 1)])
        self.assertEqual(4, built.page_count)
        self.assertEqual(1, len(self.synced))
        self.assertEqual({"not-o-direct"}, self.codes(summary))
        self.build([innodb.page(5, 1)], sync_buffered=False)
        self.assertEqual([], self.synced)

    def test_a_server_without_frames_is_a_finding(self):
        self.space(5, 10)
        _, summary = self.build([bytes(PAGE)] * 3)
        self.assertEqual({"no-frames"}, self.codes(summary))
        self.assertEqual(0, summary.pool_frames)

    def test_of_a_tablespace_that_is_there_twice_the_first_counts(self):
        at = self.space(5, 10)
        self.space(5, 20)
        built, summary = self.build([innodb.page(5, 1), innodb.page(5, 15)])
        self.assertEqual(self.blocks(at + PAGE, 0), self.pages(built))
        self.assertEqual({"unknown-tablespace": 4}, summary.excluded)

    def test_a_file_with_another_page_size_is_none_of_this_server(self):
        self.space(0, 10)
        self.space(5, 10, page_size=4096)
        self.space(6, 10, page_size=4096)
        _, summary = self.build([innodb.page(5, 1)])
        self.assertEqual(PAGE, summary.page_size)
        self.assertEqual(0, summary.mapped_pages)

    def test_more_pages_than_have_places_are_left_out_with_a_finding(self):
        at = self.space(5, 10)
        self.space(6, 2**32 - 1)
        built, summary = self.build([innodb.page(6, 1), innodb.page(5, 1)])
        self.assertEqual(self.blocks(at + PAGE, 1), self.pages(built))
        self.assertEqual({"too-many-pages": 4}, summary.excluded)
        self.assertEqual({"too-many-pages"}, self.codes(summary))

    def assert_cancelled(self, *arguments, **options):
        error = self.assertRaises(exception.AgentError, self.build, *arguments, **options)
        self.assertEqual("cancelled", error.kwargs["code"])

    def test_a_cancelled_search_ends_at_its_next_chunk(self):
        self.space(5, 100)
        reads = []

        def at_read():
            reads.append(1)
            if len(reads) == 20:
                self.made.cancel()

        self.at_read = at_read
        self.assert_cancelled([innodb.page(5, n) for n in range(100)], chunk_frames=1)
        # Those that were under way come to their end
        self.assertLess(len(reads), 30)

    def test_a_cancelled_map_ends_at_its_next_part(self):
        self.space(5, 100)
        seen = []

        def watched(parts):
            for part in parts:
                seen.append(part)
                parts.cancel()
                yield part

        self.watched = watched
        guest = [n * 1000000 + part for n in range(10) for part in range(4)]
        with mock.patch.object(bands, "MAX_PAGES", 4):
            self.assert_cancelled([innodb.page(5, n) for n in range(10)], guest)
        self.assertEqual(1, len(seen))

    def test_a_cancelled_map_places_no_file_any_more(self):
        self.space(5, 100)
        self.space(6, 100)
        placed = []

        class Files(dict):
            def __getitem__(files, path):
                placed.append(path)
                self.made.cancel()
                return super().__getitem__(path)

        self.extents = Files(self.extents)
        self.assert_cancelled([innodb.page(5, 1)])
        self.assertEqual(["/db/5.ibd"], placed)

    def test_chunks_of_any_size_give_the_same_map(self):
        self.space(5, 100)
        frames = [innodb.page(5, n) if n % 7 else None for n in range(60)]
        expected = self.pages(self.build(frames)[0])
        self.assertEqual(4 * 51, len(expected))
        for chunk in (1, 2, 13):
            self.assertEqual(expected, self.pages(self.build(frames, chunk_frames=chunk)[0]))


class MemoryTest(base.TestCase):
    """64 GiB of buffer pool need less than 200 MB, with all that the agent imports."""

    def check(self, order: str, map_bytes: int) -> None:
        directory = str(self.make_directory())
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", HUGE_POOL, order, directory, str(map_bytes)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        self.assertEqual("", done.stderr)
        self.assertLess(int(done.stdout) * 1024, 200_000_000)

    def test_when_no_two_guest_pages_are_in_a_row(self):
        self.check("scattered", 8 * (64 << 18))

    def test_when_frames_are_in_one_piece(self):
        self.check("ordered", 12 * (64 << 16))
