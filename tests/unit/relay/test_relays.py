# SPDX-License-Identifier: Apache-2.0
"""Both relays together, over real sockets and files, between a sender and a recorder."""

import json
import socket
import time
from typing import Any
from unittest import mock

import numpy as np

from nova_dmigrate.relay.monitor import ask
from nova_dmigrate.relay.session import RelaySettings
from tests.unit.relay.guest import FakeGuest
from tests.unit.relay.support import PairTestCase
from tests.unit.relay.wire.certificates import Authority

ALL_REFERENCES = RelaySettings(hold_pages=0, hurry_threshold=3600.0)
#: What a summary has more than the answer to a question about progress.
SUMMARY_ONLY = {"reason", "series", "destination"}


class TestBitExactness(PairTestCase):
    """The last version that arrives of each page is the last version that was sent."""

    def test_a_guest_without_a_map_arrives_as_it_was_sent(self) -> None:
        guest = FakeGuest(1, mapped=0)
        pair = self.migrate(guest)
        self.assertEqual(0, pair.source_summary["referenced_pages"])

    def test_mapped_pages_come_from_the_volume(self) -> None:
        guest = FakeGuest(2, mapped=0.9, zero=0, dirty=0)
        # Without the late part of the bulk, in which pages go raw while the volume is being read.
        settings = RelaySettings(hold_pages=0, hurry_threshold=3600.0)
        pair = self.migrate(guest, source_settings=settings)
        self.assertEqual(len(guest.pages), pair.source_summary["referenced_pages"])
        self.assertEqual({}, pair.source_summary["misses"])
        raw = guest.ram_pages - len(guest.pages)
        self.assertEqual(raw, pair.source_summary["raw_pages"])

    def test_pages_that_are_sent_again_and_again_arrive_in_their_last_version(self) -> None:
        guest = FakeGuest(3, ram_pages=768, mapped=1.0, zero=0.1, passes=12, dirty=0.4)
        pair = self.migrate(guest)
        self.assertGreater(pair.source_summary["resent_pages"], 0)

    def test_changed_blocks_are_asked_for_and_sent(self) -> None:
        guest = FakeGuest(4, ram_pages=768, mapped=1.0, zero=0, stale=1.0, passes=1, dirty=0)
        pair = self.migrate(guest, source_settings=ALL_REFERENCES)
        # Each of them was a miss, but for those whose copies were sent before the answer came.
        source = pair.source_summary
        self.assertEqual(len(guest.pages), source["referenced_pages"])
        self.assertEqual(0, pair.destination_summary["hits"])
        self.assertGreater(source["misses"]["changed"], 0)

    def test_a_stream_in_single_bytes_and_odd_pieces(self) -> None:
        guest = FakeGuest(5, ram_pages=320, mapped=1.0)
        pair = self.pair(guest)
        stream = next(iter(pair.chunks))
        cuts = np.random.default_rng(5).integers(200, len(stream), 400)
        edges = [*range(200), *sorted(set(cuts.tolist())), len(stream)]
        pair.chunks = [stream[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        pair.run()
        self.assert_exact(guest, pair)


class TestWays(PairTestCase):
    """The same guests by other ways: windows, channels, TLS, caps."""

    def test_a_window_of_one_page(self) -> None:
        guest = FakeGuest(6, ram_pages=512, mapped=1.0, zero=0)
        settings = RelaySettings(window_size=4096, hold_pages=0)
        pair = self.migrate(guest, source_settings=settings)
        self.assertEqual(1, pair.source_summary["peak_window_pages"])
        self.assertGreater(pair.source_summary["window_full_pages"], 0)

    def test_as_many_channels_as_there_may_be(self) -> None:
        guest = FakeGuest(7, ram_pages=1024)
        settings = RelaySettings(channels=16, batch_size=1 << 16)
        self.migrate(guest, source_settings=settings)

    def test_one_channel(self) -> None:
        self.migrate(FakeGuest(8, ram_pages=1024), source_settings=RelaySettings(channels=1))

    def test_copies_between_frames_that_go_at_once(self) -> None:
        # On any network, so that copies and the stream meet on one connection all the time.
        patched = mock.patch("nova_dmigrate.relay.outbox._FAST", -1.0)
        patched.start()
        self.addCleanup(patched.stop)
        for channels in (1, 2):
            guest = FakeGuest(9, ram_pages=16384, mapped=0.6, stale=0.5, dirty=0.3)
            settings = RelaySettings(channels=channels, hurry_threshold=3600.0)
            pair = self.migrate(guest, source_settings=settings)
            self.assertGreater(pair.source_summary["copies_asked"], 0)

    def test_tls(self) -> None:
        authority = Authority(self.make_directory())
        pair = self.migrate(
            FakeGuest(9, ram_pages=1024),
            source_tls=authority.settings("source.example.org", peer="destination.example.org"),
            destination_tls=authority.settings(
                "destination.example.org", peer="source.example.org"
            ),
            answer=b"by TLS as well",
        )
        self.assertEqual(b"by TLS as well", pair.answered)

    def test_a_cap_of_the_network_is_kept(self) -> None:
        guest = FakeGuest(10, ram_pages=512, mapped=0, zero=0, passes=1, dirty=0)
        rate = 8 << 20
        begin = time.monotonic()
        pair = self.migrate(guest, source_settings=RelaySettings(network_bandwidth=rate))
        # What goes at once after idling, and the last frame, which is not waited for.
        wire = pair.source_summary["wire_bytes"] - rate * 0.01 - (1 << 20)
        self.assertGreaterEqual(time.monotonic() - begin, wire / rate)

    def test_a_cap_of_the_volume_is_kept(self) -> None:
        guest = FakeGuest(11, ram_pages=768, mapped=1.0, zero=0, passes=1, dirty=0)
        rate = 8 << 20
        settings = RelaySettings(volume_bandwidth=rate, volume_queue_depth=1)
        begin = time.monotonic()
        pair = self.migrate(guest, destination_settings=settings)
        volume = pair.destination_summary["volume_bytes"] - rate * 0.01 - (1 << 20)
        self.assertGreaterEqual(time.monotonic() - begin, volume / rate)

    def test_both_relays_answer_questions_while_they_work(self) -> None:
        guest = FakeGuest(12, ram_pages=1024, mapped=0.9)
        answers: list[dict[str, Any]] = []
        pair = self.pair(guest)
        stream = next(iter(pair.chunks))

        def send(qemu: socket.socket) -> None:
            half = len(stream) // 2
            qemu.sendall(stream[:half])
            for name in ("source.control", "destination.control"):
                answers.append(ask(pair.directory / name, "progress"))
            qemu.sendall(stream[half:])

        pair.sender = send
        pair.run()
        self.assert_exact(guest, pair)
        self.assertEqual(["source", "destination"], [answer["role"] for answer in answers])
        self.assertEqual({"running"}, {answer["state"] for answer in answers})
        self.assertEqual(set(answers[0]), set(pair.source_summary) - SUMMARY_ONLY)
        for name, summary in (
            ("source.json", pair.source_summary),
            ("destination.json", pair.destination_summary),
        ):
            written = json.loads((pair.directory / name).read_text())
            self.assertEqual(json.loads(json.dumps(summary)), written)

    def test_a_relay_can_be_cancelled_by_its_control_socket(self) -> None:
        pair = self.pair(FakeGuest(13, ram_pages=1024))
        pair.sender = lambda qemu: (
            ask(pair.directory / "source.control", "cancel"),
            qemu.recv(1),
        )
        pair.run()
        self.assertEqual("cancelled", pair.source_summary["state"])
        self.assertEqual("cancelled", pair.destination_summary["state"])


class TestSweep(PairTestCase):
    """Random small guests under random settings."""

    def sweep(self, first: int) -> None:
        for seed in range(first, first + 56):
            with self.subTest(seed=seed):
                random = np.random.default_rng(seed)
                guest = FakeGuest(
                    seed,
                    ram_pages=512,
                    mapped=float(random.choice([0.3, 0.9, 1.0])),
                    stale=float(random.choice([0, 0.1, 1.0])),
                    silent=float(random.choice([0, 0.2])),
                    zero=float(random.choice([0, 0.3])),
                    passes=int(random.integers(1, 5)),
                    dirty=float(random.choice([0, 0.05, 0.5])),
                )
                settings = RelaySettings(
                    window_size=int(random.choice([1 << 12, 1 << 16, 1 << 28])),
                    channels=int(random.integers(1, 5)),
                    batch_size=int(random.choice([1 << 16, 1 << 20])),
                    hurry_threshold=float(random.choice([0.0, 10.0])),
                    hold_pages=int(random.choice([0, 64, 24576])),
                    volume_queue_depth=int(random.integers(1, 5)),
                    volume_read_size=int(random.choice([1 << 14, 1 << 16, 1 << 20])),
                    volume_merge_gap=int(random.choice([0, 1 << 13, 1 << 16])),
                    read_ahead=1 << 20,
                )
                self.migrate(guest, source_settings=settings, destination_settings=settings)

    def test_first_quarter(self) -> None:
        self.sweep(1000)

    def test_second_quarter(self) -> None:
        self.sweep(2000)

    def test_third_quarter(self) -> None:
        self.sweep(3000)

    def test_fourth_quarter(self) -> None:
        self.sweep(4000)
