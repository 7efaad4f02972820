# SPDX-License-Identifier: Apache-2.0
"""Faults, each provoked for real: the guest goes on at the source, or completes at the destination.

A moment is found by polling the source relay's progress, and made to last by what limits the relays
(rates, a guest that dirties more than the network carries) or by freezing one of them: nothing here
depends on who is faster. Every wait is bounded. After each fault the guest migrates once more, with
the same paths, to the last bit.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nova_dmigrate.buffermap import PAGE_SIZE
from tests.lab import migrations, processes, relays
from tests.lab.hosts import HostPair
from tests.lab.migrations import Migration
from tests.lab.qmp import QMPClosed, QMPError
from tests.lab.relays import PATIENCE, RelayProcess, wait_until

#: Exit statuses of a relay.
DELIVERED, FAILED, CANCELLED = 0, 1, 3

#: Neither side can be through before a test has acted: the bulk takes 4 s at least without a map,
#: 2 s with one, and each resolved reference is one of 512 a second.
SLOW_NETWORK: dict[str, Any] = {"relay__network_bandwidth": 32}
SLOW_VOLUME: dict[str, Any] = {
    "volume__bandwidth": 2,
    "volume__read_size": 64,
    "relay__hurry_threshold": 60000,
}


class FaultTestCase(migrations.MigrationTestCase):
    """Ways to certain moments of a migration, and what must be true after a fault there."""

    @contextlib.contextmanager
    def waiting(self, **options: Any) -> Iterator[Migration]:
        """Both relays are ready, QEMU has not begun."""
        with self.migration(saved=self.map_of(), tap=False, **options) as migration:
            yield migration

    @contextlib.contextmanager
    def in_the_bulk(self, **options: Any) -> Iterator[Migration]:
        """Raw pages and references are on their way."""
        slow = {**SLOW_NETWORK, **SLOW_VOLUME, **options}
        with self.migration(saved=self.map_of(), tap=False, **slow) as migration:
            migration.begin()
            migration.wait_progress("the bulk", stage="bulk", raw_pages=100, referenced_pages=100)
            yield migration

    @contextlib.contextmanager
    def in_the_hold(self, **options: Any) -> Iterator[Migration]:
        """The source relay holds the stream back until references are resolved, for 2 s at least:
        their pages come over a network of 24 MiB/s.
        """
        slow = {**SLOW_VOLUME, "relay__network_bandwidth": 24, **options}
        with self.migration(saved=self.map_of(), tap=False, **slow) as migration:
            migration.begin()

            def held() -> bool:
                now = migration.progress()
                spoken = now["raw_pages"] + now["zero_pages"] + now["referenced_pages"]
                # The hold begins a sixteenth of RAM before the end of the bulk.
                late = spoken * PAGE_SIZE >= now["ram_bytes"] * 15 / 16 > 0
                return bool(late and now["passes"] == 1 and now["unresolved_pages"] > 12_000)

            wait_until(held, "the hold")
            yield migration

    @contextlib.contextmanager
    def converging(self, capabilities: tuple[str, ...] = (), **options: Any) -> Iterator[Migration]:
        """The bulk is over; the guest dirties its memory faster than the network carries it."""
        slow = {**SLOW_NETWORK, **options}
        with self.migration(saved=self.map_of(), tap=False, **slow) as migration:
            self.source.command("dirty 60 150 same")
            migration.begin(capabilities=capabilities)
            migration.wait_progress("late rounds", stage="converging", passes=2)
            yield migration

    @contextlib.contextmanager
    def at_the_switchover(self, **options: Any) -> Iterator[Migration]:
        """The guest is stopped, and RAM's END cannot get through a frozen destination relay.

        QEMU's monitor does not answer then: its main lock is held while the last RAM is sent.
        """
        with self.converging(("pause-before-switchover",), **options) as migration:
            self.pause_before_switchover()
            self.assertNotEqual("running", self.source.status)
            migration.pair.destination.freeze()
            self.source.qmp("migrate-continue", state="pre-switchover")
            yield migration

    def pause_before_switchover(self) -> None:
        """Let the guest's downtime be long enough for a switchover, and wait for it to begin."""
        self.source.set_parameters(downtime_limit=60_000)
        state = self.source.wait_migration(
            PATIENCE, until=("pre-switchover", "completed", "failed", "cancelled")
        )
        self.assertEqual("pre-switchover", state["status"])

    def moments(self) -> dict[str, Callable[..., Any]]:
        return {
            "waiting": self.waiting,
            "bulk": self.in_the_bulk,
            "hold": self.in_the_hold,
            "converging": self.converging,
            "switchover": self.at_the_switchover,
        }

    def assert_survived(
        self, migration: Migration, reasons: dict[str, str], begun: bool = True
    ) -> None:
        """The guest goes on at the source, both relays end by themselves and tell why.

        :param reasons: by role, words that the relay's reason holds; a relay that was killed has
            none.
        """
        pair = migration.pair
        if not begun:
            # What comes first: QEMU finds no relay, or a relay that has lost the other one.
            with contextlib.suppress(QMPError):
                migration.begin()
        state = self.source.wait_migration(PATIENCE)
        self.assertIn(state["status"], ("failed", "cancelled"), pair.last_words())
        self.assert_guest_goes_on()
        self.source.command("dirty 0 0")
        pair.wait()
        for relay in (pair.source, pair.destination):
            if not relay.killed:
                self.assert_told(relay, reasons[relay.role])
        pair.check_clean()
        self.assert_not_running(migration)

    def assert_told(self, relay: RelayProcess, reason: str) -> None:
        """The relay ended without having delivered, and event, summary and status say so."""
        event = relay.end_event
        self.assertIsNotNone(event, relay.last_words())
        assert event is not None
        self.assertIn(event["state"], ("failed", "cancelled"))
        self.assertIn(reason, event["reason"], relay.last_words())
        self.assertEqual({"failed": FAILED, "cancelled": CANCELLED}[event["state"]], relay.wait())
        summary = relay.summary()
        self.assertEqual((event["state"], event["reason"]), (summary["state"], summary["reason"]))

    def assert_not_running(self, migration: Migration) -> None:
        """The destination QEMU has ended, or still waits: the guest does not exist twice."""
        if migration.destination.alive:
            with contextlib.suppress(QMPClosed):
                self.assertEqual("inmigrate", migration.destination.status)


