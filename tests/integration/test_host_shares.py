# SPDX-License-Identifier: Apache-2.0
"""Bandwidth that the relays of a host share."""

import os
import signal
import threading

from tests.integration.host_base import MIB, Hosts, record_of
from tests.lab.host_services import ServedPair
from tests.lab.relays import PATIENCE, wait_until


class SharesTest(Hosts):
    @classmethod
    def options(cls) -> dict[str, object]:
        return {
            "host__max_relays": 3,
            "host__network_bandwidth": 12,
            "host__volume_bandwidth": 6,
            "volume__bandwidth": 5,
        }

    def caps(self, *pairs: ServedPair) -> list[tuple[float, float]]:
        """What each relay of the pairs may at this moment, MiB/s: network and volume."""
        found = []
        for pair in pairs:
            source, destination = pair.source.told(), pair.destination.told()
            found.append((source["network_bandwidth"] / MIB, destination["volume_bandwidth"] / MIB))
        return found

    def wait_caps(self, expected: list[tuple[float, float]], *pairs: ServedPair) -> None:
        wait_until(lambda: self.caps(*pairs) == expected, f"caps are {expected}")

    def test_what_there_is_is_shared_anew_when_a_relay_starts_or_ends(self) -> None:
        first = self.pair().open()
        self.assertEqual([(12, 5)], self.caps(first))
        second = self.pair().open()
        self.wait_caps([(6, 3), (6, 3)], first, second)
        modest = self.pair(network_bandwidth=2 * MIB, volume_bandwidth=MIB).open()
        self.wait_caps([(5, 2.5), (5, 2.5), (2, 1)], first, second, modest)
        second.close_sessions()
        self.wait_caps([(10, 5), (2, 1)], first, modest)
        (pid,) = [pid for pid in self.one.relays() if pid == record_of(modest)["pid"]]
        os.kill(pid, signal.SIGKILL)
        self.wait_caps([(12, 5)], first)

    def test_a_successor_shares_among_those_that_it_takes_over(self) -> None:
        pairs = [self.pair().open() for _ in range(2)]
        self.one.kill()
        self.one.start()
        third = self.pair().open()
        self.wait_caps([(4, 2)] * 3, *pairs, third)

    def test_relays_with_equal_shares_send_alike(self) -> None:
        pairs = [self.pair().open() for _ in range(2)]
        self.wait_caps([(6, 3)] * 2, *pairs)
        migrations = [self.fake(pair, ram_pages=12288) for pair in pairs]
        threads = [threading.Thread(target=each.send, daemon=True) for each in migrations]
        for thread in threads:
            thread.start()

        def sent() -> list[int]:
            return [pair.source.told()["wire_bytes"] for pair in pairs]

        # From when both have begun, which one of them may do late
        first = wait_until(lambda: min(now := sent()) > MIB and now, "both have begun")

        def more() -> list[int]:
            return [now - then for now, then in zip(sent(), first, strict=True)]

        last = wait_until(lambda: max(now := more()) > 20 * MIB and now, "one has sent 20 MiB more")
        # What both relays' buffers hold is 3 MiB at most
        self.assertGreater(min(last), 10 * MIB, last)
        for migration, thread in zip(migrations, threads, strict=True):
            thread.join(PATIENCE)
            migration.finish()
