# SPDX-License-Identifier: Apache-2.0
"""A guest that runs at the destination while part of its memory is still at the source is lost with
its relays: no service ends them, whoever wants that.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from nova_dmigrate.relay import oom
from tests.integration import host_base
from tests.lab import relays
from tests.lab.guest import Guest
from tests.lab.host_services import ServedPair
from tests.lab.relays import PATIENCE, wait_until

MIB = 1 << 20
POST_COPY = ("postcopy-ram",)


def oom_score(pid: int) -> int:
    """How likely the kernel ends a process when memory runs out."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


class PostCopyTest(host_base.ServedGuests):
    @contextlib.contextmanager
    def under_way(self) -> Iterator[tuple[ServedPair, Guest]]:
        """Post-copy may begin, and would take long: half a minute."""
        with self.served(POST_COPY, network_bandwidth=2 * MIB) as (pair, destination):
            relays.prepare(self.source, capabilities=POST_COPY)
            self.source.migrate(pair.outgoing)
            wait_until(
                lambda: (pair.source.progress() or {}).get("guest_bytes", 0) > 4 * MIB,
                "the guest is moving",
            )
            yield pair, destination

    @contextlib.contextmanager
    def begun(self) -> Iterator[tuple[ServedPair, Guest]]:
        """Post-copy has begun, and takes long."""
        with self.under_way() as (pair, destination):
            before = self.source.command("sum")
            self.source.qmp("migrate-start-postcopy")
            self.source.wait_migration(PATIENCE, until=("postcopy-active",))
            yield pair, destination
            self.assertEqual("postcopy-active", self.source.migration()["status"])
            state = self.source.wait_migration(PATIENCE)
            self.assertEqual("completed", state["status"], f"{state}\n{pair.last_words()}")
            destination.wait_incoming(PATIENCE)
            destination.cont()
            self.assertEqual("pong", destination.command("ping", timeout=PATIENCE))
            self.assertEqual(before, destination.command("sum", timeout=PATIENCE))
            destination.kill()
        self.source.cont()
        self.assert_guest_goes_on()

    def assert_closed_in_vain(self, pair: ServedPair) -> None:
        for state in pair.close_sessions():
            self.assertEqual("running", state.state, state)
            self.assertIn("post-copy may have begun", state.message)

    def test_the_kernel_is_told_to_spare_relays_as_soon_as_a_guest_depends_on_them(self) -> None:
        before = {pid: oom_score(pid) for pid in (self.one.process.pid, self.two.process.pid)}
        with self.served(POST_COPY, network_bandwidth=4 * MIB) as (pair, _):
            pids = self.one.relays() + self.two.relays()
            self.assertEqual([oom.EXPENDABLE] * 2, [oom_score(pid) for pid in pids])
            relays.prepare(self.source, capabilities=POST_COPY)
            self.source.migrate(pair.outgoing)
            self.assertLess(max(before.values()), oom.EXPENDABLE)
            wait_until(
                lambda: [oom_score(pid) for pid in pids] == list(before.values()),
                "relays are as precious as their services",
            )
            self.source.qmp("migrate_cancel")
            self.source.wait_migration(PATIENCE)
        self.assert_guest_goes_on()

    def test_sessions_that_are_closed_go_on(self) -> None:
        with self.begun() as (pair, _):
            self.assert_closed_in_vain(pair)
            pair.renew(1)
        self.assert_nothing_left()

    def test_sessions_whose_requester_is_gone_go_on(self) -> None:
        with self.begun() as (pair, _):
            pids = self.one.relays() + self.two.relays()
            pair.renew(1)
            # More than lease, SIGTERM and SIGKILL together would take
            time.sleep(6)
            self.assertEqual(pids, self.one.relays() + self.two.relays())
        self.assert_nothing_left()

    def test_a_relay_that_hangs_is_not_killed(self) -> None:
        with self.begun() as (pair, _):
            pids = self.one.relays() + self.two.relays()
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                self.assert_closed_in_vain(pair)
                self.assertEqual(pids, self.one.relays() + self.two.relays())
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            pair.renew(1)
        self.assert_nothing_left()

    def test_relays_whose_services_are_killed_are_kept_by_the_next_ones(self) -> None:
        with self.begun() as (pair, _):
            pids = self.one.relays() + self.two.relays()
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            for service in (self.one, self.two):
                service.kill()
            for service in (self.one, self.two):
                service.start()
            self.assert_closed_in_vain(pair)
            self.assertEqual(pids, self.one.relays() + self.two.relays())
            pair.renew(1)
        self.assert_nothing_left()

    def test_where_post_copy_has_not_begun_qemu_ends_them(self) -> None:
        with self.under_way() as (pair, _):
            self.assert_closed_in_vain(pair)
            self.source.qmp("migrate_cancel")
            self.source.wait_migration(PATIENCE)
            for relay in (pair.source, pair.destination):
                wait_until(
                    lambda each=relay: each.client.session(each.session_id).state != "running",
                    "the relay has ended",
                )
            pair.close_sessions()
        self.assert_nothing_left()
        self.assert_guest_goes_on()