class TestKilledRelays(FaultTestCase):
    """kill -9 of either relay, at each moment."""

    def kill_source(self, moment: str) -> None:
        with self.moments()[moment]() as migration:
            migration.pair.source.kill()
            migration.pair.destination.thaw()
            self.assert_survived(migration, {"destination": "Peer "}, moment != "waiting")
        self.assert_next_migration_works()

    def kill_destination(self, moment: str) -> None:
        with self.moments()[moment]() as migration:
            migration.pair.destination.kill()
            self.assert_survived(migration, {"source": "Peer "}, moment != "waiting")
        self.assert_next_migration_works()

    def test_source_relay_before_qemu_connects(self) -> None:
        self.kill_source("waiting")

    def test_source_relay_in_the_bulk(self) -> None:
        self.kill_source("bulk")

    def test_source_relay_in_the_hold(self) -> None:
        self.kill_source("hold")

    def test_source_relay_in_late_rounds(self) -> None:
        self.kill_source("converging")

    def test_source_relay_at_the_switchover(self) -> None:
        self.kill_source("switchover")

    def test_destination_relay_before_qemu_connects(self) -> None:
        self.kill_destination("waiting")

    def test_destination_relay_in_the_bulk(self) -> None:
        self.kill_destination("bulk")

    def test_destination_relay_in_the_hold(self) -> None:
        self.kill_destination("hold")

    def test_destination_relay_in_late_rounds(self) -> None:
        self.kill_destination("converging")

    def test_destination_relay_at_the_switchover(self) -> None:
        self.kill_destination("switchover")


