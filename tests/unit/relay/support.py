# SPDX-License-Identifier: Apache-2.0
"""The base of tests in which both relays migrate a make-believe guest."""

import gc
import os
import threading
from typing import Any

import numpy as np

from tests.base import TestCase
from tests.unit.relay.guest import PAGE, FakeGuest, Loaded, received_memory
from tests.unit.relay.pair import Pair
from tests.unit.stream.builder import DEVICES


class PairTestCase(TestCase):
    """Runs migrations, checks what arrived, and that neither threads nor descriptors are left."""

    def setUp(self) -> None:
        super().setUp()
        self._threads_before = set(threading.enumerate())
        self._descriptors_before = _descriptors()
        self.addCleanup(self._assert_nothing_left)

    def _assert_nothing_left(self) -> None:
        left = set(threading.enumerate()) - self._threads_before
        self.assertEqual([], sorted(thread.name for thread in left))
        gc.collect()
        new = {
            number: name
            for number, name in _descriptors().items()
            if self._descriptors_before.get(number) != name
        }
        self.assertEqual({}, new)

    def pair(self, guest: FakeGuest, **options: Any) -> Pair:
        directory = self.make_directory()
        options.setdefault("volume", guest.write_volume(directory / "volume"))
        return Pair(
            directory,
            [guest.stream()],
            guest.ram_pages * PAGE,
            guest.pages,
            guest.blocks,
            guest.volume_blocks * PAGE,
            **options,
        )

    def migrate(self, guest: FakeGuest, **options: Any) -> Pair:
        pair = self.pair(guest, **options)
        pair.run()
        self.assert_exact(guest, pair)
        return pair

    def assert_exact(self, guest: FakeGuest, pair: Pair) -> None:
        self.assert_delivered(pair)
        memory, rest = received_memory(pair.recorded, guest.ram_pages)
        differing = np.flatnonzero((memory != guest.memory).any(axis=1))
        self.assertEqual([], differing.tolist()[:20])
        self.assertEqual(DEVICES, rest)

    def assert_delivered(self, pair: Pair) -> None:
        self.assertEqual("delivered", pair.source_summary["state"], pair.source_summary["reason"])
        # Reads that are under way at the end may be missing, but none that has served a page
        self.assertGreaterEqual(
            pair.source_summary["volume_bytes"], PAGE * pair.destination_summary["hits"]
        )
        self.assertEqual("delivered", pair.destination_summary["state"])

    def assert_as_if_direct(self, stream: bytes, pair: Pair) -> None:
        """QEMU has what it would have without relays, and goes on in the same state."""
        self.assert_delivered(pair)
        sent, received = Loaded(stream), Loaded(pair.recorded)
        self.assertEqual(sent.parser.blocks, received.parser.blocks)
        for block, (expected, memory) in enumerate(zip(sent.memory, received.memory, strict=True)):
            differing = np.flatnonzero((expected != memory).any(axis=1))
            self.assertEqual([], differing.tolist()[:20], f"in RAMBlock {block}")
        self.assertEqual(sent.rest, received.rest)
        self.assertEqual(sent.parser.opaque_reason, received.parser.opaque_reason)
        self.assertEqual(sent.parser.in_ram_section, received.parser.in_ram_section)
        if sent.parser.last_block is not None:
            self.assertEqual(sent.parser.last_block, received.parser.last_block)


def _descriptors() -> dict[str, str]:
    """What each open file descriptor of this process is."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the listing's own
    return found
