# SPDX-License-Identifier: Apache-2.0
"""Who decides whether a server's live migrations go through the relays, and what then happens."""

import uuid
from typing import Any

from nova.tests.functional.api import client

from tests.functional import base
from tests.functional.changes import (
    Change,
    agent_refuses,
    changed,
    configured,
    device_passed_through,
    nothing,
)

#: What is different, and what the refusal of a migration with required relays says of it.
REFUSED: dict[str, tuple[Change, str]] = {
    "confined_at_the_source": (changed("src", obstacle="AppArmor"), "AppArmor"),
    "draining_destination": (
        changed("dest", draining=True),
        "the service of host dest is being shut down",
    ),
    "old_libvirt_at_the_destination": (
        changed("dest", libvirt_version=6_007_001),
        "libvirt 6.7.1 at host dest",
    ),
    "device_passed_through": (device_passed_through, "devices of the host are passed through"),
    "no_way_to_an_agent": (configured("migration", agent_url=""), "the guest has no agent"),
    "no_driver_for_the_volumes": (changed("src", drivers=("rbd",)), "no disk can be read"),
    "agent_refuses": (agent_refuses, "not you"),
    "no_such_broker": (configured("migration", agent_url="pigeon://"), "pigeon"),
    "configuration_that_cannot_be_read": (
        lambda test: test.flags(config_file=["/nowhere.conf"], group="dmigrate"),
        "/nowhere.conf",
    ),
}
IMAGE = "155d900f-4e14-4e4c-a73d-069cbf4541e6"


class NobodySaysTest(base.MigrationTest):
    EXTRA_SPECS: dict[str, str] = {}

    def test_migrations_are_novas_own(self):
        server = self.make_server()
        self.move(server)
        self.assertNotIn("migrate_uri", self.calls[0])
        self.assertEqual([], self.orders)
        self.assertEqual((), self.summaries())

    def test_the_operators_default_counts(self):
        self.flags(default_policy="preferred", group="dmigrate")
        self.assert_relayed(self.make_server())

    def test_the_image_counts(self):
        image = dict(self.glance.show(None, IMAGE), id=str(uuid.uuid4()))
        image["properties"] = {**image["properties"], "dmigrate_policy": "preferred"}
        self.glance.create(None, image)
        self.assert_relayed(self.make_server(image_uuid=image["id"]))

    def test_metadata_count_if_the_operator_wants_so(self):
        server = self.make_server()
        self.api.api_post(
            f"/servers/{server['id']}/metadata", {"metadata": {"dmigrate_policy": "preferred"}}
        )
        self.move(server)
        self.assertNotIn("migrate_uri", self.calls.pop())
        self.flags(policy_from_metadata=True, group="dmigrate")
        self.src, self.dest = self.dest, self.src
        self.move(server, "src")
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))

    def test_what_is_no_policy_is_refused_before_anything_is_done(self):
        self.flags(policy_from_metadata=True, group="dmigrate")
        server = self.make_server()
        self.api.api_post(
            f"/servers/{server['id']}/metadata", {"metadata": {"dmigrate_policy": "perhaps"}}
        )
        self.migrate(server, refused=True)
        self._wait_for_migration_status(server, ["error"])
        event = self.event(server, "compute_check_can_live_migrate_destination")
        self.assertIn("'perhaps'", event["details"])
        self.assertEqual([], self.calls)

    def test_hosts_have_a_trait(self):
        traits = self._get_provider_traits(self.compute_rp_uuids["src"])
        self.assertIn("CUSTOM_DMIGRATE", traits)

    def test_the_api_checks_the_extra_spec(self):
        flavor = self._create_flavor()
        path = f"/flavors/{flavor}/os-extra_specs"
        self.admin_api.microversion = "2.86"
        for value in ("disabled", "preferred", "required"):
            self.admin_api.api_post(path, {"extra_specs": {"dmigrate:policy": value}})
        for key, value in (("dmigrate:policy", "always"), ("dmigrate:polici", "required")):
            error = self.assertRaises(
                client.OpenStackApiException,
                self.admin_api.api_post,
                path,
                {"extra_specs": {key: value}},
            )
            self.assertEqual(400, error.response.status_code)

    def assert_relayed(self, server: Any) -> None:
        self.move(server)
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))


