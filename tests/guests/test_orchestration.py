# SPDX-License-Identifier: Apache-2.0
"""Whole migrations of a database guest between two libvirt hosts, as an operator orders them."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from nova_dmigrate import exception
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.request import Mode
from nova_dmigrate.migration.summary import ORDINARY, MigrationSummary
from nova_dmigrate.report import history
from tests import base
from tests.guests.fallbacks import CASES, Case, Place
from tests.lab import database_guest, database_image, processes
from tests.lab.database_guest import DatabaseSpec
from tests.lab.demo.clients import ROOT
from tests.lab.demo.services import MigrationServices
from tests.lab.domains import Domain
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.relays import wait_until

#: MB/s of the migration network where a test needs time in the middle of a migration.
SLOW = 30


class TestOrchestration(base.TestCase):
    """The tests share a guest, which each of them leaves on one host or the other. Relays speak
    TLS.
    """

    _class: ClassVar[contextlib.ExitStack]
    hosts: ClassVar[LibvirtHosts]
    services: ClassVar[MigrationServices]
    domain: ClassVar[Domain]
    directory: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(database_image.unavailable())
        cls._class = contextlib.ExitStack()
        enter = cls._class.enter_context
        try:
            cls.directory = directory = enter(processes.workspace())
            cls.hosts = enter(LibvirtHosts(directory))
            cls.services = enter(MigrationServices(cls.hosts, directory, tls=True, prepare_time=1))
            disk = database_guest.create_volume(directory / "volume.raw")
            spec = DatabaseSpec(disk=disk, pool_mb=128)
            cls.domain = enter(Domain(cls.hosts, spec))
            cls.domain.start(cls.hosts.a)
        except BaseException:
            cls._class.close()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        cls._class.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.source = self.domain.host
        self.destination = self.hosts.other(self.source)
        self.addCleanup(self.hosts.shape, None)
        self.addOnException(lambda _: print(self.services.last_words()))

    def migrate(self, **options: Any) -> MigrationSummary:
        """Have the guest migrated; it is where the summary says afterwards, and whole."""
        summary = self.order(**options)
        self.check_guest(summary)
        self.assertEqual(1, len(self.running()), summary)
        self.assertEqual([], self.services.left_behind())
        return summary

    def order(self, **options: Any) -> MigrationSummary:
        """Have the guest migrated while its database works; how it went."""
        self.domain.guest.sql("UPDATE pace SET changes = 1; SET GLOBAL event_scheduler = ON")
        return self.services.migrate(
            self.domain.name,
            self.source,
            self.destination,
            **{"max_downtime_ms": 1000, **options},
        )

    def check_guest(self, summary: MigrationSummary) -> None:
        """The guest runs where the summary says, and its database is whole."""
        self.check_place(summary)
        lines = self.domain.guest.sql("CHECK TABLE t1, t2 EXTENDED", timeout=240).splitlines()
        self.assertEqual(["OK", "OK"], [line.split("\t")[-1] for line in lines], summary)

    def check_place(self, summary: MigrationSummary) -> None:
        """The guest runs where the summary says, and its database answers."""
        self.domain.arrived(self.destination if summary.state == "completed" else self.source)
        self.domain.guest.sql("SET GLOBAL event_scheduler = OFF")

    def running(self) -> list[str]:
        """The hosts on which the domain runs."""
        found = []
        for host in (self.hosts.a, self.hosts.b):
            with contextlib.closing(host.connect()) as connection:
                found += [host.name for each in connection.listAllDomains() if each.isActive()]
        return found

    def settings(self) -> str:
        return self.domain.guest.sql(
            "SELECT @@innodb_max_dirty_pages_pct, @@innodb_max_dirty_pages_pct_lwm,"
            " @@innodb_io_capacity, @@innodb_io_capacity_max"
        )

    def in_the_middle(self, action: Callable[[], None]) -> Callable[[Progress], None]:
        """Do something once, when a good part of the guest's memory has been sent. Where nothing
        was told for long, that may be all of it.
        """
        done = threading.Event()

        def on_progress(progress: Progress) -> None:
            if progress.phase in ("migrating", "converging") and progress.guest_bytes > 64 << 20:
                if not done.is_set():
                    done.set()
                    action()

        self.addCleanup(lambda: self.assertTrue(done.is_set(), "it never came to the middle"))
        return on_progress

    # Before

    def test_what_is_ready_and_what_is_not_can_be_checked_before(self) -> None:
        found = self.found()
        # The system's disk has no serial
        usual = ["domain", "host", "host", "unread-disk", "volume"]
        self.assertEqual(usual, [each["code"] for each in found][: len(usual)], found)
        self.assertGreater(len(found), len(usual), "the agent has something to say")
        self.assertNotIn("problem", [each["severity"] for each in found], found)
        self.services.kill(self.destination)
        try:
            found = self.found()
        finally:
            self.services.start(self.destination)
        codes = [each["code"] for each in found if each["severity"] == "problem"]
        self.assertEqual(["host-unreachable"], codes, found)
        self.assertIn("volume", [each["code"] for each in found])

    def test_services_tell_the_versions_of_libvirt_and_qemu(self) -> None:
        with contextlib.closing(self.source.connect()) as connection:
            versions = (connection.getLibVersion(), connection.getVersion())
        with self.services.client(self.source) as client:

            def told() -> bool:
                state = client.hello()
                return (state.libvirt_version, state.qemu_version) == versions

            wait_until(told, "the service has asked libvirt")

    def found(self) -> list[dict[str, str]]:
        """What `check` finds; its exit status tells whether there is a problem."""
        checked = self.command(
            *("check", self.domain.name, self.destination.peer_uri, "--format", "json"),
            *("--connect", self.source.uri, "--instance", database_guest.INSTANCE),
            *("--source-host", self.source.name, "--destination-host", self.destination.name),
        )
        found: list[dict[str, str]] = json.loads(checked.stdout)
        bad = any(each["severity"] == "problem" for each in found)
        self.assertEqual(int(bad), checked.returncode, checked.stderr)
        return found

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """The command line, as an operator has it."""
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "nova_dmigrate.cmd.cli.app"]
            + ["--config-file", str(self.directory / "operator.conf"), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    # Through the relays

    def test_a_guest_migrates_through_the_relays_and_its_database_is_as_it_was(self) -> None:
        before = self.settings()
        # The map comes before the stream begins
        summary = self.migrate(mode=Mode.REQUIRED)
        self.assertEqual(("completed", "dmigrate", None), _way(summary), summary)
        self.assertGreater(summary.pages_referenced, 0.8 * summary.mapped_pages)
        self.assertGreater(summary.mapped_pages * 4096, 32 << 20)
        self.assertLess(summary.misses, 0.1 * summary.pages_referenced)
        self.assertLess(summary.wire_bytes, summary.guest_bytes - (32 << 20))
        self.assertEqual(before, self.settings())
        for phase in ("checking", "waiting", "starting relays", "mapping", "migrating"):
            self.assertIn(phase, summary.phases)
        self.assertGreater(summary.mapping_s, 1)
        # The destination's libvirt has told its service
        self.assertTrue(0 < summary.downtime_ms < 1000 * summary.phases["migrating"], summary)
        self.check_database_series(summary)

    def check_database_series(self, summary: MigrationSummary) -> None:
        """The database was seen before and after the switchover, and a report shows it."""
        rows = summary.series["database"]
        begin, end = history.run_of(summary)["series"]["downtime"]
        self.assertLess(rows[0]["t"], begin, rows)
        self.assertGreater(rows[-1]["t"], end, rows)
        counted = [row["queries"] for row in rows]
        self.assertEqual(sorted(counted), counted)
        self.assertGreater(counted[-1], 0)
        path = self.directory / "report.html"
        reported = self.command("report", summary.id, "--output", str(path))
        self.assertEqual(0, reported.returncode, reported.stderr)
        self.assertIn(
            "throughput by path, database queries, database latency. The downtime is marked.",
            path.read_text(),
        )

    def test_and_back_while_the_map_is_on_its_way(self) -> None:
        before = self.settings()
        self.hosts.shape(12)
        summary = self.migrate()
        self.assertEqual(("completed", "dmigrate", None), _way(summary), summary)
        self.assertGreater(summary.pages_referenced, 0)
        self.assertGreater(summary.mapping_s, 1)
        self.assertNotIn("mapping", summary.phases)
        self.assertEqual(before, self.settings())

    # In the ordinary way, or without the volumes, with the reason

    def check_reason(self, code: str, case: Case) -> None:
        """What makes a migration the ordinary one is found, and told by its code."""
        place = Place(self.services, self.domain, self.source, self.destination, self.directory)
        before = self.settings()
        summary = None
        with case.provoke(place) as options:
            if case.way is None:
                error = self.assertRaises(exception.FallBack, self.order, mode=case.mode, **options)
                self.assertEqual(code, error.kwargs["code"], error)
                self.assertEqual([self.source.name], self.running())
            else:
                summary = self.order(mode=case.mode, **options)
                self.domain.arrived(self.destination)
                self.assertEqual((*case.way, code), _way(summary), summary)
                self.assertEqual(0, summary.pages_referenced)
                why = " ".join(str(summary.fallback_message).split())
                self.assertIn(why, summary.sentence())
        if summary is not None:
            # What QEMU has sent by itself is no more than looked at; what relays have put together
            # is checked, in later tests at the latest
            check = self.check_place if summary.mode == ORDINARY else self.check_guest
            check(summary)
        self.assertEqual(1, len(self.running()))
        # An agent that could not be asked restores when its lease ends
        wait_until(lambda: self.settings() == before, "the settings are as they were")
        self.assertEqual([], self.services.left_behind())

    # What fails on the way

    def test_what_libvirt_cannot_begin_is_tried_once_more_in_the_ordinary_way(self) -> None:
        places = []

        def occupy(progress: Progress) -> None:
            """Have the destination's QEMU find something else in the place of its socket."""
            if progress.phase == "migrating" and not places:
                sockets = self.destination.outside(Path("/run/nova-dmigrate"))
                places.extend(each / "qemu" for each in sockets.iterdir() if each.is_dir())
                for each in places:
                    each.mkdir()

        summary = self.migrate(on_progress=occupy)
        self.assertEqual(1, len(places))
        self.assertEqual(("completed", "ordinary", "relay-failed"), _way(summary), summary)

    def test_a_display_that_breaks_does_not_end_the_migration(self) -> None:
        def broken(progress: Progress) -> None:
            raise BrokenPipeError

        summary = self.migrate(on_progress=broken)
        self.assertEqual(("completed", "dmigrate"), _way(summary)[:2], summary)

    def test_a_cut_network_fails_it_and_the_guest_goes_on(self) -> None:
        before = self.settings()
        self.hosts.shape(SLOW)
        self.addCleanup(self.hosts.heal)
        # Relays are required, so that nothing is tried a second time; and the guest hardly may stop
        # for its last pages. No end but failure is left.
        summary = self.order(
            mode=Mode.REQUIRED,
            max_downtime_ms=1,
            on_progress=self.in_the_middle(self.hosts.cut),
        )
        self.assertEqual(("failed", "dmigrate", None), _way(summary), summary)
        self.assertTrue(summary.error)
        # Both hosts clean up while they cannot reach each other.
        self.check_guest(summary)
        self.assertEqual(before, self.settings())
        wait_until(
            lambda: self.running() == [self.source.name] and not self.services.left_behind(),
            "nothing is left of the migration",
        )
        self.hosts.heal()
        summary = self.migrate()
        self.assertEqual(("completed", "dmigrate", None), _way(summary), summary)


def _test_of(code: str, case: Case) -> Callable[[TestOrchestration], None]:
    return lambda test: test.check_reason(code, case)


for _code, _case in CASES.items():
    _what = "is_refused" if _case.way is None else "goes_on"
    _name = f"test_a_migration_{_what}_for_{_code.replace('-', '_')}"
    setattr(TestOrchestration, _name, _test_of(_code, _case))


def _way(summary: MigrationSummary) -> tuple[str, str, str | None]:
    return summary.state, summary.mode, summary.fallback_reason