class TestEndedByRequest(FaultTestCase):
    """migrate_cancel, and the relays' own SIGTERM and cancel command."""

    def cancel(self, moment: str) -> None:
        with self.moments()[moment]() as migration:
            self.source.qmp("migrate_cancel")
            migration.pair.destination.thaw()
            reasons = {"source": "QEMU", "destination": "the source relay gave up"}
            self.assert_survived(migration, reasons)
            if moment == "hold":
                # The relays did not go on until all was resolved before they noticed.
                self.assertGreater(migration.pair.source.summary()["unresolved_pages"], 0)
        self.assert_next_migration_works()

    def test_migrate_cancel_in_the_bulk(self) -> None:
        self.cancel("bulk")

    def test_migrate_cancel_in_the_hold(self) -> None:
        self.cancel("hold")

    def test_migrate_cancel_in_late_rounds(self) -> None:
        self.cancel("converging")

    def test_migrate_cancel_before_the_switchover(self) -> None:
        with self.converging(("pause-before-switchover",)) as migration:
            self.pause_before_switchover()
            self.source.qmp("migrate_cancel")
            reasons = {"source": "QEMU", "destination": "the source relay gave up"}
            self.assert_survived(migration, reasons)
        self.assert_next_migration_works()

    def test_sigterm_of_the_source_relay_before_qemu_connects(self) -> None:
        with self.waiting() as migration:
            migration.pair.source.terminate()
            reasons = {"source": "cancelled by request", "destination": "the source relay gave up"}
            self.assert_survived(migration, reasons, begun=False)

    def test_sigterm_of_the_destination_relay_in_the_bulk(self) -> None:
        with self.in_the_bulk() as migration:
            migration.pair.destination.terminate()
            reasons = {
                "source": "the destination relay gave up",
                "destination": "cancelled by request",
            }
            self.assert_survived(migration, reasons)

    def test_the_cancel_command_in_late_rounds(self) -> None:
        with self.converging() as migration:
            relays.ask(migration.pair.source.control_socket, "cancel", timeout=PATIENCE)
            reasons = {"source": "cancelled by request", "destination": "the source relay gave up"}
            self.assert_survived(migration, reasons)
        self.assert_next_migration_works()


class TestKilledQemu(FaultTestCase):
    """QEMU killed at either side."""

    def kill_destination(self, moment: str) -> None:
        with self.moments()[moment]() as migration:
            migration.destination.kill()
            migration.pair.destination.thaw()
            reasons = {"source": "the destination relay gave up", "destination": "QEMU"}
            self.assert_survived(migration, reasons, moment != "waiting")
        self.assert_next_migration_works()

    def test_destination_before_the_stream(self) -> None:
        self.kill_destination("waiting")

    def test_destination_in_the_bulk(self) -> None:
        self.kill_destination("bulk")

    def test_destination_in_the_hold(self) -> None:
        self.kill_destination("hold")

    def test_destination_in_late_rounds(self) -> None:
        self.kill_destination("converging")

    def test_destination_at_the_switchover(self) -> None:
        self.kill_destination("switchover")

    def kill_source(self, moment: str) -> None:
        with self.moments()[moment]() as migration:
            self.source.kill()
            pair = migration.pair
            # There is no guest any more; all else must end as well.
            self.assertNotIn(DELIVERED, pair.wait(), pair.last_words())
            self.assert_told(pair.source, "QEMU")
            self.assert_told(pair.destination, "the source relay gave up")
            pair.check_clean()
            self.assert_not_running(migration)

    def test_source_in_the_bulk(self) -> None:
        self.kill_source("bulk")

    def test_source_in_the_hold(self) -> None:
        self.kill_source("hold")

    def test_source_in_late_rounds(self) -> None:
        self.kill_source("converging")


