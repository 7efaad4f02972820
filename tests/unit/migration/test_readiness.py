# SPDX-License-Identifier: Apache-2.0
"""`check`: every obstacle is found, whatever else there is."""

import warnings
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from nova_dmigrate import conf
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest
from nova_dmigrate.rpc import messages
from tests import base
from tests.unit.migration.hypervisor import (
    DEVICE,
    NAME,
    PORT,
    UUID,
    Agent,
    Host,
    Reached,
    disk,
    host_state,
    hypervisor,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.migration import service
    from nova_dmigrate.rpc import broker

READY = (PORT, disk("vda"), disk("vdb"))


class ReadinessTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.config = cfg.ConfigOpts()
        conf.register_opts(self.config)
        broker.set_defaults(self.config)
        self.config([], project="nova-dmigrate", default_config_files=[])

    def hosts(
        self, source: Mapping[str, Any], destination: Mapping[str, Any], agent: Agent | None = None
    ) -> dict[str, Host]:
        """Services of hosts a and b, of which something is different, and an agent at a."""
        return {
            "a": Host(host_state("a", **source), agent or Agent()),
            "b": Host(host_state("b", **destination)),
        }

    def check(
        self, *devices: str, hosts: Mapping[str, Host] | None = None, **request: Any
    ) -> list[Finding]:
        """What is found of a domain with those devices."""
        if hosts is not None:
            self.useFixture(Reached(hosts))
        usual: dict[str, Any] = {
            "domain": NAME,
            "destination_uri": "qemu+tls://b/system",
            "connect_uri": hypervisor(self.make_directory(), *devices),
            "source_host": "a",
        }
        return service.check(MigrationRequest(**{**usual, **request}), self.config)

    def test_what_is_ready_is_told_piece_by_piece(self) -> None:
        said = messages.Finding("server", "ok", "one server runs")
        found = self.check(*READY, hosts=self.hosts({}, {}, Agent(said)))
        self.assertEqual(
            [
                ("domain", "domain db1 runs"),
                ("host", "the service of host a answers"),
                ("host", "the service of host b answers"),
                ("volume", "vda can be read at the destination: /run/guests/vda"),
                ("volume", "vdb can be read at the destination: /run/guests/vdb"),
                ("server", "one server runs"),
            ],
            [(each.code, each.message) for each in found],
        )
        self.assertEqual({Severity.OK}, {each.severity for each in found})

    def test_no_obstacle_hides_another_one(self) -> None:
        hosts = self.hosts(
            {"draining": True, "obstacle": "SELinux", "tls": False},
            {"draining": True, "wire_versions": (2,), "socket_directory": "/run/b"},
        )
        found = self.check(DEVICE, disk("vda", cache="writeback"), hosts=hosts, tls=True)
        self.assertEqual(
            [
                *("host-devices", "no-agent-port"),
                *("host-draining", "confined", "host-draining"),
                *("tls-differs", "wire-differs", "sockets-differ", "native-tls"),
                "no-volumes",
            ],
            _problems(found),
        )
        draining = [each.message for each in found if each.code == "host-draining"]
        self.assertEqual(
            [f"the service of host {name} is being shut down" for name in "ab"], draining
        )

    def test_versions_of_both_hosts_are_looked_at(self) -> None:
        hosts = self.hosts(
            {"libvirt_version": 9_000_000, "qemu_version": 7_002_000},
            {"libvirt_version": 6_007_001, "qemu_version": 6_002_000},
        )
        found = self.check(*READY, hosts=hosts)
        old = {each.code: each for each in found if each.code.startswith("old-")}
        self.assertEqual({"old-libvirt", "old-qemu"}, set(old))
        self.assertIn("libvirt 6.7.1 at host b ", old["old-libvirt"].message)
        # That is no reason for the ordinary migration
        self.assertIs(Severity.NOTE, old["old-qemu"].severity)
        self.assertIn("host b: QEMU 6.2.0 ", old["old-qemu"].message)

    def test_each_disk_is_told_of_though_another_one_can_be_read(self) -> None:
        found = self.check(
            *(PORT, disk("vda"), disk("vdb", cache="writeback"), disk("vdc")),
            hosts=self.hosts({}, {}),
        )
        told = [each for each in found if each.code in ("volume", "unread-disk")]
        self.assertEqual(
            [("vda", Severity.OK), ("vdb", Severity.NOTE), ("vdc", Severity.OK)],
            [(each.message.split()[0], each.severity) for each in told],
        )
        self.assertIn("vdb is cached by its host", told[1].message)
        self.assertEqual([], _problems(found))

    def test_drivers_are_those_of_the_destination(self) -> None:
        hosts = self.hosts({}, {"drivers": ("rbd",)})
        self.assertEqual(["no-volumes"], _problems(self.check(*READY, hosts=hosts)))

    def test_of_hosts_that_do_not_answer_nothing_is_made_up(self) -> None:
        found = self.check(*READY, hosts={})
        self.assertEqual(["host-unreachable", "host-unreachable"], _problems(found))
        self.assertEqual(
            ["Host a: no answer in time", "Host b: no answer in time"],
            [each.message for each in found if each.severity is Severity.PROBLEM],
        )
        told = [each.message for each in found if each.code == "volume"]
        self.assertEqual(2, len(told))
        for message in told:
            self.assertIn("can be read where there is the driver block", message)

    def test_one_host_is_looked_at_though_the_other_one_does_not_answer(self) -> None:
        hosts = self.hosts({"draining": True}, {})
        del hosts["b"]
        self.assertEqual(
            ["host-draining", "host-unreachable"], _problems(self.check(*READY, hosts=hosts))
        )
        self.assertEqual(["describe"], hosts["a"].asked)

    def test_without_a_port_no_agent_is_asked(self) -> None:
        hosts = self.hosts({}, {})
        found = self.check(disk("vda"), hosts=hosts)
        self.assertEqual((["no-agent-port"], []), (_problems(found), hosts["a"].asked))

    def test_an_agent_that_is_away_has_the_code_of_a_migration(self) -> None:
        hosts = self.hosts({}, {})
        hosts["a"].agent_here = None
        self.assertEqual(["agent-unreachable"], _problems(self.check(*READY, hosts=hosts)))

    def test_an_agent_at_the_broker_needs_no_host(self) -> None:
        self.config.set_override("agent_url", "rabbit://b", "migration")
        bad = messages.Finding("no-server", "problem", "no server runs")
        found = self.check(
            disk("vda"), hosts={UUID: Agent(bad)}, agent_transport=AgentTransport.BROKER
        )
        self.assertEqual(["host-unreachable", "host-unreachable", "no-server"], _problems(found))

    def test_a_broker_that_cannot_be_is_a_finding_and_the_rest_is_looked_at(self) -> None:
        for url in ("pigeon://u:secret@b/", "rabbit://u:secret@b:port/", "rabbit//b"):
            self.config.set_override("transport_url", url)
            found = self.check(DEVICE, *READY)
            self.assertEqual(["host-devices", "configuration"], _problems(found))
            self.assertEqual(2, len([each for each in found if each.code == "volume"]))
            self.assertNotIn("secret", str(found))

    def test_hosts_are_looked_at_though_there_is_no_such_domain(self) -> None:
        hosts = self.hosts({}, {"draining": True})
        self.assertEqual(
            ["domain", "host-draining"], _problems(self.check(hosts=hosts, domain="db2"))
        )

    def test_a_host_alone_is_looked_at(self) -> None:
        hosts = self.hosts({"obstacle": "SELinux"}, {})
        found = self.check(hosts=hosts, domain="", destination_uri="")
        self.assertEqual(["host", "confined"], [each.code for each in found])

    def test_a_destination_without_a_name_is_told(self) -> None:
        found = self.check(*READY, hosts=self.hosts({}, {}), destination_uri="qemu:///system")
        self.assertEqual(["host-unreachable"], _problems(found))
        self.assertIn("--destination-host", str(found))


def _problems(found: list[Finding]) -> list[str]:
    return [each.code for each in found if each.severity is Severity.PROBLEM]
