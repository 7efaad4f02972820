# SPDX-License-Identifier: Apache-2.0
"""As whom QEMU runs, found out."""

import grp
import pwd
from unittest import mock

from nova_dmigrate import exception
from nova_dmigrate.host import qemu_account
from nova_dmigrate.host.qemu_account import OWN, owner
from tests import base

NOBODY = pwd.getpwnam("nobody")
OTHER = next(each for each in grp.getgrall() if each.gr_gid not in (0, NOBODY.pw_gid))


class OwnerTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.root = self.make_directory()
        self.accounts("no-such-account")

    def accounts(self, *names: str) -> None:
        patcher = mock.patch.object(qemu_account, "_ACCOUNTS", names)
        patcher.start()
        self.addCleanup(patcher.stop)

    def configure(self, text: str) -> None:
        path = self.root / "etc/libvirt/qemu.conf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def test_without_libvirt_it_is_root(self) -> None:
        self.assertEqual(OWN, owner("", "", self.root))

    def test_libvirts_configuration_says_it(self) -> None:
        for text, found in (
            ('user = "nobody"', (NOBODY.pw_uid, NOBODY.pw_gid)),
            (f'user="nobody"\ngroup = "{OTHER.gr_name}"', (NOBODY.pw_uid, OTHER.gr_gid)),
            (f'user = "+{NOBODY.pw_uid}"\ngroup = "{OTHER.gr_gid}"', (NOBODY.pw_uid, OTHER.gr_gid)),
            ('user = "4294967000"', (4294967000, -1)),
            ('user = "root"\ngroup = "root"', OWN),
            ('#user = "nobody"', OWN),
        ):
            with self.subTest(text):
                self.configure(text)
                self.assertEqual(found, owner("", "", self.root))

    def test_a_distributions_account_says_it(self) -> None:
        self.accounts("no-such-account", "nobody")
        self.assertEqual((NOBODY.pw_uid, NOBODY.pw_gid), owner("", "", self.root))
        self.configure('user = "root"')
        self.assertEqual(OWN, owner("", "", self.root))

    def test_the_services_configuration_counts_more(self) -> None:
        self.configure(f'user = "root"\ngroup = "{OTHER.gr_name}"')
        self.assertEqual((NOBODY.pw_uid, NOBODY.pw_gid), owner("nobody", "", self.root))
        self.assertEqual((NOBODY.pw_uid, OTHER.gr_gid), owner("nobody", OTHER.gr_name, self.root))
        self.assertEqual(OWN, owner("root", "", self.root))

    def test_who_does_not_exist_is_a_wrong_configuration(self) -> None:
        self.configure('user = "no-such-user"')
        for arguments in (("", ""), ("nobody-of-this-name", ""), ("nobody", "no-such-group")):
            self.assertRaises(exception.ConfigurationError, owner, *arguments, self.root)
