# SPDX-License-Identifier: Apache-2.0
"""What security modules have to say, in files as hosts have them."""

import os
from pathlib import Path
from unittest import mock

from nova_dmigrate.host.confinement import obstacle
from tests.base import TestCase

SOCKETS = Path("/run/nova-dmigrate")
RULE = "etc/apparmor.d/local/abstractions/libvirt-qemu"


class ConfinementTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.root = self.make_directory()

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def test_a_kernel_without_such_modules(self) -> None:
        self.assertEqual("", obstacle(SOCKETS, self.root))

    def test_apparmor_without_a_rule(self) -> None:
        self.write("sys/module/apparmor/parameters/enabled", "Y\n")
        for rule in (
            f"# {SOCKETS}/** rw,",
            f"deny {SOCKETS}/** rw,",
            f"{SOCKETS}-old/** rw,",
            f"{SOCKETS}/** r,",
            "/run/*/ rw,",
        ):
            with self.subTest(rule):
                self.write(RULE, f"  {rule}\n")
                self.assertIn(RULE, obstacle(SOCKETS, self.root))

    def test_apparmor_without_profiles_of_libvirt(self) -> None:
        self.write("sys/module/apparmor/parameters/enabled", "Y\n")
        self.assertEqual("", obstacle(SOCKETS, self.root))

    def test_apparmor_with_a_rule(self) -> None:
        self.write("sys/module/apparmor/parameters/enabled", "Y\n")
        for name in (RULE, "etc/apparmor.d/abstractions/libvirt-qemu.d/dmigrate"):
            with self.subTest(name):
                for rule in (f"{SOCKETS}/** rw", "/{,var/}run/nova-dmigrate/** rwk", "/run/** rw"):
                    self.write(name, f"  /dev/null rw,\n  {rule},\n")
                    self.assertEqual("", obstacle(SOCKETS, self.root), rule)
                (self.root / name).unlink()

    def test_apparmor_that_is_switched_off(self) -> None:
        self.write("sys/module/apparmor/parameters/enabled", "N\n")
        self.assertEqual("", obstacle(SOCKETS, self.root))

    def test_guests_that_libvirt_does_not_confine(self) -> None:
        self.write("sys/module/apparmor/parameters/enabled", "Y\n")
        self.write(RULE, "/dev/null rw,\n")
        for line, free in (
            ('security_driver = "none"', True),
            ('security_driver = [ "none" ]', True),
            ('#security_driver = "none"', False),
            ('security_driver = [ "selinux", "apparmor" ]', False),
        ):
            with self.subTest(line):
                self.write("etc/libvirt/qemu.conf", f'user = "root"\n{line}\n')
                self.assertEqual(free, obstacle(SOCKETS, self.root) == "")

    def test_selinux(self) -> None:
        for enforce, label, free in (
            ("1", b"system_u:object_r:var_run_t:s0\0", False),
            ("1", b"system_u:object_r:qemu_var_run_t:s0\0", True),
            ("0", b"system_u:object_r:var_run_t:s0\0", True),
        ):
            with self.subTest(enforce=enforce, label=label):
                self.write("sys/fs/selinux/enforce", enforce)
                # No kernel here keeps such a label
                with mock.patch.object(os, "getxattr", return_value=label):
                    found = obstacle(SOCKETS, self.root)
                self.assertEqual(free, found == "")
