# SPDX-License-Identifier: Apache-2.0
"""Pass-through: where the source stops to understand, QEMU gets what it would get without us."""

import socket
import threading
from struct import pack
from unittest import mock

import numpy as np

from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.stream import format as fmt
from nova_dmigrate.volumes import DRIVERS, BlockReader, VolumeSpec
from tests.unit.relay.guest import PAGE, encode_delta
from tests.unit.relay.pair import HANGS, MIB, Pair
from tests.unit.relay.support import PairTestCase
from tests.unit.stream.builder import DEVICES, StreamBuilder, page_contents

PAGES = 640
#: The page that the stream has not spoken of when it latches.
UNSPOKEN = 600
OTHER = ("vga.vram", 64 * PAGE)
#: Nothing but references in the bulk: mapped pages never go raw.
SETTINGS = RelaySettings(hold_pages=0, hurry_threshold=3600.0)


class TestLatch(PairTestCase):
    """Each stream latches somewhere; what comes behind is made of arbitrary bytes."""

    def setUp(self) -> None:
        super().setUp()
        self.numbers = np.arange(256, UNSPOKEN)
        self.memory = page_contents(np.arange(PAGES), 5)
        self.builder = StreamBuilder([("pc.ram", PAGES * PAGE), OTHER])

    def relay(self, builder: StreamBuilder) -> Pair:
        """Relay the stream; pages from 256 on are mapped, the unspoken ones as well."""
        directory = self.make_directory()
        volume = directory / "volume"
        volume.write_bytes(self.memory.tobytes())
        mapped = np.arange(256, PAGES)
        pair = Pair(
            directory,
            [builder.data()],
            PAGES * PAGE,
            mapped,
            mapped,
            PAGES * PAGE,
            volume,
            source_settings=SETTINGS,
        )
        pair.run()
        self.assert_as_if_direct(builder.data(), pair)
        return pair

    def bulk(self, *, finish: bool = True) -> StreamBuilder:
        """The beginning of a stream: one section with most of the mapped pages."""
        builder = self.builder.begin().part()
        builder.pages(0, self.numbers * PAGE, self.memory[self.numbers])
        return builder.finish() if finish else builder

    def test_an_unknown_command_between_sections(self) -> None:
        builder = self.bulk().command(9, b"abc").raw(DEVICES)
        pair = self.relay(builder)
        self.assertEqual(fmt.UNKNOWN_COMMAND, pair.source_summary["pass_through"])
        self.assertEqual(fmt.UNKNOWN_COMMAND, pair.destination_summary["pass_through"])
        self.assertEqual(len(self.numbers), pair.source_summary["referenced_pages"])

    def test_a_section_behind_the_latch_may_continue_the_block_of_the_last_record(self) -> None:
        builder = self.bulk().part().zeros(1, [0, PAGE]).finish().command(9)
        builder.part().pages(1, [PAGE]).finish().raw(DEVICES)
        self.relay(builder)

    def test_a_foreign_iterable_section(self) -> None:
        start = b"\x01" + pack(">IB", 9, 12) + b"dirty-bitmap" + pack(">II", 0, 1)
        builder = self.bulk().raw(start + b"whatever" + DEVICES)
        pair = self.relay(builder)
        self.assertEqual(fmt.UNKNOWN_ITERABLE, pair.source_summary["pass_through"])

    def test_an_unknown_flag_directly_behind_a_reference(self) -> None:
        builder = self.bulk(finish=False).record(0, 300 * PAGE, 0x200, b"xyz")
        pair = self.relay(builder)
        self.assertEqual(fmt.MULTIFD_SEEN, pair.source_summary["pass_through"])
        self.assertEqual(len(self.numbers), pair.source_summary["referenced_pages"])

    def test_an_unknown_flag_directly_behind_a_zero_page(self) -> None:
        builder = self.bulk(finish=False).zeros(1, [PAGE], 0x5A).record(1, 0, 0x800, b"xyz")
        pair = self.relay(builder)
        self.assertEqual(fmt.UNKNOWN_RECORD, pair.source_summary["pass_through"])

    def test_an_unknown_flag_directly_behind_a_delta(self) -> None:
        builder = self.bulk().part().pages(1, [PAGE], self.memory[:1])
        builder.delta(0, 300 * PAGE, encode_delta(100, b"changed"))
        builder.record(0, 0, 0x100, b"xyz")
        pair = self.relay(builder)
        self.assertEqual(fmt.COMPRESSION_SEEN, pair.source_summary["pass_through"])

    def test_an_unknown_flag_within_the_end_of_ram(self) -> None:
        builder = self.bulk().end().pages(1, [PAGE]).pages(0, [0]).record(0, 0, 0x100, b"xyz")
        self.relay(builder)

    def test_an_unknown_flag_as_the_first_record_of_a_section(self) -> None:
        builder = self.bulk().part().record(0, 0, 0x100, b"xyz")
        self.relay(builder)

    def test_an_unknown_flag_as_the_first_record_of_all(self) -> None:
        builder = self.builder.begin().part().record(1, 0, 0x100, b"xyz")
        self.relay(builder)

    def test_a_device_before_any_section_of_ram(self) -> None:
        pair = self.relay(self.builder.begin().raw(DEVICES))
        self.assertEqual(fmt.FULL_BEFORE_RAM, pair.destination_summary["pass_through"])

    def test_a_wrong_footer_behind_a_section(self) -> None:
        builder = self.bulk(finish=False).raw(pack(">Q", 0x10) + b"\x7e\0\0\0\7" + DEVICES)
        self.relay(builder)

    def test_nothing_is_understood_from_the_first_byte_on(self) -> None:
        pair = self.relay(StreamBuilder().raw(b"\x16\x03\x01 not a stream at all"))
        self.assertEqual(fmt.NOT_A_STREAM, pair.source_summary["pass_through"])
        self.assertEqual(fmt.NOT_A_STREAM, pair.destination_summary["pass_through"])

    def test_the_configuration_is_not_understood(self) -> None:
        unknown = StreamBuilder.subsection("configuration/news", b"1234")
        pair = self.relay(self.builder.header().configuration(subsections=unknown).raw(DEVICES))
        self.assertEqual(fmt.UNKNOWN_CONFIGURATION, pair.destination_summary["pass_through"])

    def test_qemu_may_close_first_where_nothing_was_understood(self) -> None:
        stream = b"\x16\x03\x01 not a stream at all"

        def send(qemu: socket.socket) -> None:
            qemu.sendall(stream)
            # As QEMU does: it waits for the last word of the other one, and only then closes.
            while qemu.recv(MIB):
                pass

        def receive(qemu: socket.socket) -> None:
            got = b""
            while len(got) < len(stream):
                got += qemu.recv(MIB)

        pair = Pair(self.make_directory(), [], PAGES * PAGE, sender=send, receiver=receive)
        pair.run()
        self.assert_delivered(pair)

    def test_speculated_pages_that_were_not_spoken_of_are_zero_behind_a_latch(self) -> None:
        builder = self.bulk().command(9).raw(DEVICES)
        pair = self.relay(builder)
        # That is what assert_as_if_direct has seen; here only that there was something to see.
        self.assertEqual(PAGES - 256, pair.destination_summary["mapped_pages"])

    def test_nothing_is_read_of_the_volume_behind_a_latch(self) -> None:
        latched = threading.Event()
        reads: list[int] = []

        class Waiting(BlockReader):
            def read_into(self, offset: int, buffer: memoryview) -> None:
                reads.append(offset)
                latched.wait(HANGS)
                super().read_into(offset, buffer)

        def receive(qemu: socket.socket) -> None:
            got = b""
            while not got.endswith(DEVICES):
                got += qemu.recv(MIB)
            latched.set()
            # The migration has not ended yet.
            for thread in threading.enumerate():
                if thread.name.startswith("volume-"):
                    thread.join(HANGS)

        directory = self.make_directory()
        volume = directory / "volume"
        volume.write_bytes(self.memory.tobytes())
        mapped = np.arange(256, PAGES)
        stream = self.builder.begin().command(9).raw(DEVICES).data()
        with mock.patch.dict(DRIVERS, waiting=lambda spec, _: Waiting(spec)):
            pair = Pair(
                directory, [stream], PAGES * PAGE, mapped, mapped, PAGES * PAGE,
                volumes=[VolumeSpec("volume", "waiting", str(volume))], receiver=receive,
                destination_settings=RelaySettings(volume_read_size=PAGE, volume_queue_depth=1),
            )  # fmt: skip
            pair.run()
        self.assert_delivered(pair)
        self.assertLessEqual(len(reads), 1)


