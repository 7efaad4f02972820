# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the simulated evacuation, where it can be done by hand."""

import dataclasses
from typing import Any

from tests import base
from tests.scale.cluster import Cluster, Guest, Work
from tests.scale.evacuations import product, simulate
from tests.scale.outcome import summary
from tests.scale.simulation import Simulation

#: Of 1000 bytes, of which 800 are on the volume, and nothing changes.
GUEST = Guest(memory=1000, pool=800, mapped=1.0, other=200, dirty=0.0)
#: Nothing takes time but memory itself.
SIMPLE = Cluster(
    hosts=1,
    targets=1,
    guests=1,
    guest=GUEST,
    sizes=(1.0,),
    network=10.0,
    storage_link=1e9,
    storage=30.0,
    start_s=0.0,
    build_s=0.0,
    build_s_per_gib=0.0,
    page_bytes=0.0,
    work=Work(raw=(0.0, 0.0), referenced=(0.0, 0.0)),
    reads=1.0,
    downtime=0.0,
    step=0.0,
)
SWITCHOVER = 0.3


def simple(**changes: Any) -> Cluster:
    return dataclasses.replace(SIMPLE, **changes)


def run(cluster: Cluster) -> tuple[Simulation, dict[str, Any]]:
    done = Simulation(cluster).run()
    return done, summary(done, cluster)


class ClusterTest(base.TestCase):
    def seconds(self, cluster: Cluster) -> float:
        seconds: float = run(cluster)[1]["seconds"] - SWITCHOVER
        return seconds

    def test_a_stock_migration_sends_everything_over_the_network(self) -> None:
        self.assertAlmostEqual(100, self.seconds(simple(relayed=False)), 2)

    def test_relays_take_the_best_possible_time(self) -> None:
        # T* = max(R / Bn, (R + P) / (Bn + Bs)), here of both kinds
        self.assertAlmostEqual(25, self.seconds(SIMPLE), 2)
        self.assertAlmostEqual(20, self.seconds(simple(storage=1000.0)), 2)

    def test_what_is_sent_before_the_map_comes_is_lost_for_it(self) -> None:
        # 40 s for the map: 400 bytes have gone, a fifth of what is left is not mapped
        self.assertAlmostEqual(40 + 600 / 40, self.seconds(simple(build_s=40.0)), 2)

    def test_what_the_guest_changes_is_sent_again(self) -> None:
        guest = dataclasses.replace(GUEST, dirty=5.0)
        self.assertAlmostEqual(200, self.seconds(simple(guest=guest, relayed=False)), 1)

    def test_relays_whose_processors_are_busy_are_slower(self) -> None:
        # 0.2 s of 2 processors for a byte of either kind: 10 bytes a second
        work = Work(raw=(0.0, 0.2), referenced=(0.0, 0.2))
        self.assertAlmostEqual(100, self.seconds(simple(work=work)), 2)

    def test_hosts_share_the_storage(self) -> None:
        # Two hosts: 10 from the network and 15 from the storage each
        both = simple(hosts=2, targets=2)
        self.assertAlmostEqual(1000 / 25, self.seconds(both), 2)
        _, told = run(both)
        self.assertAlmostEqual(0.6, told["volume_share"], 2)
        self.assertAlmostEqual(1.0, told["jain_of_hosts"])

    def test_a_host_reads_no_more_than_its_cap(self) -> None:
        mib = 1 << 20
        large = Guest(memory=1000 * mib, pool=800 * mib, mapped=1.0, other=200 * mib, dirty=0.0)
        cluster = simple(guest=large, network=10.0 * mib, storage=1000.0 * mib)
        capped = product(cluster, host__volume_bandwidth=10)
        self.assertAlmostEqual(50, self.seconds(capped), 1)

    def test_one_after_the_other_or_several_at_once(self) -> None:
        one = simple(guests=4, relayed=False)
        self.assertAlmostEqual(400 + 3 * SWITCHOVER, self.seconds(one), 1)
        done, told = run(dataclasses.replace(one, concurrency=4))
        self.assertAlmostEqual(400 + SWITCHOVER, told["seconds"], 1)
        self.assertAlmostEqual(1.0, told["jain_in_host"])
        self.assertEqual([0.0] * 4, [each.began for each in done.migrations])

    def test_who_finds_no_room_in_time_migrates_as_ever(self) -> None:
        crowd = product(
            simple(hosts=4, storage=1e9, network=1.0), host__max_relays=1, migration__queue_time=60
        )
        _, told = run(crowd)
        self.assertEqual({"no room in time": 3}, told["fallbacks"])
        patient = product(crowd, host__max_relays=1, migration__queue_time=3600)
        done, told = run(patient)
        self.assertEqual({}, told["fallbacks"])
        began = sorted(each.sending_since for each in done.migrations)
        ended = sorted(each.ended for each in done.migrations)
        # Each when the one before it is done
        self.assertEqual(began[1:], ended[:-1])

    def test_a_map_that_is_not_made_or_fetched_in_time_costs_the_gain_only(self) -> None:
        for changes, why in (
            ({"build_s": 130.0, "network": 1.0}, "map not built in time"),
            (
                {"page_bytes": 1e9, "broker": 1e5, "by_broker": True, "network": 1.0},
                "map not fetched in time",
            ),
            (
                {"page_bytes": 1e9, "broker": 1.0, "by_broker": True},
                "a chunk of the map not in time",
            ),
        ):
            _, told = run(simple(**changes))
            self.assertEqual({why: 1}, told["fallbacks"])
            self.assertEqual(0.0, told["volume_share"])

    def test_a_map_is_asked_for_when_both_hosts_have_a_place(self) -> None:
        # Two targets with a place for each guest, a source with a place for one
        cluster = product(
            simple(targets=2, guests=2, concurrency=2, start_s=1.0, network=1.0, storage=1.0),
            host__max_relays=1,
            migration__queue_time=3600,
        )
        first, second = run(cluster)[0].migrations
        # Checks, the destination's relay, then the source's and the map
        self.assertEqual(2.0, first.map_wake)
        self.assertEqual(first.ended, second.map_wake)

    def test_maps_are_what_the_broker_carries(self) -> None:
        cluster = simple(page_bytes=1e7, network=1.0, storage=3.0, by_broker=True)
        _, told = run(cluster)
        chunks = cluster.map_bytes(cluster.guest) / cluster.chunk
        carried = told["broker_bytes"] * told["broker_map_share"]
        self.assertAlmostEqual(chunks * cluster.costs["map_chunk"].bytes, carried, -1)
        self.assertEqual(1, told["fetches_peak"])

    def test_maps_that_come_over_ports_do_not_cross_the_broker(self) -> None:
        cluster = simple(page_bytes=1e7, network=1.0, storage=3.0)
        _, told = run(cluster)
        seconds = cluster.map_bytes(cluster.guest) / cluster.fetch_rate
        carried = told["broker_bytes"] * told["broker_map_share"]
        self.assertAlmostEqual(seconds * cluster.costs["save_chunks"].bytes, carried, -1)

    def test_all_evacuations_that_are_compared_come_to_their_end(self) -> None:
        rows = simulate(Cluster(hosts=6, targets=6, guests=3))
        self.assertGreater(len(rows), 10)
        for row in rows:
            self.assertGreater(row["seconds"], 0)
            self.assertLessEqual(row["jain_in_host"], 1.0 + 1e-9)