class TestNetwork(FaultTestCase):
    """The relays are on two hosts, whose link is cut or stalls."""

    hosts: HostPair

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.hosts = HostPair()
        cls._class.callback(cls.hosts.close)

    def options(self, stall_timeout: int = 4) -> dict[str, Any]:
        return {"hosts": (self.hosts.a, self.hosts.b), "relay__stall_timeout": stall_timeout}

    def break_link(self, moment: str, how: Callable[[], None]) -> None:
        with self.moments()[moment](**self.options()) as migration:
            try:
                how()
                migration.pair.destination.thaw()
                reasons = {"source": "Peer ", "destination": "Peer "}
                self.assert_survived(migration, reasons, moment != "waiting")
            finally:
                self.hosts.restore()

    def assert_next_migration_works(self) -> None:
        hosts = (self.hosts.a, self.hosts.b)
        with self.migration(saved=self.map_of(), hosts=hosts) as migration:
            self.assert_delivered(migration, migration.run())

    def test_cut_before_qemu_connects(self) -> None:
        self.break_link("waiting", self.hosts.cut)
        self.assert_next_migration_works()

    def test_cut_in_the_bulk(self) -> None:
        self.break_link("bulk", self.hosts.cut)
        self.assert_next_migration_works()

    def test_cut_in_the_hold(self) -> None:
        self.break_link("hold", self.hosts.cut)

    def test_cut_in_late_rounds(self) -> None:
        self.break_link("converging", self.hosts.cut)

    def test_stall_in_the_bulk(self) -> None:
        self.break_link("bulk", self.hosts.stall)

    def test_stall_in_late_rounds(self) -> None:
        self.break_link("converging", self.hosts.stall)
        self.assert_next_migration_works()

    def test_a_stall_that_ends_in_time_costs_time_only(self) -> None:
        options = {**self.options(stall_timeout=300), **SLOW_NETWORK}
        options["hosts"] = (self.hosts.a, self.hosts.b)
        with self.migration(saved=self.map_of(), **options) as migration:
            migration.begin()
            migration.wait_progress("the bulk", stage="bulk", raw_pages=100)
            self.hosts.stall()
            try:
                seen = [-1, -2]

                def still() -> bool:
                    seen.append(migration.progress()["guest_bytes"])
                    return len(seen) > 50 and len(set(seen[-50:])) == 1

                wait_until(still, "nothing gets through")
            finally:
                self.hosts.restore()
            self.assert_delivered(migration, migration.finish())


