# SPDX-License-Identifier: Apache-2.0
"""Maps and volumes as they should not be: they cost time, never the migration or its exactness."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.buffermap import codec
from nova_dmigrate.relay import handover
from nova_dmigrate.relay.monitor import ask
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.volumes import DRIVERS, BlockReader, VolumeSpec
from tests.unit.relay.guest import PAGE, FakeGuest, encode_delta
from tests.unit.relay.pair import HANGS, Pair, extents_of
from tests.unit.relay.support import PairTestCase
from tests.unit.stream.builder import DEVICES, StreamBuilder, page_contents

PAGES = 1024
TIB = 1 << 40
#: Mapped pages always go as references, copies only where they are asked for or waited for.
SETTINGS = RelaySettings(hold_pages=0, hurry_threshold=3600.0)


class MapTestCase(PairTestCase):
    """A guest all of whose pages are mapped and right, unless a test changes that."""

    def guest(self, seed: int = 1) -> FakeGuest:
        return FakeGuest(seed, ram_pages=PAGES, mapped=1.0, zero=0.1, dirty=0.05)


class TestMaps(MapTestCase):
    """What the guest says is wrong."""

    def relay(self, guest: FakeGuest, **options: object) -> Pair:
        return self.migrate(guest, source_settings=SETTINGS, **options)

    def test_a_map_of_a_volume_that_the_destination_lacks(self) -> None:
        guest = self.guest()
        pair = self.relay(guest, volumes=[])
        self.assertEqual(0, pair.destination_summary["volume_bytes"])
        self.assertEqual(
            {"read_error": pair.source_summary["referenced_pages"]},
            pair.source_summary["misses"],
        )
        self.assertIn("blocks of volume volume that cannot be read here", self.log.output)

    def test_a_map_of_another_instances_volume_reads_nothing_of_it(self) -> None:
        guest = self.guest()
        size = guest.volume_blocks * PAGE
        half = len(guest.pages) // 2
        extents = [
            extents_of("volume", size, guest.pages[:half], guest.blocks[:half]),
            extents_of("another", size, guest.pages[half:], guest.blocks[half:]),
        ]
        pair = self.relay(guest, extents=extents)
        self.assertLessEqual(pair.destination_summary["hits"], half)
        self.assertIn("blocks of volume another that cannot be read here", self.log.output)

    def test_blocks_beyond_the_real_end_of_the_volume(self) -> None:
        guest = self.guest()
        extents = extents_of("volume", 16 * TIB, guest.pages, guest.blocks + (1 << 31))
        pair = self.relay(guest, extents=[extents])
        self.assertEqual(0, pair.destination_summary["volume_bytes"])

    def test_blocks_on_both_sides_of_the_real_end(self) -> None:
        guest = self.guest()
        beyond = guest.blocks.copy()
        beyond[::2] += guest.volume_blocks
        extents = extents_of("volume", 4 * guest.volume_blocks * PAGE, guest.pages, beyond)
        pair = self.relay(guest, extents=[extents])
        self.assertGreater(pair.destination_summary["hits"], 0)
        self.assertNotIn("will travel over the network", self.log.output)

    def test_all_pages_on_the_same_block(self) -> None:
        guest = self.guest()
        settings = RelaySettings(volume_read_size=64 << 10, read_ahead=1 << 20)
        pair = self.relay(
            guest,
            extents=[
                extents_of(
                    "volume", guest.volume_blocks * PAGE, guest.pages, np.zeros_like(guest.blocks)
                )
            ],
            destination_settings=settings,
        )
        self.assertGreater(pair.destination_summary["volume_reads"], 1)

    def test_pages_outside_of_the_guests_ram(self) -> None:
        guest = self.guest()
        pages = np.concatenate([guest.pages[:100], np.arange(1 << 24, (1 << 24) + 50)])
        extents = extents_of("volume", guest.volume_blocks * PAGE, pages, guest.blocks[:150])
        pair = self.relay(guest, extents=[extents])
        self.assertEqual(100, pair.source_summary["mapped_pages"])

    def test_volumes_too_large_to_be_numbered_cost_the_map_only(self) -> None:
        guest = self.guest()
        extents = [
            extents_of("volume", 9 * TIB, guest.pages[:10], guest.blocks[:10]),
            extents_of("another", 9 * TIB, guest.pages[10:20], guest.blocks[10:20]),
        ]
        pair = self.relay(guest, extents=extents)
        self.assertEqual(0, pair.source_summary["mapped_pages"])
        self.assertEqual(0, pair.destination_summary["mapped_pages"])
        self.assertIn("The buffer map is not used", self.log.output)

    def test_a_map_file_that_is_damaged(self) -> None:
        guest = self.guest()
        pair = self.pair(guest)
        pair._save_map()
        assert pair.map_path is not None
        data = bytearray(pair.map_path.read_bytes())
        data[len(data) // 2] ^= 1
        pair.map_path.write_bytes(data)
        self.assert_ordinary(guest, pair)

    def test_a_map_file_that_is_missing(self) -> None:
        guest = self.guest()
        self.assert_ordinary(guest, self.pair(guest, map_path=Path("/does/not/exist")))

    def test_a_layout_that_says_nothing(self) -> None:
        guest = self.guest()
        self.assert_ordinary(guest, self.pair(guest, layout="command not found"))

    def test_a_map_larger_than_this_host_allows(self) -> None:
        guest = self.guest()
        settings = RelaySettings(max_map_pages=100)
        self.assert_ordinary(guest, self.pair(guest, source_settings=settings))

    def test_a_map_larger_than_the_destination_allows(self) -> None:
        guest = self.guest()
        settings = RelaySettings(max_map_pages=100)
        pair = self.pair(guest, destination_settings=settings)
        pair.run()
        self.assert_exact(guest, pair)
        self.assertEqual(0, pair.source_summary["referenced_pages"])
        self.assertEqual(0, pair.destination_summary["volume_bytes"])
        self.assertIn("which the destination refused: Buffer map:", self.log.output)

    def test_a_map_of_more_bytes_than_the_destination_takes(self) -> None:
        guest = self.guest()
        settings = RelaySettings(max_map_pages=1)
        pair = self.pair(guest, destination_settings=settings)
        with mock.patch.object(codec, "_FRAME_BYTES", 0):
            pair.run()
        self.assert_exact(guest, pair)
        self.assertEqual(0, pair.source_summary["referenced_pages"])
        self.assertEqual("refused", pair.source_summary["map"])
        self.assertRegex(self.log.output, r"refused: Buffer map: it has \d+ bytes")

    def assert_ordinary(self, guest: FakeGuest, pair: Pair) -> None:
        pair.run()
        self.assert_exact(guest, pair)
        self.assertEqual(0, pair.source_summary["referenced_pages"])
        self.assertEqual(0, pair.destination_summary["volume_bytes"])
        self.assertIn("Instance instance migrates without a buffer map:", self.log.output)

    def test_pages_of_which_the_source_never_speaks_are_zero(self) -> None:
        guest = FakeGuest(2, ram_pages=PAGES, mapped=1.0, zero=0, silent=0.5, dirty=0.0)
        # Nothing but a wait for the whole volume keeps the source from being faster.
        pair = self.pair(guest, source_settings=SETTINGS)
        silent = ~guest.said[guest.pages]
        pair.run()
        self.assert_exact(guest, pair)
        withdrawn = pair.destination_summary["withdrawn_pages"]
        self.assertLessEqual(withdrawn, int(np.count_nonzero(silent)))

    def test_a_guest_of_two_numa_nodes(self) -> None:
        memory = [page_contents(np.arange(PAGES), seed) for seed in (1, 2)]
        builder = StreamBuilder([("ram-node0", PAGES * PAGE), ("ram-node1", PAGES * PAGE)])
        builder.begin()
        for cut in range(0, PAGES, 128):
            numbers = np.arange(cut, cut + 128)
            builder.part().pages(0, numbers * PAGE, memory[0][numbers]).finish()
        builder.part().pages(1, np.arange(PAGES) * PAGE, memory[1]).finish()
        dirty = np.arange(0, PAGES, 7)
        changed = page_contents(dirty, 9)
        builder.part().pages(1, dirty * PAGE, changed).zeros(0, dirty * PAGE).finish()
        builder.end().pages(0, dirty[:9] * PAGE, changed[:9]).finish().raw(DEVICES)
        size = PAGES * PAGE
        layout = (
            'FlatView #0\n AS "memory", root: system\n Root memory region: system\n'
            f"  {0:016x}-{size - 1:016x} (prio 0, ram): ram-node0\n"
            f"  {size:016x}-{2 * size - 1:016x} (prio 0, ram): ram-node1\n"
        )
        directory = self.make_directory()
        # The volume holds the second node's pages before the first one's, backwards.
        blocks = np.arange(2 * PAGES)[::-1].copy()
        contents = np.concatenate(memory)[blocks]
        volume = directory / "volume"
        volume.write_bytes(contents.tobytes())
        pages = np.arange(256, 2 * PAGES)
        extents = extents_of("volume", 2 * size, pages, np.arange(2 * PAGES)[::-1][pages])
        stream = builder.data()
        pair = Pair(
            directory, [stream], size, volume=volume, extents=[extents], layout=layout,
            source_settings=SETTINGS,
        )  # fmt: skip
        pair.run()
        self.assert_as_if_direct(stream, pair)
        self.assertEqual(2 * PAGES - 256, pair.source_summary["referenced_pages"])
        self.assertEqual({}, pair.source_summary["misses"])


class TestLateMaps(MapTestCase):
    """The map comes while the stream is under way."""

    def relay(self, guest: FakeGuest, share: float) -> Pair:
        """:param share: of the bytes of the first pass that go before the map comes."""
        first_pass = int(np.count_nonzero(guest.said & guest.memory.any(axis=1))) * PAGE
        return self.migrate(guest, source_settings=SETTINGS, map_after=int(share * first_pass))

    def test_what_has_not_been_sent_yet_is_referenced(self) -> None:
        for share in (0.01, 0.3, 0.6):
            guest = FakeGuest(3, ram_pages=PAGES, mapped=1.0, stale=0.1, silent=0.1, dirty=0.1)
            pair = self.relay(guest, share)
            self.assertEqual("taken", pair.source_summary["map"])
            referenced = pair.source_summary["referenced_pages"]
            self.assertGreater(referenced, 0)
            self.assertLess(referenced, (1 - share) * PAGES)
            self.assertGreater(pair.destination_summary["hits"], 0)

    def test_what_was_sent_before_is_never_replaced_by_a_block(self) -> None:
        guest = FakeGuest(4, ram_pages=PAGES, mapped=1.0, stale=1.0, zero=0.0, dirty=0.0, passes=1)
        pair = self.relay(guest, 0.5)
        # None of the blocks is right: each reference is a miss
        self.assertEqual(0, pair.destination_summary["hits"])
        self.assertLess(pair.destination_summary["speculated_pages"], 0.6 * PAGES)

    def test_after_the_bulk_it_is_of_no_use(self) -> None:
        guest = FakeGuest(5, ram_pages=PAGES, mapped=1.0, dirty=0.5)
        pair = self.relay(guest, 1.2)
        self.assertEqual("late", pair.source_summary["map"])
        self.assertEqual(0, pair.source_summary["referenced_pages"])
        self.assertEqual(0, pair.destination_summary["volume_bytes"])
        self.assertIn("has come too late", self.log.output)

    def relay_stream(self, builder: StreamBuilder, memory: NDArray[np.uint8], at: int) -> Pair:
        """A stream made by hand, whose map comes behind so many bytes; all is mapped."""
        directory = self.make_directory()
        volume = directory / "volume"
        volume.write_bytes(memory[::-1].tobytes())
        mapped = np.arange(256, PAGES)
        pair = Pair(
            directory, [builder.data()], PAGES * PAGE, mapped, PAGES - 1 - mapped, PAGES * PAGE,
            volume, source_settings=SETTINGS, map_after=at,
        )  # fmt: skip
        pair.run()
        self.assert_as_if_direct(builder.data(), pair)
        return pair

    def test_after_the_beginning_of_the_end_it_is_of_no_use(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        builder = StreamBuilder([("pc.ram", PAGES * PAGE)]).begin().part()
        builder.pages(0, np.arange(300) * PAGE, memory[:300]).finish().end()
        builder.pages(0, np.arange(300, 302) * PAGE, memory[300:302])
        at = len(builder.data())
        builder.pages(0, np.arange(310, 350) * PAGE, memory[310:350]).finish().raw(DEVICES)
        pair = self.relay_stream(builder, memory, at)
        self.assertEqual("late", pair.source_summary["map"])

    def test_of_a_stream_that_is_passed_through_it_is_of_no_use(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        builder = StreamBuilder([("pc.ram", PAGES * PAGE)]).begin().part()
        builder.pages(0, np.arange(300) * PAGE, memory[:300]).finish()
        builder.command(9, b"abc").raw(DEVICES)
        at = len(builder.data())
        builder.raw(DEVICES * 20)
        pair = self.relay_stream(builder, memory, at)
        self.assertEqual("late", pair.source_summary["map"])

    def test_after_a_delta_it_is_of_no_use(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        builder = StreamBuilder([("pc.ram", PAGES * PAGE)]).begin().part()
        builder.pages(0, np.arange(300) * PAGE, memory[:300]).finish()
        builder.part().delta(0, 500 * PAGE, encode_delta(8, b"changed")).finish()
        at = len(builder.data())
        rest = np.arange(301, 400)
        builder.part().pages(0, rest * PAGE, memory[rest]).finish().end().finish().raw(DEVICES)
        pair = self.relay_stream(builder, memory, at)
        self.assertEqual("late", pair.source_summary["map"])

    def test_a_destination_that_does_not_answer_costs_the_gain_only(self) -> None:
        guest = FakeGuest(8, ram_pages=PAGES, mapped=1.0, silent=0.1, dirty=0.1)
        pair = self.pair(guest, source_settings=SETTINGS, map_after=PAGE)
        pair.prepare()
        pair.source._handover._patience = 0.0
        with mock.patch.object(handover, "_PAGE_SECONDS", 0.0):
            pair.start()
            pair.join()
        self.assert_exact(guest, pair)
        self.assertEqual(0, pair.source_summary["referenced_pages"])
        self.assertEqual("refused", pair.source_summary["map"])

    def test_a_second_map_is_not_used(self) -> None:
        guest = self.guest()
        pair = self.pair(guest, source_settings=SETTINGS)
        pair.prepare()
        pair.offer_map()
        pair.start()
        pair.join()
        self.assert_exact(guest, pair)
        self.assertEqual(len(guest.pages), pair.source_summary["mapped_pages"])
        self.assertIn("one buffer map more is not used", self.log.output)

    def test_a_late_map_that_is_damaged_costs_the_gain_only(self) -> None:
        guest = self.guest()
        pair = self.pair(guest, map_after=PAGE)
        pair.prepare()
        assert pair.map_path is not None
        pair.map_path.write_bytes(b"nonsense")
        pair.map_after = None
        pair.start()
        control = pair.directory / "source.control"
        self.assertIn("error", ask(control, "map", buffer_map=str(pair.map_path)))
        paths = {"buffer_map": str(pair.map_path), "memory_layout": str(pair.map_path)}
        ask(control, "map", **paths)
        pair.join()
        self.assert_exact(guest, pair)
        self.assertEqual(0, pair.source_summary["referenced_pages"])


class TestVolumes(MapTestCase):
    """What the volume says is wrong, late or nothing."""

    def with_reader(
        self, guest: FakeGuest, make: Callable[[VolumeSpec], BlockReader], **options: object
    ) -> Pair:
        directory = self.make_directory()
        path = guest.write_volume(directory / "volume")
        spec = VolumeSpec("volume", "special", str(path))
        options.setdefault("source_settings", SETTINGS)
        with mock.patch.dict(DRIVERS, special=lambda spec, _: make(spec)):
            pair = self.pair(guest, volumes=[spec], **options)
            pair.run()
        self.assert_exact(guest, pair)
        return pair

    def test_a_volume_that_cannot_be_opened(self) -> None:
        guest = self.guest()
        pair = self.migrate(guest, volumes=[VolumeSpec("volume", "block", "/does/not/exist")])
        self.assertEqual(0, pair.destination_summary["hits"])
        told = pair.destination_summary["volume_troubles"]
        self.assertEqual({"volume"}, set(told))
        self.assertIn("/does/not/exist cannot be opened: No such file", told["volume"])
        self.assertIn("pages of this volume will travel over the network", self.log.output)

    def test_a_volume_that_is_cut_off_when_it_has_been_opened(self) -> None:
        guest = self.guest()
        half = guest.volume_blocks // 2 * PAGE

        def make(spec: VolumeSpec) -> BlockReader:
            reader = BlockReader(spec)
            os.truncate(spec.location, half)
            return reader

        pair = self.with_reader(guest, make)
        self.assertGreater(pair.destination_summary["volume_errors"], 0)
        self.assertGreater(pair.destination_summary["hits"], 0)
        self.assertIn("Blocks will travel over the network instead", self.log.output)

    def test_a_volume_that_fails_always_is_not_asked_for_ever(self) -> None:
        guest = self.guest()

        def make(spec: VolumeSpec) -> BlockReader:
            reader = BlockReader(spec)
            os.truncate(spec.location, 0)
            return reader

        settings = RelaySettings(
            volume_error_limit=3, volume_read_size=16 << 10, volume_merge_gap=0,
            volume_queue_depth=1,
        )  # fmt: skip
        pair = self.with_reader(guest, make, destination_settings=settings)
        self.assertEqual(3, pair.destination_summary["volume_errors"])
        self.assertEqual(0, pair.destination_summary["volume_bytes"])
        self.assertIn("Volume volume: ", pair.destination_summary["volume_troubles"]["volume"])
        self.assertIn("is not read any more after 3 errors", self.log.output)

    def test_a_volume_that_never_answers(self) -> None:
        guest = self.guest()
        answer = threading.Event()

        class Hung(BlockReader):
            def read_into(self, offset: int, buffer: memoryview) -> None:
                answer.wait(HANGS)
                super().read_into(offset, buffer)

        try:
            pair = self.with_reader(guest, Hung)
        finally:
            answer.set()
        for thread in threading.enumerate():
            if thread.name.startswith("volume-"):
                thread.join(HANGS)
        self.assertGreater(pair.source_summary["copies_unasked"], 0)
        self.assertEqual(0, pair.destination_summary["hits"])
        self.assertIn("is left behind", self.log.output)

    def test_a_volume_that_never_answers_does_not_hold_up_a_latch_or_the_end(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        mapped = np.arange(256, PAGES)
        answer = threading.Event()

        class Hung(BlockReader):
            def read_into(self, offset: int, buffer: memoryview) -> None:
                answer.wait(HANGS)
                super().read_into(offset, buffer)

        directory = self.make_directory()
        volume = directory / "volume"
        volume.write_bytes(memory.tobytes())
        builder = StreamBuilder([("pc.ram", PAGES * PAGE)]).begin().part()
        builder.pages(0, mapped * PAGE, memory[mapped]).finish().command(9).raw(DEVICES)
        with mock.patch.dict(DRIVERS, special=lambda spec, _: Hung(spec)):
            pair = Pair(
                directory, [builder.data()], PAGES * PAGE, mapped, mapped, PAGES * PAGE,
                volumes=[VolumeSpec("volume", "special", str(volume))], source_settings=SETTINGS,
            )  # fmt: skip
            pair.run()
        answer.set()
        for thread in threading.enumerate():
            if thread.name.startswith("volume-"):
                thread.join(HANGS)
        self.assert_as_if_direct(builder.data(), pair)

    def test_copies_sent_unasked_and_blocks_may_cross_on_their_way(self) -> None:
        for stale in (0.0, 0.5, 1.0):
            guest = FakeGuest(6, ram_pages=PAGES, mapped=1.0, zero=0, stale=stale, dirty=0)
            pairs: list[Pair] = []

            class Late(BlockReader):
                """Answers from the moment on at which the source sends copies unasked."""

                def read_into(
                    self, offset: int, buffer: memoryview, pairs: list[Pair] = pairs
                ) -> None:
                    deadline = time.monotonic() + HANGS
                    while not pairs[0].source._outbox.copies_unasked:
                        assert time.monotonic() < deadline
                        time.sleep(0.001)
                    super().read_into(offset, buffer)

            path = guest.write_volume(self.make_directory() / "volume")
            settings = RelaySettings(volume_read_size=16 << 10, volume_queue_depth=2)
            with mock.patch.dict(DRIVERS, late=lambda spec, _: Late(spec)):
                pairs.append(
                    self.pair(
                        guest,
                        volumes=[VolumeSpec("volume", "late", str(path))],
                        source_settings=SETTINGS,
                        destination_settings=settings,
                    )
                )
                pairs[0].run()
            self.assert_exact(guest, pairs[0])
            self.assertGreater(pairs[0].source_summary["copies_unasked"], 0)

    def test_a_volume_that_changes_under_the_reader(self) -> None:
        guest = FakeGuest(5, ram_pages=PAGES, mapped=1.0, zero=0, dirty=0.1)
        stop = threading.Event()
        directory = self.make_directory()
        volume = guest.write_volume(directory / "written")
        right: NDArray[np.uint8] = guest.volume.copy()

        def write() -> None:
            """Torn writes: parts of blocks, right and wrong ones in turns."""
            random = np.random.default_rng(1)
            with volume.open("r+b", buffering=0) as file:
                while not stop.is_set():
                    block = int(random.integers(0, len(right)))
                    start = block * PAGE + int(random.integers(0, PAGE))
                    file.seek(start)
                    if random.random() < 0.5:
                        file.write(b"\xff" * 100)
                    else:
                        file.seek(block * PAGE)
                        file.write(right[block].tobytes())

        writer = threading.Thread(target=write)
        writer.start()
        try:
            small = RelaySettings(volume_read_size=16 << 10)
            pair = self.pair(
                guest, volume=volume, source_settings=SETTINGS, destination_settings=small
            )
            pair.run()
        finally:
            stop.set()
            writer.join(HANGS)
        self.assert_exact(guest, pair)
