# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs migrate through relays that host services run."""

from typing import Any

from tests.integration.host_base import MIB, ServedGuests
from tests.lab import relays
from tests.lab.guest import Guest
from tests.lab.host_services import ServedPair
from tests.lab.relays import PATIENCE, wait_until


class GuestTest(ServedGuests):
    def assert_moved(self, pair: ServedPair, destination: Guest, state: dict[str, Any]) -> None:
        self.assertEqual("completed", state["status"], f"{state}\n{pair.last_words()}")
        self.assertEqual("paused", destination.wait_incoming(PATIENCE))
        states = pair.close_sessions()
        self.assertEqual(["delivered"] * 2, [each.state for each in states], states)
        summary = pair.source.client.summary(pair.order.session_id)
        assert summary is not None
        self.assertGreater(summary["referenced_pages"], 1000)
        self.assertGreater(summary["volume_bytes"], 0)
        destination.cont()
        self.assertEqual("pong", destination.command("ping", timeout=PATIENCE))
        self.assert_nothing_left()
        destination.kill()
        self.source.cont()
        self.assert_guest_goes_on()

    def test_a_guest_moves_by_reference(self) -> None:
        with self.served() as (pair, destination):
            relays.prepare(self.source)
            self.source.migrate(pair.outgoing)
            self.assert_moved(pair, destination, self.follow(pair))

    def test_a_guest_moves_while_both_services_are_killed(self) -> None:
        with self.served(network_bandwidth=12 * MIB) as (pair, destination):
            with self.dirtying(10, 4):
                relays.prepare(self.source)
                self.source.migrate(pair.outgoing)
                wait_until(
                    lambda: (pair.source.progress() or {}).get("guest_bytes", 0) > 8 * MIB,
                    "the guest is moving",
                )
                for service in (self.one, self.two):
                    service.kill()
                self.assertEqual("active", self.source.migration()["status"])
                for service in (self.one, self.two):
                    service.start()
                # It may have ended by itself on a machine on which services take long to start
                self.assertIn(pair.source.renew().state, ("running", "delivered"))
                self.assert_moved(pair, destination, self.follow(pair))

    def follow(self, pair: ServedPair) -> dict[str, Any]:
        """Play the orchestration until QEMU's migration has ended."""
        allowed = False

        def ended() -> dict[str, Any] | None:
            nonlocal allowed
            state = self.source.migration()
            if state.get("status") in ("completed", "failed", "cancelled"):
                return state
            progress = pair.source.progress()
            pair.destination.renew()
            if not allowed and progress is not None and progress["bulk_resolved"]:
                self.source.set_parameters(downtime_limit=2000)
                allowed = True
            return None

        result: dict[str, Any] = wait_until(ended, "the migration ends")
        return result
