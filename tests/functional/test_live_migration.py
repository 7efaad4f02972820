# SPDX-License-Identifier: Apache-2.0
"""Live migrations by Nova's API that go through the relays."""

import json
import sys
import threading
import time
import unittest
from importlib.metadata import version
from typing import Any
from unittest import mock

import fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt import migration as libvirt_migration

from tests.functional import base

MIB = 1 << 20
POST_COPY = fakelibvirt.VIR_MIGRATE_POSTCOPY
TLS = fakelibvirt.VIR_MIGRATE_TLS
PARALLEL = getattr(fakelibvirt, "VIR_MIGRATE_PARALLEL", 0)


class RelayedTest(base.MigrationTest):
    def test_libvirt_migrates_to_the_source_relay_and_the_destination_reads_its_own_device(self):
        server = self.make_server()
        self.move(server)
        self.assertEqual("dest", self.host_of(server))
        (call,) = self.calls
        destination, source = self.hosts["dest"].orders[0], self.hosts["src"].orders[0]
        self.assertEqual(f"unix:{source.qemu_socket}", call["migrate_uri"])
        self.assertEqual(destination.qemu_socket, source.qemu_socket)
        self.assertEqual(destination.token, source.token)
        self.assertEqual("qemu+tcp://dest/system", call["destination"])
        self.assertEqual(0, call["bandwidth"])
        (volume,) = destination.volumes
        self.assertEqual(self.volumes[0][:20], volume.volume_id)
        self.assertEqual("/dev/sda", volume.location)
        self.assertEqual(("dest", 49200), (source.host, source.port))

    def test_the_buffer_map_is_handed_over_while_libvirt_migrates(self):
        self.during = lambda: self.wait_for(lambda: self.hosts["src"].maps)
        self.move(self.make_server())
        self.assertEqual(1, len(self.hosts["src"].maps))

    def test_all_volumes_of_a_server_can_be_read(self):
        server = self.make_server(volumes=3)
        self.move(server)
        self.assertEqual(
            {volume[:20] for volume in self.volumes},
            {volume.volume_id for volume in self.hosts["dest"].orders[0].volumes},
        )

    def test_nothing_of_it_is_left(self):
        server = self.make_server()
        self.move(server)
        self.event(server)
        for host in self.hosts.values():
            self.assertEqual([host.orders[0].session_id], host.closed)
        self.assertEqual([], list((self.directory / "state/maps").iterdir()))
        self.assertEqual({}, self.src.driver._relaying)

    def test_the_action_the_history_and_a_notification_tell_how_it_went(self):
        server = self.make_server()
        self.move(server)
        event = self.event(server)
        self.assertEqual("Success", event["result"])
        self.assertIn("through the relays", event["details"])
        self.assertIn("300 MiB over the network", event["details"])
        (summary,) = self.summaries()
        self.assertEqual(("dmigrate", "completed"), (summary.mode, summary.state))
        self.assertEqual(("src", "dest"), (summary.source, summary.destination))
        self.assertEqual(600 * MIB, summary.volume_bytes)
        self.assertEqual(87.5, summary.downtime_ms)
        self.assertIn(f"Instance {server['id']}: {summary.sentence()}", self.stdlog.logger.output)
        told = [
            each for each in self.notifier.notifications if each.event_type.startswith("dmigrate.")
        ]
        self.assertEqual(["dmigrate.migration.end"], [each.event_type for each in told])
        self.assertEqual(summary.id, told[0].payload["id"])
        json.dumps(told[0].payload)

    def test_the_downtime_limit_is_held_back_until_the_bulk_is_resolved(self):
        self.hosts_resolve(False)
        self.flags(live_migration_downtime=400, group="libvirt")

        def during() -> None:
            self.wait_for(lambda: self.downtimes == [1])
            time.sleep(1.5)  # in which Nova's monitor sets its first step
            self.assertEqual([1], self.downtimes)
            self.hosts_resolve(True)
            self.wait_for(lambda: len(self.downtimes) > 1)

        self.during = during
        server = self.make_server()
        self.move(server)
        self.assertEqual([1, 40], self.downtimes)

    def test_caps_of_nova_are_kept_by_the_relays(self):
        self.flags(live_migration_bandwidth=50, group="libvirt")
        server = self.make_server()
        self.move(server)
        self.assertEqual(0, self.calls[0]["bandwidth"])
        self.assertEqual(50 * MIB, self.hosts["src"].orders[0].network_bandwidth)

    def test_the_relays_go_over_novas_migration_network(self):
        self.flags(live_migration_inbound_addr="192.0.2.7", group="libvirt")
        server = self.make_server()
        self.move(server)
        self.assertEqual("192.0.2.7", self.hosts["src"].orders[0].host)
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))

    def test_it_migrates_back(self):
        server = self.make_server()
        self.move(server)
        self.event(server)
        self.src, self.dest = self.dest, self.src
        self.move(server, "src")
        self.assertEqual("src", self.host_of(server))
        self.assertTrue(self.calls[1]["migrate_uri"].startswith("unix:"))

    def hosts_resolve(self, value: bool) -> None:
        self.hosts["src"].progress["bulk_resolved"] = value


