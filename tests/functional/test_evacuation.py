# SPDX-License-Identifier: Apache-2.0
"""Servers that Nova starts on another host because theirs has failed."""

from typing import Any

import fixtures

from nova_dmigrate import exception
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.messages import AGENT
from tests.functional import base, services


class LostHostTest(base.MigrationTest):
    """A server whose host has failed."""

    def setUp(self):
        super().setUp()
        # What is stopped is not to ask Nova's stand-ins while another test has them
        self.addCleanup(self.forget)

    def forget(self) -> None:
        for compute in self.computes.values():
            if compute.driver._evacuations is not None:
                compute.driver._evacuations.stop()

    def lose(self) -> Any:
        server = self.make_server()
        self.src.stop()
        (service,) = self.api.get_services(host="src", binary="nova-compute")
        self.api.put_service(service["id"], {"forced_down": True})
        return server


class EvacuationTest(LostHostTest):
    def test_the_agent_is_asked_to_warm_up(self):
        self.api.microversion = self.admin_api.microversion = "2.94"
        server = self.lose()
        self._evacuate_server(server, expected_host="dest", expected_state="ACTIVE")
        self.assertTrue(self.agent.warmed_up.wait(20))
        told = f"Instance {server['id']} is warm after 12 s: 900 of 900 hot pages"
        self.wait_for(lambda: told in self.stdlog.logger.output)

    def test_its_port_is_that_of_the_new_host(self):
        self.api.microversion = self.admin_api.microversion = "2.94"
        hosts = []
        self.useFixture(
            fixtures.MockPatch(
                "nova_dmigrate.virt.evacuation.Evacuations.arrived",
                side_effect=lambda instance, host, facts: hosts.append(host),
            )
        )
        self._evacuate_server(self.lose(), expected_host="dest", expected_state="ACTIVE")
        self.assertEqual(["dest"], hosts)

    def test_what_keeps_an_agent_from_it_is_told(self):
        self.api.microversion = self.admin_api.microversion = "2.94"
        server = self.lose()
        self.agent.warm_up_ends = messages.WarmUpState(
            "failed", "no-list", message="there is no list of hot pages"
        )
        self._evacuate_server(server, expected_host="dest", expected_state="ACTIVE")
        told = (
            f"Instance {server['id']} is not warm: failed with 0 of 0 hot pages, no-list: there is"
            " no list of hot pages"
        )
        self.wait_for(lambda: told in self.stdlog.logger.output)

    def test_since_2_95_it_is_asked_when_the_server_is_started(self):
        self.api.microversion = self.admin_api.microversion = "2.95"
        server = self.lose()
        self._evacuate_server(server, expected_host="dest", expected_state="SHUTOFF")
        self._start_server(server)
        self.assertTrue(self.agent.warmed_up.wait(20))

    def test_a_nova_compute_that_is_started_anew_in_between_knows_it(self):
        self.api.microversion = self.admin_api.microversion = "2.95"
        server = self.lose()
        self._evacuate_server(server, expected_host="dest", expected_state="SHUTOFF")
        self.assertFalse(self.agent.warmed_up.is_set())
        # What it has in memory ends with it
        self.dest.driver._evacuations._waiting[server["id"]] = 0
        self.dest.driver._evacuations = None
        self._start_server(server)
        self.assertTrue(self.agent.warmed_up.wait(20))
        self.wait_for(lambda: not self.dest.driver._evacuations._cold)
        # The next start is one like any other
        self.agent.warmed_up.clear()
        self._stop_server(server)
        self._start_server(server)
        self.assertEqual(set(), self.dest.driver._evacuations._cold)
        self.assertFalse(self.agent.warmed_up.is_set())

    def test_one_that_refuses_is_not_asked_again(self):
        self.api.microversion = self.admin_api.microversion = "2.94"
        server = self.lose()
        error = exception.RequestRefused(reason="there is no list of hot pages", code="no-list")
        self.agent.refused["warm_up"] = error
        self._evacuate_server(server, expected_host="dest", expected_state="ACTIVE")
        told = f"Instance {server['id']} is not warmed up: "
        self.wait_for(lambda: told in self.stdlog.logger.output)
        self.assertIn("there is no list of hot pages", self.stdlog.logger.output)
        self.assertEqual(set(), self.dest.driver._evacuations._cold)

    def test_nothing_of_ours_keeps_a_server_from_coming_and_starting(self):
        self.api.microversion = self.admin_api.microversion = "2.95"
        error = RuntimeError("can't start new thread")
        self.useFixture(
            fixtures.MockPatch(
                "nova_dmigrate.virt.evacuation.Evacuations.powered_on", side_effect=error
            )
        )
        server = self.lose()
        self._evacuate_server(server, expected_host="dest", expected_state="SHUTOFF")
        self._start_server(server)
        self.assertEqual(2, self.stdlog.logger.output.count("will not be warmed up"))

    def test_a_server_that_is_rebuilt_where_it_is_has_lost_no_host(self):
        server = self.make_server()
        self._rebuild_server(server, "155d900f-4e14-4e4c-a73d-069cbf4541e6")
        self.assertIsNone(self.src.driver._evacuations)
        self.assertFalse(self.agent.warmed_up.is_set())


class LateAgentTest(LostHostTest):
    AGENT = False
    PATIENCE = 2

    def test_an_agent_that_comes_later_is_waited_for(self):
        self.api.microversion = self.admin_api.microversion = "2.94"
        server = self.lose()
        self._evacuate_server(server, expected_host="dest", expected_state="ACTIVE")
        agent = services.Agent(self.volumes[0][:20])
        self.assertEqual({server["id"]}, self.dest.driver._evacuations._cold)
        self.useFixture(services.Served(server["id"], agent, AGENT))
        self.assertTrue(agent.warmed_up.wait(40))


class DisabledTest(LostHostTest):
    EXTRA_SPECS: dict[str, str] = {}

    def test_no_agent_is_asked_where_nothing_of_ours_is_wanted(self):
        self.api.microversion = self.admin_api.microversion = "2.94"
        server = self.lose()
        self._evacuate_server(server, expected_host="dest", expected_state="ACTIVE")
        self.assertIsNone(self.dest.driver._evacuations)
        self.assertFalse(self.agent.warmed_up.is_set())
