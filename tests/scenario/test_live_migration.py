# SPDX-License-Identifier: Apache-2.0
"""Live migrations in a cloud: Nova's own, and through the relays by the flavor's extra spec.

Whatever the environment lacks makes the tests fail; what cannot be with a server that is given is
skipped, which says so.
"""

import logging
import os
import subprocess

from testtools import content

from tests import base
from tests.scenario import cloud, settings
from tests.scenario.migration import Move, move
from tests.scenario.outcome import COMPLETED
from tests.scenario.settings import Expectation

POLICY = "dmigrate:policy"


class ScenarioTestCase(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        # At DEBUG they tell of every byte
        for chatty in ("keystoneauth", "openstack", "urllib3"):
            logging.getLogger(chatty).setLevel(logging.INFO)
        self.settings = settings.from_environment(os.environ)
        self.cloud = cloud.connect(self.settings.cloud, self.settings.timeout)
        hosts = self.cloud.hosts()
        self.assertGreater(len(hosts), 1, f"there is nowhere to migrate to: {hosts}")

    def move(self, server: str, told: bool = True, abort: bool = False) -> Move:
        """Migrate a server, which is active afterwards, wherever it is."""
        moved = move(self.cloud, server, told, abort)
        self.addDetailUniqueName("migration", content.text_content(str(moved)))
        if moved.status != COMPLETED:
            self.cloud.revive(server)
        self.cloud.wait_until_active(server)
        return moved

    def see_it_moved(self, moved: Move) -> None:
        self.assertEqual(COMPLETED, moved.status, str(moved))
        self.assertNotEqual(moved.source, moved.host, str(moved))

    def see_who_did_it(self, moved: Move) -> None:
        """The driver says that it was the relays, or why not; and that is what was expected."""
        outcome = moved.outcome
        assert outcome is not None, str(moved)
        self.assertEqual("completed", outcome.state)
        self.assertEqual((moved.source, moved.host), (outcome.source, outcome.destination))
        if not outcome.by_dmigrate:
            self.assertTrue(outcome.reason, outcome.sentence)
        if self.settings.expectation is not Expectation.EITHER:
            expected = self.settings.expectation is Expectation.DMIGRATE
            self.assertEqual(expected, outcome.by_dmigrate, outcome.sentence)
            self.assertEqual(expected, outcome.references > 0, outcome.sentence)
        self.assertLessEqual(2 * outcome.misses, outcome.references, outcome.sentence)


class MadeServerTest(ScenarioTestCase):
    def setUp(self) -> None:
        super().setUp()
        if self.settings.server:
            self.skipTest("DMIGRATE_SERVER is set: no servers are made, its own policy counts")

    def make_server(self, policy: str) -> str:
        """A server whose flavor has that policy, and in which an agent runs if one shall."""
        wanted = self.settings
        flavor = self.cloud.make_flavor(wanted.memory, wanted.processors, {POLICY: policy})
        self.addCleanup(self.cloud.remove_flavor, flavor)
        assert wanted.image is not None
        image = self.cloud.image(wanted.image)
        network = self.cloud.network(wanted.network)
        server = self.cloud.make_server(flavor, image, network, wanted.disk, wanted.keypair)
        self.addCleanup(self.cloud.remove_server, server)
        self.cloud.wait_until_active(server)
        if wanted.prepare:
            self.prepare(server, wanted.prepare)
        return server

    def prepare(self, server: str, command: str) -> None:
        found = self.cloud.server(server)
        addresses = [each["addr"] for net in found["addresses"].values() for each in net]
        done = subprocess.run(
            ["sh", "-c", command],
            env={
                **os.environ,
                "SERVER_ID": server,
                "SERVER_NAME": found["name"],
                "SERVER_ADDRESS": addresses[0] if addresses else "",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=self.settings.timeout,
            check=False,
        )
        self.addDetail("prepare", content.text_content(done.stdout))
        self.assertEqual(0, done.returncode, f"DMIGRATE_PREPARE: {done.stdout}")

    def test_a_server_that_is_not_to_use_the_relays_migrates_as_ever(self) -> None:
        server = self.make_server("disabled")
        moved = self.move(server, told=False)
        self.see_it_moved(moved)
        self.assertIsNone(moved.outcome)

    def test_a_server_that_prefers_the_relays_migrates_there_and_back(self) -> None:
        server = self.make_server("preferred")
        for _ in ("there", "back"):
            moved = self.move(server)
            self.see_it_moved(moved)
            self.see_who_did_it(moved)

    def test_a_server_that_requires_the_relays_migrates_by_them_or_not_at_all(self) -> None:
        moved = self.move(self.make_server("required"))
        if moved.status == COMPLETED:
            self.assertIsNot(Expectation.ORDINARY, self.settings.expectation, str(moved))
            self.see_it_moved(moved)
            assert moved.outcome is not None, str(moved)
            self.assertTrue(moved.outcome.by_dmigrate, moved.outcome.sentence)
        else:
            self.assertIsNot(Expectation.DMIGRATE, self.settings.expectation, str(moved))
            self.assertEqual(moved.source, moved.host)
            self.assertIsNotNone(moved.refusal, str(moved))

    def test_a_migration_that_is_aborted_leaves_the_server_where_it_is(self) -> None:
        server = self.make_server("preferred")
        moved = self.move(server, abort=True)
        self.assertTrue(
            moved.aborted and moved.status != COMPLETED,
            "it was over before it could be aborted: take more DMIGRATE_MEMORY, and a guest that"
            f" uses it; {moved}",
        )
        # Nova's own word for it ("cancelled", "failed", "error") depends on what its monitor sees
        self.assertEqual(moved.source, moved.host, str(moved))
        assert moved.outcome is not None, str(moved)
        self.assertEqual("cancelled", moved.outcome.state, moved.outcome.sentence)
        # Nothing of it is in the way of the next one
        self.see_it_moved(self.move(server))


class GivenServerTest(ScenarioTestCase):
    def setUp(self) -> None:
        super().setUp()
        if not self.settings.server:
            self.skipTest("DMIGRATE_SERVER is not set: servers are made")

    def test_it_migrates_by_its_own_policy(self) -> None:
        assert self.settings.server is not None
        server = self.cloud.find_server(self.settings.server)
        policy = self.cloud.server(server)["flavor"]["extra_specs"].get(POLICY, "disabled")
        told = policy != "disabled" or self.settings.expectation is Expectation.DMIGRATE
        moved = self.move(server, told=told)
        self.see_it_moved(moved)
        if told:
            self.see_who_did_it(moved)