class TestVolume(FaultTestCase):
    """What a volume can do to a migration: cost time."""

    @contextlib.contextmanager
    def reading(self, volume: Path, **options: Any) -> Iterator[Migration]:
        """References are made while the volume is read, slowly."""
        slow = {"volume__bandwidth": 8, "volume__read_size": 64, **options}
        with self.migration(saved=self.map_of(), volume=volume, **slow) as migration:
            migration.begin()
            migration.wait_progress("reading", referenced_pages=100, volume_bytes=1)
            yield migration

    def test_a_volume_that_becomes_shorter_while_it_is_read(self) -> None:
        volume = self.copy_of_disk()
        with self.reading(volume, **SLOW_NETWORK) as migration:
            os.truncate(volume, 1 << 20)
            summary = self.assert_delivered(migration, migration.finish())
            self.assertGreater(migration.pair.destination.summary()["volume_errors"], 0)
        self.assertGreater(summary["misses"].get("read_error", 0), 0)

    def test_a_device_that_returns_errors(self) -> None:
        volume = self.copy_of_disk()
        device = self.loop_device(volume)
        with self.reading(device, **SLOW_NETWORK, volume__error_limit=5) as migration:
            os.truncate(volume, 1 << 20)
            summary = self.assert_delivered(migration, migration.finish())
            errors = migration.pair.destination.summary()["volume_errors"]
        self.assertGreater(errors, 0)
        # Reads under way when the limit was reached count as well.
        self.assertLessEqual(errors, 5 + 8)
        self.assertGreater(summary["misses"].get("read_error", 0), 0)

    def test_a_device_with_single_bad_blocks(self) -> None:
        """A device that ends in the middle of a read: the blocks before are good."""
        volume = self.copy_of_disk()
        device = self.loop_device(volume)
        os.truncate(volume, self.spec.disk.stat().st_size // 2 + PAGE_SIZE)
        with self.migration(saved=self.map_of(), volume=device) as migration:
            self.assert_delivered(migration, migration.run())
            summary = migration.pair.destination.summary()
        self.assertGreater(summary["volume_errors"], 0)
        self.assertGreater(summary["hits"], 0)

    def test_a_volume_that_changes_while_it_is_read(self) -> None:
        """Blocks are torn: part of what is read is old, part of it new."""
        volume = self.copy_of_disk()
        with migrations.rewriting(volume, seed=11):
            with self.reading(volume, volume__bandwidth=32, **SLOW_NETWORK) as migration:
                self.assert_delivered(migration, migration.finish())

    def test_a_volume_that_does_not_answer_any_more(self) -> None:
        volume, server = self.served_volume()
        with self.reading(volume, **SLOW_NETWORK) as migration:
            server.send_signal(signal.SIGSTOP)
            state = migration.finish()
            for relay in (migration.pair.source, migration.pair.destination):
                event = wait_until(lambda r=relay: r.end_event, f"the {relay.role} relay is done")
                self.assertEqual("delivered", event["state"], relay.last_words())
            # A process whose reads hang in the kernel cannot even be killed.
            server.send_signal(signal.SIGCONT)
            summary = self.assert_delivered(migration, state)
        self.assertGreater(summary["copies_unasked"], 0)

    def test_a_volume_slower_than_the_network_fills_the_window(self) -> None:
        """Mapped pages go raw then: neither side waits for the other."""
        options = {**SLOW_VOLUME, "relay__window_size": 16, "relay__read_ahead": 4}
        with self.migration(saved=self.map_of(), **options) as migration:
            summary = self.assert_delivered(migration, migration.run())
        self.assertEqual((16 << 20) // PAGE_SIZE, summary["peak_window_pages"])
        self.assertGreater(summary["window_full_pages"], 0)

    def served_volume(self) -> tuple[Path, "subprocess.Popen[Any]"]:
        """A copy of the guest's disk that a process serves: when it stops, reads hang."""
        volume = self.directory / "served"
        volume.touch()
        node = f"driver=file,node-name=disk,filename={self.copy_of_disk()}"
        export = f"type=fuse,id=served,node-name=disk,mountpoint={volume},writable=off"
        argv = ["qemu-storage-daemon", "--blockdev", node, "--export", export]
        server = processes.spawn(argv)
        self._test.callback(subprocess.run, ["umount", "--lazy", str(volume)], check=False)
        self._test.callback(processes.end, server)
        self._test.callback(server.send_signal, signal.SIGCONT)
        wait_until(lambda: volume.stat().st_size, "the volume is served")
        return volume, server

    def loop_device(self, path: Path) -> Path:
        """A block device over a file; reads beyond the file's end fail."""
        show = ["losetup", "--find", "--show", "--direct-io=on", str(path)]
        device = subprocess.run(show, check=True, capture_output=True, text=True).stdout.strip()
        self._test.callback(subprocess.run, ["losetup", "--detach", device], check=False)
        return Path(device)


class TestUnsupported(FaultTestCase):
    """What does not go through relays is refused or passed through."""

    def test_multifd_is_refused_and_the_guest_goes_on(self) -> None:
        multifd = ["multifd"]
        with self.migration(saved=self.map_of(), tap=False, capabilities=multifd) as migration:
            migration.begin(capabilities=multifd)
            reasons = {"source": "multifd", "destination": "multifd"}
            self.assert_survived(migration, reasons)
        # By another QEMU: after a multifd migration that has failed, QEMU 10.0 sometimes never
        # migrates again ("duplicate yank instance")
        self.source.kill()
        self.source = self.boot()
        self.assert_next_migration_works()

    def test_post_copy_is_passed_through(self) -> None:
        both = ["postcopy-ram"]
        before = self.source.command("sum")
        options = {**SLOW_NETWORK, **SLOW_VOLUME, "tap": False, "capabilities": both}
        with self.migration(saved=self.map_of(), **options) as migration:
            migration.begin(capabilities=both)
            migration.wait_progress("the bulk", stage="bulk", raw_pages=100, referenced_pages=100)
            self.source.qmp("migrate-start-postcopy")
            state = self.source.wait_migration(PATIENCE)
            self.assertEqual("completed", state["status"], migration.pair.last_words())
            self.assertEqual((0, 0), migration.pair.wait())
            destination = migration.destination
            destination.wait_incoming(PATIENCE)
            destination.cont()
            self.assertEqual("pong", destination.command("ping"))
            self.assertEqual(before, destination.command("sum"))
            self.assertIsNotNone(migration.pair.source.summary()["pass_through"])
            migration.pair.check_clean()
        self.source.cont()
        self.assert_guest_goes_on()
        self.assert_next_migration_works()
