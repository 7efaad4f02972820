# SPDX-License-Identifier: Apache-2.0
"""Host services as in production: with the capabilities of the unit, and TLS."""

import configparser
import grp
import pwd
from pathlib import Path
from typing import ClassVar

from tests.integration.host_base import Hosts
from tests.lab.relays import PATIENCE
from tests.unit.relay.wire.certificates import Authority

UNIT = Path(__file__).parents[2] / "etc" / "systemd" / "nova-dmigrate-host.service"
BOUNDING = "CapabilityBoundingSet"


class ProductionTest(Hosts):
    """Root with the capabilities of the unit only, a QEMU that is not root, and TLS."""

    certificates: ClassVar[dict[str, object]] = {}

    @classmethod
    def options(cls) -> dict[str, object]:
        if not cls.certificates:
            authority = Authority(cls.place)
            certificate, key = authority.issue("one", "two")
            cls.certificates = {
                "wire__tls": True,
                "wire__ca_file": authority.certificate,
                "wire__certificate_file": certificate,
                "wire__key_file": key,
            }
        nobody = pwd.getpwnam("nobody")
        group = grp.getgrgid(nobody.pw_gid).gr_name
        return {"host__qemu_user": "nobody", "host__qemu_group": group, **cls.certificates}

    @classmethod
    def prefix(cls) -> list[str]:
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.read(UNIT)
        named = [each.removeprefix("CAP_").lower() for each in unit["Service"][BOUNDING].split()]
        allowed = "".join(f",+{each}" for each in named)
        return ["setpriv", f"--bounding-set=-all{allowed}", "--inh-caps=-all", "--no-new-privs"]

    def test_a_migration_between_qemus_of_another_user(self) -> None:
        self.assert_nobody_migrates(("one", "two"))

    def test_the_other_host_must_be_the_one_that_is_expected(self) -> None:
        pair = self.pair(tls_names=("one", "three"))
        pair.open_destination()
        pair.destination.wait("running")
        pair.open_source()
        self.assertIn("three", pair.source.wait("failed").message)

    def test_a_host_with_tls_does_not_migrate_in_the_clear(self) -> None:
        self.assertTrue(self.client_of(self.two).hello(PATIENCE).tls)
        self.assert_refused("tls-required", self.pair().open_destination)