class ConcurrentTest(base.MigrationTest):
    def setUp(self):
        # Read when a compute starts
        self.flags(max_concurrent_live_migrations=3)
        super().setUp()

    def test_servers_migrate_at_the_same_time(self):
        gate = threading.Barrier(3, timeout=20)
        self.during = gate.wait
        servers = [self.make_server() for _ in range(3)]
        for server in servers:
            self.migrate(server)
        for server in servers:
            self._wait_for_migration_status(server, ["completed"])
            self.assertEqual("dest", self.host_of(server))
        self.assertEqual(3, len({call["migrate_uri"] for call in self.calls}))
        self.assertEqual(3, len({order.token for order in self.hosts["src"].orders}))


class EncryptedTest(base.MigrationTest):
    def setUp(self):
        # Read when a compute starts
        self.flags(live_migration_with_native_tls=True, group="libvirt")
        super().setUp()

    def test_relays_encrypt_in_qemus_place(self):
        for host in self.hosts.values():
            host.hello_changes = {"tls": True}
        server = self.make_server()
        self.move(server)
        self.assertEqual(0, self.calls[0]["flags"] & TLS)
        self.assertEqual("dest", self.hosts["src"].orders[0].tls_peer_name)
        self.assertEqual("src", self.hosts["dest"].orders[0].tls_peer_name)


@unittest.skipIf(int(version("nova").partition(".")[0]) < 33, "Nova 33 has it first")
class SeveralConnectionsTest(base.MigrationTest):
    def setUp(self):
        self.flags(live_migration_parallel_connections=4, group="libvirt")
        super().setUp()

    def test_one_connection_is_what_a_relay_sees(self):
        server = self.make_server()
        self.move(server)
        self.assertEqual(0, self.calls[0]["flags"] & PARALLEL)
        self.assertNotIn("parallel.connections", self.calls[0])
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))


class AutoConvergeTest(base.MigrationTest):
    def setUp(self):
        self.flags(live_migration_permit_auto_converge=True, group="libvirt")
        super().setUp()

    def test_qemu_may_slow_the_guest_down_as_ever(self):
        self.move(self.make_server())
        (call,) = self.calls
        self.assertNotEqual(0, call["flags"] & fakelibvirt.VIR_MIGRATE_AUTO_CONVERGE)
        self.assertTrue(call["migrate_uri"].startswith("unix:"))


class MonitorTest(base.MigrationTest):
    def test_a_monitor_of_qemus_that_does_not_answer_keeps_nothing_else_from_its_work(self):
        ticks: list[float] = []
        over = threading.Event()

        def tick() -> None:
            while not over.wait(0.05):
                ticks.append(time.monotonic())

        def hang() -> str:
            before = len(ticks)
            # As a binding in C waits, of which no library of green threads knows
            eventlet = sys.modules.get("eventlet")
            (eventlet.patcher.original("time") if eventlet else time).sleep(3)
            meanwhile.append(len(ticks) - before)
            return "mtree"

        meanwhile: list[int] = []
        self.monitor = hang
        self.addCleanup(over.set)
        threading.Thread(target=tick, name="tick", daemon=True).start()
        self.move(self.make_server())
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))
        self.assertGreater(meanwhile[0], 5)


class SteeredTest(base.MigrationTest):
    """Migrations that operators intervene in."""

    def force(self, server: Any, migration: Any) -> None:
        self.wait_for(lambda: self.calls)
        path = f"/servers/{server['id']}/migrations/{migration['id']}/action"
        self.api.api_post(path, {"force_complete": None})

    def running(self, server: Any) -> Any:
        return self._wait_for_migration_status(server, ["running"])


