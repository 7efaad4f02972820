# SPDX-License-Identifier: Apache-2.0
"""Sessions of host services: how they begin and end, their leases, and the room that there is."""

import dataclasses
import json
import os
import signal
import time
import uuid
from pathlib import Path

from nova_dmigrate.rpc import host_messages
from nova_dmigrate.volumes import usable_drivers
from tests.integration.host_base import Hosts
from tests.lab.broker import free_ports
from tests.lab.relays import PATIENCE, wait_until


class SessionsTest(Hosts):
    def test_a_migration_leaves_nothing_but_its_summaries(self) -> None:
        pair = self.pair().open()
        self.assertEqual("127.0.0.1", pair.destination.renew().host)
        migration = self.fake(pair)
        migration.send(0.5)
        progress = pair.source.told()
        self.assertEqual(("source", "running"), (progress["role"], progress["state"]))
        migration.finish()
        migration.close()
        for state, relay in zip(
            pair.close_sessions(), (pair.source, pair.destination), strict=True
        ):
            self.assertEqual(("delivered", ""), (state.state, state.message))
            summary = relay.client.summary(relay.session_id)
            assert summary is not None
            self.assertEqual("delivered", summary["state"])
            self.assertGreater(summary["wire_bytes"], 0)
            self.assertIn("series", summary)
            self.assertTrue(Path(state.summary_path).is_file())
            self.assert_refused("unknown-session", relay.renew)
        self.assert_nothing_left()

    def test_a_host_keeps_only_so_many_summaries(self) -> None:
        self.restart(self.one, host__summary_count=2)
        self.addCleanup(self.restart, self.one)
        for _ in range(3):
            pair = self.pair().open()
            pair.close_sessions()
            newest = pair.order.session_id
        summaries = self.one.state / "summaries"
        wait_until(lambda: len(list(summaries.iterdir())) == 2, "the oldest summary is removed")
        self.assertTrue((summaries / f"{newest}.json").is_file())

    def test_the_host_tells_of_itself(self) -> None:
        state = self.client_of(self.one).hello(PATIENCE)
        self.assertEqual(("one", "127.0.0.1"), (state.host, state.migration_address))
        self.assertEqual((False, False), (state.tls, state.draining))
        # Relays are given no keys, and no units of iSCSI, unless that is configured
        drivers = tuple(each for each in usable_drivers() if each not in ("iscsi", "luks"))
        self.assertEqual((drivers, 2), (state.drivers, state.max_relays))
        self.assertEqual(str(self.one.sockets), state.socket_directory)

    def test_opening_twice_opens_once(self) -> None:
        pair = self.pair().open()
        self.assertEqual("running", pair.open_destination().state)
        self.assertEqual("running", pair.open_source().state)
        self.assertEqual((1, 1), (len(self.one.relays()), len(self.two.relays())))
        other = self.pair()
        other.order = dataclasses.replace(other.order, session_id=pair.order.session_id)
        self.assert_refused("in-use", other.open_destination)
        other.order = dataclasses.replace(
            other.order, session_id=str(uuid.uuid4()), qemu_socket=pair.order.qemu_socket
        )
        self.assert_refused("in-use", other.open_destination)

    def test_a_relay_says_what_it_cannot_read_as_soon_as_it_runs(self) -> None:
        gone = self.place / "volumes" / "gone"
        gone.parent.mkdir(exist_ok=True)
        pair = self.pair(volumes={"volume-1": gone})
        state = pair.open_destination()
        end = time.monotonic() + PATIENCE
        while not state.progress and time.monotonic() < end:
            state = pair.destination.renew()
        self.assertEqual("running", state.state, state.message)
        why = json.loads(state.progress)["volume_troubles"]["volume-1"]
        self.assertIn(f"{gone} cannot be opened: No such file or directory", why)

    def test_the_token_is_on_no_disk_while_a_relay_runs(self) -> None:
        pair = self.pair().open()
        for service in (self.one, self.two):
            for path in self.place.joinpath(service.name).rglob("*"):
                if path.is_file():
                    self.assertNotIn(pair.order.token.encode(), path.read_bytes(), path)
            self.assertEqual(0o700, (service.state / "sessions").stat().st_mode & 0o777)
            self.assertEqual(0o711, service.sockets.stat().st_mode & 0o777)

    def test_a_closed_migration_ends_wherever_it_is(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        states = pair.close_sessions()
        self.assertEqual("cancelled", states[0].state)
        self.assertIn(states[1].state, ("failed", "cancelled"))
        self.assertTrue(migration.broken())
        self.assert_nothing_left()

    def test_a_killed_relay_is_told_and_the_other_one_ends(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        (pid,) = self.two.relays()
        os.kill(pid, signal.SIGKILL)
        state = pair.destination.wait("failed")
        self.assertIn("killed", state.message)
        self.assertIn("peer", pair.source.wait("failed").message.lower())
        self.assertTrue(migration.broken())
        self.assertIsNone(pair.destination.client.summary(pair.order.session_id))
        pair.close_sessions()
        self.assert_nothing_left()

    def test_a_relay_that_hangs_is_killed(self) -> None:
        pair = self.pair().open()
        (pid,) = self.two.relays()
        os.kill(pid, signal.SIGSTOP)
        state = pair.destination.client.close_session(pair.order.session_id)
        self.assertEqual("failed", state.state)
        self.assertEqual([], self.two.relays())

    def test_a_relay_that_cannot_start_says_why(self) -> None:
        pair = self.pair()
        pair.open_destination()
        pair.destination.wait("running")
        pair.destination.client.close_session(pair.order.session_id)
        order = pair.order
        state = pair.source.client.open_session(
            host_messages.OpenSource(
                order.migration_id,
                order.instance,
                order.session_id,
                order.token,
                str(pair.outgoing),
                "127.0.0.1",
                free_ports(1)[0],
            )
        )
        self.assertEqual("starting", state.state)
        state = pair.source.wait("failed")
        self.assertIn("refused", state.message)
        pair.source.client.close_session(order.session_id)
        self.assert_nothing_left()

    # Leases

    def test_sessions_whose_requester_is_gone_end_and_leave_nothing(self) -> None:
        waiting, moving = (self.pair().open() for _ in range(2))
        queued = self.pair(lease_seconds=2, wait_seconds=60)
        self.assertEqual("queued", queued.open_destination().state)
        migration = self.fake(moving)
        migration.send(0.5)
        for pair in (waiting, moving):
            pair.renew(5)
        self.assertTrue(migration.broken())
        migration.close()
        self.assert_nothing_left()
        self.assertEqual([], self.two.records())
        self.assert_refused("unknown-session", queued.destination.renew)

    # Room

    def test_relays_beyond_the_limit_wait_for_their_turn(self) -> None:
        pairs = [self.pair(wait_seconds=300) for _ in range(4)]
        states = [pair.open_destination() for pair in pairs]
        self.assertEqual(
            ["starting", "starting", "queued", "queued"], [state.state for state in states]
        )
        self.assertEqual([0, 0, 1, 2], [state.queue_position for state in states])
        self.assertIn("2 destination relays run", states[3].message)
        hello = pairs[0].destination.client.hello(PATIENCE)
        self.assertEqual((2, 2), (hello.relays, hello.queued))
        pairs[1].destination.client.close_session(pairs[1].order.session_id)
        pairs[2].destination.wait("running")
        state = pairs[3].destination.renew()
        self.assertEqual(("queued", 1), (state.state, state.queue_position))
        state = pairs[3].destination.client.close_session(pairs[3].order.session_id)
        self.assertEqual("cancelled", state.state)

    def test_who_does_not_want_to_wait_is_told_at_once(self) -> None:
        for _ in range(2):
            self.pair().open_destination()
        late = self.pair(wait_seconds=0)
        late.open_destination()
        state = late.destination.wait("failed")
        self.assertIn("no room", state.message)

    def test_hosts_that_migrate_to_each_other_do_not_wait_for_each_other(self) -> None:
        pairs = [self.pair(reverse=bool(number % 2), wait_seconds=300) for number in range(4)]
        for pair in pairs:
            pair.open_destination()
        for pair in pairs:
            pair.destination.wait("running")
        for pair in pairs:
            pair.open_source()
            pair.source.wait("running")
        self.assertEqual(4, self.client_of(self.one).hello(PATIENCE).relays)
