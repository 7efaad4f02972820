# SPDX-License-Identifier: Apache-2.0
"""What Nova wants of libvirt, row by row: whether relays can do it, and what is asked instead."""

import fixtures
from nova.tests.fixtures import libvirt

from nova_dmigrate import exception
from nova_dmigrate.migration.domain import Domain
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest
from nova_dmigrate.virt.conditions import NovasWay, examine
from nova_dmigrate.virt.steering import rerouted
from tests import base

LIVE = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER
PARALLEL = getattr(libvirt, "VIR_MIGRATE_PARALLEL", 0)  # Nova 33 has it first
#: Flags besides the usual ones, local disks, host devices, way to the agent; the code of the reason
#: for which it is the ordinary migration, None if it is not.
CONDITIONS = (
    (0, (), (), "broker", None),
    (libvirt.VIR_MIGRATE_POSTCOPY, (), (), "broker", None),
    (libvirt.VIR_MIGRATE_AUTO_CONVERGE, (), (), "broker", None),
    (libvirt.VIR_MIGRATE_TLS, (), (), "broker", None),
    (PARALLEL, (), (), "broker", None),
    # Without disks to copy Nova takes the flag away
    (libvirt.VIR_MIGRATE_NON_SHARED_INC, (), (), "broker", None),
    (libvirt.VIR_MIGRATE_NON_SHARED_INC, ("vda",), (), "broker", "block-migration"),
    (libvirt.VIR_MIGRATE_TUNNELLED, (), (), "broker", "tunnelled"),
    (0, (), ("pci",), "broker", "host-devices"),
    (0, (), (), "none", "no-agent"),
    (0, (), (), "channel", "no-agent-port"),
)
#: Nova's flags, those that libvirt gets with the relays.
FLAGS = (
    (LIVE, LIVE),
    (LIVE | libvirt.VIR_MIGRATE_TLS, LIVE),
    (LIVE | PARALLEL, LIVE),
    (LIVE | libvirt.VIR_MIGRATE_TLS | PARALLEL, LIVE),
    (LIVE | libvirt.VIR_MIGRATE_POSTCOPY, LIVE | libvirt.VIR_MIGRATE_POSTCOPY),
    (LIVE | libvirt.VIR_MIGRATE_AUTO_CONVERGE, LIVE | libvirt.VIR_MIGRATE_AUTO_CONVERGE),
)


class WithNovasFake(base.TestCase):
    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch("nova.virt.libvirt.driver.libvirt", libvirt))


class ConditionsTest(WithNovasFake):
    def test_each_row_has_its_reason_or_none(self):
        for flags, disks, devices, transport, code in CONDITIONS:
            domain = Domain("4f1c", "db", 1 << 30, "q35", (), None, devices)
            request = MigrationRequest(agent_transport=AgentTransport(transport))
            found = None
            try:
                examine(domain, NovasWay(LIVE | flags, disks), request)
            except exception.FallBack as error:
                found = error.kwargs["code"]
            self.assertEqual(code, found, (flags, disks, devices, transport))


class ReroutedTest(WithNovasFake):
    def test_libvirt_gets_what_leaves_pages_visible_to_a_relay(self):
        for before, after in FLAGS:
            options = {"flags": before, "bandwidth": 7, "migrate_uri": "tcp://there", "parallel": 4}
            self.assertEqual(
                {"flags": after, "bandwidth": 0, "migrate_uri": "unix:/here", "parallel": 0},
                rerouted(options, "unix:/here"),
            )

    def test_an_older_nova_is_not_given_what_it_does_not_know(self):
        options = {
            "flags": LIVE,
            "bandwidth": 0,
            "migrate_uri": None,
            "destination_xml": "<domain/>",
        }
        self.assertEqual(
            {
                "flags": LIVE,
                "bandwidth": 0,
                "migrate_uri": "unix:/x",
                "destination_xml": "<domain/>",
            },
            rerouted(options, "unix:/x"),
        )
