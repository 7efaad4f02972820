# SPDX-License-Identifier: Apache-2.0
"""Both relays together, over real sockets and files, between a sender and a recorder."""

from typing import Any

import numpy as np

from nova_dmigrate.relay.session import RelaySettings
from tests.base import TestCase
from tests.unit.relay.guest import PAGE, FakeGuest, received_memory
from tests.unit.relay.pair import Pair
from tests.unit.stream.builder import DEVICES


class PairTestCase(TestCase):
    """Runs a make-believe guest's migration and checks what arrived."""

    def pair(self, guest: FakeGuest, **options: Any) -> Pair:
        directory = self.make_directory()
        volume = guest.write_volume(directory / "volume")
        return Pair(
            directory,
            [guest.stream()],
            guest.ram_pages * PAGE,
            guest.pages,
            guest.blocks,
            guest.volume_blocks * PAGE,
            volume,
            **options,
        )

    def migrate(self, guest: FakeGuest, **options: Any) -> Pair:
        pair = self.pair(guest, **options)
        pair.run()
        self.assert_exact(guest, pair)
        return pair

    def assert_exact(self, guest: FakeGuest, pair: Pair) -> None:
        self.assertEqual("delivered", pair.source_summary["state"], pair.source_summary["reason"])
        self.assertEqual("delivered", pair.destination_summary["state"])
        memory, rest = received_memory(pair.recorded, guest.ram_pages)
        differing = np.flatnonzero((memory != guest.memory).any(axis=1))
        self.assertEqual([], differing.tolist()[:20])
        self.assertEqual(DEVICES, rest)


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

    def test_random_guests_arrive_exactly(self) -> None:
        for seed in range(10, 30):
            with self.subTest(seed=seed):
                random = np.random.default_rng(seed)
                guest = FakeGuest(
                    seed,
                    mapped=float(random.choice([0, 0.3, 0.9, 1.0])),
                    stale=float(random.choice([0, 0.1, 1.0])),
                    silent=float(random.choice([0, 0.2])),
                    zero=float(random.choice([0, 0.3])),
                )
                settings = RelaySettings(
                    window_size=int(random.choice([1 << 18, 1 << 22, 1 << 28])),
                    channels=int(random.integers(1, 5)),
                    batch_size=int(random.choice([1 << 16, 1 << 20])),
                    hurry_threshold=0.0 if seed % 2 else 10.0,
                    hold_pages=int(random.choice([0, 64, 24576])),
                    volume_read_size=int(random.choice([1 << 14, 1 << 20])),
                    volume_merge_gap=int(random.choice([0, 1 << 16])),
                    read_ahead=1 << 21,
                )
                self.migrate(guest, source_settings=settings, destination_settings=settings)
