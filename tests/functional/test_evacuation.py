# SPDX-License-Identifier: Apache-2.0
"""Servers that Nova starts on another host because theirs has failed."""

from typing import Any

from tests.functional import base


class LostHostTest(base.MigrationTest):
    """A server whose host has failed."""

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

    def test_since_2_95_it_is_asked_when_the_server_is_started(self):
        self.api.microversion = self.admin_api.microversion = "2.95"
        server = self.lose()
        self._evacuate_server(server, expected_host="dest", expected_state="SHUTOFF")
        self._start_server(server)
        self.assertTrue(self.agent.warmed_up.wait(20))


class DisabledTest(LostHostTest):
    EXTRA_SPECS: dict[str, str] = {}

    def test_no_agent_is_asked_where_nothing_of_ours_is_wanted(self):
        self.api.microversion = self.admin_api.microversion = "2.94"
        server = self.lose()
        self._evacuate_server(server, expected_host="dest", expected_state="ACTIVE")
        self.assertIsNone(self.dest.driver._evacuations)
        self.assertFalse(self.agent.warmed_up.is_set())
