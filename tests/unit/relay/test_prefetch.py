# SPDX-License-Identifier: Apache-2.0
"""What is read of the volumes, in which order, and what comes of it when it cannot be read."""

import os
import threading
from pathlib import Path
from unittest import skipUnless

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nova_dmigrate import exception
from nova_dmigrate.relay.digest import digest_pages
from nova_dmigrate.relay.entries import EntryTable
from nova_dmigrate.relay.pacing import TokenBucket
from nova_dmigrate.relay.pagemap import MappedVolume, PageMap
from nova_dmigrate.relay.prefetch import BlockBatch, Prefetch
from nova_dmigrate.relay.readplan import ReadPlan, ReadPlanner
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.volumes import BlockReader, VolumeReader, VolumeSpec
from tests.base import TestCase
from tests.unit.relay.wire.support import wait_for
from tests.unit.stream.builder import page_contents
from tests.unit.volumes import loop

PAGE = 4096
LONG = 60.0


def page_map(blocks: ArrayLike, *sizes: int) -> PageMap:
    """Entry i lies on volume position ``blocks[i]``; volumes of ``sizes`` blocks."""
    positions = np.asarray(blocks, np.uint32)
    volumes = []
    first = 0
    for number, size in enumerate(sizes or (1 << 20,)):
        volumes.append(MappedVolume(f"volume{number}", first, size))
        first += size
    count = len(positions)
    return PageMap(
        np.array([0, count]), np.arange(count, dtype=np.uint32), positions, tuple(volumes)
    )


