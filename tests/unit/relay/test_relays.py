# SPDX-License-Identifier: Apache-2.0
"""Both relays together, over real sockets and files, between a sender and a recorder."""

import numpy as np

from nova_dmigrate.relay.session import RelaySettings
from tests.unit.relay.guest import FakeGuest
from tests.unit.relay.support import PairTestCase


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