class DisabledTest(base.MigrationTest):
    EXTRA_SPECS = {"dmigrate:policy": "disabled"}

    def test_the_flavor_comes_before_the_default(self):
        self.flags(default_policy="required", group="dmigrate")
        server = self.make_server()
        self.move(server)
        self.assertNotIn("migrate_uri", self.calls[0])
        self.assertEqual([], self.orders)


class RefusalTest(base.MigrationTest):
    """Relays are required."""

    EXTRA_SPECS = {"dmigrate:policy": "required"}

    def assert_refused(self, why: str, change: Change = nothing) -> None:
        server = self.make_server()
        change(self)
        self.migrate(server, refused=True)
        self._wait_for_migration_status(server, ["error"])
        server = self._wait_for_state_change(server, "ACTIVE")
        event = self.event(server, "compute_check_can_live_migrate_destination")
        self.assertEqual("Error", event["result"])
        self.assertIn("nova-dmigrate is required, but", event["details"])
        self.assertIn(why, event["details"])
        self.assertEqual([], self.calls)
        self.assertEqual([], self.orders)


class RequiredTest(RefusalTest):
    def test_it_goes_through_the_relays_and_waits_for_the_map(self):
        self.hosts["src"].progress["map"] = "offered"
        server = self.make_server()
        self.move(server)
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))
        self.assertEqual(1, len(self.hosts["src"].maps))

    def test_what_is_known_only_then_fails_it_and_leaves_the_server_as_it_is(self):
        self.hosts["dest"].state, self.hosts["dest"].message = "failed", "no memory"
        server = self.make_server()
        self.migrate(server)
        self.assertEqual("failed", self.settled(server))
        server = self._wait_for_state_change(server, "ACTIVE")
        self.assertEqual("src", self.host_of(server))
        self.assertEqual([], self.calls)
        event = self.event(server)
        self.assertEqual("Error", event["result"])
        self.assertIn("required, but", event["details"])
        self.assertIn("no memory", event["details"])

    def test_without_a_map_it_is_not_migrated(self):
        server = self.make_server()
        self.agent.outcome = "failed"
        self.migrate(server)
        self.assertEqual("failed", self.settled(server))
        self.assertEqual([], self.calls)
        self.assertIn("no database server runs", self.event(server)["details"])


class RefusedTest(RefusalTest):
    """Before anything is done; one test for each row."""


def _test(change: Change, why: str) -> Any:
    return lambda self: self.assert_refused(why, change)


for _name, _row in REFUSED.items():
    setattr(RefusedTest, f"test_{_name}", _test(*_row))


class RequiredAndTunnelledTest(RefusalTest):
    def setUp(self):
        # Read when a compute starts
        self.flags(live_migration_tunnelled=True, group="libvirt")
        super().setUp()

    def test_what_libvirt_tunnels_is_refused(self):
        self.assert_refused("libvirt tunnels the migration")


class RequiredAndEncryptedTest(RefusalTest):
    def setUp(self):
        self.flags(live_migration_with_native_tls=True, group="libvirt")
        super().setUp()

    def test_relays_that_do_not_encrypt_are_refused(self):
        self.assert_refused("the relays do not encrypt")


class RequiredWithoutAgentTest(RefusalTest):
    AGENT = False
    PATIENCE = 3

    def test_a_guest_without_an_agent_is_refused(self):
        self.assert_refused("no answer in time")


class RequiredWithoutServiceTest(RefusalTest):
    SERVICES = ("src",)
    PATIENCE = 3

    def test_a_destination_without_a_host_service_is_refused(self):
        self.assert_refused("Host dest")
