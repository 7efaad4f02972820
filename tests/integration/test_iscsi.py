# SPDX-License-Identifier: Apache-2.0
"""A unit of a real iSCSI target, read by QEMU's own initiator."""

import os
import signal

from nova_dmigrate import exception, volumes
from tests import base
from tests.integration import test_nbd
from tests.integration.test_nbd import BLOCK, PASSPHRASE, content
from tests.lab.iscsi_target import IscsiTarget, missing


class IscsiTest(test_nbd.NbdTestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require(missing())

    def target(self, kind: str = "raw") -> IscsiTarget:
        """A target with an image of this format."""
        target = IscsiTarget(self.image(kind, content()))
        self.addCleanup(target.close)
        return target

    def test_a_unit_is_read_with_its_holes(self) -> None:
        target = self.target()
        reader = self.open(f"raw:{target.url}")
        self.assert_reads(content(), reader)
        reader.close()
        self.assertEqual(0, target.connections())

    def test_an_encrypted_unit_is_read(self) -> None:
        self.assert_reads(content(), self.open(f"luks:{self.target('luks').url}", PASSPHRASE))

    def test_what_another_initiator_writes_is_seen_and_neither_disturbs_the_other(self) -> None:
        target = self.target()
        reader = self.open(f"raw:{target.url}")
        writer = test_nbd.Writer(target.url, "raw")
        self.addCleanup(writer.close)
        for pattern in (1, 2, 3):
            writer.write(pattern, 0)
            self.assertEqual(bytes([pattern]) * BLOCK, self.read(reader, 0))
        self.assertEqual(2, target.connections())
        reader.close()
        writer.write(4, 0)

    def test_a_target_that_is_not_there_is_named(self) -> None:
        target = self.target()
        target.close()
        error = self.assertRaises(exception.VolumeOpenError, self.open, f"raw:{target.url}")
        self.assertIn(f"raw:{target.url} is not opened: ", str(error))

    def test_a_unit_that_the_target_does_not_have_is_named(self) -> None:
        target = self.target()
        location = f"raw:{target.url.removesuffix('/1')}/7"
        error = self.assertRaises(exception.VolumeOpenError, self.open, location)
        self.assertIn("is not opened: ", str(error))

    def test_reads_of_a_target_that_hangs_fail_in_time(self) -> None:
        target = self.target()
        reader = self.open(f"raw:{target.url}", timeout=test_nbd.SHORT)
        self.read(reader, 0)
        os.kill(target.process.pid, signal.SIGSTOP)
        self.addCleanup(os.kill, target.process.pid, signal.SIGCONT)
        buffer = volumes.aligned_buffer(BLOCK)
        error = self.assertRaises(exception.VolumeTimeoutError, reader.read_into, BLOCK, buffer)
        self.assertIn(f"no answer for {test_nbd.SHORT:g} seconds", str(error))