def entries(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def bucket(settings: RelaySettings) -> TokenBucket:
    return TokenBucket(settings.volume_bandwidth)


def refer(table: EntryTable, which: NDArray[np.int64]) -> None:
    table.references(which, which.astype(np.uint32), np.zeros((len(which), 16), np.uint8))


class ReadPlannerTest(TestCase):
    def planner(self, blocks: ArrayLike, *sizes: int, gap: int = 2, size: int = 8) -> ReadPlanner:
        self.map = page_map(blocks, *sizes)
        self.table = EntryTable(len(self.map))
        return ReadPlanner(self.map, self.table, merge_gap=gap, read_size=size)

    def all(self, planner: ReadPlanner) -> list[tuple[int, int, int, list[int]]]:
        found = []
        while (plan := planner.next()) is not None:
            ends = np.cumsum(plan.lengths)
            for start, length, end in zip(plan.starts, plan.lengths, ends, strict=True):
                inside = (plan.index >= end - length) & (plan.index < end)
                served = plan.entries[inside].tolist()
                found.append((plan.volume, int(start), int(length), served))
        return found

    def test_blocks_are_read_in_volume_order_and_merged(self) -> None:
        planner = self.planner([12, 3, 1, 11, 2])
        self.assertEqual([(0, 1, 3, [2, 4, 1]), (0, 11, 2, [3, 0])], self.all(planner))

    def test_small_gaps_are_read_through_and_large_ones_are_not(self) -> None:
        planner = self.planner([0, 3, 7], gap=2)
        self.assertEqual([(0, 0, 4, [0, 1]), (0, 7, 1, [2])], self.all(planner))

    def test_without_a_gap_only_neighbours_are_merged(self) -> None:
        planner = self.planner([0, 1, 3], gap=0)
        self.assertEqual([(0, 0, 2, [0, 1]), (0, 3, 1, [2])], self.all(planner))

    def test_no_read_is_longer_than_it_may_be(self) -> None:
        planner = self.planner(np.arange(20), size=8)
        self.assertEqual([8, 8, 4], [plan[2] for plan in self.all(planner)])

    def test_no_read_goes_beyond_a_volumes_end(self) -> None:
        planner = self.planner([8, 9, 10, 11, 30], 10, 0, 20, 5)
        self.assertEqual([(0, 8, 2, [0, 1]), (2, 0, 2, [2, 3]), (3, 0, 1, [4])], self.all(planner))

    def test_pages_of_one_block_are_served_by_one_read(self) -> None:
        planner = self.planner([5, 5, 6, 5])
        self.assertEqual([(0, 5, 2, [0, 1, 3, 2])], self.all(planner))

    def test_many_pages_of_one_block_do_not_make_a_read_unbounded(self) -> None:
        planner = self.planner(np.full(100, 7), size=8)
        plans = self.all(planner)
        self.assertTrue(all(len(plan[3]) <= 8 for plan in plans))
        self.assertEqual(100, sum(len(plan[3]) for plan in plans))

    def test_what_the_source_has_sent_is_not_read(self) -> None:
        planner = self.planner(np.arange(6), gap=0)
        self.table.pages(entries(1, 2, 5))
        self.assertEqual([(0, 0, 1, [0]), (0, 3, 2, [3, 4])], self.all(planner))

    def test_what_is_known_to_be_unreadable_is_not_read(self) -> None:
        planner = self.planner(np.arange(4), gap=0)
        self.table.fail(entries(0, 1))
        self.assertEqual([(0, 2, 2, [2, 3])], self.all(planner))

    def test_references_are_read_first_when_they_should(self) -> None:
        planner = self.planner(np.arange(0, 100, 10), gap=2)
        planner.references_first = True
        refer(self.table, entries(7, 5))
        planner.prefer(entries(7, 5))
        firsts = [plan[1] for plan in self.all(planner)]
        self.assertEqual([50, 70, 0, 10, 20, 30, 40, 60, 80, 90], firsts)

    def test_references_wait_for_the_sweep_otherwise(self) -> None:
        planner = self.planner(np.arange(0, 40, 10), gap=2)
        refer(self.table, entries(2))
        planner.prefer(entries(2))
        self.assertEqual([0, 10, 20, 30], [plan[1] for plan in self.all(planner)])

    def test_every_entry_is_read_once_whatever_happens_between(self) -> None:
        for seed in range(6):
            random = np.random.default_rng(seed)
            count = 5000
            blocks = random.integers(0, 8000, count)
            planner = self.planner(blocks, 3000, 5000, gap=int(random.integers(0, 9)), size=64)
            read = np.zeros(count, int)
            sent = np.zeros(count, bool)
            referred = np.zeros(count, bool)
            while True:
                event = random.integers(0, 4)
                chosen = np.flatnonzero(random.random(count) < 0.005)
                if event == 0:
                    sent[chosen] = True
                    self.table.pages(chosen)
                elif event == 1:
                    chosen = chosen[~sent[chosen] & ~referred[chosen]]
                    referred[chosen] = True
                    refer(self.table, chosen)
                    planner.prefer(chosen)
                planner.references_first = bool(random.integers(0, 2))
                plan = planner.next()
                if plan is None:
                    break
                self.check(plan)
                self.assertFalse(sent[plan.entries].any())
                read[plan.entries] += 1
            self.assertLessEqual(int(read.max()), 1)
            self.assertTrue((read[~sent] == 1).all())

    def check(self, plan: ReadPlan) -> None:
        volume = self.map.volumes[plan.volume]
        self.assertLessEqual(int((plan.starts + plan.lengths).max()), volume.blocks)
        self.assertLessEqual(plan.count, 64)
        # What the plan says of the buffer is where the blocks come to lie.
        buffer = np.concatenate(
            [
                np.arange(start, start + length)
                for start, length in zip(plan.starts, plan.lengths, strict=True)
            ]
        )
        blocks = self.map.volume_position[plan.entries].astype(int) - volume.first
        self.assertEqual(blocks.tolist(), buffer[plan.index].tolist())
        self.assertTrue((np.diff(buffer) > 0).all())


class PrefetchTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.make_directory() / "volume"
        self.contents = page_contents(np.arange(64))
        self.path.write_bytes(self.contents.tobytes())
        self.batches: list[BlockBatch] = []

    def read(
        self, blocks: ArrayLike, reader: VolumeReader | None, **options: int
    ) -> tuple[Prefetch, dict[int, bytes], list[int]]:
        """Read everything; returns pages by entry, and the failed entries."""
        settings = RelaySettings(
            **{
                "volume_read_size": 8 * PAGE,
                "volume_merge_gap": 2 * PAGE,
                "volume_queue_depth": 1,
                **options,
            }
        )
        self.map = page_map(blocks, 64)
        self.table = EntryTable(len(self.map))
        pages: dict[int, bytes] = {}
        failed: list[int] = []

        def deliver(batch: BlockBatch) -> None:
            self.assertTrue((batch.digests == digest_pages(batch.pages)).all())
            for entry, page in zip(batch.entries.tolist(), batch.pages, strict=True):
                pages[entry] = page.tobytes()
            failed.extend(batch.failed.tolist())
            batch.buffer.release()

        prefetch = Prefetch(self.map, self.table, [reader], settings, bucket(settings), deliver)
        prefetch.work()
        if reader is not None:
            reader.close()
        return prefetch, pages, sorted(failed)

    def reader(self, path: Path | str | None = None) -> BlockReader:
        return BlockReader(VolumeSpec("volume", "block", str(path or self.path)))

    def assert_pages(
        self, blocks: ArrayLike, pages: dict[int, bytes], *, without: ArrayLike = ()
    ) -> None:
        expected = {
            entry: self.contents[block].tobytes()
            for entry, block in enumerate(np.asarray(blocks).tolist())
            if entry not in set(np.asarray(without).tolist())
        }
        self.assertEqual(expected, pages)

    def test_each_entry_gets_its_block(self) -> None:
        blocks = np.random.default_rng(1).permutation(64)[:40]
        prefetch, pages, failed = self.read(blocks, self.reader())
        self.assert_pages(blocks, pages)
        self.assertEqual([], failed)
        self.assertGreaterEqual(prefetch.bytes, 40 * PAGE)
        self.assertEqual(0, prefetch.errors)

    def test_each_of_many_entries_on_one_block_gets_it(self) -> None:
        blocks = [7, 7, 8, 7, 9, 9]
        _, pages, _ = self.read(blocks, self.reader())
        self.assert_pages(blocks, pages)

    def test_without_a_reader_everything_fails(self) -> None:
        prefetch, pages, failed = self.read([1, 2, 30], None)
        self.assertEqual(({}, [0, 1, 2]), (pages, failed))
        self.assertEqual(0, prefetch.bytes)

    def test_behind_a_truncation_only_what_is_gone_fails(self) -> None:
        reader = self.reader()
        os.truncate(self.path, 20 * PAGE)
        blocks = np.arange(10, 30)
        prefetch, pages, failed = self.read(blocks, reader)
        self.assertEqual(list(range(10, 20)), failed)
        self.assert_pages(blocks, pages, without=failed)
        self.assertGreater(prefetch.errors, 0)
        self.assertIn("Blocks will travel over the network instead", self.log.output)

    @skipUnless(loop.available(), "loop devices need root")
    def test_a_shrunk_block_device_fails_where_it_ended(self) -> None:
        device = self.useFixture(loop.LoopDevice(self.path))
        reader = self.reader(device.path)
        os.truncate(self.path, 32 * PAGE)
        blocks = np.arange(64)
        _, pages, failed = self.read(blocks, reader)
        self.assertEqual(list(range(32, 64)), failed)
        self.assert_pages(blocks, pages, without=failed)

    def test_after_too_many_errors_the_volume_is_left_alone(self) -> None:
        reader = self.reader()
        os.truncate(self.path, 0)
        blocks = np.arange(64)
        prefetch, _, failed = self.read(blocks, reader, volume_error_limit=3)
        self.assertEqual(3, prefetch.errors)
        self.assertEqual(list(range(64)), failed)
        self.assertIn("not read any more after 3 errors", self.log.output)

    def test_the_limit_of_errors_holds_within_one_plan(self) -> None:
        reader = self.reader()
        os.truncate(self.path, 0)
        blocks = np.arange(0, 64, 8)
        prefetch, _, failed = self.read(blocks, reader, volume_error_limit=3, volume_merge_gap=0)
        self.assertEqual(3, prefetch.errors)
        self.assertEqual(list(range(8)), failed)
        self.assertEqual(1, self.log.output.count("Blocks will travel over the network instead"))

    def test_of_a_volume_that_does_not_answer_a_plan_asks_once(self) -> None:
        asked: list[int] = []

        class Hung(BlockReader):
            def read_into(self, offset: int, buffer: memoryview) -> None:
                asked.append(offset)
                raise exception.VolumeTimeoutError(volume="volume", reason="no answer in time")

        for blocks in (np.arange(0, 64, 8), np.arange(8)):
            asked.clear()
            reader = Hung(VolumeSpec("volume", "block", str(self.path)))
            prefetch, pages, failed = self.read(blocks, reader, volume_merge_gap=0)
            self.assertEqual(({}, list(range(8))), (pages, failed))
            self.assertEqual((1, 1), (len(asked), prefetch.errors))

    def test_a_range_is_read_again_block_by_block_within_depth_and_rate(self) -> None:
        asked: list[int] = []
        taken: list[int] = []

        class Scratched(BlockReader):
            def read_into(self, offset: int, buffer: memoryview) -> None:
                asked.append(buffer.nbytes // PAGE)
                if offset <= 5 * PAGE < offset + buffer.nbytes:
                    raise exception.VolumeReadError(volume="volume", reason="scratched")
                super().read_into(offset, buffer)

        class Counting(TokenBucket):
            def take(self, size: int) -> None:
                taken.append(size // PAGE)
                super().take(size)

        blocks = np.arange(8)
        settings = RelaySettings(volume_queue_depth=1, volume_read_size=64 * PAGE)
        reader = Scratched(VolumeSpec("volume", "block", str(self.path)))
        with reader:
            prefetch = Prefetch(
                page_map(blocks, 64), EntryTable(8), [reader], settings, Counting(0),
                self.batches.append,
            )  # fmt: skip
            prefetch.work()
        self.assertEqual(([8] + 8 * [1], [8] + 8 * [1]), (asked, taken))
        (batch,) = self.batches
        self.assertEqual(([5], [0, 1, 2, 3, 4, 6, 7]), (list(batch.failed), list(batch.entries)))

    def test_of_a_volume_that_stops_to_answer_no_more_blocks_are_asked_for(self) -> None:
        asked: list[int] = []

        class Dying(BlockReader):
            def read_into(self, offset: int, buffer: memoryview) -> None:
                asked.append(offset // PAGE)
                if buffer.nbytes > PAGE:
                    raise exception.VolumeReadError(volume="volume", reason="scratched")
                if offset >= 2 * PAGE:
                    raise exception.VolumeTimeoutError(volume="volume", reason="no answer")
                super().read_into(offset, buffer)

        blocks = np.concatenate([np.arange(8), 16 + np.arange(8)])
        reader = Dying(VolumeSpec("volume", "block", str(self.path)))
        options = {"volume_merge_gap": 0, "volume_read_size": 64 * PAGE}
        _, pages, failed = self.read(blocks, reader, **options)
        self.assertEqual([0, 0, 1, 2], asked)
        self.assert_pages(blocks, pages, without=list(range(2, 16)))
        self.assertEqual(list(range(2, 16)), failed)

    def test_what_was_sent_during_the_read_is_not_delivered(self) -> None:
        test = self

        class Slow(BlockReader):
            def read_into(self, offset: int, buffer: memoryview) -> None:
                super().read_into(offset, buffer)
                test.table.pages(entries(1))

        blocks = [4, 5, 6]
        reader = Slow(VolumeSpec("volume", "block", str(self.path)))
        _, pages, failed = self.read(blocks, reader)
        self.assert_pages(blocks, pages, without=[1])
        self.assertEqual([], failed)

    def test_a_stop_ends_threads_that_wait_for_buffers(self) -> None:
        settings = RelaySettings(volume_read_size=PAGE, volume_queue_depth=3, read_ahead=PAGE)
        mapped = page_map(np.arange(64), 64)
        with self.reader() as reader:
            prefetch = Prefetch(
                mapped,
                EntryTable(64),
                [reader],
                settings,
                bucket(settings),
                self.batches.append,
            )
            threads = [
                threading.Thread(target=prefetch.work, daemon=True) for _ in range(prefetch.depth)
            ]
            for thread in threads:
                thread.start()
            prefetch.stop()
            for thread in threads:
                thread.join(LONG)
                self.assertFalse(thread.is_alive())
        self.assertLessEqual(len(self.batches), 5)

    def test_a_stop_ends_a_wait_for_the_cap_and_nothing_is_read(self) -> None:
        settings = RelaySettings(volume_read_size=PAGE, volume_queue_depth=1, volume_bandwidth=1e-3)
        mapped = page_map(np.arange(64), 64)
        with self.reader() as reader:
            prefetch = Prefetch(
                mapped,
                EntryTable(64),
                [reader],
                settings,
                bucket(settings),
                self.batches.append,
            )
            thread = threading.Thread(target=prefetch.work, daemon=True)
            thread.start()
            wait_for(lambda: prefetch.reads == 1)
            prefetch.stop()
            thread.join(LONG)
            self.assertFalse(thread.is_alive())
        self.assertEqual((1, PAGE), (prefetch.reads, prefetch.bytes))

    def test_time_is_counted_while_a_read_is_under_way(self) -> None:
        prefetch, _, _ = self.read(np.arange(8), self.reader())
        before = prefetch.busy_seconds
        self.assertGreater(before, 0)
        self.assertEqual(before, prefetch.busy_seconds)
        prefetch._begin()
        self.assertGreater(prefetch.busy_seconds, before)