class TestDeltas(PairTestCase):
    """XBZRLE: what a page is made of at the destination decides what a delta makes of it."""

    def test_a_delta_to_a_page_from_the_volume(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        directory = self.make_directory()
        volume = directory / "volume"
        mapped = np.arange(256, PAGES)
        volume.write_bytes(memory.tobytes())
        builder = StreamBuilder([("pc.ram", PAGES * PAGE), OTHER]).begin().part()
        builder.pages(0, mapped * PAGE, memory[mapped]).finish()
        for number in range(3):
            builder.part()
            for page in range(256, PAGES, 37):
                delta = encode_delta(7 * number + page, bytes([number]) * 300)
                builder.delta(0, page * PAGE, delta)
            builder.pages(0, [400 * PAGE], memory[number : number + 1]).finish()
        builder.end().delta(0, 400 * PAGE, encode_delta(0, b"end")).finish().raw(DEVICES)
        stream = builder.data()
        pair = Pair(
            directory, [stream], PAGES * PAGE, mapped, mapped, PAGES * PAGE, volume,
            source_settings=SETTINGS,
        )  # fmt: skip
        pair.run()
        self.assert_as_if_direct(stream, pair)
        self.assertEqual(len(mapped), pair.source_summary["referenced_pages"])

    def test_a_delta_that_comes_before_its_page(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        directory = self.make_directory()
        volume = directory / "volume"
        mapped = np.arange(256, PAGES)
        volume.write_bytes(memory.tobytes())
        builder = StreamBuilder([("pc.ram", PAGES * PAGE)]).begin().part()
        builder.delta(0, 300 * PAGE, encode_delta(0, b"\1" * PAGE))
        builder.pages(0, mapped * PAGE, memory[mapped]).finish()
        builder.end().finish().raw(DEVICES)
        pair = Pair(
            directory, [builder.data()], PAGES * PAGE, mapped, mapped, PAGES * PAGE, volume,
            source_settings=SETTINGS,
        )  # fmt: skip
        pair.run()
        self.assert_as_if_direct(builder.data(), pair)


class TestEndOfRam(PairTestCase):
    """RAM's END may come at any time."""

    def relay(self, stream: bytes, memory: np.ndarray) -> Pair:
        directory = self.make_directory()
        volume = directory / "volume"
        volume.write_bytes(memory.tobytes())
        mapped = np.arange(256, PAGES)
        pair = Pair(
            directory, [stream], PAGES * PAGE, mapped, mapped, PAGES * PAGE, volume,
            source_settings=SETTINGS,
        )  # fmt: skip
        pair.run()
        self.assert_as_if_direct(stream, pair)
        return pair

    def test_the_end_within_the_bulk(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        builder = StreamBuilder([("pc.ram", PAGES * PAGE), OTHER]).begin().part()
        builder.pages(0, np.arange(400) * PAGE, memory[:400]).finish().end()
        builder.pages(0, np.arange(400, PAGES) * PAGE, memory[400:]).finish().raw(DEVICES)
        pair = self.relay(builder.data(), memory)
        self.assertEqual(400 - 256, pair.source_summary["referenced_pages"])

    def test_all_of_ram_in_the_end(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        builder = StreamBuilder([("pc.ram", PAGES * PAGE), OTHER]).begin().end()
        builder.pages(0, np.arange(PAGES) * PAGE, memory).finish().raw(DEVICES)
        pair = self.relay(builder.data(), memory)
        self.assertEqual(0, pair.source_summary["referenced_pages"])

    def test_passes_that_follow_each_other_within_a_run(self) -> None:
        memory = page_contents(np.arange(PAGES), 5)
        numbers = np.concatenate([np.arange(PAGES), np.arange(0, PAGES, 3), np.arange(500)])
        builder = StreamBuilder([("pc.ram", PAGES * PAGE), OTHER]).begin().part()
        builder.pages(0, numbers * PAGE, memory[numbers]).finish()
        builder.part().zeros(0, np.array([1, 2, 3, 3, 2]) * PAGE).finish()
        builder.end().finish().raw(DEVICES)
        pair = self.relay(builder.data(), memory)
        self.assertEqual(6, pair.source_summary["passes"])
        self.assertEqual(PAGES - 256, pair.source_summary["referenced_pages"])
