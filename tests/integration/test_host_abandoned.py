# SPDX-License-Identifier: Apache-2.0
"""Relays that nobody knows any more, or that a service of another version has started."""

import json

from tests.integration import host_base
from tests.integration.host_base import ended
from tests.lab.host_services import ServedPair
from tests.lab.relays import wait_until

#: Seconds in which three relays start one after the other, also on a busy machine.
IDLE = 20


class IdleTest(host_base.Hosts):
    @classmethod
    def options(cls) -> dict[str, object]:
        return {"relay__idle_timeout": IDLE}

    def test_relays_without_qemu_end_though_their_service_never_returns(self) -> None:
        pair = self.pair()
        pair.open_destination()
        pair.destination.wait("running")
        # Of this one the source is never asked for
        alone = self.pair()
        alone.open_destination()
        alone.destination.wait("running")
        pair.open_source()
        pair.source.wait("running")
        pids = self.one.relays() + self.two.relays()
        self.assertEqual(3, len(pids))
        for service in (self.one, self.two):
            service.kill()
        for pid in pids:
            wait_until(lambda each=pid: ended(each), "the relay ends")
        for service in (self.one, self.two):
            service.start()
        for relay in (pair.source, pair.destination, alone.destination):
            state = relay.client.session(relay.session_id)
            self.assertIn(state.state, ("failed", "cancelled"))
        self.assertIn(f"QEMU has not begun within {IDLE} s", state.message)
        for each in (pair, alone):
            each.close()
        self.assert_nothing_left()

    def test_a_migration_may_take_longer(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        wait_until(lambda: seconds_of(pair)["bulk"] > IDLE + 1, "the stream has begun long ago")
        migration.finish()


def seconds_of(pair: ServedPair) -> dict[str, float]:
    """How long the source relay has been in each stage."""
    seconds: dict[str, float] = pair.source.told()["seconds"]
    return seconds


class OtherVersionTest(host_base.Hosts):
    def test_a_relay_of_a_later_version_is_taken_over(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        before = self.one.relays()
        self.one.kill()
        (path,) = (self.one.state / "sessions").glob("*.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "later": [1]}))
        self.one.start()
        self.assertEqual("running", pair.source.renew().state)
        self.assertEqual(before, self.one.relays())
        migration.finish()
        migration.close()
        self.assertEqual(["delivered"] * 2, [each.state for each in pair.close_sessions()])
        self.assert_nothing_left()
