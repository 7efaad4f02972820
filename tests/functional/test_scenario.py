# SPDX-License-Identifier: Apache-2.0
"""What the scenario tests ask of a cloud, asked of Nova's API by openstacksdk."""

from typing import Any

import openstack
from keystoneauth1 import noauth, session
from openstack import exceptions

from tests.functional import base
from tests.scenario import migration
from tests.scenario.cloud import Cloud


class ScenarioTestCase(base.MigrationTest):
    def setUp(self):
        super().setUp()
        api = self.admin_api
        headers = {
            "X-Auth-User": api.auth_user,
            "X-User-Id": api.auth_user,
            "X-Auth-Project-Id": api.project_id,
            "X-Roles": ",".join(api.roles),
        }
        login = session.Session(
            auth=noauth.NoAuth(endpoint=api.base_url), additional_headers=headers
        )
        connection = openstack.connection.Connection(
            session=login, compute_endpoint_override=api.base_url
        )
        self.cloud = Cloud(connection, timeout=60)

    def migrate_by_sdk(self, told: bool = True, abort: bool = False) -> migration.Move:
        server: Any = self.make_server()
        return migration.move(self.cloud, server["id"], told, abort)


class ScenarioTest(ScenarioTestCase):
    def test_hosts_that_take_servers_are_known(self):
        self.assertEqual({"src", "dest"}, set(self.cloud.hosts()))
        service = next(each for each in self.api.get_services() if each["host"] == "dest")
        self.admin_api.put_service(service["id"], {"status": "disabled"})
        self.assertEqual(["src"], self.cloud.hosts())

    def test_flavors_have_the_policy_and_go_again(self):
        flavor = self.cloud.make_flavor(512, 1, {"dmigrate:policy": "required"})
        shown = self.admin_api.get_flavor(flavor)
        self.assertEqual((512, 1, 0), (shown["ram"], shown["vcpus"], shown["disk"]))
        self.assertEqual({"dmigrate:policy": "required"}, self.admin_api.get_extra_specs(flavor))
        self.cloud.remove_flavor(flavor)
        self.assertRaises(exceptions.NotFoundException, self.cloud.remove_flavor, flavor)

    def test_a_server_is_awaited_and_goes(self):
        server = self.make_server()["id"]
        self.cloud.wait_until_active(server)
        specs = self.cloud.server(server)["flavor"]["extra_specs"]
        self.assertEqual("preferred", specs["dmigrate:policy"])
        self.assertEqual(server, self.cloud.find_server(server))
        self.cloud.remove_server(server)
        self.cloud.remove_server(server)

    def test_a_migration_through_the_relays_is_known_for_one(self):
        moved = self.migrate_by_sdk()
        self.assertEqual(("src", "dest", "completed"), (moved.source, moved.host, moved.status))
        self.assertTrue(moved.outcome.relayed, str(moved))
        self.assertEqual(("src", "dest"), (moved.outcome.source, moved.outcome.destination))

    def test_relays_that_got_no_map_say_so(self):
        self.hosts["src"].progress["map"] = "none"
        moved = self.migrate_by_sdk()
        self.assertEqual("completed", moved.outcome.state)
        self.assertFalse(moved.outcome.by_dmigrate)
        self.assertTrue(moved.outcome.reason)

    def test_an_abort_leaves_the_server_where_it_is(self):
        def during() -> None:
            self.wait_for(self.aborted.is_set)
            self.libvirt_fails("operation aborted: canceled by client")

        self.during = during
        moved = self.migrate_by_sdk(abort=True)
        self.assertEqual((True, "src"), (moved.aborted, moved.host))
        self.assertNotEqual("completed", moved.status)
        self.assertEqual("cancelled", moved.outcome.state)
        # Nova 34 takes it for broken, with its own driver as well
        self.cloud.revive(self.server["id"])
        self.cloud.wait_until_active(self.server["id"])


class StockTest(ScenarioTestCase):
    EXTRA_SPECS = {"dmigrate:policy": "disabled"}

    def test_of_novas_own_migration_the_driver_says_nothing(self):
        moved = self.migrate_by_sdk(told=False)
        self.assertEqual(("src", "dest", "completed"), (moved.source, moved.host, moved.status))
        self.assertIsNone(moved.outcome)


class RequiredTest(ScenarioTestCase):
    EXTRA_SPECS = {"dmigrate:policy": "required"}

    def test_a_refusal_is_understood(self):
        self.hosts["dest"].state, self.hosts["dest"].message = "failed", "no memory"
        moved = self.migrate_by_sdk()
        self.assertEqual(("src", "failed"), (moved.host, moved.status))
        self.assertIn("no memory", moved.refusal)
