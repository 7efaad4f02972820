# SPDX-License-Identifier: Apache-2.0
"""What the environment says of the cloud, and what is wrong with it."""

import re
from pathlib import Path

from tests import base
from tests.scenario import settings
from tests.scenario.settings import Expectation, SettingsError

ROOT = Path(__file__).parents[3]
_LEAST = {"OS_CLOUD": "gate", "DMIGRATE_IMAGE": "cirros"}


class SettingsTest(base.TestCase):
    def refused(self, **changed: str) -> str:
        error = self.assertRaises(SettingsError, settings.from_environment, {**_LEAST, **changed})
        return str(error)

    def test_the_least_that_has_to_be_said(self) -> None:
        found = settings.from_environment(_LEAST)
        self.assertEqual(("gate", "cirros", None), (found.cloud, found.image, found.server))
        self.assertEqual(
            ("auto", 512, 1, 10), (found.network, found.memory, found.processors, found.disk)
        )
        self.assertEqual((Expectation.EITHER, 600.0), (found.expectation, found.timeout))
        self.assertEqual((None, None), (found.keypair, found.prepare))

    def test_all_can_be_said(self) -> None:
        found = settings.from_environment(
            {
                **_LEAST,
                "DMIGRATE_NETWORK": "none",
                "DMIGRATE_MEMORY": "2048",
                "DMIGRATE_PROCESSORS": "2",
                "DMIGRATE_DISK": "20",
                "DMIGRATE_KEYPAIR": "mine",
                "DMIGRATE_PREPARE": "true",
                "DMIGRATE_EXPECT": "dmigrate",
                "DMIGRATE_TIMEOUT": "60",
            }
        )
        self.assertEqual(
            ("none", 2048, 2, 20), (found.network, found.memory, found.processors, found.disk)
        )
        self.assertEqual((Expectation.DMIGRATE, 60.0), (found.expectation, found.timeout))
        self.assertEqual(("mine", "true"), (found.keypair, found.prepare))

    def test_without_a_cloud_it_is_an_error_and_no_skip(self) -> None:
        self.assertIn("OS_CLOUD", self.refused(OS_CLOUD=""))

    def test_a_server_is_given_or_made(self) -> None:
        self.assertIn("either DMIGRATE_SERVER or", self.refused(DMIGRATE_IMAGE=""))
        self.assertIn("either DMIGRATE_SERVER or", self.refused(DMIGRATE_SERVER="db1"))
        given = settings.from_environment({"OS_CLOUD": "gate", "DMIGRATE_SERVER": "db1"})
        self.assertEqual(("db1", None), (given.server, given.image))

    def test_what_cannot_be_is_named(self) -> None:
        self.assertIn("dmigrate, ordinary, either", self.refused(DMIGRATE_EXPECT="fast"))
        for name in ("MEMORY", "PROCESSORS", "DISK", "TIMEOUT"):
            for wrong in ("0", "-1", "1.5", "much"):
                self.assertIn(f"DMIGRATE_{name}", self.refused(**{f"DMIGRATE_{name}": wrong}))

    def test_the_documentation_names_every_variable(self) -> None:
        text = (ROOT / "doc/source/contributor/testing.rst").read_text()
        described = set(re.findall(r"``((?:DMIGRATE|OS)_[A-Z]+)``", text))
        names = re.findall(r"(?:DMIGRATE|OS)_[A-Z]+", settings.from_environment.__doc__ or "")
        self.assertEqual(set(), set(names) - described)