class InterventionTest(SteeredTest):
    def test_an_abort_ends_it_and_the_server_stays(self):
        def during() -> None:
            self.assertTrue(self.aborted.wait(20))
            self.libvirt_fails("operation aborted: canceled by client")

        self.during = during
        server = self.make_server()
        self.migrate(server)
        migration = self.running(server)
        self.wait_for(lambda: self.calls)
        self.api.api_delete(f"/servers/{server['id']}/migrations/{migration['id']}")
        event = self.event(server)
        self.settled(server)
        self.assertEqual("Error", event["result"])
        self.assertEqual("cancelled", self.summaries()[0].state)
        self.assertEqual(1, len(self.calls))
        self.assertEqual("src", self.host_of(server))
        self.assert_closed()

    def test_novas_time_limit_aborts_it_and_it_is_not_tried_again(self):
        self.flags(live_migration_completion_timeout=1, group="libvirt")

        def during() -> None:
            self.assertTrue(self.aborted.wait(60))
            self.hosts["src"].state = "failed"
            self.libvirt_fails("operation aborted: canceled by client")

        self.during = during
        server = self.make_server()
        self.migrate(server)
        self.event(server)
        self.settled(server)
        self.assertEqual("cancelled", self.summaries()[0].state)
        self.assertEqual(1, len(self.calls))

    def test_an_abort_before_libvirt_knows_of_it_ends_it_as_well(self):
        self.hosts["dest"].state = "queued"
        server = self.make_server()
        self.migrate(server)
        migration = self.running(server)
        self.api.api_delete(f"/servers/{server['id']}/migrations/{migration['id']}")
        self.assertEqual("cancelled", self.settled(server))
        self._wait_for_state_change(server, "ACTIVE")
        self.assertEqual([], self.calls)
        self.event(server)
        self.assertEqual("cancelled", self.summaries()[0].state)
        self.assert_closed()

    def test_an_abort_while_nova_prepares_the_ordinary_one_is_not_lost(self):
        def abort_first(*arguments: Any, **options: Any) -> Any:
            # libvirt, which has nothing to abort yet, says so, and goes on
            migration = self.running(server)
            self.api.api_delete(f"/servers/{server['id']}/migrations/{migration['id']}")
            self.wait_for(self.aborted.is_set)
            return described(*arguments, **options)

        described = libvirt_migration.get_updated_guest_xml
        self.useFixture(
            fixtures.MockPatchObject(libvirt_migration, "get_updated_guest_xml", abort_first)
        )
        self.hosts["dest"].hello_changes = {"draining": True}
        server = self.make_server()
        self.migrate(server)
        self.assertEqual("cancelled", self.settled(server))
        self.event(server)
        self.assertEqual([], self.calls)
        self.assertEqual("cancelled", self.summaries()[0].state)
        self.assertEqual("src", self.host_of(server))

    def test_force_complete_pauses_the_server(self):
        def during() -> None:
            domain = self.domain(server)
            self.wait_for(lambda: domain._state == fakelibvirt.VIR_DOMAIN_PAUSED)

        self.during = during
        server = self.make_server()
        self.migrate(server)
        self.force(server, self.running(server))
        self._wait_for_migration_status(server, ["completed"])
        self.assertEqual("dest", self.host_of(server))

    def test_so_does_novas_time_limit_where_that_is_its_action(self):
        self.flags(
            live_migration_completion_timeout=1,
            live_migration_timeout_action="force_complete",
            group="libvirt",
        )

        def during() -> None:
            domain = self.domain(server)
            self.wait_for(lambda: domain._state == fakelibvirt.VIR_DOMAIN_PAUSED)

        self.during = during
        server = self.make_server()
        self.move(server)
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))
        self.event(server)
        self.assertEqual("dmigrate", self.summaries()[0].mode)

    def test_a_server_that_was_paused_for_it_goes_on_when_a_relay_fails(self):
        def during() -> None:
            domain = self.domain(server)
            self.wait_for(lambda: domain._state == fakelibvirt.VIR_DOMAIN_PAUSED)
            self.hosts["src"].state = "failed"
            time.sleep(1)  # in which that is noticed
            self.libvirt_fails()

        self.during = during
        server = self.make_server()
        self.migrate(server)
        self.force(server, self.running(server))
        self.assertEqual("failed", self.settled(server))
        self.event(server)
        # What is paused when libvirt begins stays so at the destination
        self.assertEqual(1, len(self.calls))
        self.assertEqual(fakelibvirt.VIR_DOMAIN_RUNNING, self.domain(server)._state)
        self.assertEqual("ACTIVE", self.api.get_server(server["id"])["status"])
        self.assertEqual("src", self.host_of(server))
        self.assert_closed()


