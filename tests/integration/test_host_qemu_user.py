# SPDX-License-Identifier: Apache-2.0
"""A host as distributions make it: its QEMU is not root, and nobody has told the service."""

import grp
import pwd

from tests.integration import host_base
from tests.lab.relays import PATIENCE

#: The host's own /etc/libvirt.
_OWN_LIBVIRT = 'mount --bind "$0" /etc/libvirt && exec "$@"'


class DetectedUserTest(host_base.Hosts):
    @classmethod
    def options(cls) -> dict[str, object]:
        return {}

    @classmethod
    def prefix(cls) -> list[str]:
        libvirt = cls.place / "libvirt"
        libvirt.mkdir(exist_ok=True)
        group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
        (libvirt / "qemu.conf").write_text(
            f'#user = "root"\nuser = "nobody"\n  group = "{group}"\n'
        )
        return ["unshare", "--mount", "sh", "-ec", _OWN_LIBVIRT, str(libvirt)]

    def test_a_migration_without_any_option_for_it(self) -> None:
        state = self.client_of(self.one).hello(PATIENCE)
        self.assertEqual(pwd.getpwnam("nobody").pw_uid, state.qemu_user)
        self.assert_nobody_migrates()

    def test_a_service_that_is_told_wrongly_cannot_be_used(self) -> None:
        """Why it matters: the destination's QEMU cannot make its socket."""
        self.restart(self.two, host__qemu_user="root")
        self.addCleanup(self.restart, self.two)
        self.assertEqual(0, self.client_of(self.two).hello(PATIENCE).qemu_user)
        pair = self.pair()
        pair.open_destination()
        pair.destination.wait("running")
        qemu = host_base.as_nobody(host_base.RECEIVER, pair.incoming)
        self.assertNotEqual(0, qemu.wait(PATIENCE))
