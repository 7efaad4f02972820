# SPDX-License-Identifier: Apache-2.0

import dataclasses
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.domain import parse_domain
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest, Mode
from nova_dmigrate.rpc.host_messages import HostState
from nova_dmigrate.volumes import DRIVERS
from tests import base

VOLUME = "6f1d2c3b-4a59-4687-9b1c-0123456789ab"
DISK = """
<disk type='{kind}' device='disk'>
  <driver name='qemu' type='{format}' {cache}/>
  {source}
  <target dev='{target}' bus='{bus}'/>
  {serial}
</disk>"""
LUKS = f"<encryption format='luks'><secret type='passphrase' uuid='{VOLUME}'/></encryption>"
ISCSI = """
<source protocol='iscsi' name='iqn.2010-10.org:v/1'><host name='10.0.0.5' port='3261'/></source>"""
CHANNEL = """
<channel type='unix'>
  <source mode='bind' path='/var/lib/libvirt/qemu/channel/target/dmigrate'/>
  <target type='virtio' name='org.openstack.dmigrate.0'/>
</channel>"""


def disk(
    kind="block",
    format="raw",  # noqa: A002 - libvirt's word
    cache="cache='none'",
    source="<source dev='/dev/sdc'/>",
    target="vdb",
    bus="virtio",
    serial=f"<serial>{VOLUME}</serial>",
):
    return DISK.format(**locals())


def domain(*devices, memory="<memory unit='KiB'>2097152</memory>"):
    return parse_domain(f"""
        <domain type='kvm'><name>instance-1</name><uuid>{VOLUME}</uuid>{memory}
        <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
        <devices>{"".join(devices)}</devices></domain>""")


def host(**values):
    state = {
        "host": "host",
        "version": "1.0",
        "wire_versions": (1,),
        "incarnation": "1",
        "tls": True,
        "drivers": ("block",),
        "relays": 0,
        "max_relays": 4,
        "queued": 0,
        "draining": False,
        "migration_address": None,
        "socket_directory": "/run/nova-dmigrate",
    }
    return HostState(**state | values)


class DomainTest(base.TestCase):
    def test_a_domain_as_nova_writes_it(self):
        found = domain(disk(), CHANNEL)
        self.assertEqual(("instance-1", VOLUME), (found.name, found.uuid))
        self.assertEqual(2 << 30, found.memory)
        self.assertEqual("pc-q35-7.2", found.machine)
        self.assertEqual(Path("/var/lib/libvirt/qemu/channel/target/dmigrate"), found.channel)
        self.assertEqual((), found.host_devices)
        (volume,) = found.disks
        self.assertEqual("/dev/sdc", volume.location)
        self.assertTrue(volume.direct)

    def test_a_serial_is_what_the_guest_sees_of_it(self):
        found = domain(disk(), disk(bus="scsi", target="sda"))
        self.assertEqual([VOLUME[:20], VOLUME], [each.serial for each in found.disks])

    def test_units_of_memory(self):
        for memory, size in (
            ("<memory>1024</memory>", 1 << 20),
            ("<memory unit='GiB'>3</memory>", 3 << 30),
            ("<memory unit='b'>8192</memory>", 8192),
        ):
            self.assertEqual(size, domain(memory=memory).memory)

    def test_devices_of_the_host_are_noted(self):
        found = domain("<hostdev type='pci'/>", "<interface type='hostdev'/>")
        self.assertEqual(("pci", "interface of type hostdev"), found.host_devices)

    def test_what_is_no_domain_is_refused(self):
        for xml in ("", "<domain", "<domain/>", "<domain><memory unit='ells'>1</memory></domain>"):
            self.assertRaises(exception.MigrationError, parse_domain, xml)