class PostCopyTest(SteeredTest):
    def setUp(self):
        self.flags(live_migration_permit_post_copy=True, group="libvirt")
        super().setUp()

    def test_force_complete_switches_to_post_copy(self):
        self.during = lambda: self.assertTrue(self.paused.wait(20))
        server = self.make_server()
        self.migrate(server)
        self.force(server, self.running(server))
        self._wait_for_migration_status(server, ["completed"])
        self.assertNotEqual(0, self.calls[0]["flags"] & POST_COPY)
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))


class FailureTest(base.MigrationTest):
    """libvirt's migration fails."""

    def test_a_failure_that_is_not_the_relays_is_one_of_novas(self):
        cleaned_up = self.useFixture(
            fixtures.MockPatchObject(self.dest.driver, "rollback_live_migration_at_destination")
        ).mock
        self.during = self.libvirt_fails
        server = self.make_server()
        self.migrate(server)
        event = self.event(server)
        self.settled(server)
        self.assertEqual("Error", event["result"])
        self.assertIn("the job has ended", event["details"])
        self.assertEqual(1, len(self.calls))
        self.assertEqual("src", self.host_of(server))
        self.assertEqual("failed", self.summaries()[0].state)
        # Nova has nothing to clean up there where the directory of servers is shared
        cleaned_up.assert_not_called()
        self.assert_closed()

    def test_what_cannot_even_be_loaded_leaves_the_migration_to_nova(self):
        for error in (ImportError("no numpy"), ValueError("numpy.dtype size changed")):
            server = self.make_server()
            with mock.patch.object(self.src.driver, "_relaying_for", side_effect=error):
                self.move(server)
            self.assertNotIn("migrate_uri", self.calls[-1])
            self.assertIn(
                f"cannot be used, it may lack a package: {error}", self.stdlog.logger.output
            )

    def test_where_only_volumes_are_shared_nova_cleans_up_at_the_destination(self):
        undone = self.useFixture(
            fixtures.MockPatchObject(
                self.dest.driver,
                "rollback_live_migration_at_destination",
                wraps=self.dest.driver.rollback_live_migration_at_destination,
            )
        ).mock
        shared = {"_check_shared_storage_test_file": False, "_is_shared_block_storage": True}
        for name, answer in shared.items():
            self.useFixture(fixtures.MockPatchObject(self.src.driver, name, return_value=answer))
        self.during = self.libvirt_fails
        server = self.make_server()
        self.migrate(server)
        self.assertEqual("Error", self.event(server)["result"])
        self.settled(server)
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))
        self.wait_for(lambda: undone.called)
        self.assertEqual(server["id"], undone.call_args.args[1].uuid)
        self.assertEqual("src", self.host_of(server))
        self.assert_closed()
        # Nothing of it is in the way of the next one. Nova takes the server for broken before, with
        # any driver
        self.during = lambda: None
        self.api.post_server_action(server["id"], {"os-resetState": {"state": "active"}})
        self.move(server)
        self.assertEqual("dest", self.host_of(server))

    def test_a_relay_that_fails_has_it_done_once_more_in_the_ordinary_way(self):
        def during() -> None:
            if len(self.calls) == 1:
                self.hosts["src"].state = "failed"
                self.hosts["src"].message = "the other relay is gone"
                time.sleep(1)  # in which that is noticed
                self.libvirt_fails()

        self.during = during
        server = self.make_server()
        self.move(server)
        self.assertEqual("dest", self.host_of(server))
        first, second = self.calls
        self.assertTrue(first["migrate_uri"].startswith("unix:"))
        self.assertNotIn("migrate_uri", second)
        self.event(server)
        (summary,) = self.summaries()
        self.assertEqual(("ordinary", "completed"), (summary.mode, summary.state))
        self.assertEqual("relay-failed", summary.fallback_reason)
        self.assertIn("the other relay is gone", summary.fallback_message)

    def test_a_destination_that_has_to_clean_up_gets_time_for_that(self):
        def during() -> None:
            if len(self.calls) == 1:
                self.hosts["src"].state = "failed"
                time.sleep(1)  # in which that is noticed
                self.libvirt_fails()
            if len(self.calls) == 2:
                self.libvirt_fails("operation failed: domain 'db' is already being removed")

        self.during = during
        server = self.make_server()
        self.move(server)
        self.assertEqual("dest", self.host_of(server))
        self.assertEqual(3, len(self.calls))
        self.event(server)
        (summary,) = self.summaries()
        self.assertEqual(("ordinary", "completed"), (summary.mode, summary.state))
