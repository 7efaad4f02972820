# SPDX-License-Identifier: Apache-2.0
"""The passphrases of encrypted volumes: a real libvirt has them, and real relays get them."""

import contextlib
import os
import signal
import uuid
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.migration.volume_keys import key_of
from nova_dmigrate.volumes import VolumeSpec
from tests import base
from tests.integration import test_nbd
from tests.integration.test_nbd_relay import ALL_REFERENCES
from tests.lab import migrations, processes, relays
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.relays import VOLUME

#: As Nova has it for a volume; the passphrase is one that Nova could have got from Barbican.
SECRET = """
<secret ephemeral='no' private='{private}'><uuid>{uuid}</uuid>
  <usage type='{use}'>{usage}</usage></secret>
"""
PASSPHRASE = "0b4f1c6a9d3e58f27c1a8e6d4b90f3c5"


class Libvirt:
    """A libvirt with secrets."""

    def __init__(self, directory: Path) -> None:
        self._ends = contextlib.ExitStack()
        self.host = self._ends.enter_context(LibvirtHosts(directory)).a
        self.uri = self.host.uri

    def secret(self, value: str = PASSPHRASE, use: str = "volume", private: str = "no") -> str:
        """UUID of a new one."""
        name = str(uuid.uuid4())
        tag = "volume" if use == "volume" else "name"
        usage = f"<{tag}>{name}</{tag}>"
        with contextlib.closing(self.host.connect()) as connection:
            xml = SECRET.format(private=private, uuid=name, use=use, usage=usage)
            connection.secretDefineXML(xml).setValue(value.encode())
        return name

    def close(self) -> None:
        self._ends.close()


class LibvirtTestCase(base.TestCase):
    libvirt: ClassVar[Libvirt]
    place: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        if os.geteuid():
            base.require("only root can make the lab's libvirt")
        super().setUpClass()
        cls.place = contextlib.ExitStack()
        cls.libvirt = Libvirt(cls.place.enter_context(processes.workspace()))
        cls.place.callback(cls.libvirt.close)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.place.close()
        super().tearDownClass()


class KeyTest(LibvirtTestCase):
    def refusal(self, name: str, patience: float = 20) -> str:
        error = self.assertRaises(
            exception.HypervisorError, key_of, self.libvirt.uri, name, patience
        )
        self.assertIn(f"secret {name}", str(error))
        self.assertNotIn(PASSPHRASE, str(error))
        return str(error)

    def test_secrets_for_volumes_are_told(self) -> None:
        name = self.libvirt.secret()
        self.assertEqual(PASSPHRASE.encode(), key_of(self.libvirt.uri, name, 20))

    def test_those_of_ceph_and_those_that_are_not_there_are_not(self) -> None:
        ceph = self.libvirt.secret(use="ceph")
        self.assertIn("is for another use than a volume", self.refusal(ceph))
        self.assertIn("no secret with matching uuid", self.refusal(str(uuid.uuid4())))

    def test_what_libvirt_keeps_for_itself_is_not(self) -> None:
        self.assertIn("secret is private", self.refusal(self.libvirt.secret(private="yes")))

    def test_a_libvirt_that_hangs_is_not_waited_for(self) -> None:
        name, pid = self.libvirt.secret(), self.libvirt.host.libvirtd_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            self.assertIn("no answer within 1 s", self.refusal(name, 1))
        finally:
            os.kill(pid, signal.SIGCONT)


class RelayTest(migrations.MigrationTestCase):
    """The guest's disk is an encrypted image for the destination's relay."""

    libvirt: ClassVar[Libvirt]
    image: ClassVar[Path]
    name: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        base.require(test_nbd.missing())
        if os.geteuid():
            base.require("only root can make the lab's libvirt")
        super().setUpClass()
        try:
            cls.libvirt = Libvirt(cls.directory)
            cls._class.callback(cls.libvirt.close)
            cls.name = cls.libvirt.secret()
            cls.image = cls.spec.disk.with_suffix(".luks")
            key = cls.directory / "key"
            key.write_text(PASSPHRASE)
            test_nbd.convert(
                cls.spec.disk,
                cls.image,
                "luks",
                f"secret,id=key,file={key}",
                *test_nbd.LUKS_OPTIONS,
            )
        except BaseException:
            cls.tearDownClass()
            raise

    def setUp(self) -> None:
        super().setUp()
        self.extents = relays.extents(self.source)
        self.right = np.count_nonzero(migrations.copies(self.source, self.extents))
        self.assertGreater(self.right, 0.8 * 96 * 256)
        self.options: dict[str, Any] = {
            "host__volume_keys": True,
            "host__libvirt_uri": self.libvirt.uri,
        }

    def volume(self, name: str) -> VolumeSpec:
        return VolumeSpec(VOLUME, "luks", f"luks,key={name}:{self.image}")

    def test_pages_on_an_encrypted_image_come_from_there(self) -> None:
        saved, volume = self.map_of([self.extents]), self.volume(self.name)
        options = {**ALL_REFERENCES, **self.options, "DEFAULT__debug": True}
        with self.migration(saved=saved, volume=volume, **options) as migration:
            relay = migration.pair.destination.pid
            (daemon,) = test_nbd.processes_of("qemu-storage-daemon", relay)
            for pid in (relay, daemon):
                for told in ("cmdline", "environ"):
                    content = Path(f"/proc/{pid}/{told}").read_bytes()
                    self.assertNotIn(PASSPHRASE.encode(), content)
            summary = self.assert_delivered(migration, migration.run())
            told = migration.pair.last_words()
        self.assertEqual((self.right, {}), (summary["referenced_pages"], summary["misses"]))
        self.assertNotIn(PASSPHRASE, told)
        self.assertNotIn(PASSPHRASE, str(summary))

    def test_without_the_key_they_come_from_the_source(self) -> None:
        wrong = self.libvirt.secret("another one")
        without = {**self.options, "host__volume_keys": False}
        for name, options in (
            (self.name, without),
            (wrong, self.options),
            (str(uuid.uuid4()), self.options),
        ):
            with self.migration(
                saved=self.map_of([self.extents]), volume=self.volume(name), **options
            ) as migration:
                self.assert_delivered(migration, migration.run())
                destination = migration.pair.destination.summary()
            self.assertEqual((0, 0), (destination["volume_bytes"], destination["hits"]))