class PreflightTest(base.TestCase):
    def reason(self, function, *arguments):
        error = self.assertRaises(exception.FallBack, function, *arguments)
        return error.kwargs["code"]

    def test_what_the_request_and_the_domain_tell(self):
        ready = domain(disk(), CHANNEL)
        preflight.examine(ready, MigrationRequest())
        preflight.examine(domain(), MigrationRequest(agent_transport=AgentTransport.BROKER))
        for code, found, request in (
            ("asked", ready, MigrationRequest(mode=Mode.ORDINARY)),
            ("no-agent", ready, MigrationRequest(agent_transport=AgentTransport.NONE)),
            ("no-agent-port", domain(disk()), MigrationRequest()),
            ("host-devices", domain(CHANNEL, "<hostdev type='pci'/>"), MigrationRequest()),
        ):
            self.assertEqual(code, self.reason(preflight.examine, found, request))

    def test_volumes_that_the_destination_may_read(self):
        found = domain(
            disk(),
            disk("file", source="<source file='/mnt/volume-2'/>", serial="<serial>2</serial>"),
        )
        volumes = preflight.volumes_of(found, ["block"])
        self.assertEqual(
            [(VOLUME[:20], "/dev/sdc"), ("2", "/mnt/volume-2")],
            [(each.volume_id, each.location) for each in volumes],
        )

    def test_rbd_images_are_read_where_and_as_whom_the_guest_does(self):
        for source, location in (
            ("name='volumes/volume-1'/>", "volumes/volume-1"),
            ("name='volume-1'/>", "volume-1"),
            (
                """name='volumes/tenant/volume-1'>
                     <host name='10.0.0.1' port='6789'/><host name='fd00::1' port='3300'/>
                     <snapshot name='before'/><config file='/etc/other.conf'/>
                     <auth username='cinder'><secret type='ceph' uuid='c0ffee'/></auth>
                   </source>""",
                "volumes/tenant/volume-1@before?id=cinder&mon_host=10.0.0.1:6789,[fd00::1]:3300",
            ),
            (
                "name='volumes/volume-1'/><auth username='cinder'><secret type='ceph'/></auth>",
                "volumes/volume-1?id=cinder",
            ),
        ):
            found = domain(disk("network", source=f"<source protocol='rbd' {source}"))
            (volume,) = preflight.volumes_of(found, ["block", "rbd"])
            self.assertEqual(("rbd", location), (volume.driver, volume.location))

    def test_qcow2_images_are_read_by_nbd(self):
        source = "<source file='/images/db.qcow2'/>"
        found = domain(disk("file", "qcow2", source=source), disk(format="qcow2", bus="scsi"))
        self.assertEqual(
            [("nbd", "qcow2:/images/db.qcow2"), ("nbd", "qcow2:/dev/sdc")],
            [
                (each.driver, each.location)
                for each in preflight.volumes_of(found, ["block", "nbd"])
            ],
        )

    def test_encrypted_disks_are_read_where_relays_are_given_their_keys(self):
        image = "<source file='/images/db.qcow2'/>"
        found = domain(
            disk().replace("</disk>", f"{LUKS}</disk>"),
            disk("file", "qcow2", source=image, bus="scsi").replace("</disk>", f"{LUKS}</disk>"),
            disk("network", source=ISCSI.replace("</source>", f"{LUKS}</source>"), bus="sata"),
        )
        drivers = ["block", "iscsi", "luks", "nbd"]
        self.assertEqual(
            [
                ("luks", f"luks,key={VOLUME}:/dev/sdc"),
                ("luks", f"qcow2,key={VOLUME}:/images/db.qcow2"),
                ("luks", f"luks,key={VOLUME}:iscsi://10.0.0.5:3261/iqn.2010-10.org:v/1"),
            ],
            [(each.driver, each.location) for each in preflight.volumes_of(found, drivers)],
        )

    def test_encrypted_disks_that_are_opened_in_another_way_are_not_read(self):
        for encryption in (
            LUKS.replace("uuid=", "usage="),
            LUKS.replace("luks", "luks2"),
            LUKS.replace("format", "engine='librbd' format"),
            LUKS.replace("<secret", "<secret type='passphrase' uuid='2'/><secret"),
        ):
            found = domain(disk().replace("</disk>", f"{encryption}</disk>"))
            self.assertTrue(found.disks[0].encrypted)
            self.assertEqual("no-volumes", self.reason(preflight.volumes_of, found, tuple(DRIVERS)))

    def test_units_of_iscsi_targets_are_read_without_an_account(self):
        found = domain(disk("network", source=ISCSI))
        (volume,) = preflight.volumes_of(found, ["iscsi"])
        self.assertEqual("raw:iscsi://10.0.0.5:3261/iqn.2010-10.org:v/1", volume.location)
        for more in ("<auth username='u'/>", "<initiator><iqn name='iqn.a'/></initiator>"):
            source = ISCSI.replace("</source>", f"{more}</source>")
            strange = domain(disk("network", source=source))
            self.assertEqual("no-volumes", self.reason(preflight.volumes_of, strange, ["iscsi"]))

    def test_disks_that_it_may_not_read_are_named_with_the_reason(self):
        for sentence, strange in (
            ("no serial", disk(serial="")),
            ("format qcow2", disk(format="qcow2")),
            ("cached", disk(cache="cache='writeback'")),
            ("cached", disk(cache="")),  # QEMU's default is a cache of the host's
            ("rbd disk", disk("network", source="<source protocol='rbd' name='volumes/1'/>")),
            ("qcow2, for which there is no driver", disk(format="qcow2")),
            ("encrypted", disk().replace("</disk>", f"{LUKS}</disk>")),
            ("encrypted", disk(source=f"<source dev='/dev/sdc'>{LUKS}</source>")),
            ("nbd disk", disk("network", source="<source protocol='nbd' name='1'/>")),
        ):
            error = self.assertRaises(
                exception.FallBack, preflight.volumes_of, domain(strange), ["block"]
            )
            self.assertEqual("no-volumes", error.kwargs["code"])
            self.assertIn("vdb ", str(error))
            self.assertIn(sentence, str(error))

    def test_what_is_to_be_encrypted_is_encrypted_between_relays_too(self):
        preflight.encrypted_as_well(domain(), False, host(tls=False))
        preflight.encrypted_as_well(domain(), True, host(tls=True))
        found = self.reason(preflight.encrypted_as_well, domain(), True, host(tls=False))
        self.assertEqual("native-tls", found)

    def test_a_libvirt_that_knows_no_unix_sockets_is_named(self):
        preflight.libvirt_can(6_008_000, "host a", "i")
        error = self.assertRaises(
            exception.FallBack, preflight.libvirt_can, 6_007_001, "host a", "i"
        )
        self.assertEqual("old-libvirt", error.kwargs["code"])
        self.assertIn("libvirt 6.7.1 at host a ", str(error))

    def test_the_user_of_qemu_is_told(self):
        dynamic = "<seclabel type='dynamic' model='dac' relabel='yes'><label>{}</label></seclabel>"
        for label, user in (
            ("+64055:+64055", 64055),
            ("root:root", 0),
            ("+0:+0", 0),
            ("qemu:qemu", None),
            ("", None),
        ):
            found = domain("</devices>", dynamic.format(label), "<devices>")
            self.assertEqual(user, found.qemu_user)
        self.assertIsNone(domain().qemu_user)
        apparmor = dynamic.replace("dac", "apparmor").format("+1:+1")
        self.assertIsNone(domain("</devices>", apparmor, "<devices>").qemu_user)

    def test_sockets_must_be_for_the_user_of_qemu(self):
        found = dataclasses.replace(domain(), qemu_user=64055)
        known, unknown, root = (host(qemu_user=user) for user in (64055, None, 0))
        elsewhere = host(qemu_user=107)
        for hosts in ((known, known), (unknown, known), (known, unknown), (known, elsewhere)):
            preflight.hosts_agree(found, *hosts)
        for hosts in ((root, root), (known, root), (elsewhere, known)):
            self.assertEqual("confined", self.reason(preflight.hosts_agree, found, *hosts))
        found = dataclasses.replace(found, qemu_user=0)
        preflight.hosts_agree(found, root, root)
        for hosts in ((known, root), (root, known)):
            self.assertEqual("confined", self.reason(preflight.hosts_agree, found, *hosts))
        preflight.hosts_agree(dataclasses.replace(found, qemu_user=None), root, known)

    def test_both_hosts_must_agree(self):
        found = domain()
        preflight.hosts_agree(found, host(), host())
        preflight.hosts_agree(found, host(libvirt_version=6_008_000), host(qemu_version=1))
        for code, other in (
            ("host-draining", host(draining=True)),
            ("old-libvirt", host(libvirt_version=6_007_001)),
            ("tls-differs", host(tls=False)),
            ("wire-differs", host(wire_versions=(2, 3))),
            ("sockets-differ", host(socket_directory="/run/elsewhere")),
        ):
            self.assertEqual(code, self.reason(preflight.hosts_agree, found, host(), other))
